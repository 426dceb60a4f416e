"""Colab, played: a clean folder, an environment with torch but without the kit, a Drive that outlives the session.

Nothing here needs the network or root: the kit is cloned from a local repository, and Drive is a folder.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
import torch

import frlkit
from frlkit import checkpoint, origin, runs
from frlkit.report import claims

NOTEBOOKS = sorted((frlkit.PROJECT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
DISPARITY = NOTEBOOKS[0]
SMOKE = frlkit.PROJECT / "notebooks" / "profiles" / "smoke.yaml"
#: A locale whose text files are not UTF-8: a CP1252 one is rarely installed; ASCII refuses even more.
NOT_UTF8 = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
COLAB = {"DRIVE": True, "RUNS": "", "FIGURES": ""}  # runs on Drive, figures in the session's clone
MARK = 12345.0  # seconds: what the interrupted run's first epoch is made to say it took

# What Colab has and this machine lacks: google.colab, whose mount shows a folder that is kept elsewhere.
DRIVE = """
import os
from importlib.metadata import version
from pathlib import Path


def mount(mountpoint):
    Path(mountpoint).mkdir(parents=True, exist_ok=True)
    place = Path(mountpoint) / "MyDrive"
    if not place.exists():
        place.symlink_to(os.environ["PLAYED_DRIVE"], target_is_directory=True)
"""
# Takes pip's place and installs nothing: writes down what it was asked for.
PIP = """
import json, os, sys

with open(os.environ["PLAYED_PIP"], "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
sys.exit(os.environ.get("PLAYED_PIP_FAILS", 0))
"""
# Hides packages, as if they were not installed, from whoever imports them or asks for their version.
HIDE = """
import os, sys
from importlib.machinery import PathFinder
from importlib.metadata import DistributionFinder

hidden = os.environ.get("PLAYED_MISSING", "").split(",")


class Visible(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in hidden else PathFinder.find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, context=DistributionFinder.Context()):
        return iter(()) if context.name in hidden else PathFinder.find_distributions(context)


sys.meta_path[sys.meta_path.index(PathFinder)] = Visible
"""
# Keeps a session as it is when this file has come to be, until it is killed.
STOP = """
import os, time

replace, place = os.replace, os.environ.get("PLAYED_STOP")


def stop(source, target, **named):
    replace(source, target, **named)
    if place and os.path.realpath(target) == place:
        time.sleep(3600)


os.replace = stop
"""


@dataclass(frozen=True)
class Colab:
    """An environment like Colab's, and the repository that its set-up cells clone."""

    python: Path
    repository: Path
    torch_files: dict[str, tuple[int, int]]  # as they were

    def variables(self, folder: Path, drive: Path) -> dict[str, str]:
        """The environment variables of a session in `folder`: none of the test's own, and no network."""
        dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "FRLKIT_DATA", "JUPYTER_PATH", "JPY_SESSION_NAME")
        return {
            **{name: value for name, value in os.environ.items() if name not in dropped},
            **{f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "all")},
            "OMP_NUM_THREADS": "1",
            "JUPYTER_PLATFORM_DIRS": "1",
            "JUPYTER_DATA_DIR": str(folder / "jupyter"),
            "IPYTHONDIR": str(folder / "ipython"),
            "FRLKIT_REPOSITORY": self.repository.as_uri(),
            "FRLKIT_DRIVE": str(folder / "drive"),
            "PLAYED_DRIVE": str(drive),
            "PLAYED_PIP": str(folder / "pip.log"),
        }


@dataclass
class Session:
    """One Colab session running one notebook; `folder` is its disk, which does not outlive it."""

    colab: Colab
    folder: Path
    drive: Path
    source: Path
    process: subprocess.Popen[str]

    @property
    def executed(self) -> Path:
        return self.folder / "executed.ipynb"

    def finish(self) -> list[Any]:
        """Wait for the notebook's end and return its cells, after checking that all of them ran as committed."""
        errors = self.process.communicate(timeout=1800)[1]
        assert self.process.returncode == 0, errors[-3000:]
        cells = [cell for cell in nbformat.read(self.executed, as_version=4).cells if cell.cell_type == "code"]
        own = [cell for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]
        committed = [cell for cell in nbformat.read(self.source, as_version=4).cells if cell.cell_type == "code"]
        assert len(cells) == len(own) + 1
        assert [cell.source for cell in own] == [cell.source for cell in committed]
        assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
        assert claims.from_notebook(cells)[0]["claims"]
        assert f"torch {version('torch')}" in cells[1].outputs[0].text
        clone = self.folder / "frlkit-kit"
        assert list((clone / "figures").glob(f"{self.source.name[:2]}_*_digits.png"))  # the clone's kit did the work
        here, there = (finished_runs(place / "checkpoints" / "digits") for place in (clone, self.drive / "frlkit"))
        assert list(here) == list(there) != []  # and Drive has all its runs
        assert not (self.folder / "pip.log").exists()  # pip was not asked for anything
        assert torch_files() == self.colab.torch_files
        return cells

    def kernel(self) -> psutil.Process:
        """The kernel's process."""
        (kernel,) = [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if any("ipykernel" in word for word in child.cmdline())
        ]
        return kernel

    def kill_kernel_when(self, file: Path) -> None:
        """SIGKILL to the kernel as soon as `file` exists."""
        deadline = time.monotonic() + 1200
        while not file.exists():
            assert self.process.poll() is None, self.process.communicate()[1][-3000:]
            assert time.monotonic() < deadline, f"{file} did not appear"
            time.sleep(0.05)
        self.kernel().send_signal(signal.SIGKILL)
        self.process.communicate(timeout=300)
        assert self.process.returncode != 0


@dataclass
class Machines:
    """Starts sessions, and takes their processes with them when the test ends."""

    colab: Colab
    started: list[Session]

    def open(self, source: Path, folder: Path, drive: Path, epochs: int = 2, **variables: str) -> Session:
        """A session that runs a notebook in `folder`, with everything of its own fetched anew unless it is there."""
        for place in (folder, drive):
            place.mkdir(parents=True, exist_ok=True)
        words = [self.colab.python, "-m", "papermill", source, folder / "executed.ipynb", "--no-progress-bar"]
        values = json.dumps({**COLAB, "EPOCHS": epochs})
        process = subprocess.Popen(
            [*map(str, words), "-k", "python3", "-f", str(SMOKE), "-y", values],
            cwd=folder,
            env={**self.colab.variables(folder, drive), **variables},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        session = Session(self.colab, folder, drive, source, process)
        self.started.append(session)
        return session

    def close(self) -> None:
        for session in self.started:
            if session.process.poll() is None:
                for process in [*psutil.Process(session.process.pid).children(recursive=True), session.process]:
                    process.kill()
            session.process.wait()
            session.process.stderr.close()


def torch_files() -> dict[str, tuple[int, int]]:
    """Every installed file of torch and torchvision with size and time of modification, but for compiled Python."""
    site = Path(torch.__file__).parents[1]
    folders = [
        folder for name in ("torch", "torchvision") for folder in (site / name, *site.glob(f"{name}-*.dist-info"))
    ]
    files = [file for folder in folders for file in folder.rglob("*") if "__pycache__" not in file.parts]
    stats = {str(file): file.stat() for file in files if file.is_file()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def git(*words: str | Path) -> None:
    identity = ("-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *identity, *map(str, words)], check=True, capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def colab(tmp_path_factory: pytest.TempPathFactory) -> Colab:
    """A fresh environment that sees this one's packages through a path line, but not the kit, and a bare repository.

    A path line does not process the .pth files of the folder it names, so a kit installed with --editable is not seen.
    """
    place = tmp_path_factory.mktemp("colab")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "env"], check=True, timeout=120)
    python = place / "env" / "bin" / "python"
    (site,) = (place / "env" / "lib").glob("python*/site-packages")
    packages = dict.fromkeys([*map(sysconfig.get_path, ("purelib", "platlib")), str(Path(torch.__file__).parents[1])])
    (site / "packages.pth").write_text("\n".join(packages) + "\n", encoding="utf-8")
    for name, text in {
        "google/colab/__init__": "",
        "google/colab/drive": DRIVE,
        "pip/__init__": "",
        "pip/__main__": PIP,
    }.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / f"{name}.py").write_text(text, encoding="utf-8")
    for name, text in {"played_missing": HIDE, "played_stop": STOP}.items():
        (site / f"{name}.py").write_text(text, encoding="utf-8")
        (site / f"{name}.pth").write_text(f"import {name}\n", encoding="utf-8")

    # It holds the working tree as it is, committed or not, but for shipped runs and figures.
    repository = place / "kit.git"
    tree = ("--git-dir", repository, "--work-tree", frlkit.PROJECT)
    git("init", "--quiet", "--bare", repository)
    git(*tree, "add", "--all", "--", frlkit.PROJECT, ":!checkpoints", ":!figures")
    git(*tree, "commit", "--quiet", "--no-verify", "--message", "the working tree")
    git("--git-dir", repository, "tag", f"v{frlkit.__version__}")
    return Colab(python, repository, torch_files())


@pytest.fixture
def machines(colab: Colab) -> Any:
    machines = Machines(colab, [])
    yield machines
    machines.close()


def run_python(colab: Colab, source: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**colab.variables(folder, folder / "kept"), **variables}
    return subprocess.run(
        [colab.python, "-c", source], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


def setup_cell() -> str:
    return next(cell for cell in nbformat.read(DISPARITY, as_version=4).cells if cell.cell_type == "code").source


def finished_runs(place: Path) -> dict[str, Path]:
    """RECIPE/seedN -> folder, of the finished runs of one data set."""
    return {str(file.parent.relative_to(place)): file.parent for file in sorted(place.rglob(runs.WEIGHTS))}


def epochs(folder: Path) -> list[dict[str, Any]]:
    """A finished run's history, without the times."""
    entries = json.loads((folder / "history.json").read_text(encoding="utf-8"))["epochs"]
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


def test_environment_has_torch_but_not_the_kit(colab: Colab, tmp_path: Path) -> None:
    done = run_python(colab, "import torch; print(torch.__version__, torch.__file__)", tmp_path)
    assert done.stdout.split() == [torch.__version__, torch.__file__]
    done = run_python(colab, "import frlkit", tmp_path)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'frlkit'"


WHERE = "\nimport importlib.util\nprint(importlib.util.find_spec('frlkit').origin)"


def kit_found(done: subprocess.CompletedProcess[str]) -> Path:
    """The kit that a set-up cell with `WHERE` behind it found, by the folder of its checkout."""
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1]).parents[1]


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """What a set-up cell that gave up said."""
    assert done.returncode == 1
    kind, _, said = done.stderr.splitlines()[-1].partition(": ")
    assert kind in ("SetUpError", "__main__.SetUpError", "frlkit.KitError")  # Python 3.13 leaves __main__ out
    return said


@pytest.mark.parametrize("missing", ["", "seaborn", "scikit-learn,click"])
def test_setup_fetches_the_kit_and_asks_pip_only_for_what_is_missing(
    colab: Colab, tmp_path: Path, missing: str
) -> None:
    done = run_python(colab, setup_cell() + WHERE, tmp_path, PLAYED_MISSING=missing, **NOT_UTF8)
    assert kit_found(done) == tmp_path.resolve() / "frlkit-kit"
    log = tmp_path / "pip.log"
    asked = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.exists() else []
    wanted = {"": [], "seaborn": ["seaborn>=0.13"], "scikit-learn,click": ["scikit-learn>=1.3", "click>=8.1"]}[missing]
    assert asked == ([["install", "--quiet", "--no-input", *wanted]] if wanted else [])
    assert torch_files() == colab.torch_files
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "pip.log") == ["frlkit-kit"]
    again = run_python(colab, setup_cell() + WHERE, tmp_path, FRLKIT_REPOSITORY="file:///nowhere")
    assert kit_found(again) == tmp_path.resolve() / "frlkit-kit"  # what is there is not fetched again


class TestAFolderOfThatName:
    """`frlkit/` in the working directory is an empty package to Python, whatever it is."""

    def test_a_clone_is_used(self, colab: Colab, tmp_path: Path) -> None:
        git("clone", "--quiet", "--depth", "1", colab.repository.as_uri(), tmp_path / "frlkit")
        done = run_python(colab, setup_cell() + WHERE, tmp_path, FRLKIT_REPOSITORY="file:///nowhere")
        assert kit_found(done) == tmp_path.resolve() / "frlkit"

    def test_another_folder_is_not(self, colab: Colab, tmp_path: Path) -> None:
        (tmp_path / "frlkit" / "frlkit").mkdir(parents=True)
        assert kit_found(run_python(colab, setup_cell() + WHERE, tmp_path)) == tmp_path.resolve() / "frlkit-kit"

    def test_nor_is_one_that_was_imported_before(self, colab: Colab, tmp_path: Path) -> None:
        (tmp_path / "frlkit").mkdir()
        done = run_python(colab, "import frlkit\n" + setup_cell() + WHERE, tmp_path)
        assert kit_found(done) == tmp_path.resolve() / "frlkit-kit"


class TestPinned:
    def later(self, colab: Colab, tmp_path: Path) -> Path:
        """A repository that has gone on to another version since the notebook's."""
        place = tmp_path / "later"
        git("clone", "--quiet", colab.repository.as_uri(), place)
        file = place / "frlkit" / "__init__.py"
        text = file.read_text(encoding="utf-8")
        file.write_text(
            text.replace(f'__version__ = "{frlkit.__version__}"', '__version__ = "9.9.9"'), encoding="utf-8"
        )
        git("-C", place, "commit", "--quiet", "--all", "--no-verify", "--message", "later")
        return place

    def test_to_the_notebooks_own_version(self, colab: Colab, tmp_path: Path) -> None:
        repository = self.later(colab, tmp_path).as_uri()
        done = run_python(colab, setup_cell() + WHERE, tmp_path / "session", FRLKIT_REPOSITORY=repository)
        init = (kit_found(done) / "frlkit" / "__init__.py").read_text(encoding="utf-8")
        assert f'__version__ = "{frlkit.__version__}"' in init

    def test_another_version_is_refused(self, colab: Colab, tmp_path: Path) -> None:
        """A fork need not have the tags: its branch will do, if it is of the notebook's version."""
        later = self.later(colab, tmp_path)
        git("-C", later, "tag", "--delete", f"v{frlkit.__version__}")
        done = run_python(colab, setup_cell(), tmp_path / "session", FRLKIT_REPOSITORY=later.as_uri())
        assert f"belongs to frlkit {frlkit.__version__}" in sentence(done)
        git("-C", later, "reset", "--quiet", "--hard", "HEAD~1")
        done = run_python(colab, setup_cell() + WHERE, tmp_path / "new", FRLKIT_REPOSITORY=later.as_uri())
        assert kit_found(done) == (tmp_path / "new" / "frlkit-kit").resolve()


class _Locked(BaseHTTPRequestHandler):
    """Asks everyone for a password, as GitHub does for a repository that is private or missing."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Basic realm="kit"')
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def locked() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Locked)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/kit.git"
    server.shutdown()
    thread.join()
    server.server_close()


class TestOneSentence:
    @pytest.mark.parametrize("address", ["file:///nowhere/kit.git", "https://github.invalid/frlkit/frlkit"])
    def test_no_repository_and_no_network(self, colab: Colab, tmp_path: Path, address: str) -> None:
        said = sentence(run_python(colab, setup_cell(), tmp_path, FRLKIT_REPOSITORY=address))
        assert said.startswith(f"the kit could not be fetched from {address} (fatal: ")
        assert said.endswith(
            f"or put a clone of the kit into {tmp_path.resolve() / 'frlkit-kit'}, and run this cell again"
        )
        assert list(tmp_path.iterdir()) == []

    def test_no_prompt_that_waits(self, colab: Colab, tmp_path: Path, locked: str) -> None:
        done = run_python(colab, setup_cell(), tmp_path, FRLKIT_REPOSITORY=locked, no_proxy="127.0.0.1", http_proxy="")
        assert f"the kit could not be fetched from {locked}" in sentence(done)

    def test_no_git(self, colab: Colab, tmp_path: Path) -> None:
        said = sentence(run_python(colab, setup_cell(), tmp_path, PATH=str(tmp_path)))
        assert said.startswith("the kit could not be fetched from ")
        assert "'git'" in said

    def test_a_half_made_clone(self, colab: Colab, tmp_path: Path) -> None:
        (tmp_path / "frlkit-kit" / ".git").mkdir(parents=True)
        said = sentence(run_python(colab, setup_cell(), tmp_path))
        assert said.startswith(
            f"{tmp_path.resolve() / 'frlkit-kit'} holds no whole copy of the kit: delete or rename it"
        )

    def test_pip_fails(self, colab: Colab, tmp_path: Path) -> None:
        done = run_python(colab, setup_cell(), tmp_path, PLAYED_MISSING="seaborn", PLAYED_PIP_FAILS="no network")
        assert done.stdout == "installing seaborn>=0.13\n"
        assert sentence(done) == "seaborn>=0.13 could not be installed (no network): install them, and run this again"

    def test_no_torch(self, colab: Colab, tmp_path: Path) -> None:
        done = run_python(colab, setup_cell(), tmp_path, PLAYED_MISSING="torch,seaborn")
        assert sentence(done).startswith("torch>=2.6 must be there first: install")
        assert not (tmp_path / "pip.log").exists()

    def test_papermill_shows_it_without_a_traceback(self, colab: Colab, tmp_path: Path) -> None:
        content = nbformat.read(DISPARITY, as_version=4)
        content.cells = [next(cell for cell in content.cells if cell.cell_type == "code")]
        nbformat.write(content, tmp_path / "setup.ipynb")
        words = [colab.python, "-m", "papermill", "setup.ipynb", "out.ipynb", "-k", "python3", "--no-progress-bar"]
        variables = {**colab.variables(tmp_path, tmp_path / "kept"), "FRLKIT_REPOSITORY": "file:///nowhere"}
        done = subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode != 0
        (output,) = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells[-1].outputs
        (line,) = output.traceback
        assert line.startswith("SetUpError: the kit could not be fetched from file:///nowhere (fatal: ")


def test_a_lost_session_goes_on_in_a_new_one(machines: Machines, tmp_path: Path) -> None:
    """Killed after an epoch, its disk lost: the next session goes on from Drive and ends at the same weights."""
    source, interrupted = DISPARITY, "pgd_at_half/seed0"
    straight, broken = tmp_path / "drive_straight", tmp_path / "drive_broken"
    machines.open(source, tmp_path / "straight", straight).finish()
    expected = finished_runs(straight / "frlkit" / "checkpoints" / "digits")
    assert list(expected) == ["natural/seed0", interrupted]

    kept = broken / "frlkit" / "checkpoints" / "digits"
    run = kept / interrupted
    stop = str(run.resolve() / "checkpoint.pt")  # or the next epoch might come before the kill
    session = machines.open(source, tmp_path / "lost", broken, PLAYED_STOP=stop)
    session.kill_kernel_when(run / "checkpoint.pt")
    assert not (run / runs.WEIGHTS).exists()
    shutil.rmtree(session.folder)
    state = checkpoint.read(run / "checkpoint.pt")
    assert state["epoch"] == len(state["history"]) == 1
    state["history"][0]["seconds"] = MARK  # a run that began again would not say so at its end
    checkpoint.save(run / "checkpoint.pt", state)
    earlier = {file: file.stat().st_mtime_ns for file in broken.rglob(runs.WEIGHTS)}
    assert earlier

    machines.open(source, tmp_path / "new", broken).finish()
    assert {file: file.stat().st_mtime_ns for file in earlier} == earlier  # what was finished is not trained again
    seconds = [entry["seconds"] for entry in json.loads((run / "history.json").read_text(encoding="utf-8"))["epochs"]]
    assert seconds[0] == MARK
    assert len(seconds) == 2
    found = finished_runs(kept)
    assert list(found) == list(expected)
    for name, folder in found.items():
        ours, theirs = (runs.read_weights(place / runs.WEIGHTS) for place in (folder, expected[name]))
        assert checkpoint.digest(dict(ours[0].state_dict())) == checkpoint.digest(dict(theirs[0].state_dict())), name
        assert ours[1] == theirs[1]
        assert epochs(folder) == epochs(expected[name])
        assert (folder / "record.json").read_bytes() == (expected[name] / "record.json").read_bytes()


class TestAddress:
    def copy(self, place: Path) -> Path:
        """Every text of the project that could name its repository."""
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=frlkit.PROJECT,
            capture_output=True,
            encoding="utf-8",
        )
        if listed.returncode:
            pytest.skip("needs a git checkout: it lists the project's files")
        for name in listed.stdout.splitlines():
            binary = name.startswith("checkpoints/") and not name.endswith(".md") or name.endswith(".png")
            if not binary and (frlkit.PROJECT / name).is_file():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(frlkit.PROJECT / name, place / name)
        return place

    def naming(self, project: Path, slug: str) -> dict[str, int]:
        texts = {path: path.read_text(encoding="utf-8") for path in project.rglob("*") if path.is_file()}
        found = {str(path.relative_to(project)): text.count(f"/{slug}") for path, text in texts.items()}
        return {name: count for name, count in found.items() if count and not name.startswith("tests/")}

    def test_one_command_rewrites_it_everywhere(self, tmp_path: Path) -> None:
        project, own = self.copy(tmp_path), frlkit.REPOSITORY.removeprefix("https://github.com/")
        before = self.naming(project, own)
        changed = origin.address("https://github.com/someone/their-frlkit.git", project)
        assert self.naming(project, own) == {}
        assert self.naming(project, "someone/their-frlkit") == before
        assert changed == sorted(before)
        assert {"README.md", "CITATION.cff", "pyproject.toml", "frlkit/__init__.py"} <= before.keys()
        assert origin.address("https://github.com/someone/their-frlkit", project) == []
        assert origin.address(f"{frlkit.REPOSITORY}/", project) == changed
        for name in before:
            assert (project / name).read_bytes() == (frlkit.PROJECT / name).read_bytes()

    def test_a_longer_name_is_another_repository(self, tmp_path: Path) -> None:
        (tmp_path / "frlkit").mkdir()
        (tmp_path / "frlkit" / "__init__.py").write_text('REPOSITORY = "https://github.com/a/b"\n', encoding="utf-8")
        (tmp_path / "README.md").write_text("https://github.com/a/b, https://github.com/a/b-c.\n", encoding="utf-8")
        assert origin.address("https://github.com/x/y", tmp_path) == ["README.md", "frlkit/__init__.py"]
        text = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert text == "https://github.com/x/y, https://github.com/a/b-c.\n"

    @pytest.mark.parametrize(
        "url", ["", "someone/kit", "https://gitlab.com/a/b", "https://github.com/a", "git@github.com:a/b"]
    )
    def test_what_is_no_address_is_refused(self, url: str, tmp_path: Path) -> None:
        with pytest.raises(frlkit.KitError, match="use https://github.com/OWNER/NAME"):
            origin.address(url, tmp_path)

    def test_a_folder_without_the_kit_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(frlkit.KitError, match="is no clone of the kit"):
            origin.address("https://github.com/a/b", tmp_path)

    def test_make_needs_no_packages(self, tmp_path: Path) -> None:
        project = self.copy(tmp_path)
        make = ["make", "--no-print-directory", "address", f"PYTHON={sys.executable} -S"]
        for url, code, said in (("nonsense", 2, "OWNER/NAME"), ("https://github.com/a/b", 0, "README.md\n")):
            words, variables = [*make, f"URL={url}"], {**os.environ, **NOT_UTF8}
            done = subprocess.run(words, cwd=project, env=variables, capture_output=True, text=True, timeout=60)
            assert done.returncode == code
            assert said in done.stdout + done.stderr
            assert "Traceback" not in done.stderr

    def test_code_names_it_once(self) -> None:
        code = [
            path
            for pattern in ("frlkit/**/*.py", "benchmarks/*.py", "Makefile")
            for path in frlkit.PROJECT.glob(pattern)
        ]
        named = [str(path.relative_to(frlkit.PROJECT)) for path in code if frlkit.REPOSITORY in path.read_text("utf-8")]
        assert named == ["frlkit/__init__.py"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_has_the_cell_and_both_badges(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    first = next(cell for cell in cells if cell.cell_type == "code")
    assert first.source == setup_cell()
    assert first.source.splitlines()[1].startswith(f'REPOSITORY = "{frlkit.REPOSITORY}"  # ')
    assert f'\nVERSION = "{frlkit.__version__}"  # ' in first.source
    slug = frlkit.REPOSITORY.removeprefix("https://github.com/")
    page = f"{frlkit.REPOSITORY}/blob/main/notebooks/{path.name}"
    assert f"(https://colab.research.google.com/github/{slug}/blob/main/notebooks/{path.name})" in cells[0].source
    assert f"(https://kaggle.com/kernels/welcome?src={page})" in cells[0].source
    readme = (frlkit.PROJECT / "README.md").read_text(encoding="utf-8")
    for line in cells[0].source.splitlines():
        assert line[line.index("](") :] in readme  # README has the same badges


class TestRequirements:
    def test_are_what_the_package_declares(self) -> None:
        text = (frlkit.PROJECT / "pyproject.toml").read_text(encoding="utf-8")
        (project,) = [block for block in text.split("\n[") if block.startswith("project]")]
        listed = re.findall(r'^    "(.*?)",', project.partition("dependencies = [")[2], re.MULTILINE)
        assert origin.requirements() == listed
        assert all(re.fullmatch(r"[a-z-]+>=[\d.]+", each) for each in listed)  # no more is compared

    @pytest.mark.parametrize(
        ("found", "met"), [("3.21.0", True), ("3.21", True), ("4.0.0a1", True), ("3.100", True), ("3.20.9", False)]
    )
    def test_versions_are_compared_as_numbers(self, found: str, met: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(origin, "version", {"filelock": found}.__getitem__)
        assert origin._met("filelock>=3.21") is met

    def test_an_installed_kit_has_been_seen_to_by_pip(self, tmp_path: Path) -> None:
        assert origin.requirements(tmp_path) == []

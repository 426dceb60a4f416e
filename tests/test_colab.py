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
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
import torch

import frlkit
from frlkit import checkpoint
from frlkit.report import claims

DISPARITY = next((frlkit.PROJECT / "notebooks").glob("01_*.ipynb"))
SMOKE = frlkit.PROJECT / "notebooks" / "profiles" / "smoke.yaml"
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
"""
# Hides packages, as if they were not installed.
HIDE = """
import os, sys
from importlib.machinery import PathFinder

hidden = os.environ.get("PLAYED_MISSING", "").split(",")


class Visible(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name in hidden else PathFinder.find_spec(name, path, target)


sys.meta_path[sys.meta_path.index(PathFinder)] = Visible
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
            time.sleep(0.002)
        self.kernel().send_signal(signal.SIGKILL)
        self.process.communicate(timeout=300)
        assert self.process.returncode != 0


@dataclass
class Machines:
    """Starts sessions, and takes their processes with them when the test ends."""

    colab: Colab
    started: list[Session]

    def open(self, source: Path, folder: Path, drive: Path, epochs: int = 2) -> Session:
        """A session that runs a notebook in `folder`, with everything of its own fetched anew unless it is there."""
        for place in (folder, drive):
            place.mkdir(parents=True, exist_ok=True)
        words = [self.colab.python, "-m", "papermill", source, folder / "executed.ipynb", "--no-progress-bar"]
        values = json.dumps({**COLAB, "EPOCHS": epochs})
        process = subprocess.Popen(
            [*map(str, words), "-k", "python3", "-f", str(SMOKE), "-y", values],
            cwd=folder,
            env=self.colab.variables(folder, drive),
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
    (site / "packages.pth").write_text("\n".join(packages) + "\n")
    for name, text in {
        "google/colab/__init__": "",
        "google/colab/drive": DRIVE,
        "pip/__init__": "",
        "pip/__main__": PIP,
    }.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / f"{name}.py").write_text(text)
    (site / "played_missing.py").write_text(HIDE)
    (site / "played_missing.pth").write_text("import played_missing\n")

    repository = place / "kit.git"  # holds the working tree as it is, committed or not
    tree = ("--git-dir", repository, "--work-tree", frlkit.PROJECT)
    git("init", "--quiet", "--bare", repository)
    git(*tree, "add", "--all")
    git(*tree, "commit", "--quiet", "--no-verify", "--message", "the working tree")
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


def finished_runs(runs: Path) -> dict[str, Path]:
    """RECIPE/seedN -> folder, of the finished runs of one data set."""
    return {str(file.parent.relative_to(runs)): file.parent for file in sorted(runs.rglob("weights.pt"))}


def epochs(folder: Path) -> list[dict[str, Any]]:
    """A finished run's history, without the times."""
    entries = json.loads((folder / "history.json").read_text())["epochs"]
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


def test_environment_has_torch_but_not_the_kit(colab: Colab, tmp_path: Path) -> None:
    done = run_python(colab, "import torch; print(torch.__version__, torch.__file__)", tmp_path)
    assert done.stdout.split() == [torch.__version__, torch.__file__]
    done = run_python(colab, "import frlkit", tmp_path)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'frlkit'"


@pytest.mark.parametrize("missing", ["", "seaborn", "sklearn,click"])
def test_setup_fetches_the_kit_and_asks_pip_only_for_what_is_missing(
    colab: Colab, tmp_path: Path, missing: str
) -> None:
    source = setup_cell() + "\nimport importlib.util\nprint(importlib.util.find_spec('frlkit').origin)"
    done = run_python(colab, source, tmp_path, PLAYED_MISSING=missing)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path.resolve() / "frlkit-kit" / "frlkit" / "__init__.py"
    log = tmp_path / "pip.log"
    asked = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    wanted = {"": [], "seaborn": ["seaborn"], "sklearn,click": ["click", "scikit-learn"]}[missing]
    assert asked == ([["install", "--quiet", *wanted]] if wanted else [])
    assert torch_files() == colab.torch_files


def test_a_lost_session_goes_on_in_a_new_one(machines: Machines, tmp_path: Path) -> None:
    """Killed after an epoch, its disk lost: the next session goes on from Drive and ends at the same weights."""
    source, interrupted = DISPARITY, "pgd_at_half/seed0"
    straight, broken = tmp_path / "drive_straight", tmp_path / "drive_broken"
    machines.open(source, tmp_path / "straight", straight).finish()
    expected = finished_runs(straight / "frlkit" / "checkpoints" / "digits")
    assert list(expected) == ["natural/seed0", interrupted]

    session = machines.open(source, tmp_path / "lost", broken)
    kept = broken / "frlkit" / "checkpoints" / "digits"
    run = kept / interrupted
    session.kill_kernel_when(run / "checkpoint.pt")
    assert not (run / "weights.pt").exists()
    shutil.rmtree(session.folder)
    state = checkpoint.read(run / "checkpoint.pt")
    assert state["epoch"] == len(state["history"]) == 1
    state["history"][0]["seconds"] = MARK  # a run that began again would not say so at its end
    checkpoint.save(run / "checkpoint.pt", state)
    earlier = {file: file.stat().st_mtime_ns for file in broken.rglob("weights.pt")}
    assert earlier

    machines.open(source, tmp_path / "new", broken).finish()
    assert {file: file.stat().st_mtime_ns for file in earlier} == earlier  # what was finished is not trained again
    seconds = [entry["seconds"] for entry in json.loads((run / "history.json").read_text())["epochs"]]
    assert seconds[0] == MARK
    assert len(seconds) == 2
    found = finished_runs(kept)
    assert list(found) == list(expected)
    for name, folder in found.items():
        ours, theirs = (checkpoint.read(place / "weights.pt") for place in (folder, expected[name]))
        assert checkpoint.digest(ours) == checkpoint.digest(theirs), name
        assert epochs(folder) == epochs(expected[name])
        assert (folder / "record.json").read_bytes() == (expected[name] / "record.json").read_bytes()


def test_the_repository_is_named_once_in_the_code() -> None:
    """Only `frlkit.REPOSITORY` says where the kit lives; README's badges agree with it."""
    code = [
        file
        for pattern in ("frlkit/**/*.py", "benchmarks/*.py", "*.toml", "Makefile", ".ci/*")
        for file in frlkit.PROJECT.glob(pattern)
    ]
    address = re.compile(r"https?://(?:www\.)?git(?:hub|lab)\.com/\S*frlkit[^\s\"']*")
    named = [
        (str(file.relative_to(frlkit.PROJECT)), found) for file in code for found in address.findall(file.read_text())
    ]
    assert named == [("frlkit/__init__.py", frlkit.REPOSITORY)]
    readme = (frlkit.PROJECT / "README.md").read_text()
    badges = re.findall(r"https://colab\.research\.google\.com/github/(\S+?)/blob/main/([^)\s]+)", readme)
    slug = frlkit.REPOSITORY.removeprefix("https://github.com/")
    notebooks = sorted((frlkit.PROJECT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    assert badges == [(slug, f"notebooks/{path.name}") for path in notebooks]

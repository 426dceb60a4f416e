"""What pip makes of the kit: a whole wheel, a light install, a command, whatever folder stands in the way."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email.message import Message
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import frlkit
from frlkit import PROJECT

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOR_NOTEBOOKS = (
    "jupyter",
    "jupyterlab",
    "notebook",
    "papermill",
    "nbval",
    "nbconvert",
    "nbformat",
    "IPython",
    "ipykernel",
)

#: A locale whose text files are not UTF-8: a CP1252 one is rarely installed; ASCII refuses even more.
NOT_UTF8 = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def plain_environment(**more: str) -> dict[str, str]:
    """The test's own variables without those that lead Python to this checkout."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def run(*words: str | Path, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env=plain_environment(**more), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def copy_of_the_source(place: Path) -> Path:
    """What a build needs, in a folder of its own: a build leaves its own folders beside pyproject.toml."""
    shutil.copytree(PROJECT / "frlkit", place / "frlkit", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(PROJECT / name, place)
    return place


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    source = copy_of_the_source(place)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", place / "built", source, cwd=place, **NOT_UTF8)
    (built,) = (place / "built").iterdir()
    return built


def environment(place: Path) -> Path:
    """A fresh environment that sees this one's packages, but not the kit; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True, timeout=120)
    (site,) = (place / "lib").glob("python*/site-packages")
    packages = dict.fromkeys([*map(sysconfig.get_path, ("purelib", "platlib")), str(Path(torch.__file__).parents[1])])
    (site / "packages.pth").write_text("\n".join(packages) + "\n", encoding="utf-8")
    return place / "bin" / "python"


def install(python: Path, *what: str | Path) -> None:
    """Without the network, without dependencies, by this environment's pip."""
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-build-isolation")
    run(*pip, "--force-reinstall", *what, cwd=python.parent)


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode("utf-8"))


class TestWheel:
    def test_holds_every_module_and_what_they_read(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            found = {name for name in archive.namelist() if name.startswith("frlkit/")}
        package = [path for path in (PROJECT / "frlkit").rglob("*") if "__pycache__" not in path.parts]
        wanted = [path for path in package if path.suffix in (".py", ".cpp", ".j2", ".yaml") or path.name == "py.typed"]
        assert found == {path.relative_to(PROJECT).as_posix() for path in wanted}
        assert {"frlkit/py.typed", "frlkit/kernels/lenet5.cpp"} <= found

    def test_says_whose_it_is_and_where(self, wheel: Path) -> None:
        about = metadata(wheel)
        assert (about["Name"], about["Version"]) == ("frlkit", frlkit.__version__)
        assert (about["Author"], about["License-Expression"]) == ("frlkit contributors", "MIT")
        assert about["Requires-Python"] == ">=3.10"
        assert about["Description-Content-Type"] == "text/markdown"
        assert about.get_payload() == (PROJECT / "README.md").read_text(encoding="utf-8")
        links = dict(link.split(", ") for link in about.get_all("Project-URL"))
        assert links["Homepage"] == frlkit.REPOSITORY
        assert "Typing :: Typed" in about.get_all("Classifier")
        with zipfile.ZipFile(wheel) as archive:
            (licence,) = (name for name in archive.namelist() if name.endswith("LICENSE"))
            assert archive.read(licence) == (PROJECT / "LICENSE").read_bytes()

    def test_its_base_is_light(self, wheel: Path) -> None:
        needed = [Requirement(text) for text in metadata(wheel).get_all("Requires-Dist")]
        base = {need.name.lower() for need in needed if need.marker is None}
        assert base.isdisjoint(name.lower() for name in FOR_NOTEBOOKS)
        assert {"torch", "torchvision", "numpy", "pandas", "matplotlib", "seaborn", "pydantic", "safetensors"} <= base

    def test_the_command_runs_beside_a_folder_of_its_name(self, wheel: Path, tmp_path: Path) -> None:
        """To Python, a clone named frlkit in the working directory is a package of that name, if an empty one."""
        python = environment(tmp_path / "env")
        install(python, wheel)
        (tmp_path / "work" / "frlkit" / "frlkit").mkdir(parents=True)
        words = ("train", "natural", "--dataset", "digits", "--epochs", "1", "--batch-size", "100")
        run(python.with_name("frlkit"), *words, cwd=tmp_path / "work", **NOT_UTF8)
        assert list((tmp_path / "work" / "checkpoints").rglob("weights.*"))
        shown = run(python, "-m", "frlkit", "--version", cwd=tmp_path / "work").stdout
        assert frlkit.__version__ in shown


def test_an_editable_install_wins_over_a_folder_of_its_name(tmp_path: Path) -> None:
    source = tmp_path / "frlkit"
    source.mkdir()
    copy_of_the_source(source)
    python = environment(tmp_path / "env")
    install(python, "--editable", source)
    code = "import frlkit; print(frlkit.__file__)"
    assert Path(run(python, "-c", code, cwd=tmp_path).stdout.strip()) == source.resolve() / "frlkit" / "__init__.py"
    assert frlkit.__version__ in run(python.with_name("frlkit"), "--version", cwd=tmp_path).stdout


def test_uv_runs_the_command(wheel: Path, tmp_path: Path) -> None:
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        pytest.skip("needs uv: pip install uv")
    python = environment(tmp_path / "env")
    project = tmp_path / "project"
    project.mkdir()
    copy_of_the_source(project)
    quiet = {
        "UV_PROJECT_ENVIRONMENT": str(tmp_path / "env"),
        "UV_OFFLINE": "1",
        "UV_CACHE_DIR": str(tmp_path / "cache"),
    }
    run(uv, "pip", "install", "--quiet", "--python", python, "--no-deps", wheel, cwd=project, **quiet)
    shown = run(uv, "run", "--no-sync", "--python", python, "frlkit", "--version", cwd=project, **quiet).stdout
    assert frlkit.__version__ in shown


def test_the_core_needs_no_jupyter() -> None:
    """What `pip install frlkit` leaves out is not imported before it is used."""
    files = [path.relative_to(PROJECT).with_suffix("") for path in (PROJECT / "frlkit").rglob("*.py")]
    blocked = ", ".join(f"{name!r}: None" for name in FOR_NOTEBOOKS)
    code = f"import sys; sys.modules.update({{{blocked}}})\n"
    code += "\n".join(f"import {'.'.join(path.parts)}" for path in files if path.name != "__init__")
    run(sys.executable, "-c", code, cwd=PROJECT, PYTHONPATH=str(PROJECT))


@pytest.mark.parametrize(("asked", "threads"), [("", {1}), ("2", set())])
def test_small_algebra_has_one_thread_unless_the_user_says_otherwise(asked: str, threads: set[int]) -> None:
    """With more, OpenBLAS's threads wait for each other beside a busy neighbour: twenty times as long."""
    name = "OPENBLAS_NUM_THREADS"
    code = f"""
import os
os.environ.pop({name!r}, None)
if {asked!r}:
    os.environ[{name!r}] = {asked!r}
import frlkit.theory
from threadpoolctl import threadpool_info
pools = {{pool["num_threads"] for pool in threadpool_info() if pool["internal_api"] == "openblas"}}
print(os.environ[{name!r}], *pools)
"""
    said, *pools = run(sys.executable, "-c", code, cwd=PROJECT, PYTHONPATH=str(PROJECT)).stdout.split()
    assert said == (asked or "1")
    assert not threads or set(map(int, pools)) == threads


def requirements(text: str) -> list[str]:
    return [line.split("#")[0].strip() for line in text.splitlines() if line.split("#")[0].strip()]


class TestRequirements:
    def test_the_file_names_what_the_package_declares(self) -> None:
        declared = PYPROJECT["dependencies"] + PYPROJECT["optional-dependencies"]["notebooks"]
        assert requirements((PROJECT / "requirements.txt").read_text(encoding="utf-8")) == declared

    def test_every_requirement_has_a_pin_that_fits(self) -> None:
        extras = PYPROJECT["optional-dependencies"].values()
        declared = [
            Requirement(text) for text in PYPROJECT["dependencies"] + [each for extra in extras for each in extra]
        ]
        pins = [Requirement(line) for line in requirements((PROJECT / "requirements.lock").read_text(encoding="utf-8"))]
        for need in declared:
            found = [next(iter(pin.specifier)).version for pin in pins if pin.name == need.name]
            assert need.name == "frlkit" or found, f"{need.name} has no pin"
            assert all(need.specifier.contains(each) for each in found), f"{need} and {found}"


def test_citation_names_the_same_kit() -> None:
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == frlkit.__version__ == PYPROJECT["version"] == version("frlkit")
    assert citation["license"] == PYPROJECT["license"] == "MIT"
    assert citation["repository-code"] == frlkit.REPOSITORY == PYPROJECT["urls"]["Homepage"]
    assert citation["preferred-citation"]["url"] == PYPROJECT["urls"]["Paper"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", frlkit.__version__)


def test_make_alone_prints_what_there_is() -> None:
    shown = run("make", "--no-print-directory", cwd=PROJECT).stdout
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)[1].split()
    assert [name for name in targets if name != "help" and f"make {name} " not in shown] == []
    assert "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu" in shown


def test_the_public_check_is_make_test() -> None:
    workflow = yaml.safe_load((PROJECT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))
    (job,) = workflow["jobs"].values()
    assert job["steps"][-1]["run"] == "make test"
    oldest, *_ = job["strategy"]["matrix"]["python"]
    assert PYPROJECT["requires-python"] == f">={oldest}"


def test_cpu_wheels_are_preferred_and_fit_the_pins() -> None:
    """What PyTorch's index adds to a version is a later one to pip, and meets a pin without it."""
    cpu, plain = Version("2.15.0+cpu"), Version("2.15.0")
    assert cpu > plain
    assert Requirement("torch==2.15.0").specifier.contains(cpu)

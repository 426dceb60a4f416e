"""Where the kit comes from and what it stands on. Needs nothing but Python: a notebook's set-up cell asks it first."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import frlkit
from frlkit import PROJECT, KitError

#: Never installed or changed by the kit: Colab's and a cluster's fit their drivers.
GIVEN = ("torch", "torchvision")
#: Every file that names the repository; the one line of code among them is `frlkit.REPOSITORY`.
NAMING = ("frlkit/__init__.py", "*.md", "*.cff", "pyproject.toml", "docs/*.md", "checkpoints/*.md", "notebooks/*.ipynb")
REPOSITORY_LINE = re.compile(r'^REPOSITORY = "(https://github\.com/([^"/]+/[^"/]+))"$', re.MULTILINE)


def ready(wanted: str) -> None:
    """Make sure, from a notebook, that this kit is of version `wanted` and has the packages that it needs.

    Packages that are missing or too old are installed with pip into the running Python, but for torch and torchvision.

    Raises
    ------
    KitError
        Another version, no torch, or pip fails: one sentence with the fix.
    """
    if frlkit.__version__ != wanted:
        raise KitError(
            f"this notebook belongs to frlkit {wanted}, and {Path(frlkit.__file__).parent} is {frlkit.__version__}: "
            f"use the notebooks of {frlkit.__version__}, or update that one, and restart the kernel"
        )
    missing = [text for text in requirements() if not _met(text)]
    if given := [text for text in missing if re.match(r"\w+", text)[0] in GIVEN]:
        raise KitError(
            f"{' and '.join(given)} must be there first: install them as pytorch.org says, and run this again"
        )
    if missing:
        print(f"installing {', '.join(missing)}")
        words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", *missing]
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
        )
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise KitError(f"{', '.join(missing)} could not be installed ({why}): install them, and run this again")


def requirements(project: Path = PROJECT) -> list[str]:
    """What the base install needs, each as ``name>=version``, from a checkout's ``pyproject.toml``; [] without one."""
    file = project / "pyproject.toml"
    if not file.exists():  # an installed kit, whose requirements pip has seen to
        return []
    found = re.search(r"^dependencies = (\[.*?^\])", file.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return ast.literal_eval(found[1])  # a list of texts is written alike in TOML and Python (tomllib came with 3.11)


def _met(requirement: str) -> bool:
    name, lowest = requirement.split(">=")
    try:
        return _numbers(version(name)) >= _numbers(lowest)
    except PackageNotFoundError:
        return False


def _numbers(text: str) -> list[int]:
    """2.6.0+cu124 -> [2, 6, 0]."""
    return [int(part) for part in re.findall(r"\d+", text)[:3]]


def address(url: str, project: Path = PROJECT) -> list[str]:
    """Rewrite the repository's address, for a fork: badges, set-up cells, documents, ``pyproject.toml``, the constant.

    Returns the files that changed. Raises `KitError` where `url` is no repository's address on GitHub, which Colab's
    badges need, or where `project` holds no kit.
    """
    new = re.fullmatch(r"https?://(?:www\.)?github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", url)
    if not new:
        raise KitError(f"address = {url!r} is not allowed: use https://github.com/OWNER/NAME")
    constant = project / "frlkit" / "__init__.py"
    old = REPOSITORY_LINE.search(constant.read_text(encoding="utf-8")) if constant.exists() else None
    if not old:
        raise KitError(f"{project} is no clone of the kit: run this in one")
    pairs = {old[1]: f"https://github.com/{new[1]}", f"google.com/github/{old[2]}": f"google.com/github/{new[1]}"}
    changed = []
    for file in sorted({file for pattern in NAMING for file in project.glob(pattern)}):
        text = fresh = file.read_bytes().decode("utf-8")
        for before, after in pairs.items():
            fresh = re.sub(rf"{re.escape(before)}(?![\w.-]*\w)", after, fresh)
        if fresh != text:
            file.write_bytes(fresh.encode("utf-8"))
            changed.append(str(file.relative_to(project)))
    return changed


if __name__ == "__main__":  # of `make address`, which needs no packages
    try:
        print(*address(sys.argv[1]), sep="\n")
    except KitError as error:
        sys.exit(str(error))

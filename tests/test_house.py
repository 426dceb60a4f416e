"""Who may import whom, how large the rooms are: the house's plan, kept true."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from frlkit import PROJECT

KIT = PROJECT / "frlkit"
#: Bottom up; a module imports only from floors below its own, or, within a wing, from its wing.
FLOORS = [
    {"values", "disk", "origin", "options", "models"},
    {"checkpoint", "distributed", "theory"},
    {"kernels", "sources", "drive"},
    {"data"},
    {"attacks", "fairness"},
    {"evaluation", "recipes", "interval"},
    {"losses"},
    {"training", "records"},
    {"runs", "notebook"},
    {"audit", "report", "scale"},
    {"commands", "reproduce"},
    {"__main__"},
]
WINGS = ("audit", "kernels", "report", "scale", "sources")


def modules() -> dict[str, list[Path]]:
    """The kit's rooms: a module, or a wing, and its files."""
    rooms: dict[str, list[Path]] = {}
    for path in sorted(KIT.rglob("*.py")):
        name = path.relative_to(KIT).parts[0].removesuffix(".py")
        if name != "__init__":
            rooms.setdefault(name, []).append(path)
    return rooms


def imports(path: Path) -> set[str]:
    """The rooms that a file imports, at its top or inside functions; names of frlkit/__init__ do not count."""
    rooms, found = set(modules()), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "frlkit":
            found |= {alias.name for alias in node.names} & rooms
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("frlkit."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("frlkit.")}
    return found


def floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("room", modules())
def test_an_import_never_climbs(room: str) -> None:
    for path in modules()[room]:
        for other in imports(path) - {room}:
            assert floor(other) < floor(room), f"{path.name} imports {other}"


def test_every_room_has_a_floor() -> None:
    assert set(modules()) <= set().union(*FLOORS)


def test_only_notebooks_and_reproduce_import_notebook() -> None:
    assert {room for room, paths in modules().items() for path in paths if "notebook" in imports(path)} <= {"reproduce"}


@pytest.mark.parametrize(
    ("wing", "questions"), [("kernels", {"fast", "describe", "folded", "layout"}), ("sources", {"read"})]
)
def test_the_core_asks_a_wing_few_questions(wing: str, questions: set[str]) -> None:
    """`fast`, `folded` and `layout` in the attacks, and for records `describe`; `read` in `data.load`; nothing else."""
    asked = set()
    for room, paths in modules().items():
        if room in WINGS:
            continue
        for path in paths:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            asked |= {
                node.attr
                for node in ast.walk(tree)
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == wing
            }
    assert asked == questions


def test_data_alone_knows_the_readers() -> None:
    assert {room for room, paths in modules().items() for path in paths if "sources" in imports(path)} == {
        "data",
        "sources",
    }


#: What house.md calls the core, with what a module brings that was taken out of it.
CORE = (
    *("data", "models", "attacks", "evaluation", "fairness", "recipes", "training", "losses", "records", "checkpoint"),
    *("disk", "runs", "distributed", "theory", "notebook", "__main__"),
)


def sizes() -> dict[str, int]:
    """Lines of each room, wings' files together."""
    return {
        room: sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
        for room, paths in modules().items()
    }


def test_sizes() -> None:
    """No module above 300 lines; ``python tests/test_house.py`` prints all."""
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in KIT.rglob("*.py")}
    assert max(lines.values()) <= 300, max(lines, key=lines.__getitem__)


def test_every_text_has_an_encoding() -> None:
    """ruff's PLW1514 sees only what it knows to be a path."""
    files = [path for folder in ("frlkit", "tests", "benchmarks") for path in (PROJECT / folder).rglob("*.py")]
    bare = [
        f"{path.relative_to(PROJECT)}:{node.lineno}"
        for path in files
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("read_text", "write_text")
        and len(node.args) < (1 if node.func.attr == "read_text" else 2)
        and all(keyword.arg != "encoding" for keyword in node.keywords)
    ]
    assert bare == []


if __name__ == "__main__":
    found = sizes()
    groups = {"core": CORE, "beside it": sorted(set(found) - {*CORE, *WINGS}), "wings": WINGS}
    for name, rooms in groups.items():
        print(f"{sum(found[room] for room in rooms):5}  {name}")
        print(*(f"{found[room]:12}  {room}" for room in rooms), sep="\n")

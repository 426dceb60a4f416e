"""Who may import whom, how large the rooms are: the house's plan, kept true."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import numpy as np
import pytest

from frlkit import PROJECT

KIT = PROJECT / "frlkit"
#: Bottom up; a module imports only from floors below its own, or, within a wing, from its wing.
FLOORS = [
    {"values", "disk", "origin", "models"},
    {"checkpoint", "distributed", "theory"},
    {"kernels", "sources", "drive"},
    {"data"},
    {"attacks", "fairness"},
    {"evaluation", "recipes"},
    {"interval"},
    {"losses"},
    {"training", "records"},
    {"runs", "notebook"},
    {"audit", "report", "scale"},
    {"reproduce"},
    {"commands"},
    {"__main__"},
]
WINGS = ("audit", "commands", "kernels", "report", "scale", "sources")


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


def test_training_knows_no_file() -> None:
    for room in ("training", "losses", "evaluation", "recipes", "attacks", "fairness"):
        for path in modules()[room]:
            assert not imports(path) & {"checkpoint", "disk", "runs", "records", "drive"}, room


def test_every_room_has_a_floor() -> None:
    assert set(modules()) <= set().union(*FLOORS)


def test_only_notebooks_and_reproduce_import_notebook() -> None:
    assert {room for room, paths in modules().items() for path in paths if "notebook" in imports(path)} <= {"reproduce"}


@pytest.mark.parametrize(
    ("wing", "questions"), [("kernels", {"fast", "describe", "folded", "graphs", "layout"}), ("sources", {"read"})]
)
def test_the_core_asks_a_wing_few_questions(wing: str, questions: set[str]) -> None:
    """`fast`, `folded`, `graphs`, `layout` in attacks, and for records `describe`; `read` in `data.load`; no more."""
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


#: What a notebook's reader may want to have read; the wings are for those who look for what is in them.
CORE = (
    *("data", "models", "attacks", "evaluation", "fairness", "recipes", "training", "losses", "records", "checkpoint"),
    *("disk", "runs", "distributed", "theory", "notebook", "__main__"),
)


def sizes() -> dict[str, np.ndarray]:
    """Each room's lines, and how many of them are code: no docstring, comment or blank line; wings' files together."""
    return {
        room: sum(np.array([len(text.splitlines()), code(text)]) for text in map(read, paths))
        for room, paths in modules().items()
    }


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def code(text: str) -> int:
    nodes = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
    ]
    words = [node.body[0] for node in nodes if ast.get_docstring(node) is not None]
    said = {line for word in words for line in range(word.lineno, word.end_lineno + 1)}
    thin = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in thin]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - said)


def test_lines_of_code_by_hand() -> None:
    text = '"""Two\nlines."""\n\nx = 1  # one\n# none\ny = [\n    2,\n]\n\n\ndef f():\n    """Words."""\n    return x\n'
    assert code(text) == 6


def test_sizes() -> None:
    """No module above 300 lines; ``python tests/test_house.py`` prints all."""
    lines = {path: len(read(path).splitlines()) for path in KIT.rglob("*.py")}
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
    print("lines, of code")
    for name, rooms in groups.items():
        print("{:6}{:6}  {}".format(*sum(found[room] for room in rooms), name))
        print(*("{:12}{:6}  {}".format(*found[room], room) for room in rooms), sep="\n")

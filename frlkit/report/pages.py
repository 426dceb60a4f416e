"""HTML that can be read offline and mailed: a notebook as one page, and the index of a reproduction."""

from __future__ import annotations

import re
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from frlkit import PROJECT, checkpoint
from frlkit.report import claims

TEMPLATES = Path(__file__).parent


def notebook(path: Path) -> str:
    """An executed notebook as one HTML page that asks the network for nothing.

    Formulas are MathML, which browsers show by themselves. Dollar signs in outputs, such as a class's name, stay dollar
    signs.
    """
    from jinja2 import pass_context
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

    class Renderer(IPythonRenderer):
        def block_math(self, body: str) -> str:
            return mathml(body, "block") or super().block_math(body)

        def inline_math(self, body: str) -> str:
            return mathml(body, "inline") or super().inline_math(body)

        def image(self, text: str, url: str, title: str | None = None) -> str:
            return text if url.startswith("http") else super().image(text, url, title)  # a badge's words, for instance

    @pass_context
    def markdown(_: Any, source: str) -> str:
        return MarkdownWithMath(renderer=Renderer(escape=False)).render(source)

    exporter = HTMLExporter(raw_template=(TEMPLATES / "notebook.html.j2").read_text(encoding="utf-8"))
    exporter.register_filter("markdown2html", markdown)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nbconvert on pictures without a description
        return exporter.from_filename(str(path))[0]


def mathml(formula: str, display: str) -> str:
    """A TeX formula as MathML, `display` "inline" or "block"; empty where it cannot be translated: TeX is readable."""
    try:
        from latex2mathml.converter import convert

        found = convert(formula.replace("{aligned}", "{split}"), display=display)  # the same, and it knows that one
    except Exception:  # its errors have no ancestor of their own
        return ""
    if re.search(r"<mi>(\\|&<)", found):  # a command or a column that it passed on as it was
        return ""
    return re.sub(r' xmlns="[^"]*"', "", found)  # HTML needs none, and nbconvert's headings would make it a prefix


def about(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the index says about a notebook executed just now: "title", "tables", "date" and "commit"."""
    heading = re.search(r"^# (.+)$", "\n".join("".join(cell["source"]) for cell in cells), re.MULTILINE)
    title = heading[1] if heading else "a notebook without a title"
    return {"title": title, "tables": claims.from_notebook(cells), "date": _now(), "commit": commit()}


def index(notes: Mapping[str, Mapping[str, Any]], waiting: Sequence[str], output: Path, study: str, made: str) -> None:
    """Write ``index.html``: links, claims tables and figures of every notebook that has run.

    Parameters
    ----------
    notes
        Folder in `output` -> what `about` says of the notebook in it, "live" (whether its data set was there) and
        "took" (how long, in words); every PNG file in the folder's ``figures`` is shown.
    waiting
        Names of notebooks that have not run yet.
    study, made
        What was studied, and with which versions, in words.
    """
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    shown = []
    for name, note in notes.items():
        files = sorted((output / name / "figures").glob("*.png"))
        figures = [{"path": file.relative_to(output).as_posix(), "name": file.stem} for file in files]
        shown.append({**note, "name": name, "file": f"{name}/{name}", "figures": figures})
    found = Counter(row["verdict"] for note in shown for table in note["tables"] for row in table["claims"])
    text = environment.get_template("index.html.j2").render(
        study=study,
        made=made,
        date=_now(),
        commit=commit(),
        notebooks=shown,
        waiting=waiting,
        verdicts=claims.VERDICTS,
        phrase=claims.phrase,
        counts=[(verdict, found[verdict]) for verdict in claims.VERDICTS if found[verdict]],
    )
    checkpoint.write_atomically(output / "index.html", text.encode())


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z")


def commit() -> str:
    """The checkout's commit, with "-dirty" where tracked files differ from it."""
    words = ["git", "-C", str(PROJECT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git checkout)"

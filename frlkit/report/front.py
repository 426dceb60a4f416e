"""README's table of notebooks: what each answers, how long it takes where its runs reload, and where to open it."""

from __future__ import annotations

import json
from pathlib import Path

from frlkit import PROJECT, took
from frlkit.report import tables

QUESTIONS = {
    "01": "Does adversarial training leave some classes far behind, and is it those that were hard before?",
    "02": "Why should it? The paper's two Gaussian classes: its theorems checked, its formulas restored",
    "03": "What does Reweight do for the hardest class that retraining alone does not?",
    "04": "Why did the report's Remargin fail, and what does a faithful one do?",
    "05": "Are both together the best, as the paper says and as the report left open?",
    "06": "Which of your own model's classes fail under attack, can the number be trusted, and can it be mended?",
    "07": "Which differences between classes are certain, whatever attack comes next?",
}


def notebooks(project: Path = PROJECT) -> str:
    """One row a notebook; times from ``benchmarks/notebooks.json``, without that column where nothing was timed."""
    file = project / "benchmarks" / "notebooks.json"
    timed = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"machine": "", "seconds": {}}
    rows = [_row(path, timed["seconds"]) for path in sorted((project / "notebooks").glob("[0-9][0-9]_*.ipynb"))]
    head = ["notebook", "what it answers", f"time, {timed['machine']}", "open in"]
    keep = [column for column in range(4) if column != 2 or any(row[2] for row in rows)]
    return tables.markdown([head[k] for k in keep], [[row[k] for k in keep] for row in rows])


def _row(path: Path, seconds: dict[str, float]) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    badges, heading = ("".join(cell["source"]) for cell in cells[:2])
    number, _, title = heading.partition("\n")[0].removeprefix("# ").partition(" · ")
    time = took(seconds[path.stem]) if path.stem in seconds else ""
    name = path.stem[3:].replace("_", " ").replace("frl", "FRL")
    return [
        f"[{number} {name}](notebooks/{path.name})",
        QUESTIONS.get(number, title),
        time,
        " ".join(badges.split("\n")),
    ]

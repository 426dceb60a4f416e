"""``make faults``: every fault once, and many random moments, for a plain and for a retraining run; a table.

``--repeat 'SIGKILL@training.py:436#3'`` strikes at one moment alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from cases import CASES, MOST_LOST, Case  # noqa: E402
from conftest import tiny_dataset  # noqa: E402
from faulty import SIGNALS, VALUES, Fault, Stage  # noqa: E402

from frlkit import data  # noqa: E402


def faults(stage: Stage, recipe: str, moments: int, seed: int) -> dict[str, tuple[str, Case]]:
    """What is tried on a recipe: name -> (row of the table, how). A fifth as many SIGTERM and SIGINT as SIGKILL."""
    listed = {}
    for name, case in CASES.items():
        row, comma, _ = name.partition(",")
        listed[name] = (f"{row} during a write" if comma and row in SIGNALS else row.split(" at ")[0], case)
    for kind, number in (("SIGKILL", moments), ("SIGTERM", moments // 5), ("SIGINT", moments // 5)):
        for fault in islice(stage.moments(recipe, kind, seed), number):
            listed[str(fault)] = (f"{kind} at a random moment", partial(strike, fault=fault))
    return listed


def strike(stage: Stage, recipe: str, runs: Path, *, fault: Fault) -> int:
    return stage.survive(recipe, runs, fault)


def main() -> int:
    """Returns 1 where a fault was not survived, or cost more epochs than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=50, help="random moments of SIGKILL for each recipe")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--repeat", help="one fault, as the table names it")
    parser.add_argument("--recipes", nargs="+", default=list(VALUES), choices=list(VALUES))
    words = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder))
        stage.write_data(tiny_dataset(data.load("digits"), 5, 1, 2))
        for recipe in words.recipes:
            if words.repeat:
                tried = {words.repeat: (words.repeat, partial(strike, fault=Fault.parse(words.repeat)))}
            else:
                tried = faults(stage, recipe, words.moments, words.seed)
            for number, (name, (kind, case)) in enumerate(tried.items()):
                row = rows.setdefault(kind, Counter())
                try:
                    lost = case(stage, recipe, Path(folder) / f"{recipe}{number}" / "runs")
                    assert lost <= MOST_LOST.get(name, 1), f"{lost} epochs were lost"
                except pytest.skip.Exception as skipped:
                    print(f"skipped: {name}: {skipped}", flush=True)
                    continue
                except Exception as error:
                    print(f"FAILED: {recipe}, {name}: {error}", flush=True)
                    lost = -1
                row += Counter({"tried": 1, "survived": int(lost >= 0), "lost": max(lost, 0)})
    rows["all"] = sum(rows.values(), Counter())
    print(f"{'fault':<44}{'tried':>6}{'survived':>9}{'epochs lost':>12}")
    for kind, row in rows.items():
        print(f"{kind:<44}{row['tried']:>6}{row['survived']:>9}{row['lost']:>12}")
    return int(rows["all"]["survived"] < rows["all"]["tried"])


if __name__ == "__main__":
    sys.exit(main())

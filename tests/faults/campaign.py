"""``make faults``: faults of every kind, at every file event and many random moments of the kit's commands; a table.

``--repeat 'SIGKILL@file:41'`` strikes at one moment alone. The table is Markdown, so that a document can hold it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from cases import CASES, MOST_LOST, SWEEPS, Case  # noqa: E402
from conftest import tiny_dataset  # noqa: E402
from faulty import COMMANDS, STEPS, TITLES, Fault, Stage  # noqa: E402

from frlkit import data  # noqa: E402

EVENTS = {  # at every event of its sort
    "SIGKILL": "SIGKILL at every change of a file",
    "SIGTERM": "SIGTERM at every change of a file",
    "SIGINT": "SIGINT at every change of a file",
    "torn": "SIGKILL in the middle of every write",
    "EIO": "EIO at every file event, then again in the same process",
    "ENOSPC": "ENOSPC at every create and write, then again in the same process",
    "gone": "the folder gone from every file event on, then again",
}
ROWS = {"disk of": "a real disk that is too small, or has too few files", "Drive": "Google Drive lags, fails, is gone"}


def strike(stage: Stage, name: str, runs: Path, *, fault: Fault) -> int:
    return stage.survive(name, runs, fault)


def faults(stage: Stage, name: str, moments: int, seed: int) -> Iterator[tuple[str, str, Case]]:
    """What is tried on a command: its row of the table, its name, how. SIGKILL is tried the most often."""
    if stage.shim is None:
        print("skipped: faults at file events: they need a C compiler, on Linux", flush=True)
    for kind, row in EVENTS.items() if stage.shim else ():
        for fault in stage.file_events(name, kind):
            yield row, str(fault), partial(strike, fault=fault)
    if name in STEPS:
        for kind, number in (("SIGKILL", moments), ("SIGTERM", moments // 5), ("SIGINT", moments // 5)):
            for fault in islice(stage.moments(name, kind, seed), number):
                yield f"{kind} at a random line", str(fault), partial(strike, fault=fault)
        for case, how in CASES.items():
            yield next((row for start, row in ROWS.items() if case.startswith(start)), case), case, how


def main() -> int:
    """Returns 1 where a fault was not survived, or cost more epochs than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=50, help="random moments of SIGKILL for each recipe")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--every", type=int, default=1, help="only every so-manieth fault, for a quick look")
    parser.add_argument("--repeat", help="one fault, as the table names it")
    parser.add_argument("--commands", nargs="+", default=[*COMMANDS, "sweep"], choices=[*COMMANDS, "sweep"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="faults at a time")
    words = parser.parse_args()
    torch.set_num_threads(1)
    began, table = time.monotonic(), dict[tuple[str, str], Counter[str]]()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(words.jobs) as pool:
        Path(folder).chmod(0o755)
        stage = Stage(Path(folder))
        stage.write_data(tiny_dataset(data.load("digits"), 5, 1, 2))

        def attempt_in(name: str, number: int, fault: str, case: Case) -> int | None:
            place = Path(folder) / f"{name}{number}"
            lost = attempt(stage, name, place / "runs", fault, case)
            shutil.rmtree(place, ignore_errors=True)
            return lost

        for name in words.commands:
            if words.repeat:
                fault = Fault.parse(words.repeat) if "@" in words.repeat else None
                how = partial(strike, fault=fault) if fault else {**CASES, **SWEEPS}[words.repeat]
                tried = [(words.repeat, words.repeat, how)]
            elif name == "sweep":
                tried = [("a sweep's driver struck", case, how) for case, how in SWEEPS.items()]
            else:
                tried = list(faults(stage, name, words.moments, words.seed))[:: words.every]
            results = [pool.submit(attempt_in, name, n, fault, how) for n, (_, fault, how) in enumerate(tried)]
            for (row, _, _), result in zip(tried, results, strict=True):
                if (lost := result.result()) is not None:
                    counts = table.setdefault((TITLES.get(name, name), row), Counter())
                    counts += Counter({"tried": 1, "survived": int(lost >= 0), "lost": max(lost, 0)})
            print(f"{TITLES.get(name, name)}: {len(tried)} faults, {time.monotonic() - began:.0f} s so far", flush=True)
    return show(table, time.monotonic() - began)


def attempt(stage: Stage, name: str, runs: Path, fault: str, case: Case) -> int | None:
    """The epochs lost; -1 where it was not survived, None where it cannot be tried here."""
    try:
        lost = case(stage, name, runs)
        assert lost <= MOST_LOST.get(fault, 1), f"{lost} epochs were lost"
    except pytest.skip.Exception as skipped:
        print(f"skipped: {fault}: {skipped}", flush=True)
        return None
    except Exception as error:
        print(f"FAILED: {name}, {fault}: {error}", flush=True)
        return -1
    return lost


def show(table: dict[tuple[str, str], Counter[str]], seconds: float) -> int:
    everything = sum(table.values(), Counter())
    print("| command | fault | tried | survived | epochs trained again |\n|---|---|---:|---:|---:|")
    for (command, row), counts in (*table.items(), (("all", ""), everything)):
        print(f"| {command} | {row} | {counts['tried']:,} | {counts['survived']:,} | {counts['lost']:,} |")
    print(f"\n{seconds / 60:.0f} minutes")
    return int(everything["survived"] < everything["tried"])


if __name__ == "__main__":
    sys.exit(main())

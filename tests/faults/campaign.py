"""``make faults``: faults of every kind, at every file event and many random moments of the kit's commands; a table.

``--repeat 'SIGKILL@file:41'`` strikes at one moment alone. With ``--keep FILE`` every result is a line of that file and
is not tried again, so a campaign can be interrupted, or done command by command; ``--table`` tries nothing and shows
what is kept. The table is Markdown; ``--write`` puts it into a document.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
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
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from cases import CASES, MOST_LOST, SWEEPS, Case  # noqa: E402
from conftest import tiny_dataset  # noqa: E402
from faulty import COMMANDS, STEPS, TITLES, Fault, Stage  # noqa: E402

from frlkit import data, records  # noqa: E402

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


def last_of_its_kind(stage: Stage, name: str) -> set[str]:
    """The moments of the last event of each kind: the same call about a file of the same name."""
    kinds = (re.sub(r" (.*/)?(.+?)(\.[0-9a-f]{8}\.tmp)?$", r" \2\3", event) for event in stage.events[name])
    plain = (re.sub(r"[0-9a-f]{8}\.tmp$", "tmp", kind) for kind in kinds)
    return {f"file:{number}" for number in {kind: number for number, kind in enumerate(plain)}.values()}


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


def row_of(case: str) -> str:
    return "a worker or driver of a real Ray or Dask cluster killed" if "cluster" in case else "its driver struck"


def main() -> int:
    """Returns 1 where a fault was not survived, or cost more epochs than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=50, help="random moments of SIGKILL for each recipe")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--every", type=int, default=1, help="only every so-manieth fault, for a quick look")
    parser.add_argument("--kinds", action="store_true", help="of file events alike (call, file's name) only the last")
    parser.add_argument("--repeat", help="one fault, as the table names it")
    parser.add_argument("--commands", nargs="+", default=[*COMMANDS, "sweep"], choices=[*COMMANDS, "sweep"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="faults at a time")
    parser.add_argument("--keep", type=Path, help="a file of results, which are not tried again")
    parser.add_argument("--table", action="store_true", help="try nothing: show what is kept")
    parser.add_argument("--write", type=Path, help="a document whose table becomes this one")
    words = parser.parse_args()
    kept = read(words.keep) if words.keep else []
    if not words.table:
        torch.set_num_threads(1)
        with Results(words.keep, kept) as results:
            campaign(words, results)
    text, code = table(kept)
    print(text)
    if words.write:
        before = words.write.read_text(encoding="utf-8")
        after = re.sub(r"(?s)(<!-- faults -->\n).*(<!-- end -->)", lambda old: f"{old[1]}{text}\n{old[2]}", before)
        words.write.write_text(after, encoding="utf-8")
    return code


class Results:
    """What has been found, line by line in a file that is kept, and on what machine."""

    def __init__(self, path: Path | None, kept: list[dict[str, Any]]) -> None:
        self.kept, self.began = kept, time.monotonic()
        self.known = {(line["command"], line["fault"]) for line in kept if "fault" in line}
        self.file = path.open("a", encoding="utf-8") if path else None
        self.add({"about": about()})

    def add(self, line: dict[str, Any]) -> None:
        self.kept.append(line)
        if self.file:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: Any) -> None:
        print(f"{(time.monotonic() - self.began) / 60:.0f} minutes", flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that `Results` wrote; a last one that is cut short is none."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def about() -> str:
    """Date, machine and versions."""
    made = ", ".join(f"{name} {value}" for name, value in records.versions().items())
    machine = f"{platform.system()} on {platform.machine()}, {os.cpu_count()} cores"
    return f"{time.strftime('%Y-%m-%d', time.gmtime())}, {machine}; {made}"


def campaign(words: argparse.Namespace, results: Results) -> None:
    """Try what the command line asks for and is not known yet."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as end:
        pool = ThreadPoolExecutor(words.jobs)
        end.callback(pool.shutdown, cancel_futures=True)  # after Ctrl-C those in hand are finished, no others begun
        Path(folder).chmod(0o755)
        stage = Stage(Path(folder))
        stage.write_data(tiny_dataset(data.load("digits"), 5, 1, 2))

        def attempt_in(name: str, number: int, fault: str, case: Case) -> int | None:
            place = Path(folder) / f"{name}{number}"
            lost = attempt(stage, name, place / "runs", fault, case)
            shutil.rmtree(place, ignore_errors=True)
            return lost

        for name in words.commands:
            title = TITLES.get(name, name)
            if name == "sweep":
                every = [(row_of(case), case, how) for case, how in SWEEPS.items()]
            else:
                every = list(faults(stage, name, words.moments, words.seed))
            there = Counter(row for row, _, _ in every)
            chosen = every[:: words.every]
            if words.kinds:
                last = last_of_its_kind(stage, name) if name in COMMANDS else set()
                chosen = [one for one in chosen if "@file:" not in one[1] or one[1].partition("@")[2] in last]
            tried = [one for one in chosen if (title, one[1]) not in results.known]
            if words.repeat:  # also a random moment that is none of those
                named = [one for one in every if one[1] == words.repeat]
                tried = named or [(words.repeat, words.repeat, partial(strike, fault=Fault.parse(words.repeat)))]
            found = [pool.submit(attempt_in, name, n, fault, how) for n, (_, fault, how) in enumerate(tried)]
            for (row, fault, _), result in zip(tried, found, strict=True):
                if (lost := result.result()) is not None:
                    results.add({"command": title, "row": row, "fault": fault, "of": there[row], "lost": lost})
            print(f"{title}: {len(tried)} faults, {time.monotonic() - results.began:.0f} s so far", flush=True)


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


def table(kept: list[dict[str, Any]]) -> tuple[str, int]:
    """The results as Markdown, and 1 where a fault was not survived."""
    rows = dict[tuple[str, str], Counter[str]]()
    for line in kept:
        if "fault" in line:
            counts = rows.setdefault((line["command"], line["row"]), Counter())
            counts += Counter({"tried": 1, "survived": int(line["lost"] >= 0), "lost": max(line["lost"], 0)})
            counts["there"] = line["of"]
    everything = sum(rows.values(), Counter())
    text = [
        "| command | fault | there are | tried | survived | epochs trained again |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for (command, row), counts in (*rows.items(), (("all", ""), everything)):
        numbers = " | ".join(f"{counts[name]:,}" for name in ("there", "tried", "survived", "lost"))
        text.append(f"| {command} | {row} | {numbers} |")
    text += ["", ". ".join(dict.fromkeys(line["about"] for line in kept if "about" in line))]
    return "\n".join(text), int(everything["survived"] < everything["tried"])


if __name__ == "__main__":
    sys.exit(main())

"""What `make reproduce` cost here, notebook by notebook, from the notes it left: by this it announces its time.

    python benchmarks/notebooks.py [OUTPUT]     writes benchmarks/notebooks.json

Only a reproduction whose runs were all reloaded says what reloading costs: run it twice where something was trained.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
import torch

import frlkit
from frlkit import checkpoint


@click.command()
@click.argument("output", type=click.Path(exists=True, path_type=Path), default=frlkit.PROJECT / "output")
def main(output: Path) -> None:
    notes = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in output.glob("*/done.json")}
    values = {
        kind: {name: round(notes[name][kind], 1) for name in sorted(notes)} for kind in ("seconds", "cpu_seconds")
    }
    machine = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    checkpoint.write_json(frlkit.PROJECT / "benchmarks" / "notebooks.json", {"machine": machine, **values})
    click.echo(f"{len(notes)} notebooks, {sum(values['cpu_seconds'].values()):.0f} s of one core in all")


if __name__ == "__main__":
    main()

"""The sweep engine's overhead: ``python benchmarks/sweep.py``, ten natural runs on Fashion-MNIST in a temporary folder.

Overhead is the processes' time that no run had: starting, waiting for each other at the end, sending. It is given as a
share of the runs' own time, which each process measures itself.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from frlkit import recipes
from frlkit.scale import clusters, sweeps

SWEEP = "grid: [{recipe: natural, seed: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], values: {epochs: %d}}]"
carry_out = clusters._here


def timed(run: sweeps.Run, *place: object) -> tuple[Path, str, str]:
    began = time.perf_counter()
    folder, error, _ = carry_out(run, *place)
    return folder, error, str(time.perf_counter() - began)


def measure(epochs: int = recipes.Config("natural").epochs) -> dict[str, float]:
    """Seconds of the whole sweep and of its runs, processes, and the overhead as a share."""
    with tempfile.TemporaryDirectory() as folder, clusters.local("cpu") as (engine, workers):
        path = Path(folder) / "sweep.yaml"
        path.write_text(SWEEP % epochs, encoding="utf-8")
        planned = sweeps.plan(path, Path(folder) / "runs")
        clusters._here = timed
        began, own = time.perf_counter(), 0.0
        for name, error, seconds in engine(planned):
            print(f"{name.name} {error or 'finished'} {float(seconds):.1f} s", flush=True)
            own += float(seconds)
        whole = time.perf_counter() - began
    return {"whole": whole, "own": own, "processes": workers, "overhead": (whole * workers - own) / own}


if __name__ == "__main__":
    print({name: round(value, 4) for name, value in measure().items()})

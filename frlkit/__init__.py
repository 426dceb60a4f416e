"""A reproduction kit for *To be Robust or to be Fair* (Xu et al., ICML 2021).

Floors, top down; an import never climbs: ``__main__`` · wing ``commands`` · ``reproduce`` · wings ``audit``,
``report``, ``scale`` · ``runs``, ``notebook`` · ``training``, ``records`` · ``losses`` · ``evaluation``, ``recipes``,
``interval`` · ``attacks``, ``fairness`` · ``data`` · ``kernels``, ``sources``, ``drive`` · ``checkpoint``,
``distributed`` · ``models``, ``values``, ``disk``, ``origin``. ``theory`` stands alone. The numbered notebooks are
prose, parameters and calls to these.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# torch's threads wait for each other by spinning, for milliseconds; where a neighbour is busy that can cost a factor of
# ten. A short spin costs little on an idle machine. It is read when torch loads, and the user's own setting wins.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# So do those of OpenBLAS, which numpy and scipy bring along, and our matrices there are small: beside a busy neighbour
# one thread solves notebook 02's problems twenty to forty times sooner than two.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

__version__ = "0.2.0"

# The one place that names the public repository; the notebooks' badges and set-up cells repeat it (a test compares).
REPOSITORY = "https://github.com/frlkit/frlkit"

_checkout = Path(__file__).resolve().parents[1]
#: Where ``checkpoints/``, ``figures/`` and ``data/`` live: the checkout that holds this package, or, for a kit
#: installed without its checkout, the working directory.
PROJECT = _checkout if (_checkout / "notebooks").is_dir() else Path.cwd()


class KitError(ValueError):
    """Bad input, said in one sentence: the value, what is allowed, the fix.

    Notebooks and the command line show that sentence alone, without a traceback.
    """

    def _render_traceback_(self) -> list[str]:  # IPython's hook for an exception's display
        return [f"{type(self).__name__}: {self}"]


_quiet = False


@contextlib.contextmanager
def unwatched(quiet: bool = True) -> Iterator[None]:
    """Show no progress."""
    global _quiet
    before, _quiet = _quiet, quiet or _quiet
    try:
        yield
    finally:
        _quiet = before


def watched() -> bool:
    """Whether a person sees progress live: a terminal, Jupyter or Colab, but not papermill, nbval or a pipe."""
    if _quiet:
        return False
    return sys.stderr.isatty() or "JPY_SESSION_NAME" in os.environ or "google.colab" in sys.modules


def took(seconds: float) -> str:
    """A time in words: "38 s", "6 min", "31 h 5 min"."""
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{hours} h {minutes} min" if hours else f"{minutes} min"

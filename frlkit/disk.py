"""Files that the disk may refuse, and one process at a time on a run's folder.

What the disk refuses is said in one sentence, and however a holder ends, nothing stays locked: locks are the kernel's,
on open files, and go with the process.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from frlkit import KitError

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

OF_DISKS = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ENOTCONN}  # if no file is named
DRAFT = f".{'[0-9a-f]' * 8}.tmp"  # how the name of a file that is being written ends

_held: dict[Path, Hold] = {}  # what this process has locked


class WriteError(KitError, OSError):
    """A file could not be written; what was saved before is intact."""


class ReadError(KitError, OSError):
    """A file that may be whole could not be read."""


def not_written(path: Path, error: OSError) -> WriteError:
    """The sentence for a file that the disk did not take."""
    fix = "free space or choose another folder, and run the same again; what was saved before is intact"
    return WriteError(f"{path} cannot be written ({error.strerror or error}): {fix}")


def not_read(path: Path, error: OSError) -> ReadError:
    """The sentence for a file that the disk did not give."""
    return ReadError(f"{path} cannot be read ({error.strerror or error}): see to the disk, and run the same again")


def content(path: Path, kind: str, fix: str) -> bytes:
    """A file's bytes. Raises `KitError`, naming its kind and the fix, where there is none, else `ReadError`."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise KitError(f"there is no {kind} {path}: {fix}") from None
    except OSError as error:
        raise not_read(path, error) from None


def cache() -> Path:
    """The kit's folder in the user's cache. A relative ``XDG_CACHE_HOME`` does not count: its specification says so."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (root if root.is_absolute() else Path.home() / ".cache") / "frlkit"


def exists(path: Path) -> bool:
    """Whether there is such a file. Raises `ReadError` where the disk does not say."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise not_read(path, error) from None
    return True


@dataclass(eq=False)
class Hold:
    """A locked file, until `release` or the end of the process."""

    path: Path
    descriptor: int
    owner: tuple[int, int]  # process and thread

    def release(self) -> None:
        if _held.get(self.path) is not self:
            return
        del _held[self.path]
        with contextlib.suppress(OSError):
            if "fcntl" in globals():
                fcntl.flock(self.descriptor, fcntl.LOCK_UN)  # for children that were forked with it
        with contextlib.suppress(OSError):
            os.close(self.descriptor)


def lock(descriptor: int) -> bool:
    """Lock an open file, or not where another process has: it is free again when closed, or when this process ends."""
    try:
        if "fcntl" in globals():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise
        warnings.warn("this file system knows no locks: see to it that only one process works on a run", stacklevel=2)
    return True


def _owner() -> tuple[int, int]:
    return os.getpid(), threading.get_ident()


def claim(path: Path) -> Hold | None:
    """Make a file where it is missing, and lock it; None where another process, or thread, has it. Raises `OSError`."""
    path = path.absolute()
    descriptor, hold = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), None
    try:
        # whoever held it before may have removed it: this is then a lock on no name
        with contextlib.suppress(FileNotFoundError):
            if lock(descriptor) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                hold = _held[path] = Hold(path, descriptor, _owner())
    finally:
        if hold is None:
            os.close(descriptor)
    return hold


def _wait_for(folder: Path) -> Hold:
    """The lock of a run's folder, both made where they are missing. Raises `WriteError` where that fails."""
    waiting, missing = False, 0
    left = _held.get((folder / "run.lock").absolute())
    if left is not None and left.owner == _owner():  # by Ctrl-C at a bad moment: nobody waits for itself
        left.release()
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if hold := claim(folder / "run.lock"):
                return hold
            if not waiting:
                print(f"another process works on {folder}: waiting for it", flush=True)
            waiting = True
        except OSError as error:  # an empty folder goes with the process that held it: then once more
            missing += 1
            if missing > 50 or not isinstance(error, FileNotFoundError):
                raise not_written(folder, error) from None
        time.sleep(0.1)


def _litter(folder: Path, name: str = "") -> list[Path]:
    """Temporary files of writes, of one file or of all in a folder."""
    try:
        return list(folder.glob((glob.escape(name) or "?*") + DRAFT))
    except OSError as error:
        raise not_read(folder, error) from None


def sweep_up(folder: Path, name: str = "") -> None:
    """Remove what a kill left of its writes; a file that somebody is writing now is locked, and stays."""
    for file in _litter(folder, name):
        with contextlib.suppress(OSError):  # not ours to remove, or gone by now
            with open(file, "rb+") as draft:
                dead = lock(draft.fileno())
            if dead:
                file.unlink()


def at_rest(folder: Path) -> bool:
    """Whether no process works in a run's folder, or was killed in it."""
    return not exists(folder / "run.lock") and not _litter(folder)


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold a run's folder: a second process says so and waits until the first has finished, or has died.

    Raises `WriteError` where it cannot be held, or for any bare error about a file in it; at the end it is free again.
    """
    hold = None
    try:
        hold = _wait_for(folder)
        sweep_up(folder)
        yield
    except KitError:
        raise
    except OSError as error:
        named = isinstance(error.filename, (str, bytes, os.PathLike))
        path = Path(os.fsdecode(error.filename)) if named else folder
        if folder in path.parents or (error.filename is None and error.errno in OF_DISKS):
            raise not_written(path, error) from None
        raise
    finally:
        if hold is not None:
            for _ in range(2):  # left there, it would say that somebody works on a finished run
                with contextlib.suppress(OSError):
                    (folder / "run.lock").unlink(missing_ok=True)
            hold.release()
            with contextlib.suppress(OSError):
                folder.rmdir()  # where nothing was written

"""The native kernel's library: compiled from ``lenet5.cpp`` (a few seconds), kept in the user's cache, loaded."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import torch

from frlkit import disk

SOURCE = Path(__file__).with_name("lenet5.cpp")
FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-pthread")
TARGETS = {  # what torch calls this processor -> images side by side, compiler's name for the instructions
    "AVX2": ("-DFRLKIT_LANES=8", "-march=x86-64-v3"),
    "AVX512": ("-DFRLKIT_LANES=16", "-march=x86-64-v4"),
}

_INT, _POINTER = ctypes.c_int, ctypes.c_void_p
_HEAD = (ctypes.c_int64, _INT, _POINTER)  # images, threads, network
SIGNATURES = {
    "frlkit_pgd": (*_HEAD, *[_POINTER] * 5, _INT, _INT, _POINTER),
    "frlkit_features": (*_HEAD, *[_POINTER] * 2),
    "frlkit_features_backward": (*_HEAD, *[_POINTER] * 4),
}


# Flags of the compiler that would change results: no fused multiply-adds, or sums in another order.
CHANGING = (
    *("-Ofast", "-ffast-math", "-funsafe-math", "-fassociative-math", "-freciprocal-math", "-ffinite-math"),
    *("-ffp-", "-fapprox-func", "-fno-signed-zeros", "-fno-honor", "-fsingle-precision", "-frounding-math"),
    *("-fexcess-precision", "-mfpmath", "-mno-", "-mrecip", "-mdaz", "-mlow-precision", "-fdenormal-fp"),
)
# And those that bring such flags from elsewhere: a file's, another program's, those before and behind the compiler.
HIDING = ("@", "-Wp,", "-Xpreprocessor", "-Xclang", "-mllvm", "-specs", "--specs", "-include", "-imacros", "-wrapper")


def build() -> ctypes.CDLL:
    """Compile where no library of this source, compiler, flags and processor is cached, and load it.

    Raises `RuntimeError`, `OSError` or `subprocess.SubprocessError` where that cannot be, or the flags in ``CXX`` would
    change results.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine() not in ("x86_64", "AMD64") or capability not in TARGETS:
        raise RuntimeError(f"it needs an x86-64 processor with AVX2, this is {platform.machine()} with {capability}")
    compiler = shlex.split(os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "")
    if not compiler:
        raise RuntimeError("there is no C++ compiler (c++ or g++) on the PATH")
    if unwanted := [flag for flag in compiler if flag.startswith((*CHANGING, *HIDING))]:
        raise RuntimeError(f"{unwanted[0]} in CXX would change results, or bring flags that do: leave it out")
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    command = [*compiler, *FLAGS, *TARGETS[capability]]
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), version, *map(os.fsencode, command)])).hexdigest()[:16]
    command, name = [*command, str(SOURCE)], f"lenet5-{key}.so"
    try:
        folder = _cache()
        return _open(folder / name) if _is_whole(folder / name) else _compile(command, folder, name)
    except OSError:  # no cache of the user's own to write to: build for this process alone; once loaded, it may go
        with tempfile.TemporaryDirectory(prefix="frlkit-") as private:
            return _compile(command, Path(private), name)


def _cache() -> Path:
    """The kit's folder in the user's cache, which nobody else can enter; raises `OSError` where it is not the user's.

    Whoever can write there runs code here; and so does whoever can put another folder in its place.
    """
    folder = disk.cache()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status, above = folder.lstat(), folder.parent.stat()
    if stat.S_ISLNK(status.st_mode) or not _is_ours(status):
        raise PermissionError(f"{folder} is a link, or belongs to somebody else")
    if above.st_mode & 0o002 and not above.st_mode & stat.S_ISVTX:
        raise PermissionError(f"{folder.parent} can be written by others")
    if status.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def _is_ours(status: os.stat_result) -> bool:
    return not hasattr(os, "geteuid") or status.st_uid == os.geteuid()


def _compile(command: list[str], folder: Path, name: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # rename at the end: two processes may build at once
        draft = Path(scratch) / name
        done = subprocess.run([*command, "-o", str(draft)], capture_output=True, timeout=300)
        if done.returncode != 0 or not draft.exists():
            said = done.stderr.decode(errors="replace").splitlines()
            reason = next((line for line in said if "error" in line), f"exit status {done.returncode}")
            raise RuntimeError(f"{command[0]} failed: {reason}")
        content = draft.read_bytes()
        draft.write_bytes(content + hashlib.sha256(content).digest())
        draft.chmod(0o700)
        os.replace(draft, folder / name)
    return _open(folder / name)


def _is_whole(path: Path) -> bool:
    """Whether the file is the user's, nobody else can write it, and it ends in its own SHA-256.

    Loading a library cut short would kill the process, not raise.
    """
    try:
        with path.open("rb") as file:
            status, content = os.fstat(file.fileno()), file.read()
    except OSError:
        return False
    if not _is_ours(status) or status.st_mode & 0o022:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, arguments in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library

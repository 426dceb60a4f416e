"""The native kernel's library: compiled from ``lenet5.cpp`` (a few seconds), kept in the user's cache, loaded."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

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


def build() -> ctypes.CDLL:
    """Compile where no library of this source, compiler and processor is cached, and load it."""
    capability = torch.backends.cpu.get_cpu_capability()
    if platform.machine() not in ("x86_64", "AMD64") or capability not in TARGETS:
        raise RuntimeError(f"it needs an x86-64 processor with AVX2, this is {platform.machine()} with {capability}")
    compiler = shlex.split(os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or "")
    if not compiler:
        raise RuntimeError("there is no C++ compiler (c++ or g++) on the PATH")
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=60).stdout
    flags = (*FLAGS, *TARGETS[capability])
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), version, *map(str.encode, flags)])).hexdigest()[:16]
    name = f"lenet5-{key}.so"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frlkit"
    if _is_whole(folder / name):
        return _open(folder / name)
    command = [*compiler, *flags, str(SOURCE)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _compile(command, folder, name)
    except OSError:  # no cache to write to: build for this process alone; once loaded, the file may go
        with tempfile.TemporaryDirectory(prefix="frlkit-") as private:
            return _compile(command, Path(private), name)


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
        os.replace(draft, folder / name)
    return _open(folder / name)


def _is_whole(path: Path) -> bool:
    """Whether the file ends in its own SHA-256: loading a library cut short would kill the process, not raise."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, arguments in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library

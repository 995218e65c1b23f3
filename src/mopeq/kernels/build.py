"""Compiles the C files here with the machine's C compiler at first use, and keeps them in the user's cache folder.

A wheel carries the source only, so it installs anywhere; without a compiler the reason is returned, never raised.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("cpu.c")
ROUND = Path(__file__).with_name("round.c")
GPTQ = Path(__file__).with_name("gptq.c")
FACTORS = Path(__file__).with_name("factors.c")
FORMS = Path(__file__).with_name("forms.c")
DENSE = Path(__file__).with_name("dense.c")
TEAM, TILE, PRODUCT, HALVES = (
    Path(__file__).with_name(name) for name in ("team.h", "cpu_tile.h", "product.h", "halves.h")
)
PARTS = {
    SOURCE: (TEAM, TILE),
    GPTQ: (TEAM, PRODUCT),
    FACTORS: (TEAM, PRODUCT),
    FORMS: (TEAM, PRODUCT, HALVES),
    DENSE: (TEAM, PRODUCT, HALVES),
}  # what a file includes
FLAGS = ("-O3", "-std=gnu11", "-fno-strict-aliasing", "-Wno-psabi", "-shared", "-fPIC", "-pthread")
BEST = 3  # the widest set of instructions that product.h knows
OPENMP = re.compile(r"/lib(gomp|iomp5|omp)\b[^/]*$")
SECONDS = 300  # after which a compiler is given up on


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "mopeq"


def compiler() -> str | None:
    """The C compiler: $CC if it names a program, else the first of cc, gcc, clang."""
    return next(
        (found for name in (os.environ.get("CC", ""), "cc", "gcc", "clang") if (found := shutil.which(name))), None
    )


def is_private(path: Path) -> bool:
    """Whether nobody but this user (or root) can have written what lies there: code is loaded from it."""
    status = path.stat()
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & 0o022


@cache
def compiled(file: Path) -> tuple[ctypes.CDLL | None, str]:
    """(a C file as a library, "") or (None, why there is none), asked for once a process."""
    if os.name != "posix":
        return None, f"it is built on Linux and macOS, not on {platform.system()}"
    try:
        source = b"".join(part.read_bytes() for part in (file, *PARTS.get(file, ())))
        key = hashlib.sha256(source + repr((FLAGS, platform.machine())).encode()).hexdigest()[:16]
        folder = cache_folder()
        path = folder / f"{file.stem}-{platform.machine()}-{key}.so"
        if not path.exists():
            cc = compiler()
            if cc is None:
                return None, "it needs a C compiler (cc, gcc or clang)"
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            compile_to(path, cc, file)
        if not (is_private(folder) and is_private(path)):
            return None, f"others can write to {folder}"
        return ctypes.CDLL(str(path)), ""
    except subprocess.CalledProcessError as problem:
        lines = problem.stderr.strip().splitlines() or ["it said nothing"]
        return None, f"the C compiler failed: {lines[0]}"
    except (OSError, subprocess.TimeoutExpired) as problem:
        return None, f"it could not be built: {problem}"


@cache
def library() -> tuple[ctypes.CDLL | None, str]:
    """The kernels of cpu.c."""
    lib, why = compiled(SOURCE)
    return None if lib is None else declared(lib), why


def openmp() -> int:
    """The address of GOMP_parallel in the OpenMP that torch has loaded; 0 where there is none."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6 and OPENMP.search(fields[5])}
    for path in (None, *sorted(paths, key=lambda path: ("/torch" not in path, path))):  # first what was loaded for all
        with suppress(OSError, AttributeError):
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value or 0
    return 0


def use_threads(lib: ctypes.CDLL) -> None:
    """Has a library take torch's own threads (team.h)."""
    lib.mopeq_use_threads.argtypes = (ctypes.c_void_p,)
    lib.mopeq_use_threads.restype = None
    lib.mopeq_use_threads(openmp())


@cache
def rounding() -> ctypes.CDLL | None:
    """Rounding to nearest, and what is asked of weights before (round.c), or None: torch does the same."""
    lib, _ = compiled(ROUND)
    if lib is not None:
        address, count, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        lib.mopeq_round.argtypes = (address, count, size, size, count, count, count, address, address, address)
        lib.mopeq_round.restype = count
        lib.mopeq_extent.argtypes = (address, count, size, address, address)
        lib.mopeq_extent.restype = None
    return lib


def shared_job(file: Path) -> ctypes.CDLL | None:
    """A file that product.h serves, set to its best instructions; its `mopeq_<file>` does a job on so many threads."""
    lib, _ = compiled(file) if platform.machine() in ("x86_64", "AMD64") else (None, "")
    if lib is None or not getattr(lib, f"mopeq_{file.stem}_set")(BEST):
        return None
    getattr(lib, f"mopeq_{file.stem}").argtypes = (ctypes.c_void_p, ctypes.c_int64)
    use_threads(lib)
    return lib


@cache
def feedback() -> ctypes.CDLL | None:
    """Rounding with feedback and coordinate descent (gptq.c), or None: torch does the same, more slowly."""
    lib = shared_job(GPTQ)
    if lib is not None:
        lib.mopeq_gptq_tiled.argtypes = (ctypes.c_int, ctypes.c_int64)
    return lib


@cache
def factors() -> ctypes.CDLL | None:
    """Factors of moments (factors.c), or None: torch does the same, more slowly."""
    return shared_job(FACTORS)


@cache
def dense() -> ctypes.CDLL | None:
    """Products in float32 by AMX (dense.c), or None: torch's are better."""
    return shared_job(DENSE)


@cache
def forms() -> ctypes.CDLL | None:
    """What candidates change in the loss (forms.c), or None: torch does the same, more slowly."""
    return shared_job(FORMS)


def declared(lib: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions, as cpu.c has them; addresses are plain integers."""
    address, count, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    lib.mopeq_level.restype = count
    numbers, arrays = (size, size, size), (address, address, address)
    counts = (count, count, count)
    lib.mopeq_experts.argtypes = (*arrays, *numbers, address, size, address, size, *arrays, *counts, address, size)
    lib.mopeq_experts.restype = size
    lib.mopeq_order.argtypes = (count, address, count, count, size, *numbers, *arrays, count)
    lib.mopeq_order.restype = None
    use_threads(lib)
    return lib


def compile_to(path: Path, cc: str, source: Path) -> None:
    """The library at `path`, by one atomic rename, so that processes may build it at the same time."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        command = [cc, *FLAGS, str(source), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
        made.chmod(0o700)
        os.replace(made, path)

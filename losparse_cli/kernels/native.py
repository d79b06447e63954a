"""The C code beside this file, compiled once with the system's C compiler, kept by its hash, and called through ctypes.

Where there is no compiler, or it fails, one line is logged and `library` is None: everything still works, slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("c") / "sparse.c"
PATIENCE = 1800
"""Seconds after which a compiler is given up: it takes a minute of an idle core, and many of one that others want."""
FLAGS = ("-O3", "-fPIC", "-std=gnu11", "-Wno-psabi", "-fno-math-errno")
RUNTIMES = {"gcc": ("GOMP_parallel", ("-fopenmp",)), "clang": ("__kmpc_fork_call", ("-Xclang", "-fopenmp"))}
"""Compiler -> a name in the OpenMP that its code asks for, and the flags for it, which Apple's clang takes, too."""
ARM = ("aarch64", "arm64")
LEVELS = ("plain", "AVX2", "AVX-512", "AVX-512 with bfloat16")
"""Instructions that sparse.c chooses from on x86, by its number. On ARM 1 is NEON with products of bytes, 0 without."""

logger = logging.getLogger("losparse")


class Layer(ctypes.Structure):
    """`Layer` of sparse.c: addresses (0 where absent), sizes, and 0 for bfloat16 or 1 for float32."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("gap_starts", ctypes.c_void_p),
        ("U", ctypes.c_void_p),
        ("V", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("m", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("kept", ctypes.c_void_p),
        ("kept_count", ctypes.c_int64),
        ("bits", ctypes.c_int64),
        ("rest", ctypes.c_int64),
    )


class Classes(ctypes.Structure):
    """`Classes` of streams.h: sizes, and addresses of classes and tables."""

    _fields_ = (
        ("m", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("lane_rows", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("frequencies", ctypes.c_void_p),
        ("widths", ctypes.c_void_p),
        ("tables", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("level", ctypes.c_int32),
    )


class Library:
    """The loaded functions of sparse.c. level: index into LEVELS of what this processor can do."""

    few: Any
    walk: Any
    block: Any
    add_columns: Any
    expand: Any
    bits_of_gaps: Any
    bits_of_groups: Any
    starts_of_bits: Any
    decode_codes: Any
    encode_codes: Any
    coded: Any
    code_bits: Any
    pack_codes: Any
    rows_of_codes: Any
    large_pages: Any
    scale: Any
    step: Any

    def __init__(self, path: Path) -> None:
        handle = ctypes.CDLL(str(path))
        pointer, long, whole, layer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.POINTER(Layer)
        classes = ctypes.POINTER(Classes)
        for name, arguments in {
            "few": (layer, pointer, pointer, long, whole, whole),
            "walk": (layer, pointer, pointer, long, whole, whole),
            "block": (layer, whole, pointer, pointer, long, whole, whole),
            "add_columns": (pointer, pointer, pointer, long, long, long, whole, whole),
            "expand": (layer, pointer, long, long, whole, whole, whole),
            "bits_of_gaps": (pointer, long, pointer, long, long, long, long, whole, pointer, pointer, whole),
            "bits_of_groups": (pointer, whole, whole, whole, long, long, pointer, pointer, whole),
            "starts_of_bits": (pointer, long, long, long, pointer),
            "decode_codes": (classes, pointer, pointer, pointer, pointer, long, whole, pointer),
            "encode_codes": (classes, pointer, pointer, pointer, pointer, pointer),
            "coded": (layer, pointer, pointer, long, whole, whole, whole),
            "code_bits": (pointer, long, whole, pointer, whole),
            "pack_codes": (layer, pointer, whole, whole, whole),
            "rows_of_codes": (layer, pointer, long, long, whole, whole, pointer, whole, whole),
            "large_pages": (pointer, long, long, long),
            "scale": (layer, pointer, long, whole, pointer, whole, whole),
            "step": (pointer, long, pointer),
        }.items():
            function = getattr(handle, f"losparse_{name}")
            function.argtypes, function.restype = arguments, ctypes.c_int
            setattr(self, name, function)
        self.encode_codes.restype = long
        self.level: int = handle.losparse_level()


@cache
def library() -> Library | None:
    """The compiled kernels, or None where there are none."""
    try:
        return Library(_compiled())
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        reason = next((line for line in str(output).splitlines() if line.strip()), type(error).__name__)
        logger.warning("Compressed layers run on slower kernels, because sparse.c was not compiled: %s", reason.strip())
        return None


def is_ready() -> bool:
    """Whether `library` takes no time: it is compiled, or cannot be."""
    try:
        return _plan()[0].is_file()
    except OSError:
        return True


def folder() -> Path:
    """Where compiled kernels are kept: $LOSPARSE_CACHE or ~/.cache/losparse, and kernels in it."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LOSPARSE_CACHE") or Path(cache_home) / "losparse") / "kernels"


def _plan() -> tuple[Path, tuple[str, ...], frozenset[str]]:
    """Where the library lies or is to lie, the compiler, and those of RUNTIMES that are there."""
    compiler, runtimes = _compiler(), _runtimes()
    # The processor is no part of the name: the code for each kind is in the library, and chosen when it runs.
    sources = [path.read_text(encoding="utf-8") for path in sorted(SOURCE.parent.glob("*.[ch]"))]
    binary = os.path.realpath(shutil.which(compiler[0]) or "")  # cc may be another one tomorrow
    machine = (platform.system(), platform.machine())
    made_of = (*sources, *compiler, binary, *FLAGS, str(RUNTIMES), *sorted(runtimes), *machine)
    return folder() / f"sparse-{hashlib.sha256(chr(0).join(made_of).encode()).hexdigest()[:16]}.so", compiler, runtimes


def _compiled() -> Path:
    path, compiler, runtimes = _plan()
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        ways = _ways(compiler, runtimes)
        for way in ways:
            try:
                linked = _linked(compiler, way, Path(scratch))
                break
            except (OSError, subprocess.CalledProcessError):
                if way is ways[-1]:
                    raise
        if not any("openmp" in flag for flag in way):
            logger.warning("Compressed layers run on one thread: %s and torch share no OpenMP.", compiler[0])
        os.replace(linked, path)
    return path


def _ways(compiler: tuple[str, ...], runtimes: frozenset[str]) -> list[tuple[str, ...]]:
    """Flags beside FLAGS, the best first: old compilers know no products of bytes on ARM, or another OpenMP."""
    said = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=PATIENCE).stdout
    kind = "clang" if "clang" in said.lower() else "gcc"
    threads = [RUNTIMES[kind][1], ()] if kind in runtimes else [()]
    known = ((), ("-DNO_DOT",)) if platform.machine() in ARM else ((),)
    return [(*some, *less) for some in threads for less in known]


def _linked(compiler: tuple[str, ...], way: tuple[str, ...], scratch: Path) -> Path:
    """The library, which this process could load. CalledProcessError, or OSError if it cannot be loaded."""
    unlinked, linked = scratch / "sparse.o", scratch / "sparse.so"
    # Linked without -fopenmp: the only OpenMP in the process shall be torch's, whose threads are there already.
    undefined = ("-undefined", "dynamic_lookup") if platform.system() == "Darwin" else ()
    _run([*compiler, *FLAGS, *way, "-c", str(SOURCE), "-o", str(unlinked)])
    _run([*compiler, "-shared", *undefined, str(unlinked), "-o", str(linked)])
    ctypes.CDLL(str(linked))
    return linked


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=PATIENCE)


def _compiler() -> tuple[str, ...]:
    named = shlex.split(os.environ.get("CC", ""))
    for command in (named, ["cc"], ["gcc"], ["clang"]):
        if command and shutil.which(command[0]):
            return tuple(command)
    raise OSError("no C compiler found (cc, gcc or clang, or one named by CC)")


def _runtimes() -> frozenset[str]:
    """Those of RUNTIMES that torch's OpenMP is; its names are then there for what is loaded later."""
    found = [path for path in dict.fromkeys(_loaded()) if re.match(r"lib[gi]?omp.*\.(so|dylib)", Path(path).name)]
    for path in sorted(found, key=lambda path: "torch" not in path):  # others may have brought their own
        try:
            handle = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        there = frozenset(kind for kind, (name, _) in RUNTIMES.items() if hasattr(handle, name))
        if there:
            return there
    return frozenset()


def _loaded() -> list[str]:
    """Paths of the libraries of this process."""
    system: Any = ctypes.CDLL(None)
    if hasattr(system, "_dyld_image_count"):  # macOS
        system._dyld_get_image_name.restype = ctypes.c_char_p
        return [os.fsdecode(system._dyld_get_image_name(k) or b"") for k in range(system._dyld_image_count())]
    try:
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [parts[5] for line in mapped if len(parts := line.split(maxsplit=5)) == 6]

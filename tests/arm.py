"""The C code as ARM processors run it, without one: compiled for them by zig, and run by an emulator in this process.

The emulator sees the memory of this process at its own addresses, so that whoever calls the code notices nothing.
"""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from losparse_cli.kernels import native

LEVELS = ("NEON", "NEON with products of bytes")
RUNTIME = Path(__file__).with_name("arm_runtime.c")
BASE, STACK, END = 1 << 32, 2 << 32, 3 << 32  # where nothing of a process on Linux lies
STACK_BYTES = 1 << 22
PAGE = 4096


def compiled(folder: Path) -> Path:
    """An executable of sparse.c and what it needs of a C library; without OpenMP."""
    program, objects = folder / "arm.elf", []
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-musl"]
    for source in (RUNTIME, native.SOURCE):
        objects.append(str(folder / f"{source.stem}.o"))
        command = [*compiler, *native.FLAGS, "-fno-PIC", "-c", str(source), "-o", objects[-1]]
        subprocess.run(command, check=True, capture_output=True)
    link = ["-static", "-nostdlib", f"-Wl,--image-base={BASE:#x}", "-Wl,-e,losparse_level", "-o", str(program)]
    subprocess.run([*compiler, *objects, *link], check=True, capture_output=True)
    return program


class Emulated:
    """A stand-in for `native.Library`. level: of LEVELS. calls: of each function, so far."""

    def __init__(self, program: Path, level: int) -> None:
        import unicorn
        from unicorn import arm64_const

        self._registers = arm64_const
        self._machine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self._machine.ctl_set_cpu_model(arm64_const.UC_CPU_ARM64_MAX)
        self._machine.reg_write(arm64_const.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # registers of NEON may be used
        self._mapped: list[range] = []
        elf = program.read_bytes()
        for at, content, size in _segments(elf):
            self._own(range(at // PAGE * PAGE, -(-(at + size) // PAGE) * PAGE))
            self._machine.mem_write(at, content)
        self._own(range(STACK, STACK + STACK_BYTES))
        self._own(range(END, END + PAGE))
        self._functions = dict(_functions(elf))
        self._machine.hook_add(unicorn.UC_HOOK_MEM_READ_UNMAPPED | unicorn.UC_HOOK_MEM_WRITE_UNMAPPED, self._share)
        self.level = level
        self.calls: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        address = self._functions.get(f"losparse_{name}")
        if address is None:
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.calls[name] += 1
            self._run(self._functions["arm_begin"], [])
            return self._run(address, [_number(argument) for argument in arguments])

        return call

    def _run(self, address: int, arguments: list[int]) -> int:
        """As ARM's procedures are called: eight numbers in registers, the others on the stack."""
        more = b"".join(number.to_bytes(8, "little") for number in arguments[8:])
        top = (STACK + STACK_BYTES - len(more)) // 16 * 16
        self._machine.mem_write(top, more)
        self._machine.reg_write(self._registers.UC_ARM64_REG_SP, top)
        self._machine.reg_write(self._registers.UC_ARM64_REG_LR, END)
        for k, number in enumerate(arguments[:8]):
            self._machine.reg_write(self._registers.UC_ARM64_REG_X0 + k, number)
        self._machine.emu_start(address, END)
        found: int = self._machine.reg_read(self._registers.UC_ARM64_REG_W0)
        return found - (found >> 31 << 32)

    def _own(self, addresses: range) -> None:
        """Memory of the machine's own."""
        for free in _without(addresses, self._mapped):
            self._machine.mem_map(free.start, len(free))
            self._mapped.append(free)

    def _share(self, machine: Any, access: int, address: int, size: int, value: int, data: Any) -> bool:
        """Memory of this process, at its address; an address that it has not ends the run."""
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
            begin, end = (int(number, 16) for number in line.split(maxsplit=1)[0].split("-"))
            if begin <= address < end and " rw" in line:
                for free in _without(range(begin, end), self._mapped):
                    machine.mem_map_ptr(free.start, len(free), 3, ctypes.c_void_p(free.start))
                    self._mapped.append(free)
                return True
        return False


def _number(argument: Any) -> int:
    argument = getattr(argument, "_obj", argument)  # of byref
    if isinstance(argument, ctypes.Structure | ctypes.Array):
        return ctypes.addressof(argument)
    return int(argument or 0) & (1 << 64) - 1


def _without(addresses: range, taken: list[range]) -> list[range]:
    """What of them is in none of those taken."""
    found = [addresses]
    for other in taken:
        before = [range(one.start, min(one.stop, other.start)) for one in found]
        behind = [range(max(one.start, other.stop), one.stop) for one in found]
        found = [part for part in before + behind if len(part)]
    return found


# --- an executable (ELF64) ----------------------------------------------------------------------------


def _segments(elf: bytes) -> Iterator[tuple[int, bytes, int]]:
    """(address, what lies there, size) of all that is loaded."""
    table, size, count = struct.unpack_from("<Q", elf, 32)[0], *struct.unpack_from("<HH", elf, 54)
    for k in range(count):
        kind, _, offset, address, _, stored, wanted, _ = struct.unpack_from("<IIQQQQQQ", elf, table + k * size)
        if kind == 1:
            yield address, elf[offset : offset + stored], wanted


def _functions(elf: bytes) -> Iterator[tuple[str, int]]:
    """(name, address) of its symbols."""
    table, (size, count) = struct.unpack_from("<Q", elf, 40)[0], struct.unpack_from("<HH", elf, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, table + k * size) for k in range(count)]
    for _, kind, _, _, offset, length, link, _, _, step in sections:
        if kind == 2:
            for at in range(offset, offset + length, step):
                name, _, _, _, address, _ = struct.unpack_from("<IBBHQQ", elf, at)
                begin = sections[link][4] + name
                yield elf[begin : elf.index(0, begin)].decode(), address

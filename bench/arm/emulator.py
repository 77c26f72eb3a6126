"""Counts the instructions that programs for ARM execute, under qemu."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from planish.backends.bundle import toolchain
from planish.errors import ToolchainError
from planish.targets import ArmLevel

_SECONDS = 1200


@dataclass(frozen=True)
class Counts:
    """How often a program executed its instructions: by address, and by function."""

    addresses: dict[int, int]
    functions: dict[str, int]

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.functions.values())


@dataclass(frozen=True)
class Emulator:
    """qemu with a plugin that counts.

    Attributes:
        folder: for the plugin and its output.
        level: of the programs that it runs, on a processor that has no more.
    """

    folder: Path
    level: ArmLevel

    @cached_property
    def _plugin(self) -> Path:
        library = self.folder / "libicount.so"
        source = Path(__file__).with_name("icount.c")
        toolchain.call(["gcc", "-shared", "-fPIC", "-O2", source, "-o", library], self.folder)
        return library

    def counts(self, program: Path, symbol: str = "", words: Sequence[str] = ()) -> Counts:
        """Of all functions whose name contains ``symbol``; the program runs in its own folder.

        Raises:
            ToolchainError: a tool is missing, or the program failed.
        """
        out = self._run(program, words, f"symbol={symbol}")
        addresses, functions = dict[int, int](), dict[str, int]()
        for line in out.read_text().splitlines():
            address, times, *function = line.split(" ")
            addresses[int(address, 16)] = int(times)
            name = " ".join(function)
            functions[name] = functions.get(name, 0) + int(times)
        return Counts(addresses, functions)

    def window(self, program: Path, symbol: str, skip: int, length: int) -> list[int]:
        """Addresses of ``length`` executed instructions, in order, after the first ``skip``."""
        trace = self.folder / "trace"
        self._run(program, (), f"symbol={symbol},trace={trace},skip={skip},length={length}")
        return [int(line, 16) for line in trace.read_text().splitlines()]

    def _run(self, program: Path, words: Sequence[str], options: str) -> Path:
        out = self.folder / "counts"
        cpu = toolchain.EMULATED[self.level.isa]
        plugin = ["-cpu", cpu, "-plugin", f"{self._plugin},out={out},{options}"]
        command = [*toolchain.emulator(self.level), *plugin, str(program), *words]
        done = subprocess.run(
            command, cwd=program.parent, capture_output=True, text=True, check=False, timeout=_SECONDS
        )
        if done.returncode:
            raise ToolchainError(f"{program.name} failed under qemu", where=" ".join(command), why=done.stderr.strip())
        return out

    def instructions(self, program: Path) -> dict[int, str]:
        """The program's code: address to text, without jump targets' names."""
        _, tools = toolchain.compiler(self.level)
        text = toolchain.call([f"{tools}objdump", "-d", "--no-show-raw-insn", program], self.folder)
        found = re.findall(r"^\s*([0-9a-f]+):\s+(.*)$", text, re.MULTILINE)
        return {int(address, 16): re.split(r"//|;|@", line)[0].strip() for address, line in found}

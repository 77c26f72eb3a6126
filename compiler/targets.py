"""Targets: what a machine can do, as data. A string such as ``"cpu"`` is only a spelling of one."""

from __future__ import annotations

import logging
import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path

from planish.costs import CostTable, Machine, choose_table, shipped_table
from planish.errors import TargetError, UnknownNameError

log = logging.getLogger("planish")


@dataclass(frozen=True)
class Target:
    """One machine to compile for.

    Attributes:
        name: the spelling users write.
        backend: the backend that lowers for it, ``"tvm"`` or ``"reference"``.
        doc: one line for the table of targets.
        arch: machine code: ``"x86_64"``, ``"aarch64"``, ``"arm"``, or ``""`` where the backend generates none.
        isa: instruction-set level that kernels are written for: ``"avx2"``, ``"avx512"`` or one of ``ARM_LEVELS``;
            ``"host"`` is resolved when compiling.
        mcpu: LLVM's processor name, which decides scheduling and the allowed instructions.
        vector_bytes: width of a vector register in bytes.
        vector_registers: number of architectural vector registers.
        l2_bytes: private second-level cache of a core in bytes.
        llc_bytes: last-level cache in bytes.
        format: of the layers that quantize-uniform turns into integer codes, as in ``Format.parse``; empty for fp32.
        cores: cores that share the last-level cache; code is chosen for as many threads, and runs on any number.
        costs: measured times of linear layers, which decide their blocking; None for the kernels' own defaults.
    """

    name: str
    backend: str
    doc: str
    arch: str = ""
    isa: str = ""
    mcpu: str = ""
    vector_bytes: int = 0
    vector_registers: int = 0
    l2_bytes: int = 0
    llc_bytes: int = 0
    cores: int = 0
    format: str = ""
    costs: CostTable | None = None

    @property
    def is_arm(self) -> bool:
        """Whether its kernels are those for ARM."""
        return self.isa in ARM_LEVELS

    @property
    def is_cross(self) -> bool:
        """Whether its machine code is for ARM, which this machine does not run."""
        return self.arch in ("aarch64", "arm")

    @property
    def twin(self) -> Target:
        """The same kernels as this ARM target's, operation by operation, as code for x86-64."""
        return replace(self, arch="x86_64", mcpu="haswell")

    @property
    def triple(self) -> str:
        """LLVM's name of an ARM target's platform."""
        return ARM_LEVELS[self.isa].triple

    @property
    def lanes(self) -> int:
        """fp32 values in one vector register."""
        return self.vector_bytes // 4

    @property
    def shared_rows(self) -> int:
        """Fewest rows that the cores share out evenly enough: where there are fewer, long rows are cut."""
        return 2 * self.cores

    @property
    def machine(self) -> Machine:
        """This machine, or the processor of an ARM target, with caches and cores, as cost tables describe it."""
        modelled = f"{self.mcpu}, modelled at {GIGAHERTZ:g} GHz and {GIGABYTES:g} GB/s"
        return Machine(
            modelled if self.is_cross else _host_processor(), self.isa, self.l2_bytes, self.llc_bytes, self.cores
        )

    @staticmethod
    def parse(spelling: str | Target) -> Target:
        """The target that a string names; ``"cpu"`` becomes the best level this machine runs.

        ``"arm-int4:cortex-a55"`` is ``"arm-int4"`` for that processor: its order of instructions and its caches.

        Raises:
            UnknownNameError: no target, or no processor, has that name.
            TargetError: this machine, or the processor, cannot run the target's code.
        """
        if isinstance(spelling, Target):
            return spelling
        name, _, mcpu = spelling.partition(":")
        if name not in TARGETS:
            raise UnknownNameError(f"unknown target {name!r}", fix="use one of: " + ", ".join(TARGETS))
        target = TARGETS[name]
        if mcpu:
            return target.tuned(mcpu)
        if target.isa == "host":
            return replace(Target.host(), name=target.name, format=target.format)
        if target.is_arm:
            return target._with_costs()
        if target.isa and target.isa not in host_isa_levels():
            raise TargetError(
                f"target {target.name!r} needs {target.isa.upper()}, which this processor does not have",
                why=f"the processor offers: {', '.join(host_isa_levels()) or 'none of the supported levels'}",
                fix="use target='cpu' to get the best level this machine runs",
            )
        return replace(target, costs=shipped_table(target.isa)) if target.isa else target

    def tuned(self, mcpu: str) -> Target:
        """This ARM target for one processor, whatever its level: code keeps to the target's instructions.

        Raises:
            UnknownNameError: there is no such processor.
            TargetError: the target is not for ARM, or the processor lacks its instructions.
        """
        if not self.is_arm:
            raise TargetError(f"target {self.name!r} cannot be tuned for {mcpu!r}", why="only ARM targets can")
        fit = [name for name, cpu in ARM_PROCESSORS.items() if ARM_LEVELS[self.isa] in cpu.levels]
        if mcpu not in ARM_PROCESSORS:
            raise UnknownNameError(f"unknown processor {mcpu!r}", fix="use one of: " + ", ".join(fit))
        if mcpu not in fit:
            raise TargetError(
                f"target {self.name!r} needs {self.isa}, which {mcpu} does not have",
                why=f"{mcpu} has: {', '.join(level.isa for level in ARM_PROCESSORS[mcpu].levels)}",
                fix="use one of: " + ", ".join(fit),
            )
        return replace(self, mcpu=mcpu, l2_bytes=ARM_PROCESSORS[mcpu].l2_bytes)._with_costs()

    def _with_costs(self) -> Target:
        """With the cost table of this processor; a measured one that is damaged is not used, which the log says."""
        choice = choose_table(self.machine)
        if choice.problem is not None:
            log.warning("%s are used as cost table:\n%s", choice.origin, choice.problem)
        return replace(self, costs=choice.table)

    @staticmethod
    def host() -> Target:
        """The best CPU target of this machine, with the cost table measured on it or the shipped one.

        A measured one that is damaged is not used, which the log says.

        Raises:
            TargetError: the processor has none of the instruction-set levels planish generates.
        """
        for name in ("cpu-avx512", "cpu-avx2"):
            if TARGETS[name].isa in host_isa_levels():
                table = TARGETS[name]
                llc_bytes, cores = _host_last_level(table.llc_bytes, table.cores)
                found = replace(table, l2_bytes=_host_l2_bytes(table.l2_bytes), llc_bytes=llc_bytes, cores=cores)
                return found._with_costs()
        raise TargetError(
            f"this processor ({platform.machine()}) has neither AVX2 with FMA nor AVX-512",
            why="planish's CPU kernels are written for those levels",
            fix="use target='reference' to run the optimised graph in PyTorch",
        )


@dataclass(frozen=True)
class ArmLevel:
    """A set of instructions that ARM code may use.

    Attributes:
        isa: its name.
        doc: which machines have it.
        target: what names of targets begin with.
        triple: LLVM's name of the platform.
        mcpu: processor that code is tuned for if none is named.
        features: LLVM's, beyond the processor's own or taken away from it.
        registers: of 16 bytes.
        order: levels of an architecture have the instructions of those before.
    """

    isa: str
    doc: str
    target: str
    triple: str
    mcpu: str
    features: tuple[str, ...]
    registers: int
    order: int

    @property
    def arch(self) -> str:
        """``"aarch64"`` or ``"arm"``."""
        return "aarch64" if self.triple.startswith("aarch64") else "arm"


_LINUX = "aarch64-linux-gnu"
_NO_SVE = ("-sve", "-sve2")
"""Levels promise none, also where the processor that code is tuned for has it."""

_NEON = ("+neon", "+vfp4")
_LEVELS = (
    ArmLevel("armv8-dotprod", "ARMv8.2 with dot products", "arm", _LINUX, "cortex-a76", ("+dotprod", *_NO_SVE), 32, 1),
    ArmLevel("armv8", "any 64-bit ARM", "armv8", _LINUX, "cortex-a53", ("-dotprod", *_NO_SVE), 32, 0),
    ArmLevel("armv8-i8mm", "ARMv8.6, matrix products", "armv8-i8mm", _LINUX, "neoverse-n2", ("+i8mm", *_NO_SVE), 32, 2),
    ArmLevel("armv7", "32-bit ARM with NEON", "armv7", "armv7a-linux-gnueabihf", "cortex-a7", _NEON, 16, 0),
)
ARM_LEVELS = {level.isa: level for level in _LEVELS}

GIGAHERTZ, GIGABYTES = 2.0, 10.0
"""Clock and bytes a second from memory that cost tables of ARM processors assume: nothing is timed on ARM."""


@dataclass(frozen=True)
class ArmProcessor:
    """A processor: the highest level that it has, and the second-level cache of a core, as it is usually built."""

    isa: str
    l2_bytes: int

    @property
    def levels(self) -> tuple[ArmLevel, ...]:
        """All whose code it runs as its own architecture's."""
        best = ARM_LEVELS[self.isa]
        found = [level for level in _LEVELS if level.arch == best.arch and level.order <= best.order]
        return tuple(sorted(found, key=lambda level: level.order))


ARM_PROCESSORS = {
    name: ArmProcessor(isa, kib << 10)
    for isa, kib, names in (
        ("armv7", 256, "cortex-a7 cortex-a15 cortex-a17 cortex-a32"),
        ("armv8", 512, "cortex-a35 cortex-a53 cortex-a57 cortex-a72 cortex-a73"),
        ("armv8-dotprod", 128, "cortex-a55"),
        ("armv8-dotprod", 256, "cortex-a75 cortex-a76 cortex-a77"),
        ("armv8-dotprod", 512, "cortex-a78 cortex-x1"),
        ("armv8-dotprod", 1024, "neoverse-n1"),
        ("armv8-i8mm", 256, "cortex-a510 cortex-a520"),
        ("armv8-i8mm", 512, "cortex-a710 cortex-a715 cortex-a720"),
        ("armv8-i8mm", 1024, "cortex-x2 cortex-x3 neoverse-n2 neoverse-v1 neoverse-v2"),
    )
    for name in names.split()
}


def _arm_targets() -> list[Target]:
    """For every level one in fp32 and one for each format of layers."""
    formats = (
        ("", "", ", as a bundle"),
        ("-int8", "w8a8", ", layers on 8-bit codes (w8a8)"),
        ("-int4", "w4a8-g32", ", weights in 4 bits (w4a8-g32), the head in 8"),
        ("-int2", "w2a8-g32", ", weights in 2 bits (w2a8-g32), the head in 8"),
    )
    return [
        Target(
            level.target + suffix,
            "tvm",
            level.doc + doc,
            arch=level.arch,
            isa=level.isa,
            mcpu=level.mcpu,
            vector_bytes=16,
            vector_registers=level.registers,
            l2_bytes=ARM_PROCESSORS[level.mcpu].l2_bytes,
            llc_bytes=2 << 20,
            cores=4,
            format=form,
        )
        for level in _LEVELS
        for suffix, form, doc in formats
    ]


TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target("cpu", "tvm", "this machine's best level: AVX-512 where it has it, else AVX2", isa="host"),
        Target("cpu-int8", "tvm", "as cpu, layers on 8-bit codes (w8a8)", isa="host", format="w8a8"),
        Target("cpu-int4", "tvm", "as cpu, weights in 4 bits (w4a8-g32), the head in 8", isa="host", format="w4a8-g32"),
        Target(
            "cpu-avx512",
            "tvm",
            "x86-64 with AVX-512 (F, BW, DQ, VL)",
            arch="x86_64",
            isa="avx512",
            mcpu="skylake-avx512",
            vector_bytes=64,
            vector_registers=32,
            l2_bytes=1 << 20,
            llc_bytes=32 << 20,
            cores=8,
        ),
        Target(
            "cpu-avx2",
            "tvm",
            "x86-64 with AVX2 and FMA",
            arch="x86_64",
            isa="avx2",
            mcpu="haswell",
            vector_bytes=32,
            vector_registers=16,
            l2_bytes=512 << 10,
            llc_bytes=16 << 20,
            cores=4,
        ),
        *_arm_targets(),
        Target("reference", "reference", "runs the rewritten graph in eager PyTorch: the oracle of the tests"),
    )
}

_ISA_FLAGS = {"avx2": {"avx2", "fma"}, "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"}}


def host_isa_levels() -> tuple[str, ...]:
    """The instruction-set levels of this processor, weakest first."""
    flags = set(_processor_facts().get("flags", "").split())
    return tuple(level for level, need in _ISA_FLAGS.items() if need <= flags)


def _host_processor() -> str:
    """Name and numbers of this processor: virtual ones of several generations have the same name."""
    facts = _processor_facts()
    numbers = [f"{what} {facts[key]}" for what, key in (("family", "cpu family"), ("model", "model")) if key in facts]
    return ", ".join([facts.get("model name", platform.machine()), *numbers])


def _processor_facts() -> dict[str, str]:
    """What the kernel says of the first processor, by name; nothing where it does not say it in the way of x86."""
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _host_l2_bytes(default: int) -> int:
    size = os.sysconf("SC_LEVEL2_CACHE_SIZE") if "SC_LEVEL2_CACHE_SIZE" in os.sysconf_names else 0
    return size if size > 0 else default


CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def _host_last_level(llc_bytes: int, cores: int) -> tuple[int, int]:
    """Size of the last-level cache that core 0 uses, and how many of this process's cores share it.

    From the kernel's description of the caches: ``sysconf`` may give all caches of a socket together. The arguments
    are what to take where there is none.
    """
    sizes = {_read(c / "level"): c for c in CACHES.glob("index*") if _read(c / "size").endswith("K")}
    if not sizes:
        return llc_bytes, cores
    last = sizes[max(sizes)]
    shared = {n for part in _read(last / "shared_cpu_list").split(",") for n in _span(part)}
    usable = len(shared & os.sched_getaffinity(0))
    return int(_read(last / "size").removesuffix("K")) << 10, usable or cores


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _span(part: str) -> range:
    """``2-5`` as 2, 3, 4, 5."""
    first, _, last = part.partition("-")
    return range(int(first), int(last or first) + 1) if first.isdigit() else range(0)

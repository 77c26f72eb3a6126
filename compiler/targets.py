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
        arch: ``"x86_64"``, or ``""`` where the backend does not generate code.
        isa: instruction-set level, ``"avx2"`` or ``"avx512"``; ``"host"`` is resolved when compiling.
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
        """Whether its code is for ARM, which this machine does not run."""
        return self.arch in ("aarch64", "arm")

    @property
    def triple(self) -> str:
        """LLVM's name of an ARM target's platform."""
        return "aarch64-linux-gnu" if self.arch == "aarch64" else "armv7a-linux-gnueabihf"

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
        """This machine, with the target's caches and cores, as cost tables describe it."""
        return Machine(_host_processor(), self.isa, self.l2_bytes, self.llc_bytes, self.cores)

    @staticmethod
    def parse(spelling: str | Target) -> Target:
        """The target that a string names; ``"cpu"`` becomes the best level this machine runs.

        Raises:
            UnknownNameError: no target has that name.
            TargetError: this machine cannot run the target's code.
        """
        if isinstance(spelling, Target):
            return spelling
        if spelling not in TARGETS:
            raise UnknownNameError(f"unknown target {spelling!r}", fix="use one of: " + ", ".join(TARGETS))
        target = TARGETS[spelling]
        if target.isa == "host":
            return replace(Target.host(), name=target.name, format=target.format)
        if target.is_arm:
            return target
        if target.isa and target.isa not in host_isa_levels():
            raise TargetError(
                f"target {target.name!r} needs {target.isa.upper()}, which this processor does not have",
                why=f"the processor offers: {', '.join(host_isa_levels()) or 'none of the supported levels'}",
                fix="use target='cpu' to get the best level this machine runs",
            )
        return replace(target, costs=shipped_table(target.isa)) if target.isa else target

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
                choice = choose_table(found.machine)
                if choice.problem is not None:
                    log.warning("%s are used as cost table:\n%s", choice.origin, choice.problem)
                return replace(found, costs=choice.table)
        raise TargetError(
            f"this processor ({platform.machine()}) has neither AVX2 with FMA nor AVX-512",
            why="planish's CPU kernels are written for those levels",
            fix="use target='reference' to run the optimised graph in PyTorch",
        )


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
        *(
            Target(
                f"arm{suffix}",
                "tvm",
                doc,
                arch="aarch64",
                isa="armv8-dotprod",
                mcpu="cortex-a76",
                vector_bytes=16,
                vector_registers=32,
                l2_bytes=256 << 10,
                llc_bytes=2 << 20,
                cores=4,
                format=form,
            )
            for suffix, form, doc in (
                ("", "", "ARMv8.2 with dot products, as a bundle"),
                ("-int8", "w8a8", "as arm, layers on 8-bit codes (w8a8)"),
                ("-int4", "w4a8-g32", "as arm, weights in 4 bits (w4a8-g32), the head in 8"),
                ("-int2", "w2a8-g32", "as arm, weights in 2 bits (w2a8-g32), the head in 8"),
            )
        ),
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

"""Prints a benchmark's result as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_MIB = 1 << 20


def show(result: dict[str, Any], console: Console) -> None:
    """Print the JSON object of a benchmark for people: limits, contenders, kernels, the extra figures."""
    if result["bench"] == "perplexity":
        _show_perplexity(result, console)
        return
    if result["bench"] == "precision":
        _show_precision(result, console)
        return
    if result["bench"] == "arm":
        _show_arm(result, console)
        return
    machine, limits = result["machine"], result["limits"]
    by_isa = ", ".join(f"{isa} {gflops:.0f}" for isa, gflops in limits["fma_gflops_by_isa"].items())
    console.print(f"{machine['cpu']}, {result['threads']} threads, torch {machine['torch']}", highlight=False)
    console.print(
        f"limits: {limits['fma_gflops']:.0f} GFLOP/s fp32 FMA ({limits['isa']}; {by_isa}), "
        f"{limits['read_gbs']:.1f} GB/s read",
        highlight=False,
    )
    if result["bench"] == "qgemm":
        _show_qgemm(result, console)
        return
    if result["bench"] == "softmax":
        console.print(_softmax(result["rows"]))
    else:
        console.print(_rows(result["rows"]))
    for absent in result["absent"]:
        console.print(Text(f"no {absent['name']} row: {absent['reason']}"))
    if result["bench"] == "softmax":
        console.print(Text(result["memory"]))
        return
    console.print(_kernels(result["kernels"]))
    if result["bench"] == "padding":
        console.print(_sets(result["sets"]))
    figures = {"encoder": _figures, "padding": _padding_figures}.get(result["bench"], _suite_figures)
    for line in figures(result):
        console.print(Text(line))


_QUALITY = {
    "cosine_min": ("cosine min", ".7f"),
    "pearson": ("Pearson", ".4f"),
    "top1_equal": ("top-1 equal", ".0%"),
    "max_rel": ("max rel. Δ", ".1e"),
    "max_abs": ("max |Δ|", ".1e"),
}
"""Column and format of each figure of a row's quality that is shown."""


def show_families(result: dict[str, Any], console: Console) -> None:
    """Print the JSON object of the families benchmark for people: a row for each family, the reasons, the sums."""
    columns = ("family", "kind", "dynamic", "native", "max err", "match", "compile s", "export s")
    cells = [
        (
            row["name"],
            row["kind"],
            row["dynamic"] or "",
            f"{row['native_share']:.0%}",
            _figure(row["max_rel_err"], ".0e"),
            "yes" if row["match"] else "no",
            _figure(row["compile_s"], ".1f"),
            _figure(row["export_s"], ".1f"),
        )
        for row in result["rows"]
    ]
    console.print(_table(columns, cells))
    lines = [f"{row['name']}: {_reason(reason)}" for row in result["rows"] for reason in row["reasons"]]
    summary = result["summary"]
    lines += [f"{count} families held up by {what}" for what, count in summary["blocked_by"].items()]
    lines.append("dynamic: " + ", ".join(f"{level} {count}" for level, count in summary["dynamic"].items()))
    lines.append(f"native: {summary['native']} of {summary['families']} families, {summary['native_and_match']} match")
    for line in lines:
        console.print(Text(line))


def _show_precision(result: dict[str, Any], console: Console) -> None:
    """Scorers against what was measured, and the assignments made from them; each figure the mean over the seeds."""
    by_scorer: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["scorers"]:
        by_scorer.setdefault((row["model"], row["scorer"]), []).append(row)
    cells = [
        (
            *names,
            _mean(rows, lambda r: r["seconds"], ".1f"),
            _mean(rows, lambda r: r["spearman"], ".3f"),
            _mean(rows, lambda r: min(r["spearman_within"].values()), ".3f"),
            _mean(rows, lambda r: r["ratio_at_many_bits"], ".3f"),
        )
        for names, rows in by_scorer.items()
    ]
    columns = ("model", "scorer", "s", "Spearman", "least within a format", "predicted / measured, from 4 bits")
    console.print(_table(columns, cells))
    by_plan: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for row in result["assignments"]:
        by_plan.setdefault((row["model"], row["scorer"], round(row["bits"], 2)), []).append(row)
    cells = [
        (
            model,
            name,
            f"{bits:.2f}",
            _mean(rows, lambda r: r.get("predicted"), ".3g"),
            _mean(rows, lambda r: r["held_out"], ".3g"),
            " ".join(f"{r['held_out']:.3g}" for r in rows),
        )
        for (model, name, bits), rows in by_plan.items()
    ]
    console.print(_table(("model", "scorer", "bits", "predicted", "held-out loss", "of each seed"), cells))


def _predicted(found: dict[str, float]) -> list[str]:
    if not found:
        return []
    foretold, measured = found["foretold"], found["measured"]
    return [
        f"planish-mixed: {foretold:.0f} ms foretold by the cost table, {measured:.0f} measured: {found['ratio']:.2f}"
    ]


def _mean(rows: list[dict[str, Any]], of: Callable[[dict[str, Any]], float | None], form: str) -> str:
    values = [value for value in map(of, rows) if value is not None]
    return format(sum(values) / len(values), form) if values else ""


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _reason(reason: dict[str, Any]) -> str:
    message = reason["message"]
    short = message if len(message) <= 160 else message[:159] + "…"
    if reason["op"] is not None:
        return f"{reason['op']} x{reason['nodes']}: {short}"
    return f"{reason['error']} ({reason['phase']}): {short}"


def _rows(rows: list[dict[str, Any]]) -> Table:
    shown = [key for key in _QUALITY if key in rows[0]["quality"]]
    labels = [_QUALITY[key][0] for key in shown]
    columns = ("contender", "median ms", "min ms", "x eager", "95 % interval", *labels, "claim")
    cells: list[tuple[str, ...]] = []
    for row in rows:
        low, high = row["ratio_ci95"]
        claims = [row["claim"]]
        for other in (key.removeprefix("claim_") for key in row if key.startswith("claim_")):
            claim = row[f"claim_{other}"]
            lo, hi = row[f"ratio_to_{other}_ci95"]
            named = claim if other in claim else f"{claim} ({other})"
            claims.append(f"{named} ({lo:.2f} to {hi:.2f})")
        cells.append(
            (
                row["name"],
                f"{row['ms_median']:.1f}",
                f"{row['ms_min']:.1f}",
                f"{row['ratio_to_eager']:.3f}",
                f"{low:.3f} to {high:.3f}",
                *(format(row["quality"][key], _QUALITY[key][1]) for key in shown),
                "\n".join(claims),
            )
        )
    return _table(columns, cells)


def _softmax(rows: list[dict[str, Any]]) -> Table:
    columns = ("contender", "schedule", "ns/element", "of read", "x eager", "95 % interval", "max rel. Δ", "also")
    cells: list[tuple[str, ...]] = []
    for row in rows:
        low, high = row["ratio_ci95"]
        others = [key.removeprefix("ratio_to_") for key in row if key.startswith("ratio_to_") and key[-4:] != "ci95"]
        also = [f"{row[f'claim_{other}']} ({_interval(row, other)})" for other in others if other != "eager"]
        cells.append(
            (
                row["name"],
                row.get("schedule", ""),
                f"{row['ns_per_element']:.3f}",
                f"{row['share_of_read']:.0%}",
                f"{row['ratio_to_eager']:.2f}",
                f"{low:.2f} to {high:.2f}",
                _figure(row["quality"].get("max_rel"), ".1e"),
                "; ".join(also),
            )
        )
    return _table(columns, cells)


def _interval(row: dict[str, Any], other: str) -> str:
    low, high = row[f"ratio_to_{other}_ci95"]
    return f"{low:.2f} to {high:.2f}"


def _kernels(kernels: list[dict[str, Any]]) -> Table:
    columns = ("kernel", "op", "batch", "shape", "calls", "ms", "GFLOP/s", "of FMA peak")
    cells: list[tuple[str, ...]] = []
    for k in kernels:
        counts = k["share_of_limit"] is not None
        cells.append(
            (
                k["name"],
                k["op"],
                "x".join(map(str, k["batch"])),
                "x".join(map(str, k["shape"])),
                str(k["calls"]),
                f"{k['ms']:.3f}",
                f"{k['gflops']:.1f}" if counts else "",
                f"{k['share_of_limit']:.0%}" if counts else "",
            )
        )
    return _table(columns, cells)


def _show_perplexity(result: dict[str, Any], console: Console) -> None:
    cells = [(row["name"], f"{row['perplexity']:.2f}", f"{row['to_fp32']:+.1%}") for row in result["perplexity"]]
    console.print(_table(("activations", "perplexity", "to fp32"), cells))
    console.print(Text(f"{result['held_out_tokens']} tokens that calibration has not seen"))
    for note in result["outliers"]:
        console.print(Text(note))


def _show_arm(result: dict[str, Any], console: Console) -> None:
    """Tiles, then models."""
    columns = ("tile", "level", "rows", "instr. / MAC", "MACs / cycle, modelled", "bytes", "spills", "rel. error")
    cells = [
        (
            k["name"],
            k["level"],
            str(k["M"]),
            f"{k['instr_per_mac']:.3f}",
            ", ".join(f"{cpu} {value:.1f}" for cpu, value in k["macs_per_cycle"].items()),
            str(k["bytes"]),
            str(k["spills"]),
            _figure(k["rel_err"], ".0e"),
        )
        for k in result["kernels"]
    ]
    console.print(_table(columns, cells))
    columns = (
        "model",
        "code KB",
        "largest tile",
        "weights MB",
        "bytes / weight",
        "arena KB",
        "M instr.",
        "to host",
        "to eager",
    )
    cells = [
        (
            m["name"],
            f"{m['code_bytes'] / 1e3:.1f}",
            str(m["largest_kernel"][0]),
            f"{m['weights_bytes'] / 1e6:.1f}",
            _figure(m["linear_bytes_per_weight"], ".3f"),
            f"{m['arena_bytes'] / 1e3:.0f}",
            f"{m['instructions'] / 1e6:.1f}",
            f"{max(m['rel_err']):.0e}",
            f"{m['to_eager']:.0e}",
        )
        for m in result["models"]
    ]
    if cells:
        console.print(_table(columns, cells))
    console.print(Text(result["method"]))


def _show_qgemm(result: dict[str, Any], console: Console) -> None:
    """Every format at every shape: its speed against the limit that holds for it, and against fp32."""
    columns = ("format", "M x N x K", "ms", "GOP/s", "GB/s", "of the limit", "x fp32", "rel. error")
    fp32 = {tuple(k["shape"]): k["ms"] for k in result["kernels"] if k["name"] == "fp32"}
    cells: list[tuple[str, ...]] = []
    for k in result["kernels"]:
        base, gbs = fp32.get(tuple(k["shape"])), k["gbs"]
        limit = "FMA peak" if gbs is None else "read"
        figures = (f"{k['ms']:.3f}", f"{k['gflops']:.0f}", _figure(gbs, ".1f"), f"{k['share_of_limit']:.2f} {limit}")
        against = "" if base is None else f"{base / k['ms']:.2f}"
        cells.append((k["name"], "x".join(map(str, k["shape"])), *figures, against, _figure(k["rel_err"], ".1e")))
    console.print(_table(columns, cells))
    console.print(Text(f"limit of products of bytes: {result['int8_limit_gops']:.0f} GOP/s, four times the FMA peak"))
    found = ", ".join(f"{n} {e:.3f}" if isinstance(e, float) else f"{n}: {e}" for n, e in result["mlp_rel_err"].items())
    console.print(Text(f"relative error on a full-range perceptron: {found}"))


def _figures(result: dict[str, Any]) -> list[str]:
    memory = result["memory"]
    low, high = result["after_torch_op_ci95"]
    arena, parts = memory["arena_bytes"], memory["intermediates_bytes"]
    lines = [
        f"compile: {result['compile_s']:.1f} s with export, again {result['second_compile_s']:.2f} s",
        *_predicted(result["predicted_ms"]),
        f"call of a two-op model: {result['call_us']:.1f} µs (eager {result['call_us_eager']:.1f} µs)",
        f"call after a torch op: {result['after_torch_op_ratio']:.3f}x the call alone ({low:.3f} to {high:.3f})",
        f"arena: {arena / _MIB:.1f} MiB for {parts / _MIB:.1f} MiB of intermediates"
        + (f" ({arena / parts:.0%})" if parts else "")
        + f"; weights {memory['weights_bytes'] / _MIB:.1f} MiB",
    ]
    for name, marks in memory["peak_rss"].items():
        steps = ", ".join(f"{phase.replace('_', ' ')} {value / _MIB:.0f}" for phase, value in marks.items())
        lines.append(f"peak memory of the {name} process, MiB: {steps}")
    if result["inductor"]:
        mode = result["inductor"]
        lines.append(f"inductor runs in its faster mode, {mode['mode']} ({_trial(mode)})")
    for name, mode in result["peers"].items():
        lines.append(f"{name} {mode['version']} runs on {mode['mode']}, the faster ({_trial(mode)})")
    return lines


def _suite_figures(result: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, times in result["compile"].items():
        lines.append(f"{name}: compile {times['compile_s']:.1f} s with export, again {times['second_compile_s']:.2f} s")
    for name, found in result["accuracy"].items():
        distance = ", ".join(f"{label} {found[key]:{form}}" for key, (label, form) in _QUALITY.items() if key in found)
        lines.append(f"{name} against eager on {result['compared']}: {distance}")
    for label, found in result["inductor"].items():
        if found:
            lines.append(f"inductor runs {label} in its faster mode, {found['mode']} ({_trial(found)})")
    return lines


def _sets(sets: list[dict[str, Any]]) -> Table:
    """What dropping padding gained on each set, beside what the formula promises."""
    columns = ("set", "batches", "tokens", "kappa", "f1", "f2", "expected", "measured", "95 % interval", "of expected")
    cells: list[tuple[str, ...]] = []
    for found in sets:
        low, high = found["measured_ci95"]
        figures = (f"{found[key]:.3f}" for key in ("kappa", "f1", "f2", "speedup", "measured"))
        shapes = Counter("x".join(map(str, shape)) for shape in found["batches"])
        cells.append(
            (
                found["set"],
                ", ".join(f"{count} of {shape}" for shape, count in shapes.items()),
                str(found["tokens"]),
                *figures,
                f"{low:.3f} to {high:.3f}",
                f"{found['measured_to_expected']:.1%}",
            )
        )
    return _table(columns, cells)


def _padding_figures(result: dict[str, Any]) -> list[str]:
    lines = ["expected: (1 + a) / (f1 + a f2) with a = kappa S / (6 H), over our padded build"]
    if not result["removes_padding"]:
        lines.append("both builds are the same: there is no pass that removes padding")
    for found in result["sets"]:
        if found["f1"] == 1:
            low, high = (1 / bound - 1 for bound in reversed(found["measured_ci95"]))
            loss = 1 / found["measured"] - 1
            lines.append(f"{found['set']}: packed takes {loss:+.1%} ({low:+.1%} to {high:+.1%}) against padded")
    modes = [(found["set"], found["ctranslate2"]) for found in result["sets"] if found["ctranslate2"]]
    if modes:
        libraries = ", ".join(f"{label} {mode['mode']}" for label, mode in modes)
        lines.append(f"CTranslate2 {modes[0][1]['version']} runs on the faster of its libraries: {libraries}")
    ratings = ", ".join(f"{name} {value:.6f}" for name, value in result["lee_pearson"].items())
    lines.append(f"Pearson correlation with human ratings of 1,225 pairs: {ratings}")
    return lines


def _trial(mode: dict[str, Any]) -> str:
    return ", ".join(f"{name} {ms:.0f} ms" for name, ms in mode["trial_ms"].items())


def _table(columns: tuple[str, ...], cells: list[tuple[str, ...]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(column, no_wrap=index == 0, overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    return table

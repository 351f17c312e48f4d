"""The table at the end of a run, and what is in it, in words."""

from typing import Any

__all__ = ["ACCURACIES", "bytes_text", "summary_table"]

# What the accuracies of a summary are of, in the order in which they are told.
ACCURACIES = (
    ("teacher, full precision", "teacher_top1"),
    ("rounded to nearest (PTQ)", "ptq_top1"),
    ("student, last step", "final_top1"),
    ("student, best", "best_top1"),
    ("integers", "integer_top1"),
)


def bytes_text(count: int) -> str:
    """A number of bytes for people."""
    return f"{count / 1e6:,.2f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"


def summary_table(summary: dict[str, Any]) -> str:
    """The table at the end of a run, for a terminal.

    Args:
        summary: see `record.summarize`, with `integer_top1`.
    """
    bits = f"W{summary['weight_bits']}A{summary['activation_bits']}"
    if summary["first_last_bits"] or summary["layer_bits"]:
        bits += " (some layers differ)"
    sizes = {
        "teacher_top1": bytes_text(summary["float_bytes"]),
        "integer_top1": bytes_text(summary["integer_bytes"]),
    }
    teacher = summary["teacher_top1"]
    lines = [
        f"{summary['config_name'] or 'run'}, {bits}, GI {summary['gi']}",
        "",
        f"  {'':<26}{'top-1':>8}{'to teacher':>12}{'size':>12}",
    ]
    for label, key in ACCURACIES:
        if key == "best_top1" and summary.get("keep_student") == "last":
            continue
        top1 = summary[key]
        measured = "-" if top1 is None else f"{top1:.2f} %"
        change = (
            "" if None in (top1, teacher) or key == "teacher_top1" else f"{top1 - teacher:+.2f}"
        )
        lines.append(f"  {label:<26}{measured:>8}{change:>12}{sizes.get(key, ''):>12}".rstrip())
    ratio = summary["float_bytes"] / summary["integer_bytes"]
    lines += [
        "",
        f"  {'times smaller':<26}{ratio:>6.2f}",
        *_inputs(summary),
        f"  {'codes changed in a step':<26}{100 * summary['crossed_fraction']:6.3f} %",
        f"  {'misses of the guarantee':<26}{summary['guarantee_misses']:6d}",
        f"  {'time':<26}{summary['seconds']:6.0f} s ({summary['compile_seconds']:.0f} s compiling)",
    ]
    return "\n".join([*lines, *_diagnosis(summary.get("diagnosis"))])


def _diagnosis(diagnosis: dict[str, Any] | None) -> list[str]:
    # Older runs have none, nor have those with log.diagnosis=false.
    if diagnosis is None:
        return []
    lines = []
    measured = [entry for entry in diagnosis["accuracies"] if entry["top1"]]
    if measured:
        columns = list(measured[0]["top1"])
        lines += ["", f"  {'top-1, rounded alone':<26}{_cells(columns)}"]
        lines += [
            f"  {entry['moment']:<26}"
            + _cells([f"{entry['top1'][column]:.2f} %" for column in columns])
            for entry in measured
        ]
    for i, layer in enumerate(diagnosis["worst_layers"]):
        label = "" if i else "lowest SQNR of weights"
        name = f"{layer['name']} ({layer['bits']} bits)"
        lines += [*[""] * (i == 0), f"  {label:<26}{layer['sqnr']:>6.1f} dB  {name}"]
    suggestion = diagnosis["suggestion"]
    if suggestion and suggestion["bytes"] > suggestion["run_bytes"]:
        more = 100 * (suggestion["bytes"] / suggestion["run_bytes"] - 1)
        lines += [
            f"  {f'for {more:.0f} % more bytes':<26}"
            f"--config.quant.layer_bits='{suggestion['layer_bits']}'"
        ]
    return lines


def _cells(texts: list[str]) -> str:
    return "".join(f"{text:>12}" for text in texts).rstrip()


def _inputs(summary: dict[str, Any]) -> list[str]:
    # Summaries of older runs do not know.
    if "kernel_calls" not in summary:
        return []
    counts = f"{summary['quantized_inputs']} of {summary['kernel_calls']}"
    return [f"  {counts} kernels read a quantized input"]

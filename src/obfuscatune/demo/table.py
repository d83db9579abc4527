"""The table that lays both sides beside each other: the same rows on the terminal and on the page."""

from typing import NamedTuple

from obfuscatune.demo.result import Result
from obfuscatune.demo.side import Side
from obfuscatune.report.units import format_bytes, format_count, format_seconds, format_share, format_small

COLUMNS = ("", "protected", "plain", "difference")


class Row(NamedTuple):
    """One line: what is compared, and how it stands on each side."""

    what: str
    protected: str
    plain: str
    difference: str


def rows(result: Result) -> list[Row]:
    """Losses, answers, times, and what only the protected side has."""
    a, b, gap = result.protected, result.plain, result.differences
    asked = len(result.questions)
    lines = [
        Row("loss, first step", f"{a.losses[0]:.4f}", f"{b.losses[0]:.4f}", format_small(gap.losses[0])),
        Row("loss, last step", f"{a.losses[-1]:.4f}", f"{b.losses[-1]:.4f}", format_small(gap.losses[-1])),
        Row("loss, any step", "", "", f"at most {format_small(gap.loss)}"),
        Row("adapter weights", "", "", f"at most {format_small(gap.weight)}"),
        Row("right before", _right(a, tuned=False), _right(b, tuned=False), ""),
        Row("right after", _right(a, tuned=True), _right(b, tuned=True), f"{result.same_answers}/{asked} the same"),
        Row("training", format_seconds(a.seconds.training), format_seconds(b.seconds.training), _times(a, b)),
        Row("answering after", format_seconds(a.seconds.after), format_seconds(b.seconds.after), ""),
        Row("in the enclave", f"{format_share(result.shape.enclave_share)} of the weights", "all", ""),
    ]
    if a.link is not None:
        steps = len(a.steps)
        sent, received = format_bytes(a.link["bytes_sent"]), format_bytes(a.link["bytes_received"])
        crossings = int(a.link["crossings"])
        lines += [
            Row("crossings, training", f"{format_count(crossings)} ({crossings // steps} a step)", "none", ""),
            Row("bytes, training", f"{sent} out, {received} in", "none", ""),
        ]
    return lines


def _right(side: Side, *, tuned: bool) -> str:
    metric = side.after if tuned else side.before
    right = sum(verdict.right for verdict in metric.verdicts)
    return f"{right}/{len(metric.verdicts)} ({format_share(metric.value)})"


def _times(protected: Side, plain: Side) -> str:
    return f"{protected.seconds.training / plain.seconds.training:.2f} times as long"

"""The demo's page, and the table that it shares with the terminal."""

from typing import NamedTuple

from obfuscatune.demo.result import DemoRun, Result
from obfuscatune.report.charts import Chart, Series
from obfuscatune.report.page import (
    Beside,
    Facts,
    Figure,
    KeyFigures,
    Section,
    Table,
    Verdict,
    format_bytes,
    format_count,
    format_seconds,
    format_share,
    format_small,
    render_page,
)

COLUMNS = ("", "protected", "plain", "difference")


class Row(NamedTuple):
    """One line: what is compared, and how it stands on each side."""

    what: str
    protected: str
    plain: str
    difference: str


def table_rows(result: Result) -> list[Row]:
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


def _right(side: DemoRun, *, tuned: bool) -> str:
    metric = side.after if tuned else side.before
    right = sum(verdict.right for verdict in metric.verdicts)
    return f"{right}/{len(metric.verdicts)} ({format_share(metric.value)})"


def _times(protected: DemoRun, plain: DemoRun) -> str:
    return f"{protected.seconds.training / plain.seconds.training:.2f} times as long"


_LONGEST_ANSWER = 60


def render(result: Result) -> str:
    """`report.html` as text."""
    shape = result.shape
    sections: list[Section] = [
        _verdict(result),
        _key_figures(result),
        Beside(_losses(result), _differences(result)),
        Table(
            "Side by side",
            COLUMNS,
            table_rows(result),
            caption="Protected, the large matrices lie on a worker process, multiplied by secret random matrices, as "
            "is all that reaches it; what is small, the adapter, the text and the optimizer stay in the enclave. Both "
            "runs had the same seeds, on the same machine, one after the other.",
        ),
        _samples(result),
        Beside(_settings(result), Facts("Environment", result.environment)),
    ]
    return render_page(
        title="Fine-tuned where nobody can read along",
        subtitle=f"obfuscatune demo: a language model of {shape.parameters:,} parameters learns private clinic notes, "
        f"protected and plain",
        sections=sections,
        footer="Written by `obfuscatune demo`; the same in numbers is in result.json beside this page.",
    )


def _verdict(result: Result) -> Verdict:
    failed = [f"{it.name}: {it.measured:.3g}, the limit is {it.limit:.3g}" for it in result.checks if not it.passed]
    if failed:
        return Verdict(f"Something is not as it should be. {'; '.join(failed)}.", "bad")
    return Verdict(
        "Neither model nor text was sent to the worker in the clear, and the result is the same: no step's loss "
        f"differs by more than {format_small(result.differences.loss)}, and {result.same_answers} of "
        f"{len(result.questions)} answers are equal.",
        "good",
    )


def _key_figures(result: Result) -> KeyFigures:
    a, b = result.protected, result.plain
    figures = [
        Figure(f"{_percent(a.before.value)} → {_percent(a.after.value)}", "questions right, protected"),
        Figure(f"{_percent(b.before.value)} → {_percent(b.after.value)}", "questions right, plain"),
        Figure(format_small(result.differences.loss), "largest difference of any step's loss"),
        Figure(format_small(result.differences.weight), "largest difference of any adapter weight"),
        Figure(format_share(result.shape.enclave_share), "of the parameters stay in the enclave"),
        Figure(f"{a.seconds.training / b.seconds.training:.2f} ×", "the training time of the plain run"),
    ]
    if a.link is not None:
        crossed = a.link["bytes_sent"] + a.link["bytes_received"]
        figures += [
            Figure(f"{a.link['crossings']:,}", "crossings while training"),
            Figure(format_bytes(crossed), "crossed while training, both ways"),
        ]
    return KeyFigures(figures)


def _losses(result: Result) -> Chart:
    return Chart(
        "Training loss",
        [
            Series("protected", _by_step(result.protected.losses), wide=True),
            Series("plain", _by_step(result.plain.losses)),
        ],
        x_label="step",
        y_label="nats per token",
        caption="The thin curve is drawn on the wide one.",
    )


def _differences(result: Result) -> Chart:
    exact = sum(loss == 0 for loss in result.differences.losses)
    gaps = f" {exact} steps of {len(result.differences.losses)} agree in every bit, and have no point." if exact else ""
    return Chart(
        "Difference of the two losses",
        [Series("|protected − plain|", _by_step(result.differences.losses))],
        x_label="step",
        y_label="nats per token",
        caption=f"Float32 rounds each number by up to 6e-08 of itself.{gaps}",
        log_y=True,
    )


def _samples(result: Result) -> Table:
    rows = [(it.question, it.truth, _cut(it.before), _cut(it.protected), _cut(it.plain)) for it in result.samples()]
    return Table(
        "Questions that were not in the training set, about facts that were",
        ("question", "true answer", "before", "after, protected", "after, plain"),
        rows,
        text_columns=5,
    )


def _settings(result: Result) -> Facts:
    recipe = result.settings.recipe(result.protected.adapter, plain=False)
    lora = f"rank {recipe.lora_r}, alpha {recipe.lora_alpha:g}, dropout {recipe.lora_dropout:g}, all linear layers"
    return Facts(
        "Settings",
        {
            "LoRA": lora,
            "optimizer": f"AdamW, rate {recipe.lr:g}, {recipe.schedule}, {recipe.warmup_steps} steps of warm-up",
            "steps": f"{len(result.protected.steps)} of {recipe.batch_size} records",
            "numbers": recipe.dtype,
            "profile": recipe.profile,
            "seed": str(recipe.seed),
            "whole demo": format_seconds(result.seconds),
        },
    )


def _by_step(values: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
    return tuple((float(step), value) for step, value in enumerate(values, start=1))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_ANSWER else text[: _LONGEST_ANSWER - 1] + "…"

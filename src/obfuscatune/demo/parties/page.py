"""The page of the demo of three parties."""

from obfuscatune.demo.parties.result import Result, Scene
from obfuscatune.report.charts import Chart, Series
from obfuscatune.report.page import (
    Facts,
    Figure,
    KeyFigures,
    Section,
    Table,
    Verdict,
    format_seconds,
    render_page,
)


def render(result: Result) -> str:
    """`report.html` as text."""
    sections: list[Section] = [_verdict(result), _key_figures(result)]
    for scene in result.scenes:
        sections += [_steps(scene), _refusals(scene), _searches(scene), _answers(scene), _loss(scene)]
    sections.append(Facts("Environment", {**result.environment, "client": result.client, "network": _network(result)}))
    return render_page(
        title="Three parties that need not trust each other",
        subtitle="obfuscatune demo --three-parties: a provider's model, an owner's text and a cloud, on one machine, "
        "with evidence that is simulated and proves nothing",
        sections=sections,
        footer="Written by `obfuscatune demo --three-parties`; the same is in result.json beside this page.",
    )


def _verdict(result: Result) -> Verdict:
    failures = [f"{scene.profile}: {line}" for scene in result.scenes for line in scene.failures()]
    if failures:
        return Verdict(f"Something is not as it should be. {'; '.join(failures)}.", "bad")
    return Verdict(
        "Each party let go of its secret only to an enclave that it had verified, every attempt that had to fail was "
        "refused, and a search of all that left the enclave found neither text, adapter nor weights.",
        "good",
    )


def _key_figures(result: Result) -> KeyFigures:
    refused = sum(it.held for scene in result.scenes for it in scene.refusals)
    tried = sum(len(scene.refusals) for scene in result.scenes)
    quiet = [it for scene in result.scenes for it in scene.searches if not it.is_control]
    return KeyFigures(
        [
            Figure(f"{refused}/{tried}", "attempts refused"),
            Figure(f"{sum(it.megabytes for it in quiet):,.0f} MB", "that left the enclaves, searched"),
            Figure(f"{sum(sum(it.found.values()) for it in quiet)}", "canaries found in them"),
            Figure(f"{sum(sum(scene.canaries.values()) for scene in result.scenes):,}", "canaries searched for"),
            Figure(format_seconds(result.seconds), "the whole demo"),
        ]
    )


def _steps(scene: Scene) -> Table:
    rows = [(it.who, it.what, it.told, format_seconds(it.seconds)) for it in scene.steps]
    return Table(f"{scene.profile}: what the parties did", ("party", "step", "", "time"), rows, text_columns=3)


def _refusals(scene: Scene) -> Table:
    rows = [(it.who, it.attempt, it.reason, "yes" if it.held else "NO") for it in scene.refusals]
    return Table(f"{scene.profile}: what had to fail", ("party", "attempt", "reason", "refused"), rows, text_columns=4)


def _searches(scene: Scene) -> Table:
    kinds = list(scene.canaries)
    rows = [
        (it.place, f"{it.megabytes:,.1f}", *(str(it.found.get(kind, 0)) for kind in kinds), "yes" if it.held else "NO")
        for it in scene.searches
    ]
    return Table(
        f"{scene.profile}: the search",
        ("where", "MB", *(f"{kind}, of {scene.canaries[kind]:,}" for kind in kinds), "as it should be"),
        rows,
        caption="Pieces of the owner's text (UTF-8, UTF-16, hex, base64, token ids) and runs of neighbouring weights "
        "in float64, float32, float16 and bfloat16, along rows and columns. A control is the same search where nothing "
        "is sealed, and must find.",
    )


def _answers(scene: Scene) -> Table:
    return Table(
        f"{scene.profile}: alice's questions", ("question", "true", "before", "after"), scene.answers, text_columns=4
    )


def _loss(scene: Scene) -> Chart:
    points = tuple((float(step), loss) for step, loss in enumerate(scene.losses, start=1))
    return Chart(f"{scene.profile}: training loss", [Series("loss", points)], x_label="step", y_label="nats per token")


def _network(result: Result) -> str:
    return "a namespace for each machine" if result.isolated else "127.0.0.1"

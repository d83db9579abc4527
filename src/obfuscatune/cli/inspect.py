"""`obfuscatune inspect`: where each layer would run, and what would cross, from the configuration alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from obfuscatune.cli import options
from obfuscatune.cli.fleet_table import placed_document, placed_table
from obfuscatune.cli.output import progress, write_json
from obfuscatune.cli.session import advise_of_public_base
from obfuscatune.option import Option

if TYPE_CHECKING:
    from rich.console import RenderableType

    from obfuscatune.enclave.plan import LayerPlan, Plan


def inspect(
    model: Annotated[
        str | None,
        Option(
            "A config.json, its directory, or a Hub name.",
            unset="the embedded model",
            variable=options.ENVIRONMENT["model"],
        ),
    ] = None,
    provider_adapter: options.ProviderAdapter = None,
    profile: options.Profile = None,
    base: options.Base = None,
    first_blocks: options.FirstBlocks = None,
    dtype: options.Dtype = None,
    fleet: Annotated[
        Path | None, Option("Also show which of the workers that a fleet.yaml names would hold what.")
    ] = None,
    full: Annotated[bool, Option("List every layer; else blocks that are alike share a line.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Show where each layer runs, and what crosses between enclave and worker.

    Needs no worker and no weights, so models of any size take seconds.
    """
    numbers = options.check_dtype(dtype)
    with progress("reading the configuration"):
        plan, provider = _make_plan(model, profile or "private", first_blocks, numbers, base, provider_adapter)
    placed = None if fleet is None else placed_document(plan, fleet)
    if as_json:
        write_json(_document(plan) | {"provider_adapter": provider} | ({} if placed is None else {"fleet": placed}))
    else:
        _print(plan, full, provider, placed)


def _make_plan(
    model: str | None, profile: str, first_blocks: int | None, dtype: str, base: str | None, provider: Path | None
) -> "tuple[Plan, dict[str, Any] | None]":
    """The plan, and digest and size of the provider's adapter."""
    import torch

    from obfuscatune.assets import tiny_model_path
    from obfuscatune.enclave.plan import make_plan, model_from_config
    from obfuscatune.enclave.profiles import resolve
    from obfuscatune.training.provider_adapter import check_provider_adapter, provider_summary

    knobs = {} if first_blocks is None else {"first_blocks": first_blocks}
    resolved = resolve(profile, **knobs)
    skeleton = model_from_config(model or tiny_model_path())
    directory = Path(model or tiny_model_path())
    advise_of_public_base(base, resolved, skeleton.config, directory if directory.is_dir() else None)
    plan = make_plan(skeleton, resolved, getattr(torch, dtype))
    if provider is None:
        return plan, None
    return plan, provider_summary(
        check_provider_adapter(skeleton, provider, lora_on_worker=resolved.lora_on == "worker")
    )


def _document(plan: "Plan") -> dict[str, object]:
    return {
        "model": plan.model,
        "auto_class": plan.auto_class,
        "profile": plan.profile.name,
        "first_blocks": plan.profile.first_blocks,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "layers": [_layer_document(layer) for layer in plan.layers],
        "enclave": {"parameters": plan.enclave_parameters, "share": plan.enclave_share, "by_kind": plan.enclave},
        "worker": {"parameters": plan.worker_parameters, "bytes_sent_once": plan.upload_bytes},
        "parameters": plan.parameters,
        "crossings": {"forward": plan.forward_crossings, "backward": plan.backward_crossings},
        "bytes_per_token": {"forward": plan.forward_bytes, "backward": plan.backward_bytes},
        "shield_rows_per_crossing": plan.shield_rows,
        "not_offloaded": [
            {
                "name": it.name,
                "shape": it.shape,
                "count": it.count,
                "parameters": it.parameters,
                "reason": it.reason,
            }
            for it in plan.unmoved
        ],
    }


def _layer_document(layer: "LayerPlan") -> dict[str, object]:
    return {
        "name": layer.name,
        "block": layer.block,
        "runs": layer.place,
        "shape": [layer.p, layer.q],
        "parameters": layer.parameters,
        "matrices": {"count": layer.count, "of_a_token": layer.active},
        "crossings": {"forward": layer.forward_crossings, "backward": layer.backward_crossings},
        "bytes_per_token": {"forward": layer.forward_bytes, "backward": layer.backward_bytes},
    }


def _print(plan: "Plan", full: bool, provider: dict[str, Any] | None, placed: dict[str, Any] | None) -> None:
    from obfuscatune.report.page import format_count
    from obfuscatune.report.terminal import result_console

    console = result_console()
    console.print(_layers_table(plan, full))
    console.print()
    console.print(_enclave_table(plan))
    console.print()
    for party, own in (placed or {}).items():
        console.print(placed_table(party, own))
        console.print()
    if provider is not None:
        console.print(
            f"provider   {format_count(provider['parameters'])} parameters of the provider's adapter stay here"
        )
    for line in (*_totals(plan), *_how_to_load(plan)):
        console.print(line, soft_wrap=True)
    for line in _warnings(plan):
        console.print(line, style="yellow", soft_wrap=True)


def _layers_table(plan: "Plan", full: bool) -> "RenderableType":
    from rich.text import Text

    from obfuscatune.report.page import format_bytes, format_count
    from obfuscatune.report.terminal import plain_table

    dtype = str(plan.dtype).removeprefix("torch.")
    title = f"{plan.model}, {format_count(plan.parameters)} parameters, profile {plan.profile.name}, {dtype}"
    numbers = ("W (p x q)", "parameters", "crossings\nforward", "\nbackward", "bytes/token\nforward", "\nbackward")
    table = plain_table("layer", "runs on", numbers=numbers, title=title)

    def add(name: str, layers: "tuple[LayerPlan, ...]") -> None:
        one = layers[0]
        table.add_row(
            name,
            Text(one.place, style="cyan" if one.place == "enclave" else "magenta"),
            f"{one.p} x {one.q}" + (f", {one.count} experts" if one.count > 1 else ""),
            format_count(sum(layer.parameters for layer in layers)),
            str(sum(layer.forward_crossings for layer in layers)),
            str(sum(layer.backward_crossings for layer in layers)),
            format_bytes(sum(layer.forward_bytes for layer in layers)),
            format_bytes(sum(layer.backward_bytes for layer in layers)),
        )

    if full:
        for layer in plan.layers:
            add(layer.name, (layer,))
        return table
    for run in plan.runs():
        count = run.last - run.first + 1
        span = f"blocks {run.first}-{run.last}  x{count}" if count > 1 else f"block {run.first}"
        table.add_row(Text(f"{run.stem}  {span}", style="bold"))
        for column in run.columns:
            add(f"  {column[0].leaf}", column)
    return table


def _enclave_table(plan: "Plan") -> "RenderableType":
    from obfuscatune.report.page import format_count, format_share
    from obfuscatune.report.terminal import plain_table

    table = plain_table("parameters", numbers=("count", "share"))
    for kind, count in plan.enclave.items():
        if count:
            table.add_row(f"  {kind.replace('_', ' ')}", format_count(count), format_share(count / plan.parameters))
    table.add_row(
        "in the enclave", format_count(plan.enclave_parameters), format_share(plan.enclave_share), style="bold cyan"
    )
    table.add_row(
        "on the worker", format_count(plan.worker_parameters), format_share(1 - plan.enclave_share), style="magenta"
    )
    return table


def _totals(plan: "Plan") -> list[str]:
    from obfuscatune.report.page import format_bytes

    forward, backward = format_bytes(plan.forward_bytes), format_bytes(plan.backward_bytes)
    spared = "" if plan.profile.first_blocks else "; what feeds the first layer is not trained, so it needs none"
    lines = [
        f"sent once  {format_bytes(plan.upload_bytes)} of transformed matrices",
        f"forward    {plan.forward_crossings} crossings a pass, {forward} a token, request and reply together",
        f"backward   {plan.backward_crossings} crossings a pass, {backward} a token{spared}",
    ]
    if plan.shield_rows:
        more_forward = format_bytes(plan.shield_rows * plan.forward_bytes)
        more_backward = format_bytes(plan.shield_rows * plan.backward_bytes)
        lines.append(
            f"shield     not in these figures: at least {plan.shield_rows} random rows a crossing, each as large as a "
            f"token's ({more_forward} a forward pass, {more_backward} a backward pass)"
        )
    return lines


def _how_to_load(plan: "Plan") -> list[str]:
    if plan.auto_class == "AutoModelForCausalLM":
        return []
    return [f"load       no causal language model: obfuscatune.load(..., auto_class=transformers.{plan.auto_class})"]


def _warnings(plan: "Plan") -> list[str]:
    from obfuscatune.report.page import format_count, format_share

    if not plan.unmoved:
        return []
    lines = [
        "",
        "Not offloaded: matrices inside the blocks that cannot go to a worker. The enclave computes with them.",
    ]
    for it in plan.unmoved:
        shape = " x ".join(map(str, it.shape))
        share = format_share(it.parameters / plan.parameters)
        count = f"{format_count(it.parameters)} parameters, {share}"
        lines.append(f"  {it.name}  ({shape}) x{it.count}: {count}; {it.reason}")
    return lines

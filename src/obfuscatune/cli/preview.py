"""What `obfuscatune finetune` prints instead of running.

--preview   the first examples as the model will see them, with the tokens that the loss counts marked
--dry-run   steps, parameters and traffic of the run; nothing is sent or written
"""

import unicodedata
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from obfuscatune.cli import output
from obfuscatune.cli.protection import Protection, resolved_profile
from obfuscatune.cli.session import ModelFiles, check_adapters
from obfuscatune.report.page import format_bytes, format_count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obfuscatune.training.data import Data
    from obfuscatune.training.preview import Piece, Preview, PreviewedExample
    from obfuscatune.training.recipe import Recipe


_TRAINED_STYLE = "bold underline green"
_TRAINED_MARKS = ("[[", "]]")
"""Around the text that the loss counts, if the output is not a terminal, which would underline it."""
_NUMBERS_PER_PARAMETER = 4
"""Kept for each trained parameter: itself, its gradient, AdamW's two moments."""


def show_preview(recipe: "Recipe", files: ModelFiles, *, count: int, as_json: bool) -> None:
    """Print the first `count` examples of each source, and counts over all examples. No weights and no worker are used.

    Raises:
        DataError, ConfigError: as `finetune` does, except that records that are too long are counted, not refused.
    """
    from obfuscatune.training.preview import Preview
    from obfuscatune.training.run import longest_example, sources
    from obfuscatune.training.tokens import embedding_rows

    longest = longest_example(recipe, files.config)
    documents = []
    for source in sources(recipe):
        if source is None:
            continue
        previewed = Preview(source, files.tokenizer, longest, recipe.split_turns, embedding_rows(files.config))
        examples = []
        for example in previewed.examples(count):
            if as_json:
                examples.append(_example_document(example))
            else:
                _print_example(example)
        if as_json:
            documents.append({**_summary_document(previewed), "examples": examples})
        else:
            _print_summary(previewed, recipe)
    if as_json:
        output.write_json({"sources": documents})


def _print_example(example: "PreviewedExample") -> None:
    console = Console(highlight=False, soft_wrap=True)
    cut = f", {example.left_out} more left out" if example.left_out else ""
    console.print(Text(f"--- {example.where}: {example.tokens} tokens, {example.trained} trained on{cut}", style="dim"))
    shown = Text()
    for piece in example.pieces:
        if console.is_terminal:
            shown.append(_printable(piece.text), style=_TRAINED_STYLE if piece.trained else "")
        else:
            shown.append(_marked(piece))
    console.print(shown)


def _print_summary(previewed: "Preview", recipe: "Recipe") -> None:
    output.write_text(f"--- {previewed.read_as}")
    lengths = previewed.lengths
    output.write_text(
        f"{len(lengths)} examples, {sum(lengths)} tokens, {previewed.trained} of them trained on; "
        f"an example has {min(lengths)} to {max(lengths)} tokens, {previewed.median_length} in the middle"
    )
    if previewed.untrained:
        output.write_text(f"nothing to train on in {_first_of(previewed.untrained)}; finetune refuses that")
    if previewed.too_long:
        fate = {"error": "finetune refuses them", "truncate": "they are cut", "drop": "they are left out"}
        output.write_text(
            f"longer than {previewed.max_length} tokens: {_first_of(previewed.too_long)}; "
            f"{fate[recipe.too_long]} (--too-long, --max-length)"
        )


def _first_of(places: "Sequence[str]") -> str:
    return places[0] + (f" and {len(places) - 1} more" if len(places) > 1 else "")


def _summary_document(previewed: "Preview") -> dict[str, object]:
    return {
        "read_as": previewed.read_as,
        "records": len(previewed.lengths),
        "tokens": sum(previewed.lengths),
        "trained_tokens": previewed.trained,
        "longest": max(previewed.lengths),
        "too_long": previewed.too_long,
        "untrained": previewed.untrained,
    }


def _example_document(example: "PreviewedExample") -> dict[str, object]:
    return {
        "where": example.where,
        "tokens": example.tokens,
        "trained_tokens": example.trained,
        "left_out": example.left_out,
        "pieces": [{"text": piece.text, "trained": piece.trained} for piece in example.pieces],
    }


def _marked(piece: "Piece") -> str:
    opening, closing = _TRAINED_MARKS if piece.trained else ("", "")
    return f"{opening}{_printable(piece.text)}{closing}"


def _printable(text: str) -> str:
    """The text with control characters escaped, since they can drive a terminal; line breaks and tabs stay."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) != "Cc" else char.encode("unicode_escape").decode()
        for char in text
    )


def show_dry_run(
    recipe: "Recipe", files: ModelFiles, data: "Data", protection: Protection | None, *, as_json: bool
) -> None:
    """Print what a run would do. The caller has checked the data, the run directory and the options.

    Args:
        protection: None for a plain run.

    Raises:
        ConfigError: the model cannot take LoRA as the recipe says, or there is no such profile.
        ModelFileError, ProtectionError: the model cannot be protected.
    """
    with output.progress("counting"):
        document = _dry_run_document(recipe, files, data, protection)
    output.write_result(document, _readable(document), as_json=as_json)
    if not as_json:
        output.notice("a dry run: nothing was sent, nothing was written")


def _dry_run_document(
    recipe: "Recipe", files: ModelFiles, data: "Data", protection: Protection | None
) -> dict[str, Any]:
    import torch

    from obfuscatune.enclave.plan import make_plan, model_from_config
    from obfuscatune.enclave.profiles import resolve
    from obfuscatune.training.loop import Cadence
    from obfuscatune.training.provider_adapter import provider_summary
    from obfuscatune.training.run import add_lora_as_recipe

    dtype = getattr(torch, recipe.dtype)
    skeleton = model_from_config(files.directory)
    plan = make_plan(skeleton, resolve("enclave") if protection is None else resolved_profile(protection), dtype)
    below = check_adapters(files, protection, None, recipe.provider_adapter) or skeleton
    trained = [parameter for parameter in add_lora_as_recipe(below, recipe).parameters() if parameter.requires_grad]
    trained_bytes = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    cadence = Cadence.of(recipe, len(data.train.examples))
    micro_batches = [batch for step in range(cadence.total_steps) for batch in cadence.plan.micro_batches(step)]
    lengths = [len(example.input_ids) for example in data.train.examples]
    padded_tokens = sum(max(lengths[index] for index in batch) * len(batch) for batch in micro_batches)
    measurements = 0 if data.eval is None else sum(cadence.measures_at(step) for step in range(cadence.total_steps + 1))
    return {
        "model": str(files.directory),
        "protected": protection is not None,
        "profile": None if protection is None else plan.profile.name,
        "dtype": recipe.dtype,
        "data": {
            "examples": len(lengths),
            "tokens": sum(lengths),
            "trained_tokens": sum(example.trained_tokens for example in data.train.examples),
            "longest": max(lengths),
            "eval_examples": 0 if data.eval is None else len(data.eval.examples),
        },
        "steps": cadence.total_steps,
        "steps_per_epoch": cadence.plan.steps_per_epoch,
        "forward_passes": len(micro_batches),
        "padded_tokens": padded_tokens,
        "measurements": measurements,
        "adapter": {
            "parameters": sum(parameter.numel() for parameter in trained),
            "bytes_in_training": _NUMBERS_PER_PARAMETER * trained_bytes,
        },
        "provider_adapter": provider_summary(below),
        "enclave": {"parameters": plan.enclave_parameters, "bytes": plan.enclave_parameters * dtype.itemsize},
        "worker": {
            "address": None if protection is None else protection.named_workers,
            "parameters": plan.worker_parameters,
            "bytes_sent_once": plan.upload_bytes,
        },
        "crossings": (plan.forward_crossings + plan.backward_crossings) * len(micro_batches),
        "bytes_crossing": (plan.forward_bytes + plan.backward_bytes) * padded_tokens,
        "out": str(recipe.out),
    }


def _readable(run: dict[str, Any]) -> str:
    data, adapter, enclave, worker = (run[name] for name in ("data", "adapter", "enclave", "worker"))
    lines = [
        f"data       {data['examples']} examples, {format_count(data['tokens'])} tokens an epoch, "
        f"{format_count(data['trained_tokens'])} of them trained on; the longest has {data['longest']}",
        f"steps      {run['steps']} ({run['steps_per_epoch']} an epoch), {run['forward_passes']} forward and backward "
        f"passes over {format_count(run['padded_tokens'])} tokens with padding",
        f"adapter    {format_count(adapter['parameters'])} parameters; with gradients and AdamW's moments "
        f"{format_bytes(adapter['bytes_in_training'])}",
        f"here       {format_count(enclave['parameters'])} parameters of the model, {format_bytes(enclave['bytes'])}; "
        "activations come on top",
    ]
    if data["eval_examples"]:
        lines.insert(2, f"measured   {run['measurements']} times on {data['eval_examples']} examples")
    if run["provider_adapter"] is not None:
        count = format_count(run["provider_adapter"]["parameters"])
        lines.append(f"provider   {count} parameters of the provider's adapter, frozen, under yours; they stay here")
    if run["protected"]:
        lines += [
            f"worker     {format_count(worker['parameters'])} parameters, {format_bytes(worker['bytes_sent_once'])} "
            f"sent once to {worker['address'] or 'a worker that is started on this machine'}, profile {run['profile']}",
            f"crossings  {format_count(run['crossings'])} while training, {format_bytes(run['bytes_crossing'])} both "
            "ways, without shield rows",
        ]
    else:
        lines.append("worker     none: a plain run")
    lines.append(f"out        {run['out']}")
    return "\n".join(lines)

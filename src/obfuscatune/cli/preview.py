"""`obfuscatune finetune --preview`: what the model will see of the records, and what of it is trained on."""

import unicodedata
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from obfuscatune.cli import output
from obfuscatune.cli.session import ModelFiles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from obfuscatune.tuning.preview import Piece, Preview, PreviewedExample
    from obfuscatune.tuning.recipe import Recipe

_TRAINED = "bold underline green"
_MARKS = ("[[", "]]")
"""Around what is trained on, where there is no terminal to underline it."""


def show_preview(recipe: "Recipe", files: ModelFiles, *, count: int, as_json: bool) -> None:
    """Print the first `count` examples of each source, and the counts of all; no model is read, no worker used.

    Raises:
        DataError, ConfigError: as `finetune` would, but for records that are too long: those are counted.
    """
    from obfuscatune.tuning.preview import Preview
    from obfuscatune.tuning.run import longest_example, sources
    from obfuscatune.tuning.tokens import embedding_rows

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
            shown.append(_printable(piece.text), style=_TRAINED if piece.trained else "")
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
    opening, closing = _MARKS if piece.trained else ("", "")
    return f"{opening}{_printable(piece.text)}{closing}"


def _printable(text: str) -> str:
    """Control characters, which may move a terminal's cursor or worse, as escapes; line breaks and tabs stay."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) != "Cc" else char.encode("unicode_escape").decode()
        for char in text
    )

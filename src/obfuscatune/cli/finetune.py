"""`obfuscatune finetune`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from inspect import Parameter
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer

from obfuscatune.cli import options, output
from obfuscatune.cli.options import default_text, is_from_environment
from obfuscatune.cli.protection import Protection, resolved_profile
from obfuscatune.cli.session import check_adapters, empty_model, open_files, open_session
from obfuscatune.cli.signals import StopSignals, Terminated, stop_signals
from obfuscatune.errors import RunStopped
from obfuscatune.option import Option, split_annotation

if TYPE_CHECKING:
    from obfuscatune.training.journal import Event, Started
    from obfuscatune.training.recipe import Recipe
    from obfuscatune.training.run import Outcome


class RecipeOptions(dict[str, Any]):
    """Settings of a recipe that the command line gave, by their names in the recipe or in Hugging Face's libraries."""

    def __init__(self, **values: Any) -> None:
        super().__init__({name: value for name, value in values.items() if value is not None and value is not False})

    @staticmethod
    def option_parameters() -> Iterator[Parameter]:
        """An option for each field of `Recipe` that has an `Option`, and a hidden one for each of `recipe.ALIASES`."""
        from obfuscatune.training.recipe import ALIASES, Recipe

        for name, field in Recipe.model_fields.items():
            if told := next((it for it in field.metadata if isinstance(it, Option)), None):
                kind, choices = _read_as(field.annotation)
                unset = told.unset or (None if field.is_required() else default_text(field.default))
                option = replace(told, unset=unset, choices=choices)
                yield Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])
        for name in ALIASES:
            hidden = typer.Option(f"--{name.replace('_', '-')}", hidden=True)
            yield Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, hidden])


def _read_as(annotation: Any) -> tuple[Any, tuple[str, ...]]:
    """What the command line reads a field of the recipe as, and the words that it takes.

    Numbers, paths and switches are read by typer; all else is text, which the recipe understands.
    """
    if get_origin(annotation) is Literal:
        return str, get_args(annotation)
    kinds = [split_annotation(it)[0] for it in get_args(annotation) or (annotation,)]
    words = tuple(word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind))
    known = [kind for kind in kinds if kind is not NoneType]
    return (known[0], words) if known in ([int], [float], [bool], [Path]) else (str, words)


def finetune(
    config: Annotated[Path | None, Option("A run file in YAML; options override it.")] = None,
    model: options.Model = None,
    provider_adapter: options.ProviderAdapter = None,
    *,
    recipe_options: RecipeOptions,
    preview: Annotated[bool, Option("Show what the model will see and what is trained on, and end.", "Data")] = False,
    preview_records: Annotated[int, Option("How many examples to show.", "Data")] = 3,
    resume: Annotated[bool, Option("Go on from the newest checkpoint in --out.", "Run")] = False,
    dry_run: Annotated[bool, Option("Check everything, show what the run would do, and send nothing.", "Run")] = False,
    dtype: options.Dtype = None,
    protection: Protection,
    as_json: options.AsJson = False,
) -> None:
    """Fine-tune a model with LoRA on private text, on a worker that learns neither.

    Writes <out>/adapter in PEFT's format, checkpoints to resume from, and metrics. Data formats, the run file,
    checkpoints, and options under their names in Hugging Face's libraries (--learning-rate, --output_dir):
    docs/finetune.md.
    """
    shared = {"model": model, "provider_adapter": provider_adapter, "dtype": dtype, **asdict(protection)}
    recipe = _recipe(config, recipe_options, shared)
    if preview:
        from obfuscatune.cli.preview import show_preview

        show_preview(recipe, open_files(recipe.model), count=preview_records, as_json=as_json)
        return
    wanted = replace(protection, plain=recipe.plain).unless_plain()
    if wanted is not None:
        of_recipe = (
            *("worker", "fleet", "mask_worker", "mask_memory", "mask_budget", "enclave_device"),
            *("profile", "first_blocks", "base", "public_base"),
        )
        wanted = replace(wanted, **{name: getattr(recipe, name) for name in of_recipe})
        resolved_profile(wanted)  # before the data are read
    _run(recipe, wanted, resume=resume, dry=dry_run, as_json=as_json)


def _recipe(config: Path | None, given: Mapping[str, Any], shared: Mapping[str, Any]) -> "Recipe":
    """The command line over the run file over the environment.

    Args:
        shared: values of options that other commands have too; those that are no fields of a recipe are left out.
    """
    from obfuscatune.training.recipe import Recipe, load_recipe

    fields = {name: None if value is False else value for name, value in shared.items() if name in Recipe.model_fields}
    said = {name: value for name, value in fields.items() if is_from_environment(name, value)}
    return load_recipe(config, {**{name: value for name, value in fields.items() if name not in said}, **given}, said)


def _run(recipe: "Recipe", protection: Protection | None, *, resume: bool, dry: bool, as_json: bool) -> None:
    from obfuscatune.training.adapter import check_lora
    from obfuscatune.training.checkpoint import model_fingerprint
    from obfuscatune.training.provider_adapter import provider_summary
    from obfuscatune.training.run import check_out, load_data, summary
    from obfuscatune.training.run import finetune as run_recipe

    with _resumption_told(recipe) as signals:
        files = open_files(recipe.model)
        with output.progress("reading the data"):
            data = load_data(recipe, files.tokenizer, files.config)
            fingerprint = model_fingerprint(files.directory)
            check_out(recipe, data, fingerprint=fingerprint, resume_run=resume)
            below = check_adapters(files, protection, None, recipe.provider_adapter)
            check_lora(below or empty_model(files), recipe.lora_targets)
        for dataset in (data.train, data.eval):
            if dataset is not None:
                output.notice(dataset.read_as)
        if dry:
            from obfuscatune.cli.preview import show_dry_run

            show_dry_run(recipe, files, data, protection, as_json=as_json)
            return
        with (
            open_session(
                files, dtype=recipe.dtype, protection=protection, provider_adapter=recipe.provider_adapter
            ) as session,
            output.progress("fine-tuning") as meter,
        ):
            signals.patient = True
            outcome = run_recipe(
                session.model,
                files.tokenizer,
                recipe,
                data,
                fingerprint=fingerprint,
                report=_Watcher(meter).see,
                resume_run=resume,
                stop_asked=signals.asked,
            )
            link, masks = session.link(), session.masks()
            provider = provider_summary(session.model)
    if as_json:
        made = {"protected": session.protected, "model": str(files.directory), "adapter": str(outcome.adapter)}
        told = {"link": link, "masks": masks, "provider_adapter": provider}
        output.write_json({**made, **summary(outcome.progress), **told})
    else:
        if provider is not None:
            output.write_text(f"trained on top of the provider's adapter with sha256 {provider['sha256']}")
        _tell(outcome, link, masks)


@contextmanager
def _resumption_told(recipe: "Recipe") -> Iterator[StopSignals]:
    """Say how to go on, when Ctrl-C or a signal ends a run.

    Raises:
        typer.Exit: a signal ended it; the exit code is the signal's.
    """
    written = recipe.out / "recipe.yaml"

    def tell() -> None:
        if written.exists():
            output.notice(f"to go on: obfuscatune finetune --config {written} --resume")

    with stop_signals() as signals:
        try:
            yield signals
        except KeyboardInterrupt:
            tell()
            raise
        except (Terminated, RunStopped) as end:
            if signals.received is None:
                raise
            by = Terminated(signals.received)
            tell()
            output.notice(f"{by}: {end}" if isinstance(end, RunStopped) else str(by))
            raise typer.Exit(by.exit_code) from None


class _Watcher:
    """Shows the run as it happens: a curve of the losses so far, the last one, and the speed."""

    def __init__(self, meter: output.Meter) -> None:
        self._meter = meter
        self._losses: list[float] = []

    def see(self, event: "Event") -> None:
        from obfuscatune.training.journal import Measured, Started

        match event:
            case Started():
                self._start(event)
            case Measured(step, loss):
                output.notice(f"loss on the eval records after step {step}: {loss:.4f}")
            case _:
                self._losses.append(event.loss)
                speed = event.tokens / event.seconds
                self._meter.advance(1, f"{output.sparkline(self._losses)} loss {event.loss:.4f}, {speed:.0f} tokens/s")

    def _start(self, event: "Started") -> None:
        data = event.data.train
        cut = [f"{n} {what}" for n, what in ((data.truncated, "truncated"), (data.dropped, "left out")) if n]
        output.notice(", ".join([f"{len(data.examples)} examples", *cut]))
        if event.first_step:
            output.notice(f"going on after step {event.first_step} of {event.total_steps}")
        if event.planned_before is not None:
            output.notice(
                f"the run is extended from {event.planned_before} to {event.total_steps} steps; from here on the "
                f"learning rate follows the schedule of {event.total_steps} steps"
            )
        self._meter.expect(event.total_steps)
        self._meter.advance(event.first_step)


def _tell(outcome: "Outcome", link: Mapping[str, int | float] | None, masks: Mapping[str, Any] | None) -> None:
    steps = outcome.progress.steps
    losses = [event.loss for event in steps]
    seconds = sum(event.seconds for event in steps)
    output.write_text(f"{output.sparkline(losses, width=60)}")
    output.write_text(f"{len(steps)} steps in {seconds:.1f} s, loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    if outcome.progress.evals:
        (_, first), (_, last) = outcome.progress.evals[0], outcome.progress.evals[-1]
        output.write_text(f"loss on the eval records {first:.4f} -> {last:.4f}")
    if outcome.stopped_early and outcome.progress.best is not None:
        step, loss = outcome.progress.best
        output.write_text(f"stopped early: no smaller loss on the eval records than {loss:.4f}, after step {step}")
    if outcome.best_step is not None:
        output.write_text(f"the adapter is that of step {outcome.best_step}")
    if link is not None:
        output.write_text(output.readable_link(link))
    if masks is not None:
        output.write_text(output.readable_masks(masks))
    output.write_text(f"adapter: {outcome.adapter}")

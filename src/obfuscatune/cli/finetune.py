"""`obfuscatune finetune`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from obfuscatune.cli import options, output
from obfuscatune.cli.options import ENVIRONMENT, option, said_by_environment, with_known_names
from obfuscatune.cli.session import Protection, empty_model, open_files, open_session
from obfuscatune.cli.stop_signals import StopSignals, Terminated
from obfuscatune.wire.errors import RunStopped

if TYPE_CHECKING:
    from obfuscatune.tuning.journal import Event, Started
    from obfuscatune.tuning.recipe import Recipe
    from obfuscatune.tuning.run import Outcome

_DATA, _LORA, _TRAINING, _RUN = "Data", "LoRA", "Training", "Run"


@with_known_names
def finetune(
    config: Annotated[Path | None, option("--config", "A run file in YAML; options override it.")] = None,
    model: options.Model = None,
    data: Annotated[
        Path | None, option("--data", "Training records (with --task, or a data directory).", panel=_DATA)
    ] = None,
    evaluation: Annotated[
        Path | None, option("--eval", "Records whose loss is measured, untrained.", panel=_DATA)
    ] = None,
    task: Annotated[
        str | None, option("--task", "The records are those of sciq, openbookqa, piqa or webqs.", panel=_DATA)
    ] = None,
    fields: options.Fields = None,
    split_turns: Annotated[
        bool,
        option("--split-turns", "An example of each turn, where the chat template rewrites earlier ones.", panel=_DATA),
    ] = False,
    preview: Annotated[
        bool, option("--preview", "Show what the model will see and what is trained on, and end.", panel=_DATA)
    ] = False,
    preview_records: Annotated[
        int, option("--preview-records", "How many examples to show.", default="3", panel=_DATA)
    ] = 3,
    max_length: Annotated[
        int | None, option("--max-length", "Tokens of an example.", default="the model's window", panel=_DATA)
    ] = None,
    too_long: Annotated[
        str | None, option("--too-long", "Longer ones: error, truncate or drop.", default="error", panel=_DATA)
    ] = None,
    out: Annotated[Path | None, option("--out", "The run directory.", default="runs/finetune", panel=_RUN)] = None,
    resume: Annotated[bool, option("--resume", "Go on from the newest checkpoint in --out.", panel=_RUN)] = False,
    dry: Annotated[
        bool, option("--dry-run", "Check everything, show what the run would do, and send nothing.", panel=_RUN)
    ] = False,
    checkpoint_every: Annotated[
        str | None, option("--checkpoint-every", "Steps between checkpoints, or epoch.", default="50", panel=_RUN)
    ] = None,
    checkpoints_kept: Annotated[
        int | None, option("--checkpoints-kept", "How many of the newest stay.", default="2", panel=_RUN)
    ] = None,
    eval_every: Annotated[
        str | None,
        option("--eval-every", "Steps between measurements, or epoch.", default="before and after", panel=_RUN),
    ] = None,
    patience: Annotated[
        int | None, option("--patience", "Stop after so many measurements without a new best.", panel=_RUN)
    ] = None,
    load_best: Annotated[
        bool, option("--load-best", "Make the adapter of the best checkpoint, not of the last.", panel=_RUN)
    ] = False,
    tensorboard: Annotated[
        bool, option("--tensorboard", "Write event files for TensorBoard into --out.", panel=_RUN)
    ] = False,
    logging_steps: Annotated[
        int | None, option("--logging-steps", "Steps between points in TensorBoard.", default="1", panel=_RUN)
    ] = None,
    seed: Annotated[
        int | None, option("--seed", "Of order, fresh factors and dropout.", default="0", panel=_RUN)
    ] = None,
    dtype: options.Dtype = None,
    lora_r: Annotated[int | None, option("--lora-r", "Rank.", default="16", panel=_LORA)] = None,
    lora_alpha: Annotated[float | None, option("--lora-alpha", "Scale times rank.", default="32", panel=_LORA)] = None,
    lora_dropout: Annotated[
        float | None, option("--lora-dropout", "Share of inputs dropped.", default="0.05", panel=_LORA)
    ] = None,
    lora_targets: Annotated[
        str | None, option("--lora-targets", "Layer names, comma between.", default="all-linear", panel=_LORA)
    ] = None,
    lr: Annotated[float | None, option("--lr", "Peak learning rate.", default="0.0002", panel=_TRAINING)] = None,
    schedule: Annotated[
        str | None, option("--schedule", "linear, cosine or constant.", default="linear", panel=_TRAINING)
    ] = None,
    warmup_steps: Annotated[
        int | None, option("--warmup-steps", "Steps to the peak.", default="0", panel=_TRAINING)
    ] = None,
    warmup_ratio: Annotated[
        float | None, option("--warmup-ratio", "Instead: the share of all steps.", panel=_TRAINING)
    ] = None,
    weight_decay: Annotated[float | None, option("--weight-decay", "AdamW's.", default="0", panel=_TRAINING)] = None,
    clip: Annotated[float | None, option("--clip", "Largest gradient norm.", default="1", panel=_TRAINING)] = None,
    batch_size: Annotated[
        int | None, option("--batch-size", "Examples in a forward pass.", default="8", panel=_TRAINING)
    ] = None,
    accumulation: Annotated[
        int | None, option("--accumulation", "Forward passes in a step.", default="1", panel=_TRAINING)
    ] = None,
    epochs: Annotated[float | None, option("--epochs", "Passes over the data.", default="3", panel=_TRAINING)] = None,
    max_steps: Annotated[int | None, option("--max-steps", "Overrides --epochs.", panel=_TRAINING)] = None,
    gradient_checkpointing: Annotated[
        bool, option("--gradient-checkpointing", "Compute activations twice, for less memory.", panel=_TRAINING)
    ] = False,
    plain: options.Plain = False,
    worker: options.Worker = None,
    profile: options.Profile = None,
    base: options.Base = None,
    first_blocks: options.FirstBlocks = None,
    key_file: options.KeyFile = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    peer: options.Peer = None,
    as_json: options.AsJson = False,
    *,
    known_names: Mapping[str, str],
) -> None:
    """Fine-tune a model with LoRA on private text, on a worker that learns neither.

    Writes <out>/adapter in PEFT's format, checkpoints to resume from, and metrics. Data formats, the run file,
    checkpoints, and options under their names in Hugging Face's libraries (--learning-rate, --output_dir):
    docs/finetune.md.
    """
    recipe = _recipe(
        config,
        {
            "model": model,
            "data": data,
            "eval": evaluation,
            "task": task,
            "max_length": max_length,
            "too_long": too_long,
            "fields": options.columns(fields),
            "split_turns": split_turns or None,
            "out": out,
            "checkpoint_every": checkpoint_every,
            "checkpoints_kept": checkpoints_kept,
            "eval_every": eval_every,
            "patience": patience,
            "load_best": load_best or None,
            "tensorboard": tensorboard or None,
            "logging_steps": logging_steps,
            "seed": seed,
            "dtype": dtype,
            "lora_r": lora_r,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "lora_targets": lora_targets,
            "lr": lr,
            "schedule": schedule,
            "warmup_steps": warmup_steps,
            "warmup_ratio": warmup_ratio,
            "weight_decay": weight_decay,
            "clip": clip,
            "batch_size": batch_size,
            "accumulation": accumulation,
            "epochs": epochs,
            "max_steps": max_steps,
            "gradient_checkpointing": gradient_checkpointing or None,
            "plain": plain or None,
            "worker": worker,
            "profile": profile,
            "base": base,
            "first_blocks": first_blocks,
            **known_names,
        },
    )
    if preview:
        from obfuscatune.cli.preview import preview as show

        show(recipe, open_files(recipe.model), count=preview_records, as_json=as_json)
        return
    asked = Protection(worker, profile, first_blocks, key_file, tls_cert, tls_key, peer, base).unless(recipe.plain)
    protection = asked and replace(
        asked, worker=recipe.worker, profile=recipe.profile, first_blocks=recipe.first_blocks, base=recipe.base
    )
    _run(recipe, protection, resume=resume, dry=dry, as_json=as_json)


def _recipe(config: Path | None, options: Mapping[str, object]) -> "Recipe":
    """The command line over the run file over the environment."""
    from obfuscatune.tuning.recipe import load_recipe

    said = {name: options[name] for name in ENVIRONMENT if name in options and said_by_environment(name, options[name])}
    given = {name: value for name, value in options.items() if name not in said}
    return load_recipe(config, given, said)


def _run(recipe: "Recipe", protection: Protection | None, *, resume: bool, dry: bool, as_json: bool) -> None:
    from obfuscatune.tuning.adapter import check_lora
    from obfuscatune.tuning.identity import model_fingerprint
    from obfuscatune.tuning.run import check_out, load_data, summary
    from obfuscatune.tuning.run import finetune as run_recipe

    with _resumption_told(recipe) as signals:
        files = open_files(recipe.model)
        with output.progress("reading the data"):
            data = load_data(recipe, files.tokenizer, files.config)
            fingerprint = model_fingerprint(files.directory)
            check_out(recipe, data, fingerprint=fingerprint, resume_run=resume)
            check_lora(empty_model(files), recipe.lora_targets)
        for dataset in (data.train, data.eval):
            if dataset is not None:
                output.notice(dataset.read_as)
        if dry:
            from obfuscatune.cli.dry_run import dry_run

            dry_run(recipe, files, data, protection, as_json=as_json)
            return
        with (
            open_session(files, dtype=recipe.dtype, protection=protection) as session,
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
            link = session.link()
    if as_json:
        made = {"protected": session.protected, "model": str(files.directory), "adapter": str(outcome.adapter)}
        output.write_json({**made, **summary(outcome.progress), "link": link})
    else:
        _tell(outcome, link)


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

    with StopSignals() as signals:
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
        from obfuscatune.tuning.journal import Measured, Started

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


def _tell(outcome: "Outcome", link: Mapping[str, int | float] | None) -> None:
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
    output.write_text(f"adapter: {outcome.adapter}")

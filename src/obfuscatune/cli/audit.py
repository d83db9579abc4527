"""`obfuscatune audit`: what a worker learns, measured."""

import json
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from obfuscatune.cli import options, output
from obfuscatune.cli.session import open_files
from obfuscatune.errors import ConfigError
from obfuscatune.option import Option
from obfuscatune.protocol.addresses import DeviceAddress
from obfuscatune.protocol.files import temporary_root

if TYPE_CHECKING:
    from obfuscatune.audit.attacks.base import Attacker
    from obfuscatune.audit.grid import Grid
    from obfuscatune.audit.scenario import Scenario
    from obfuscatune.cli.session import ModelFiles

EMBEDDED = "embedded"
REPORT, FIGURES, TABLE = "report.html", "audit.json", "audit.md"


def audit(
    model: Annotated[
        list[str] | None,
        Option("Model directory, or `embedded`; may be repeated.", unset="the embedded model"),
    ] = None,
    profile: Annotated[
        str | None,
        Option(
            "Profiles with commas between, each perhaps with knobs (private:first_blocks=0); "
            "identity and rotation are unsafe controls.",
            unset="all, and the controls",
        ),
    ] = None,
    attacker: Annotated[str, Option("closed, public-text, public-base, known-plaintext or all.")] = "all",
    seeds: Annotated[int, Option("Runs of each profile, with other texts and secrets.", least=1)] = 3,
    data: Annotated[
        list[Path] | None,
        Option(
            "Text to run on: .jsonl records, .xz, plain, or `embedded`. If repeated, one for each --model in turn.",
            unset="the embedded notes",
        ),
    ] = None,
    tokens_per_call: Annotated[
        int,
        Option(
            "Tokens of a training example; prompts have half as many. What a call shows depends on whether it has "
            "fewer rows than the model is wide, as many, or more.",
            least=16,
        ),
    ] = 32,
    worker: Annotated[
        str | None,
        Option(
            "device:cuda:N or device:cpu: record what crosses the bus to that device, and on device:cpu for masks.",
            unset="processes on this machine",
        ),
    ] = None,
    out: Annotated[Path, Option("Folder for report.html, audit.json and audit.md.")] = Path("runs/audit"),
    fail_above: Annotated[
        float | None,
        Option(
            "Fail where an attack on tokens or weights gets further from chance (0) to success (1); what both workers "
            "of guarded see together does not count."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Play the curious worker, and say in numbers what each profile gives away.

    For each profile a worker on this machine records a run of fine-tuning and generation, and every attack is tried
    on what it saw. Beside each figure stands what luck would give. The secret model is the given one, tuned on half of
    the text; the attacker who has the public base has the given one itself. Under masks (guarded) both workers record,
    and each of them is attacked alone, and both together.

    Example: obfuscatune audit --profile private,guarded,identity --model embedded --model ./llama --data notes.jsonl
    """
    from obfuscatune.audit.attackers import default_names, parse_variants
    from obfuscatune.audit.grid import attacks_of, columns_of, run_grid
    from obfuscatune.audit.verdict import exceeding

    device = None if worker is None else DeviceAddress.parse(worker)
    variants = parse_variants(profile or ",".join(default_names()))
    attacks = attacks_of(_attacker(attacker))
    with ExitStack() as stack:
        made = tempfile.TemporaryDirectory(prefix="obfuscatune-audit-", dir=temporary_root())
        folder = Path(stack.enter_context(made))
        subjects = [(open_files(name), text) for name, text in _subjects(model or [EMBEDDED], data or [Path(EMBEDDED)])]
        for files, _ in subjects:
            _check_window(files, tokens_per_call)
        scenarios = [
            _scenario(files, text, folder / str(number), tokens_per_call)
            for number, (files, text) in enumerate(subjects)
        ]
        with output.progress("auditing") as meter:
            tried = sum(1 + len(attacks) * len(columns_of(variant)) for variant in variants)
            meter.expect(len(scenarios) * seeds * tried)
            done = partial(meter.advance, 1)
            grid = run_grid(scenarios, variants, attacks, seeds, recording=meter.begin, done=done, device=device)
    _write(grid, out)
    if as_json:
        output.write_json(json.loads((out / FIGURES).read_text("utf-8")))
    else:
        from obfuscatune.audit.report import print_grid

        print_grid(grid)
    output.notice(f"written: {out / REPORT}, {out / FIGURES}, {out / TABLE}")
    if fail_above is not None:
        failed = exceeding(grid, fail_above)
        for cell in failed:
            output.notice(
                f"above {fail_above:g}: {cell.attack.name} on {cell.model}, {cell.profile}: advantage "
                f"{cell.advantage:.2f} ({cell.value:.3f}, chance {cell.chance:.3f})"
            )
        if failed:
            raise typer.Exit(1)


def _attacker(name: str) -> "Attacker | None":
    from obfuscatune.audit.attacks.base import Attacker

    if name == "all":
        return None
    if name not in list(Attacker):
        raise ConfigError(f"--attacker: expected all or one of {', '.join(Attacker)}, found {name}")
    return Attacker(name)


def _subjects(models: list[str], texts: list[Path]) -> list[tuple[str | None, Path | None]]:
    """Each model with its text, the last of which serves all that follow; None for what is embedded."""
    if len(texts) > len(models):
        raise ConfigError(
            f"--data was given {len(texts)} times, for {len(models)} models: at most one for each --model"
        )
    texts = texts + texts[-1:] * (len(models) - len(texts))
    return [
        (None if model == EMBEDDED else model, None if text == Path(EMBEDDED) else text)
        for model, text in zip(models, texts, strict=True)
    ]


def _check_window(files: "ModelFiles", tokens_per_call: int) -> None:
    """See that the model can read texts as long as the audit's.

    Raises:
        ConfigError: they are longer than its context window.
    """
    from obfuscatune.audit.scenario import Size
    from obfuscatune.training.tokens import context_window

    window, longest = context_window(files.config), Size.with_tokens_per_call(tokens_per_call).longest
    if longest > window:
        raise ConfigError(
            f"--tokens-per-call {tokens_per_call}: the audit would run texts of {longest} tokens, and "
            f"{files.directory.name} reads at most {window} at once; ask for fewer"
        )


def _scenario(files: "ModelFiles", data: Path | None, folder: Path, tokens_per_call: int) -> "Scenario":
    import torch

    from obfuscatune.audit.scenario import Size, make_scenario, read_text
    from obfuscatune.enclave.experts import has_experts
    from obfuscatune.training.run import load_plain

    name, size = files.directory.name, Size.with_tokens_per_call(tokens_per_call)
    with output.progress(name) as meter:
        meter.begin("reading the model and the text")
        base = load_plain(files.directory, files.config, torch.float32)
        if has_experts(base):
            raise ConfigError(f"{files.directory}: no attack knows a mixture of experts yet; audit a dense model")
        text = read_text(data)
        meter.begin("tuning the secret model")
        meter.expect(size.tuning_steps)
        step_done = partial(meter.advance, 1, "steps of tuning the secret model")
        return make_scenario(name, base, files.tokenizer, text, folder, size, step_done=step_done)


def _write(grid: "Grid", out: Path) -> None:
    from obfuscatune.audit.report import as_json, as_markdown, render
    from obfuscatune.report.page import environment
    from obfuscatune.training.storage import RunDirectory

    facts = environment()
    texts = {
        FIGURES: json.dumps(as_json(grid, facts), indent=1) + "\n",
        TABLE: as_markdown(grid),
        REPORT: render(grid, facts),
    }
    folder = RunDirectory(out)
    for name, text in texts.items():
        folder.write_file(name, text.encode())

"""What the times of requests tell the compute worker under `guarded`, with and without a pace.

    python scripts/measure_timing.py --pace 800 --trials 8

Decodes with the embedded model as `generate --full-length` does, two kinds of run in turn, and reads the times off the
transcript of a compute worker. Prints as Markdown the AUC with which each statistic tells the two kinds apart (chance:
0.5), its standard error, and the medians of both in milliseconds. `step to step` is the time between the first requests
of two passes; `within` is what the enclave took between a reply and the next request, summed over a pass. Texts are
told by the nearer centroid of all steps, each run left out in turn.

The kinds: prompts of 17 and of 24 tokens, which fill the same bucket; two texts of the same length, read at once, or by
somebody who takes 40 ms for each character, as reading aloud does; steps before and after the end of an answer, in the
last of these. A slow reader is the positive control: where he is not told apart without a pace, noise hides the rest.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import obfuscatune
from obfuscatune.assets import clinic_notes_path
from obfuscatune.audit.attacks.scoring import area_under_curve
from obfuscatune.audit.scenario import read_text
from obfuscatune.cli.decoding import AnswerPacing, Sampling, decode
from obfuscatune.cli.session import ModelFiles, Session, open_files
from obfuscatune.protocol.messages import MessageType
from obfuscatune.protocol.transcript import read_transcript

NO_PACE = 1e-3
"""Milliseconds: every step is late and waits for no longer."""
STEPS = 10
SHORT, LONG, EQUAL = 17, 24, 20
"""Tokens of prompts."""
SECONDS_A_CHARACTER = 40e-3
"""As read aloud."""
Show = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """One answer, and when the compute worker was asked for it."""

    kind: bool
    tokens: int
    """Of the answer, before it was filled up."""
    late: int
    """Steps that missed their tick."""
    firsts_ms: Tensor
    """(passes,): of the first request of each."""
    within_ms: Tensor
    """(passes,)."""

    @property
    def steps_ms(self) -> Tensor:
        """(passes - 1,), from the first request of a pass to that of the next."""
        return self.firsts_ms.diff()


def slowly(text: str) -> None:
    """Read as somebody does."""
    time.sleep(SECONDS_A_CHARACTER * len(text))


def times(folder: Path, layers: int) -> Iterator[tuple[float, float]]:
    """Of each pass, when its first request came and what the worker waited for within it, in milliseconds."""
    waits: list[float] = []
    first = replied = 0.0
    for entry in read_transcript(folder, mapped=True):
        at = entry.at_ns / 1e6
        if entry.direction == "reply":
            replied = at
        elif entry.header.type is MessageType.MULTIPLY:
            if not waits:
                first = at
            waits.append(at - replied)
            if len(waits) == layers:
                yield first, sum(waits[1:])
                waits = []


def record(files: ModelFiles, prompts: dict[int, list[list[int]]], pace: float, trials: int) -> dict[str, list[Run]]:
    """All runs at a pace, by experiment."""
    plan: list[tuple[str, list[int], bool, Show | None]] = []
    for _ in range(trials):
        for kind in (False, True):
            plan.append(("lengths", prompts[LONG if kind else SHORT][0], kind, None))
            plan.append(("texts", prompts[EQUAL][kind], kind, None))
            plan.append(("texts, read aloud", prompts[EQUAL][kind], kind, slowly))
    written = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        compute = stack.enter_context(obfuscatune.local_worker(record=Path(folder) / "compute", threads=1))
        mask = stack.enter_context(obfuscatune.local_worker(threads=1))
        model = obfuscatune.load(files.directory, compute.address, "guarded", mask_worker=mask.address, base="closed")
        session, sampling, pacing = Session(model, True), Sampling(STEPS), AnswerPacing(pace, full_length=True)
        layers = len(model.protection.offloaded)
        ids = model.generate(torch.tensor([prompts[EQUAL][0]]), max_new_tokens=STEPS, do_sample=False)[0, EQUAL:]
        model.generation_config.eos_token_id = int(ids[STEPS // 2])  # ends an answer half way
        for number, (name, prompt, _, show) in enumerate(plan):
            sys.stderr.write(f"\rpace {pace:g} ms: {name}, {number} of {len(plan)}   ")
            written.append(decode(session, files, prompt, sampling, pacing, show=show))
        model.close()
        compute.close()
        passes = list(times(Path(folder) / "compute", layers))[-STEPS * len(plan) :]
    runs: dict[str, list[Run]] = {}
    for number, ((name, _, kind, _), answer) in enumerate(zip(plan, written, strict=True)):
        late = 0 if answer.pace is None else answer.pace.late
        firsts, within = torch.tensor(passes[number * STEPS : (number + 1) * STEPS], dtype=torch.float64).T
        runs.setdefault(name, []).append(Run(kind, answer.tokens, late, firsts - firsts[0], within))
    return runs


def nearer(vectors: Tensor, kinds: Tensor) -> Tensor:
    """(runs,): by how much (runs, steps) are nearer to the second kind's median than to the first's; each left out."""
    scores = []
    for number, vector in enumerate(vectors):
        others = torch.arange(len(vectors)) != number
        first, second = (vectors[others & (kinds == kind)].median(0).values for kind in (False, True))
        scores.append((vector - first).abs().median() - (vector - second).abs().median())
    return torch.stack(scores)


def row(what: str, statistic: str, pace: float, values: Tensor, kinds: Tensor, shown: Tensor | None = None) -> str:
    """One line of the table; `shown` has the medians where `values` are scores."""
    area, error = area_under_curve(values, kinds)
    shown = values if shown is None else shown
    first, second = (float(shown[kinds == kind].median()) for kind in (False, True))
    name = "none" if pace == NO_PACE else f"{pace:g} ms"
    return f"| {what} | {statistic} | {name} | {area:.2f} ± {error:.2f} | {first:.2f}, {second:.2f} |"


def table(runs: dict[str, list[Run]], pace: float) -> Iterator[str]:
    """The lines for one pace."""
    of_lengths = runs["lengths"]
    kinds = torch.tensor([run.kind for run in of_lengths])
    steps = torch.stack([run.steps_ms.median() for run in of_lengths])
    yield row("lengths", "step to step, median", pace, steps, kinds)
    yield row("lengths", "within the prompt's pass", pace, torch.stack([run.within_ms[0] for run in of_lengths]), kinds)
    decoding = torch.stack([run.within_ms[1:].median() for run in of_lengths])
    yield row("lengths", "within later passes, median", pace, decoding, kinds)
    for name in ("texts", "texts, read aloud"):
        kinds = torch.tensor([run.kind for run in runs[name]])
        for statistic, vectors in (
            ("step to step", torch.stack([run.steps_ms for run in runs[name]])),
            ("within", torch.stack([run.within_ms for run in runs[name]])),
        ):
            yield row(name, statistic, pace, nearer(vectors, kinds), kinds, vectors.median(1).values)
    ended = [run for run in runs["texts, read aloud"] if 1 < run.tokens < STEPS - 1]
    steps = torch.cat([run.steps_ms for run in ended])
    after = torch.cat([torch.arange(1, STEPS) > run.tokens for run in ended])
    yield row("end of an answer", "step to step", pace, -steps, after, steps)
    within = torch.cat([run.within_ms[1:] for run in ended])
    yield row("end of an answer", "within", pace, -within, after, within)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pace", type=float, default=800.0, help="milliseconds (default: %(default)s)")
    parser.add_argument("--trials", type=int, default=8, help="runs of each kind (default: %(default)s)")
    options = parser.parse_args()
    obfuscatune.settle_process()
    torch.set_num_threads(1)
    files = open_files(None)
    ids = files.tokenizer(read_text(clinic_notes_path() / "train.jsonl"))["input_ids"]
    prompts = {length: [ids[start : start + length] for start in (100, 400)] for length in (SHORT, LONG, EQUAL)}
    print("| told apart | by | pace | AUC | medians, ms |")
    print("|---|---|---|---|---|")
    for pace in (NO_PACE, options.pace):
        runs = record(files, prompts, pace, options.trials)
        for line in table(runs, pace):
            print(line, flush=True)
    late = sum(run.late for of_one in runs.values() for run in of_one)
    print(f"\nAt {pace:g} ms {late} of {STEPS * sum(map(len, runs.values()))} steps came late.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

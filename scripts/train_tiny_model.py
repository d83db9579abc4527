#!/usr/bin/env python3
"""Train a small GPT-2-architecture language model and its tokenizer from plain text.

Data passes in order through `tiny_corpus.py` (text, novels, tokens), the training and the export here.
The embedded model was made with::

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python scripts/train_tiny_model.py --minutes 48 --out tiny-gpt2

The schedule follows the share of the budget that is used (`--steps`, `--minutes`, or both: whichever is
further), so a run on a busy machine still anneals to the end. Every snapshot is a complete folder that
`from_pretrained` loads; `--resume` goes on from the last one, and after the end only writes the folder again.
On a busy machine `OMP_WAIT_POLICY=PASSIVE` wastes less.
Larger: `--layers 12 --width 768 --heads 12 --device cuda`.
"""

from __future__ import annotations

import json
import math
import platform
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tiny_corpus import EOS, EOS_ID, Corpus, batches, load_corpus
from tiny_settings import Settings, TrainingError, parse_settings

SAMPLE_PROMPTS = (
    "It was a cold evening in November, and",
    "The doctor took off his hat and",
    '"I do not understand you," said Mary,',
    "When they reached the village,",
)
CHECKPOINT = "checkpoint.safetensors"
SNAPSHOT_WINDOWS = 128  # held-out windows measured at a snapshot; the end of the run measures all


# ---------------------------------------------------------------- model


def build_model(settings: Settings) -> GPT2LMHeadModel:
    """Return a fresh GPT-2 (tied embeddings, no dropout) of the size that `settings` asks for."""
    torch.manual_seed(settings.seed)  # weight initialisation reads torch's global generator; nothing else does
    config = GPT2Config(
        vocab_size=settings.vocab, n_positions=settings.positions,
        n_embd=settings.width, n_layer=settings.layers, n_head=settings.heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=EOS_ID, eos_token_id=EOS_ID, pad_token_id=EOS_ID,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def build_optimizers(model: GPT2LMHeadModel, settings: Settings) -> list[torch.optim.Optimizer]:
    """Return the optimizers; with Muon the block matrices take orthogonalised steps of AdamW's size."""
    named = list(model.named_parameters())
    blocks = [p for name, p in named if p.ndim == 2 and ".h." in name]
    tables = [p for name, p in named if p.ndim == 2 and ".h." not in name]
    vectors = [p for _, p in named if p.ndim != 2]
    decay = settings.weight_decay
    use_muon = settings.optimizer == "muon"
    decayed = tables if use_muon else tables + blocks
    groups = [{"params": decayed, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)
    if not use_muon:
        return [adamw]
    muon = torch.optim.Muon(blocks, lr=settings.lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return [adamw, muon]


def token_losses(model: GPT2LMHeadModel, windows: torch.Tensor) -> torch.Tensor:
    """Return the mean next-token cross-entropy in nats over (batch, positions + 1) windows."""
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def perplexities(model: GPT2LMHeadModel, corpus: Corpus, settings: Settings, windows: int) -> dict[str, float]:
    """Measure the first `windows` stretches of `positions` held-out tokens, which do not overlap, in float32."""
    span = settings.positions
    total = 0.0
    model.eval()
    with torch.inference_mode():
        for first in range(0, windows, 32):
            chunk = range(first, min(first + 32, windows))
            rows = [corpus.heldout[window * span : window * span + span + 1] for window in chunk]
            batch = torch.from_numpy(np.stack(rows).astype(np.int64))
            total += float(token_losses(model, batch.to(settings.device))) * len(chunk)
    model.train()
    per_token = total / windows
    nats = per_token * len(corpus.heldout)  # what was not measured counts at the mean
    return {
        "perplexity per token": math.exp(per_token),
        "perplexity per word": math.exp(nats / corpus.heldout_words),
        "bits per byte": nats / math.log(2) / corpus.heldout_bytes,
    }


def greedy_samples(model: GPT2LMHeadModel, tokenizer: Tokenizer, new_tokens: int = 50) -> list[tuple[str, str]]:
    """Return (prompt, greedy continuation) for the fixed prompts, as produced."""
    model.eval()
    samples = []
    for prompt in SAMPLE_PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids], device=model.device)
        mask = torch.ones_like(ids)
        room = max(1, min(new_tokens, model.config.n_positions - ids.shape[1]))
        output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=room, do_sample=False)
        samples.append((prompt, tokenizer.decode(output[0, ids.shape[1] :].tolist())))
    model.train()
    return samples


# ---------------------------------------------------------------- saving


@dataclass
class Progressed:
    """How far a run has come; `seconds` is training time, evaluation and snapshots not counted."""

    step: int = 0
    seconds: float = 0.0

    def share(self, settings: Settings) -> float:
        """Return the used share of the budget, 0 to 1."""
        by_steps = self.step / settings.steps if settings.steps > 0 else 0.0
        by_time = self.seconds / (60 * settings.minutes) if settings.minutes > 0 else 0.0
        return min(1.0, max(by_steps, by_time))


def save_checkpoint(
    path: Path, model: GPT2LMHeadModel, optimizers: list[torch.optim.Optimizer], progressed: Progressed
) -> None:
    """Write weights, optimizer state and progress to one safetensors file, replacing the old one at once."""
    tensors = {f"model/{name}": p.detach().contiguous() for name, p in model.named_parameters()}
    names = {p: name for name, p in model.named_parameters()}
    for index, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state.items():
            tensors |= {f"optimizer{index}/{names[parameter]}/{key}": value for key, value in state.items()}
    fresh = path.with_suffix(".new")
    save_file(tensors, fresh, metadata={"progress": json.dumps(asdict(progressed))})
    fresh.replace(path)


def load_checkpoint(path: Path, model: GPT2LMHeadModel, optimizers: list[torch.optim.Optimizer]) -> Progressed:
    """Restore what `save_checkpoint` wrote; raises `TrainingError` where there is nothing to resume."""
    if not path.exists():
        raise TrainingError(f"no checkpoint at {path}: start without --resume")
    parameters = dict(model.named_parameters())
    with safe_open(path, framework="pt", device="cpu") as checkpoint:
        progressed = Progressed(**json.loads(checkpoint.metadata()["progress"]))
        for key in checkpoint.keys():  # noqa: SIM118 - safe_open is no mapping
            part, name, *entry = key.split("/")
            parameter, value = parameters[name], checkpoint.get_tensor(key)
            if part == "model":
                parameter.data.copy_(value)
            else:
                optimizer = optimizers[int(part.removeprefix("optimizer"))]
                optimizer.state[parameter][entry[0]] = value.to(parameter.device)
    return progressed


def export(
    model: GPT2LMHeadModel, corpus: Corpus, settings: Settings, progressed: Progressed, windows: int
) -> dict[str, float]:
    """Write the model folder (float16 weights, tokenizer, card); return the perplexities of what is stored."""
    stored = GPT2LMHeadModel(model.config)
    stored.load_state_dict(model.state_dict())
    stored.half().save_pretrained(settings.out)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=corpus.tokenizer, bos_token=EOS, eos_token=EOS, pad_token=EOS, unk_token=EOS,
        model_max_length=settings.positions, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    wrapped.save_pretrained(settings.out)
    reloaded = GPT2LMHeadModel.from_pretrained(settings.out, dtype=torch.float32).to(settings.device)
    scores = perplexities(reloaded, corpus, settings, windows)
    samples = greedy_samples(reloaded, corpus.tokenizer)
    card = model_card(settings, corpus, progressed, scores, samples, reloaded.num_parameters(), windows)
    (settings.out / "README.md").write_text(card, encoding="utf-8")
    return scores


def machine(settings: Settings) -> str:
    """Return the processor, or the accelerator, that the training ran on."""
    if settings.device.startswith("cuda"):
        return torch.cuda.get_device_name(settings.device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return f"{found[1] if found else platform.machine()}, {settings.threads} threads"


def model_card(
    settings: Settings, corpus: Corpus, progressed: Progressed, scores: dict[str, float],
    samples: list[tuple[str, str]], parameters: int, windows: int,
) -> str:  # fmt: skip
    """Return the model card in Markdown, from what was measured."""
    hidden = {"out", "work", "corpus", "resume", "snapshot_minutes"}
    chosen = "\n".join(f"| {key} | {value} |" for key, value in asdict(settings).items() if key not in hidden)
    measured = "\n".join(f"| held-out {key} | {value:.3f} |" for key, value in scores.items())
    shown = "\n\n".join(f"> **{prompt}**{text}".replace("\n\n", "\n>\n> ") for prompt, text in samples)
    seen = progressed.step * settings.batch * settings.positions
    return f"""---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# {settings.out.name}

A GPT-2-architecture language model of our own ({parameters:,} parameters, tied embeddings, float16 on disk)
with its own byte-level BPE tokenizer, for demonstrations and tests without a download. It writes English in the
manner of nineteenth-century novels and knows nothing; it is no use for anything else.
This card is written by `scripts/train_tiny_model.py` from what it measured.

Text: {settings.corpus.name}; for the embedded model that is the 99 English novels, in the public domain, of
COST-ELTeC/ELTeC-eng at 3db3b67. Quotation marks and hyphens were made plain. {settings.heldout} novels, drawn by
the seed, were held out ({corpus.heldout_words:,} words, {len(corpus.heldout):,} tokens); an author may stand on
both sides.

| measured | |
|---|---|
| steps | {progressed.step:,} |
| tokens seen | {seen:,} ({seen / len(corpus.train):.2f} epochs of {len(corpus.train):,}) |
| share of the budget used | {progressed.share(settings):.0%} |
| training time | {progressed.seconds / 60:.1f} minutes |
| machine | {machine(settings)}, shared with other work |
{measured}

Perplexity is of the stored weights, in float32, over {windows:,} windows of {settings.positions} tokens each.

| setting | |
|---|---|
{chosen}

## Greedy samples, as produced

{shown}
"""


# ---------------------------------------------------------------- training


def set_rates(optimizers: list[torch.optim.Optimizer], settings: Settings, share: float) -> float:
    """Set and return the learning rate: linear warm-up, then cosine to zero, by the used share of the budget."""
    warm = min(1.0, (share + 1e-4) / settings.warmup) if settings.warmup > 0 else 1.0
    rest = max(0.0, share - settings.warmup) / (1 - settings.warmup)
    rate = settings.lr * warm * 0.5 * (1 + math.cos(math.pi * rest))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    return rate


def make_step(
    model: GPT2LMHeadModel, optimizers: list[torch.optim.Optimizer], settings: Settings
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function that takes one step on a (batch, positions + 1) tensor and returns its loss."""
    losses = torch.compile(token_losses) if settings.compile else token_losses
    kind = torch.device(settings.device).type

    def step(windows: torch.Tensor) -> torch.Tensor:
        with torch.autocast(kind, torch.bfloat16, enabled=settings.bf16):
            loss = losses(model, windows.to(settings.device))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    return step


@dataclass
class Run:
    """A training run: its parts and how far it has come."""

    settings: Settings
    corpus: Corpus
    model: GPT2LMHeadModel
    optimizers: list[torch.optim.Optimizer]
    progressed: Progressed
    console: Console
    mean_loss: float = math.nan

    def snapshot(self, final: bool = False) -> dict[str, float]:
        """Write the checkpoint and the model folder; return the held-out perplexities, of all the text if final."""
        every = (len(self.corpus.heldout) - 1) // self.settings.positions
        windows = every if final else min(every, SNAPSHOT_WINDOWS)
        save_checkpoint(self.settings.work / CHECKPOINT, self.model, self.optimizers, self.progressed)
        scores = export(self.model, self.corpus, self.settings, self.progressed, windows)
        said = ", ".join(f"{key} {value:.2f}" for key, value in scores.items())
        share = self.progressed.share(self.settings)
        self.console.print(f"step {self.progressed.step}, {share:.0%}, loss {self.mean_loss:.3f}: held-out {said}")
        return scores

    def train(self) -> dict[str, float]:
        """Train until the budget is used, with a snapshot every so often; return the last perplexities."""
        take_step = make_step(self.model, self.optimizers, self.settings)
        feed = batches(self.corpus.train, self.settings, self.progressed.step)
        saved = self.progressed.seconds
        columns = (*Progress.get_default_columns(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"))
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task("training", total=1.0, note="")
            while (share := self.progressed.share(self.settings)) < 1:
                self.advance(take_step, next(feed), share)
                note = f"step {self.progressed.step} loss {self.mean_loss:.3f}"
                bar.update(task, completed=share, note=note)
                if self.progressed.seconds - saved > 60 * self.settings.snapshot_minutes:
                    saved = self.progressed.seconds
                    self.snapshot()
            bar.update(task, completed=1.0)
        return self.snapshot(final=True)

    def advance(self, take_step: Callable[[torch.Tensor], torch.Tensor], windows: torch.Tensor, share: float) -> None:
        """Take one step and account for it; raises `TrainingError` where the loss is no longer finite."""
        started = time.monotonic()
        set_rates(self.optimizers, self.settings, share)
        loss = float(take_step(windows))
        if not math.isfinite(loss):
            raise TrainingError(f"loss {loss} at step {self.progressed.step}: lower --lr and start again")
        self.mean_loss = loss if math.isnan(self.mean_loss) else 0.98 * self.mean_loss + 0.02 * loss
        self.progressed.step += 1
        self.progressed.seconds += time.monotonic() - started


def start(settings: Settings, console: Console) -> Run:
    """Return the run that `settings` asks for, fresh or resumed."""
    settings.work.mkdir(parents=True, exist_ok=True)
    with console.status("reading the corpus, making the tokenizer"):
        corpus = load_corpus(settings)
    model = build_model(settings).to(settings.device)
    optimizers = build_optimizers(model, settings)
    progressed = Progressed()
    if settings.resume:
        progressed = load_checkpoint(settings.work / CHECKPOINT, model, optimizers)
    size, tokens = model.num_parameters(), len(corpus.train)
    console.print(f"{size:,} parameters, {tokens:,} training tokens, from step {progressed.step}")
    return Run(settings, corpus, model, optimizers, progressed, console)


def main() -> None:
    """Train as the command line asks; one clear line and exit status 1 where it cannot go on."""
    console = Console()
    settings = parse_settings(__doc__)
    torch.set_num_threads(settings.threads)
    try:
        start(settings, console).train()
    except TrainingError as error:
        console.print(f"error: {error}", style="red")
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()

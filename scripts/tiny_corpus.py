"""From plain text to batches of tokens, for `train_tiny_model.py`: novels, byte-level BPE, token stream, windows."""

from __future__ import annotations

import lzma
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from tiny_settings import Settings, TrainingError

EOS = "<|endoftext|>"
EOS_ID = 0
NOVEL_BREAK = re.compile(r"(?<!\n)\n(?!\n)")  # paragraphs are a blank line apart, novels a single line break
PLAIN = str.maketrans("“”‘’`´‐‑", "\"\"''''--", "\xad")  # quotation marks and hyphens; no soft hyphen
Tokens = NDArray[np.uint16]


def read_novels(path: Path) -> list[str]:
    """Return the novels of `path`, quotation marks and hyphens made plain, to spend no tokens on variants."""
    if not path.exists():
        raise TrainingError(f"no corpus at {path}: give --corpus a text file")
    data = path.read_bytes()
    text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode()
    return [novel.strip() for novel in NOVEL_BREAK.split(text.translate(PLAIN)) if novel.strip()]


def split_novels(novels: list[str], heldout: int, seed: int) -> tuple[list[str], list[str]]:
    """Split into (training, held-out) novels by a seeded draw; an author may stand on both sides."""
    if len(novels) <= heldout:
        raise TrainingError(f"{len(novels)} novels, {heldout} of them held out: nothing left to train on")
    chosen = set(np.random.default_rng(seed).permutation(len(novels))[:heldout].tolist())
    training = [novel for index, novel in enumerate(novels) if index not in chosen]
    return training, [novels[index] for index in sorted(chosen)]


def train_tokenizer(novels: list[str], vocab: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer with `vocab` entries; `<|endoftext|>` is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(novels, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, novels: list[str]) -> Tokens:
    """Return all novels as one stream of tokens, (n,), uint16, `<|endoftext|>` in front of each."""
    pieces = [[EOS_ID, *encoding.ids] for encoding in tokenizer.encode_batch_fast(novels)]
    return np.concatenate([np.asarray(piece, dtype=np.uint16) for piece in pieces])


@dataclass(frozen=True)
class Corpus:
    """The tokenizer, the two token streams, and the size of the held-out text."""

    tokenizer: Tokenizer
    train: Tokens
    heldout: Tokens
    heldout_words: int
    heldout_bytes: int


def encode_once(path: Path, tokenizer: Tokenizer, novels: list[str], resume: bool) -> Tokens:
    """Return `encode` of the novels, kept in `path` for a resumed run to read."""
    if resume and path.exists():
        kept: Tokens = np.load(path, allow_pickle=False)
        return kept
    tokens = encode(tokenizer, novels)
    np.save(path, tokens)
    return tokens


def load_corpus(settings: Settings) -> Corpus:
    """Read and tokenize the corpus; what is already in `settings.work` is used again when resuming."""
    training, heldout = split_novels(read_novels(settings.corpus), settings.heldout, settings.seed)
    saved = settings.work / "tokenizer.json"
    if settings.resume and saved.exists():
        tokenizer = Tokenizer.from_file(str(saved))
    else:
        tokenizer = train_tokenizer(training, settings.vocab)
        tokenizer.save(str(saved))
    words = sum(len(novel.split()) for novel in heldout)
    size = sum(len(novel.encode()) for novel in heldout)
    train_tokens = encode_once(settings.work / "train.npy", tokenizer, training, settings.resume)
    heldout_tokens = encode_once(settings.work / "heldout.npy", tokenizer, heldout, settings.resume)
    return Corpus(tokenizer, train_tokens, heldout_tokens, words, size)


def batches(tokens: Tokens, settings: Settings, step: int) -> Iterator[torch.Tensor]:
    """Yield (batch, positions + 1) int64 windows from `step` on; every epoch has its own order and phase."""
    span = settings.positions
    per_epoch = (len(tokens) - span - 1) // span // settings.batch
    if per_epoch < 1:
        raise TrainingError(f"{len(tokens)} tokens do not fill a batch of {settings.batch} x {span}: use more text")
    while True:
        epoch, offset = divmod(step, per_epoch)
        rng = np.random.default_rng([settings.seed, epoch])
        phase = int(rng.integers(span))
        order = rng.permutation(per_epoch * settings.batch).reshape(per_epoch, settings.batch)
        for rows in order[offset:]:
            windows = [tokens[phase + row * span : phase + row * span + span + 1] for row in rows]
            yield torch.from_numpy(np.stack(windows).astype(np.int64))
            step += 1

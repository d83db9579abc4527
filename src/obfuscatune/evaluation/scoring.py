"""Log-likelihoods of continuations, computed as lm-evaluation-harness does, and the metrics made of them.

The model's input is context and continuation without the last token. If that is longer than the model's window, the
first tokens are cut off (`HFLM._loglikelihood_tokens`). Every pair is one row of a batch, longest first. Choices do not
share the pass over their context, since that would change the rounding and so perhaps an answer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING

import torch

from obfuscatune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Pair:
    """Token ids of a context and of a continuation; at least one each."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Score:
    """The score of one continuation.

    Attributes:
        loglikelihood: in nats.
        greedy: whether greedy decoding would produce the continuation.
        margin: least change of a logit difference that changes `greedy`.
    """

    loglikelihood: float
    greedy: bool
    margin: float


def score_pairs(
    model: "PreTrainedModel",
    pairs: Sequence[Pair],
    *,
    window: int,
    batch_size: int,
    pad_id: int,
    advance: Callable[[int], None],
) -> list[Score]:
    """Score every pair, in the order given.

    Args:
        model: A causal language model; it is switched to evaluation mode.
        window: The most tokens that the model takes.
        pad_id: Token that fills shorter rows; it is masked.
        advance: Called after each batch with the number of pairs in it.

    Raises:
        DataError: a continuation is empty, or longer than the window.
    """
    for pair in pairs:
        if not 0 < len(pair.continuation) <= window:
            raise DataError(
                f"an answer of {len(pair.continuation)} tokens cannot be scored; between 1 and {window} can"
            )
    rows = [_Row.of(pair, window) for pair in pairs]
    longest_first = sorted(range(len(rows)), key=lambda index: (-len(rows[index].inputs), index))
    scores: dict[int, Score] = {}
    model.eval()
    for start in range(0, len(longest_first), batch_size):
        chosen = longest_first[start : start + batch_size]
        batch = [rows[index] for index in chosen]
        scores.update(zip(chosen, _score_batch(model, batch, pad_id), strict=True))
        advance(len(chosen))
    return [scores[index] for index in range(len(rows))]


@dataclass(frozen=True)
class _Row:
    """The last `len(targets)` positions of `inputs` predict `targets`."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]

    @classmethod
    def of(cls, pair: Pair, window: int) -> "_Row":
        whole = (*pair.context, *pair.continuation)
        return cls(whole[-(window + 1) :][:-1], pair.continuation)


@torch.no_grad()
def _score_batch(model: "PreTrainedModel", rows: Sequence[_Row], pad_id: int) -> list[Score]:
    length = max(len(row.inputs) for row in rows)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):  # padded on the right, which causal attention does not see
        ids[index, : len(row.inputs)] = torch.tensor(row.inputs)
        mask[index, : len(row.inputs)] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (rows, length, vocabulary)
    return [_score(row, logits[index]) for index, row in enumerate(rows)]


def _score(row: _Row, logits: torch.Tensor) -> Score:
    """The score of one row from its logits (length, vocabulary), computed in float32 or wider."""
    end = len(row.inputs)
    logits = logits[end - len(row.targets) : end]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    targets = torch.tensor(row.targets, device=logits.device)[:, None]
    chosen = logits.gather(1, targets)
    total = (chosen - logits.logsumexp(1, keepdim=True)).sum().item()
    greedy = bool((logits.argmax(1, keepdim=True) == targets).all())
    lead = (chosen - logits.scatter(1, targets, -torch.inf).amax(1, keepdim=True)).squeeze(1)
    margin = lead.min() if greedy else (-lead).max()
    return Score(total, greedy, max(0.0, margin.item()))


@dataclass(frozen=True)
class Verdict:
    """The model's answer to one question.

    Attributes:
        answer: index of a choice, or generated text, or whether greedy decoding would produce a right answer.
        right: whether the answer is right.
        margin: least change of logits or log-likelihoods (nats) that changes the answer.
    """

    answer: int | str | bool
    right: bool
    margin: float


@dataclass(frozen=True)
class Metric:
    """An accuracy under one rule, and the answers it is made of, in the order of the questions."""

    name: str
    verdicts: tuple[Verdict, ...]

    @property
    def value(self) -> float:
        """The share of right answers, 0 to 1."""
        return fmean(verdict.right for verdict in self.verdicts)

    @property
    def stderr(self) -> float:
        """Standard error of `value`: sample standard deviation over sqrt(n). NaN for fewer than two answers."""
        if len(self.verdicts) < 2:
            return math.nan
        return stdev(float(verdict.right) for verdict in self.verdicts) / math.sqrt(len(self.verdicts))


TIE = 1e-3
"""Nats. Rounding may change an answer with a smaller margin: protected and plain logits agree to 1e-4 in float32
(tests/contract), and a log-likelihood sums over about ten tokens."""


@dataclass(frozen=True)
class Comparison:
    """Indices of the questions with different answers. `ties` are those with a margin below `TIE` on either side."""

    metric: str
    differing: tuple[int, ...]
    ties: tuple[int, ...]

    @property
    def same_but_for_ties(self) -> bool:
        """Whether every difference is a tie."""
        return self.differing == self.ties


def compare(one: Metric, other: Metric) -> Comparison:
    """Compare the answers to the same questions.

    Raises:
        ValueError: metrics or numbers of questions differ.
    """
    if (one.name, len(one.verdicts)) != (other.name, len(other.verdicts)):
        raise ValueError(f"{one.name} of {len(one.verdicts)} against {other.name} of {len(other.verdicts)}")
    both = list(zip(one.verdicts, other.verdicts, strict=True))
    differing = [index for index, (a, b) in enumerate(both) if a.answer != b.answer]
    ties = [index for index in differing if min(verdict.margin for verdict in both[index]) < TIE]
    return Comparison(one.name, tuple(differing), tuple(ties))

"""The oldest attack: where equal tokens are seen to be equal, counting them reads the text."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import quadratic_assignment

from obfuscatune.audit.attacks.base import Attacker, CannotRun, Finding, Target
from obfuscatune.audit.attacks.geometry import similarities
from obfuscatune.audit.attacks.knowledge import Knowledge, PublicText
from obfuscatune.audit.attacks.linkage import EXACT, MOST_CALLS
from obfuscatune.audit.attacks.scoring import TokenGuess, Truth, pairs_of, score_tokens
from obfuscatune.audit.attacks.view import SeenCall, WorkerView

COMMONEST = 200
"""Symbols and tokens that are matched by their neighbours; rarer ones by rank alone."""
STARTS = 60
WORK = 3e7
"""Starts times symbols cubed: 60 starts up to 79 symbols, 4 of 200."""
NEAR = 8.0
"""Ranks by which a symbol's token may well be off."""
FAR = 0.02
"""Weight of all others in a start, against 1."""

Place = tuple[int, int]


class FrequencyDecipherment:
    """Gives the commonest symbol the commonest token, then matches which symbols and tokens follow one another."""

    name = "frequency-decipherment"
    needs = Attacker.PUBLIC_TEXT
    target = Target.TOKENS
    measure = "share of tokens named"
    source = "al-Kindi, 9th century; Vogelstein et al. 2015 for the matching (FAQ)"

    def run(self, view: WorkerView, knowledge: Knowledge, seed: int) -> TokenGuess:
        """Clusters of equal rows, named by what public text says of frequencies and neighbours."""
        text = knowledge.the_text()
        texts = _as_symbols(view, mixed=knowledge.scheme.mixing)
        count = 1 + max(symbol for places in texts for _, symbol in places)
        sequences = [[symbol for _, symbol in places] for places in texts]
        key = _decipher(sequences, count, text, seed)
        tokens: dict[int, list[int]] = defaultdict(list)
        for places in texts:
            for (call, _), symbol in places:
                tokens[call].append(key[symbol])
        return TokenGuess({call: tuple(named) for call, named in tokens.items()})

    def score(self, guess: TokenGuess, truth: Truth) -> Finding:
        """Against the tokens."""
        return score_tokens(guess, truth)


def _as_symbols(view: WorkerView, *, mixed: bool) -> list[list[tuple[Place, int]]]:
    """Texts as lists of ((call, row), symbol): rows that are equal have one symbol."""
    if mixed:  # single rows are seen in decoding alone
        calls = view.decoding(0)[:MOST_CALLS]
        if 2 * calls[0].count >= calls[0].width:
            return [[((call.index, 0), number) for number, call in enumerate(calls)]]
        alike = similarities(calls) > EXACT
        i, j = pairs_of(len(calls))
        symbols = _components(len(calls), i[alike].tolist(), j[alike].tolist())
        return [[((call.index, 0), symbol) for call, symbol in zip(calls, symbols, strict=True)]]
    return _rows_as_symbols(view.forward(0))


def _rows_as_symbols(calls: Sequence[SeenCall]) -> list[list[tuple[Place, int]]]:
    known: dict[tuple[float, ...], int] = {}
    texts: list[list[tuple[Place, int]]] = []
    scale = max(float(call.rows.abs().max()) for call in calls)
    for call in calls:
        rounded = torch.round(call.rows / scale, decimals=4)
        places = [((call.index, n), known.setdefault(tuple(row), len(known))) for n, row in enumerate(rounded.tolist())]
        if len(places) == 1 and texts:
            texts[-1] += places  # goes on with the text before
        else:
            texts.append(places)
    return texts


def _components(count: int, i: list[int], j: list[int]) -> list[int]:
    parent = list(range(count))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for a, b in zip(i, j, strict=True):
        parent[root(a)] = root(b)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(node), len(numbers)) for node in range(count)]


def _decipher(sequences: list[list[int]], symbols: int, text: PublicText, seed: int) -> list[int]:
    """A token for each symbol; different ones as long as there are tokens."""
    counts = Counter(symbol for sequence in sequences for symbol in sequence)
    tokens = Counter(token for one in text.texts for token in one)
    if not tokens:
        raise CannotRun("the public text is empty")
    by_count = [token for token, _ in tokens.most_common()]
    ranked = [symbol for symbol, _ in counts.most_common()]
    key = [by_count[0]] * symbols
    for rank, symbol in enumerate(ranked):
        key[symbol] = by_count[min(rank, len(by_count) - 1)]
    size = min(COMMONEST, len(by_count), len(ranked))
    for place, match in enumerate(_match(sequences, ranked[:size], text, by_count[:size], seed)):
        key[ranked[place]] = by_count[match]
    return key


def _match(
    sequences: Sequence[Sequence[int]], symbols: list[int], text: PublicText, tokens: list[int], seed: int
) -> list[int]:
    """For each symbol the index of a token, so that both follow one another alike: quadratic assignment."""
    seen, public = _follows(sequences, symbols), _follows(text.texts, tokens)
    size = len(symbols)
    best, reached = list(range(size)), float((seen * public).sum())  # commonest to commonest
    random = np.random.default_rng(seed)
    ranks = np.arange(size)
    near = np.exp(-np.abs(ranks[:, None] - ranks[None]) / NEAR) + FAR
    for _ in range(max(3, min(STARTS, round(WORK / size**3)))):
        start = _doubly_stochastic(near * random.random((size, size)))
        options = {
            "maximize": True,
            "P0": start,
            "maxiter": 60,
            "rng": random,
        }  # its default looks at numpy's global one
        found = quadratic_assignment(seen, public, method="faq", options=options)
        if found.fun > reached:
            best, reached = found.col_ind.tolist(), float(found.fun)
    return best


def _doubly_stochastic(start: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows and columns scaled in turn until all add up to 1 (Sinkhorn 1964)."""
    for _ in range(1000):
        start = start / start.sum(1, keepdims=True)
        start = start / start.sum(0, keepdims=True)
        if np.abs(start.sum(1) - 1).max() < 1e-6:
            break
    return start


def _follows(texts: Sequence[Sequence[int]], kept: list[int]) -> NDArray[np.float64]:
    """How often each of `kept` follows each, as a share; its root, for rare pairs tell too."""
    place = {item: number for number, item in enumerate(kept)}
    counts = np.zeros((len(kept), len(kept)))
    for one in texts:
        for a, b in pairwise(one):
            if a in place and b in place:
                counts[place[a], place[b]] += 1
    shares: NDArray[np.float64] = np.sqrt(counts / max(1.0, counts.sum()))
    return shares

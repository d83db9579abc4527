"""The oldest attack: where equal tokens are seen to be equal, counting them reads the text."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from obfuscatune.attacks.base import Attacker, CannotRun, Finding, Target
from obfuscatune.attacks.equality import EXACT, MOST_CALLS
from obfuscatune.attacks.geometry import similarities
from obfuscatune.attacks.knowledge import Knowledge, PublicText
from obfuscatune.attacks.scoring import TokenGuess, pairs_of, score_tokens
from obfuscatune.attacks.truth import Truth
from obfuscatune.attacks.view import SeenCall, WorkerView

SWAPS = 30_000
HOTTEST = 8.0
"""Loss of log-likelihood that a swap may cost at first."""
COMMONEST = 160
"""Symbols and tokens among which swaps are tried."""

Place = tuple[int, int]


class FrequencyDecipherment:
    """Gives the commonest symbol the commonest token, then swaps as long as pairs of neighbours grow likelier."""

    name = "frequency-decipherment"
    needs = Attacker.PUBLIC_TEXT
    target = Target.TOKENS
    measure = "share of tokens named"
    source = "al-Kindi, 9th century; Jakobsen 1995 for the swaps"

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
        if 2 * calls[0].rows.shape[0] >= calls[0].rows.shape[1]:
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
    head = ranked[: min(COMMONEST, len(by_count), len(ranked))]
    _swap(key, head, sequences, text, seed)
    return key


def _swap(key: list[int], head: list[int], sequences: list[list[int]], text: PublicText, seed: int) -> None:
    """Annealing on the log-likelihood of neighbouring tokens (Kirkpatrick et al. 1983)."""
    follows = Counter(pair for one in text.texts for pair in pairwise(one))
    used = sorted({token for one in text.texts for token in one})
    place = {token: number for number, token in enumerate(used)}
    likelihood = np.full((len(used), len(used)), math.log(0.01))
    for (a, b), count in follows.items():
        likelihood[place[a], place[b]] = math.log(count + 0.01)
    neighbours = Counter(pair for one in sequences for pair in pairwise(one))
    links: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for (a, b), count in neighbours.items():
        links[a].append((a, b, count))
        if b != a:
            links[b].append((a, b, count))
    named = {symbol: place.get(key[symbol], 0) for symbol in range(len(key))}

    def local(a: int, b: int) -> float:
        both = links[a] + [link for link in links[b] if a not in link[:2]]
        return float(sum(count * likelihood[named[x], named[y]] for x, y, count in both))

    random = np.random.default_rng(seed)
    chosen = random.integers(0, len(head), (SWAPS, 2)).tolist()
    thresholds = np.log(random.random(SWAPS)) * HOTTEST * (1 - np.arange(SWAPS) / SWAPS)
    for (first, second), threshold in zip(chosen, thresholds.tolist(), strict=True):
        a, b = head[first], head[second]
        before = local(a, b)
        named[a], named[b] = named[b], named[a]
        if local(a, b) - before < threshold:
            named[a], named[b] = named[b], named[a]
    for symbol in head:
        key[symbol] = used[named[symbol]]

"""Log-likelihoods against the sum written out, one pair and one token at a time."""

import pytest
import torch

from obfuscatune.errors import DataError
from obfuscatune.evaluation.scoring import Pair, score_pairs
from obfuscatune.training.tasks import TASKS, load_questions
from obfuscatune.training.tokens import encode_pair

# float32; a batch's rows are multiplied in other blocks than a row alone, and up to 60 tokens are summed.
TOLERANCE = 5e-4


def by_hand(model, pair, window=512):
    """The same by definition: no batch, no padding, one forward pass for each token."""
    ids = [*pair.context, *pair.continuation]
    total, greedy = 0.0, True
    for place in range(len(pair.context), len(ids)):
        with torch.no_grad():
            # As many tokens before the last one as the whole, cut once, has there.
            first = max(0, len(ids) - 1 - window)
            log_p = model(torch.tensor([ids[first:place]])).logits[0, -1].log_softmax(-1)
        total += log_p[ids[place]].item()
        greedy &= int(log_p.argmax()) == ids[place]
    return total, greedy


def score(model, pairs, *, window=512, batch_size=4, advance=lambda _: None):
    return score_pairs(model, pairs, window=window, batch_size=batch_size, pad_id=2, advance=advance)


@pytest.fixture(scope="module")
def pairs(tokenizer):
    texts = [
        ("Once upon a time", ", there was a little girl named Lily."),
        ("Once upon a time", ", there was a big dog."),
        ("She loved to", " play"),
        ("Question: what?\nAnswer: ", "rain"),
        ("", "Once"),
        ("One day, a boy named Tim went to the park with his mom. He saw a big, red", " ball"),
    ]
    return [Pair(*map(tuple, encode_pair(tokenizer, *text))) for text in texts]


def test_scores_are_those_by_hand(model, pairs):
    for found, pair in zip(score(model, pairs), pairs, strict=True):
        expected, greedy = by_hand(model, pair)
        assert found.loglikelihood == pytest.approx(expected, abs=TOLERANCE)
        assert found.greedy is greedy
    assert {found.greedy for found in score(model, pairs)} == {True, False}


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_the_batch_is_of_no_consequence(model, pairs, batch_size):
    for found, expected in zip(score(model, pairs, batch_size=batch_size), score(model, pairs), strict=True):
        assert found.loglikelihood == pytest.approx(expected.loglikelihood, abs=TOLERANCE)
        assert found.greedy is expected.greedy


def test_the_same_call_gives_the_same_bits(model, pairs):
    assert score(model, pairs) == score(model, pairs)


def test_what_does_not_fit_is_cut_off_on_the_left(model, pairs):
    long = pairs[-1]
    (found,) = score(model, [long], window=8)
    assert len(long.context) > 8
    expected, _ = by_hand(model, long, window=8)
    assert found.loglikelihood == pytest.approx(expected, abs=TOLERANCE)
    assert found.loglikelihood != pytest.approx(by_hand(model, long)[0], abs=0.01)


@pytest.mark.parametrize("length", [0, 9])
def test_a_continuation_of_no_tokens_or_too_many_is_refused(model, length):
    with pytest.raises(DataError, match=f"an answer of {length} tokens cannot be scored; between 1 and 8 can"):
        score(model, [Pair((1,), (5,) * length)], window=8)


def test_progress_counts_every_pair(model, pairs):
    seen = []
    score(model, pairs, advance=seen.append)
    assert seen == [4, 2]


def test_the_margin_is_the_lead_that_greedy_decoding_had(model, pairs):
    for found, pair in zip(score(model, pairs), pairs, strict=True):
        with torch.no_grad():
            ids = [*pair.context, *pair.continuation]
            logits = model(torch.tensor([ids])).logits[0, len(pair.context) - 1 : -1]
        leads = []
        for row, token in zip(logits, pair.continuation, strict=True):
            others = torch.cat([row[:token], row[token + 1 :]])
            leads.append((row[token] - others.max()).item())
        expected = min(leads) if found.greedy else max(-lead for lead in leads)
        assert found.margin == pytest.approx(expected, abs=TOLERANCE)


def test_bfloat16_logits_are_summed_in_float32(model, pairs):
    import copy

    rough = score(copy.deepcopy(model).bfloat16(), pairs)
    for found, expected in zip(rough, score(model, pairs), strict=True):
        assert found.loglikelihood == pytest.approx(expected.loglikelihood, rel=0.05, abs=0.3)


@pytest.mark.parametrize("name", TASKS)
def test_real_questions_are_scored_as_by_hand(name, model, tokenizer, shared_data):
    questions = load_questions(TASKS[name], shared_data, limit=2)
    pairs = [Pair(*map(tuple, encode_pair(tokenizer, q.prompt, f" {c}"))) for q in questions for c in q.choices]
    for found, pair in zip(score(model, pairs), pairs, strict=True):
        expected, greedy = by_hand(model, pair)
        assert found.loglikelihood == pytest.approx(expected, abs=TOLERANCE, rel=1e-5)
        assert found.greedy is greedy

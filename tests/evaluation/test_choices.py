"""Accuracy, judged as the harness judges it, recomputed here with numpy."""

import math

import numpy as np
import pytest

from obfuscatune.evaluation.questions import evaluate_task
from obfuscatune.evaluation.scoring import Pair, score_pairs
from obfuscatune.training.tasks import TASKS, Question, load_questions
from obfuscatune.training.tokens import encode_pair


def scores_of(model, tokenizer, question):
    pairs = [Pair(*map(tuple, encode_pair(tokenizer, question.prompt, f" {c}"))) for c in question.choices]
    return score_pairs(model, pairs, window=512, batch_size=1, pad_id=2, advance=lambda _: None)


@pytest.fixture(scope="module")
def questions(shared_data):
    return load_questions(TASKS["sciq"], shared_data, limit=12)


def test_accuracy_is_that_of_the_harness(model, tokenizer, questions):
    acc, acc_norm = evaluate_task(model, tokenizer, TASKS["sciq"], questions, batch_size=5)
    hits, hits_norm = [], []
    for index, question in enumerate(questions):
        scores = [score.loglikelihood for score in scores_of(model, tokenizer, question)]
        lengths = np.array([float(len(choice)) for choice in question.choices])
        best, best_norm = int(np.argmax(scores)), int(np.argmax(np.array(scores) / lengths))
        assert acc.verdicts[index].answer == best
        assert acc_norm.verdicts[index].answer == best_norm
        two = sorted(scores)[-2:]
        assert acc.verdicts[index].margin == pytest.approx(two[1] - two[0], abs=1e-3)
        hits.append(best == question.gold[0])
        hits_norm.append(best_norm == question.gold[0])
    assert (acc.name, acc_norm.name) == ("acc", "acc_norm")
    assert acc.value == pytest.approx(np.mean(hits))
    assert acc_norm.value == pytest.approx(np.mean(hits_norm))
    assert acc.stderr == pytest.approx(np.std(hits, ddof=1) / math.sqrt(len(hits)))
    assert 0 < acc.value < 1, "a set on which nothing can go wrong shows nothing"


def test_length_is_in_characters_and_without_the_space(model, tokenizer):
    # Of two choices with the same log-likelihood in all, the longer has the better per character.
    question = Question("Once upon a time, there was a", ("dog", "little girl named Lily"), (1,))
    acc, acc_norm = evaluate_task(model, tokenizer, TASKS["sciq"], [question], batch_size=2)
    dog, girl = (score.loglikelihood for score in scores_of(model, tokenizer, question))
    assert acc.verdicts[0].margin == pytest.approx(abs(dog - girl), abs=1e-3)
    assert acc_norm.verdicts[0].margin == pytest.approx(abs(dog / 3 - girl / 22), abs=1e-3)
    assert acc_norm.verdicts[0].answer == 1


def test_of_equal_choices_the_first_is_taken(model, tokenizer):
    question = Question("She loved to", ("play", "play"), (1,))
    acc, _ = evaluate_task(model, tokenizer, TASKS["sciq"], [question], batch_size=1)
    assert (acc.verdicts[0].answer, acc.verdicts[0].right, acc.verdicts[0].margin) == (0, False, 0.0)
    assert math.isnan(acc.stderr)


def test_any_answer_that_greedy_decoding_writes_is_an_exact_match(model, tokenizer):
    prompt = "Once upon a time, there was a little girl named Lily. She loved to"
    questions = [
        Question(prompt, ("eat stones", "play outside"), (0, 1)),
        Question(prompt, ("eat stones", "sing a song"), (0, 1)),
    ]
    (metric,) = evaluate_task(model, tokenizer, TASKS["webqs"], questions, batch_size=3)
    assert metric.name == "exact_match"
    assert [verdict.right for verdict in metric.verdicts] == [True, False]
    for verdict, question in zip(metric.verdicts, questions, strict=True):
        scores = scores_of(model, tokenizer, question)
        hits = [score.margin for score in scores if score.greedy]
        assert verdict.margin == pytest.approx(max(hits) if hits else min(s.margin for s in scores), abs=1e-3)


def test_progress_counts_choices(model, tokenizer):
    seen = []
    question = Question("a", ("b", "c", "d"), (0,))
    evaluate_task(model, tokenizer, TASKS["sciq"], [question], batch_size=2, advance=seen.append)
    assert seen == [2, 1]

"""A task's questions, answered by likelihood: `process_results` of lm-evaluation-harness for its choices."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from obfuscatune.evaluation.scoring import Metric, Pair, Score, Verdict, score_pairs
from obfuscatune.tuning.tasks import Question, Task
from obfuscatune.tuning.tokens import context_window, encode_pair, end_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def evaluate_task(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    task: Task,
    questions: Sequence[Question],
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> tuple[Metric, ...]:
    """Score every choice of every question, and judge as the task says.

    Args:
        batch_size: Choices in one forward pass.
        advance: Called with the number of choices scored since the last call.

    Returns:
        `acc` and `acc_norm` (log-likelihood per character of the choice), or `exact_match` of a task that asks
        whether a right answer is what the model would write greedily.

    Raises:
        DataError: a choice is longer than the model's window.
    """
    pairs = [
        Pair(tuple(context), tuple(continuation))
        for question in questions
        for context, continuation in (encode_pair(tokenizer, question.prompt, f" {c}") for c in question.choices)
    ]
    scores = iter(
        score_pairs(
            model,
            pairs,
            window=context_window(model.config),
            batch_size=batch_size,
            pad_id=end_id(tokenizer),
            advance=advance,
        )
    )
    scored = [(question, [next(scores) for _ in question.choices]) for question in questions]
    if task.metric == "greedy":
        return (Metric("exact_match", tuple(_judge_greedy(question, own) for question, own in scored)),)
    return (
        Metric("acc", tuple(_judge_choice(question, _plain(own)) for question, own in scored)),
        Metric("acc_norm", tuple(_judge_choice(question, _per_character(question, own)) for question, own in scored)),
    )


def _plain(scores: Sequence[Score]) -> list[float]:
    return [score.loglikelihood for score in scores]


def _per_character(question: Question, scores: Sequence[Score]) -> list[float]:
    return [score.loglikelihood / len(choice) for score, choice in zip(scores, question.choices, strict=True)]


def _judge_choice(question: Question, values: Sequence[float]) -> Verdict:
    """The first of the largest values is the answer, as `numpy.argmax` has it."""
    best = max(range(len(values)), key=lambda index: values[index])
    rest = [value for index, value in enumerate(values) if index != best]
    return Verdict(best, best in question.gold, values[best] - max(rest, default=-float("inf")))


def _judge_greedy(question: Question, scores: Sequence[Score]) -> Verdict:
    """Right if greedy decoding would write any right answer. To lose that, every such answer must be lost."""
    gold = [scores[index] for index in question.gold]
    hits = [score.margin for score in gold if score.greedy]
    return Verdict(bool(hits), bool(hits), max(hits) if hits else min(score.margin for score in gold))

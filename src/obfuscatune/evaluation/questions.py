"""Questions put to a model: answered in its own words, or by the likelihood of given choices.

Its own words are greedy text up to the end of the first line, matched exactly. Choices are scored as `process_results`
of lm-evaluation-harness does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from obfuscatune.errors import DataError
from obfuscatune.evaluation.scoring import Metric, Pair, Score, Verdict, score_pairs
from obfuscatune.training.data import Source
from obfuscatune.training.data_files import Completion
from obfuscatune.training.tasks import Question, Task
from obfuscatune.training.tokens import (
    check_ids,
    context_window,
    embedding_rows,
    encode_open,
    encode_pair,
    encode_prompt,
    end_id,
    stop_ids,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


_SPARE_TOKENS = 4
"""Written beyond the longest expected answer, so that one which goes on is seen to."""


@dataclass(frozen=True)
class _Asked:
    ids: tuple[int, ...]
    expected: str


def load_completions(
    path: Path, limit: int | None = None, columns: Mapping[str, str] | None = None
) -> list[Completion]:
    """The first `limit` prompts and completions of a file (all of them if None).

    Args:
        columns: Which columns hold the prompt and the completion, where they are not called so.

    Raises:
        DataError: the file cannot be read, holds other records, or an expected answer of several lines.
    """
    found: list[Completion] = []
    for where, record in Source.of(path, None, "test", columns).records():
        if not isinstance(record, Completion):
            raise DataError(f"{where}: expected prompt and completion: only those can be asked and matched")
        if "\n" in record.completion.strip():
            raise DataError(f"{where}: the completion has several lines; an answer is read up to the first")
        found.append(record)
        if len(found) == limit:
            break
    return found


def check_completions(
    path: Path,
    completions: Sequence[Completion],
    tokenizer: "PreTrainedTokenizerBase",
    config: Any,
) -> None:
    """See, before a model is read, that every prompt and its answer fit it.

    Args:
        path: The file that they are from, for messages.
        config: The model's.

    Raises:
        DataError: a token for which the model has no embedding, or more of them than its window holds.
    """
    window, rows = context_window(config), embedding_rows(config)
    pairs = [encode_pair(tokenizer, one.prompt, one.completion) for one in completions]
    longest = max(len(answer) for _, answer in pairs) + _SPARE_TOKENS
    for number, (context, answer) in enumerate(pairs, start=1):
        try:
            check_ids(tokenizer, [*context, *answer], rows)
        except DataError as error:
            raise DataError(f"{path}: record {number}: {error}") from error
        if len(context) + longest > window:
            raise DataError(
                f"{path}: record {number}: a prompt of {len(context)} tokens leaves no room for an answer of {longest} "
                f"in the model's window of {window}"
            )


def check_questions(questions: Sequence[Question], tokenizer: "PreTrainedTokenizerBase", config: Any) -> None:
    """See, before a model is read, that it has embeddings for all tokens of a task's questions. `config`: the model's.

    Raises:
        DataError: it has not.
    """
    rows = embedding_rows(config)
    for question in questions:
        for text in (question.prompt, *question.choices):
            check_ids(tokenizer, encode_open(tokenizer, text), rows)


def evaluate_completions(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    completions: Sequence[Completion],
    *,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Metric:
    """Ask every prompt, and compare the first line written with the completion, white space at both ends aside.

    Args:
        batch_size: Prompts in one batch.
        advance: Called after each batch with the number of prompts in it.

    Returns:
        `exact_match`; the answers are the lines written.

    Raises:
        DataError: a prompt and its answer do not fit the model's window.
    """
    longest = max(len(encode_pair(tokenizer, c.prompt, c.completion)[1]) for c in completions) + _SPARE_TOKENS
    asked = [_Asked(tuple(encode_prompt(tokenizer, c.prompt)), c.completion.strip()) for c in completions]
    window = context_window(model.config)
    for one in asked:
        if len(one.ids) + longest > window:
            raise DataError(
                f"a prompt of {len(one.ids)} tokens leaves no room for an answer of {longest} "
                f"in the model's window of {window}"
            )
    longest_first = sorted(range(len(asked)), key=lambda index: (-len(asked[index].ids), index))
    verdicts: dict[int, Verdict] = {}
    model.eval()
    for start in range(0, len(asked), batch_size):
        chosen = longest_first[start : start + batch_size]
        answers = _answer(model, tokenizer, [asked[index].ids for index in chosen], longest)
        for index, (text, margin) in zip(chosen, answers, strict=True):
            verdicts[index] = Verdict(text, text == asked[index].expected, margin)
        advance(len(chosen))
    return Metric("exact_match", tuple(verdicts[index] for index in range(len(asked))))


@torch.no_grad()
def _answer(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[tuple[int, ...]], most: int
) -> list[tuple[str, float]]:
    """The first line that greedy decoding writes after each prompt, and its smallest lead over another token."""
    end, stops = end_id(tokenizer), stop_ids(tokenizer, model.generation_config)
    length = max(len(ids) for ids in prompts)
    ids = torch.full((len(prompts), length), end, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left: what is written continues every row at once
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1

    def first_line(written: torch.Tensor) -> str:
        return str(tokenizer.decode(written, skip_special_tokens=True)).lstrip()

    def line_ended(sequences: torch.Tensor, _scores: object, **_: object) -> torch.Tensor:
        return torch.tensor([first_line(row[length:]).count("\n") > 0 for row in sequences], device=sequences.device)

    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=most,
        do_sample=False,
        num_beams=1,
        pad_token_id=end,
        eos_token_id=stops,
        stopping_criteria=[line_ended],
        output_logits=True,
        return_dict_in_generate=True,
    )
    top = torch.stack(output.logits, dim=1).topk(2).values  # (prompts, tokens written, 2)
    leads = (top[..., 0] - top[..., 1]).float()
    answers = []
    for row, sequence in enumerate(output.sequences):
        written = sequence[length:]
        ends = torch.isin(written, torch.tensor(stops, device=written.device)).nonzero()
        count = int(ends[0]) + 1 if len(ends) else len(written)
        text = first_line(written[:count])
        answers.append((text.split("\n")[0].strip(), leads[row, :count].min().item()))
    return answers


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

"""The public question sets, each as data: where its rows lie and how a row becomes a question.

Prompts, choices and metrics are those of lm-evaluation-harness (`lm_eval/tasks/<name>/<name>.yaml`), so that
numbers compare: the prompt as `doc_to_text` renders it, each choice after one space (`target_delimiter`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from obfuscatune.errors import ConfigError, DataError
from obfuscatune.training.data_files import Line, field_faults, json_type, read_jsonl, text_of


@dataclass(frozen=True)
class Question:
    """A prompt and its choices, without the space that goes before a choice. `gold` are the right ones."""

    prompt: str
    choices: tuple[str, ...]
    gold: tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """A file under the data directory, and which of its records: `start <= index < stop`, from 0."""

    file: str
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class Task:
    """One question set.

    `metric` is `choice` (the most likely choice is right: accuracy, plain and per character) or `greedy`
    (some right answer is what the model would write greedily).
    """

    name: str
    train: Rows
    test: Rows
    read: Callable[[Line], Question]
    metric: Literal["choice", "greedy"]

    def file(self, data_dir: Path, rows: Rows) -> Path:
        """Where the records of `rows` lie."""
        return data_dir / rows.file

    def lines(self, data_dir: Path, rows: Rows) -> Iterator[Line]:
        """The records of `rows`, unparsed.

        Raises:
            DataError: as `read_jsonl` says.
        """
        return islice(read_jsonl(self.file(data_dir, rows)), rows.start, rows.stop)


def load_questions(task: Task, data_dir: Path, limit: int | None = None) -> list[Question]:
    """The first `limit` test questions of a task (all of them if None), in the file's order.

    Raises:
        DataError: the file is missing or a record is not of the task's layout.
    """
    questions = [task.read(line) for line in islice(task.lines(data_dir, task.test), limit)]
    if not questions:
        raise DataError(f"{task.file(data_dir, task.test)}: no test question in the rows set aside for the test")
    return questions


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ConfigError: there is none.
    """
    try:
        return TASKS[name]
    except KeyError:
        raise ConfigError(f"unknown task {name!r}; the tasks are {', '.join(TASKS)}") from None


def _sciq(line: Line) -> Question:
    # sciq.yaml: "{{support.lstrip()}}\nQuestion: {{question}}\nAnswer:". The rows have no support passage,
    # so the line break that would follow it stands alone.
    question, choices, label = _labelled(line, optional={"answer"})
    if "answer" in line.fields and line.fields["answer"] != choices[label]:
        raise DataError(f"{line.where}: answer is not the choice that label names")
    return Question(f"\nQuestion: {question}\nAnswer:", choices, (label,))


def _openbookqa(line: Line) -> Question:
    question, choices, label = _labelled(line, optional=set())
    return Question(question, choices, (label,))


def _piqa(line: Line) -> Question:
    _fields(line, {"goal", "sol1", "sol2", "label"}, optional=set())
    choices = (_string(line, "sol1"), _string(line, "sol2"))
    return Question(f"Question: {_string(line, 'goal')}\nAnswer:", choices, (_label(line, choices),))


def _webqs(line: Line) -> Question:
    _fields(line, {"qText", "answers"}, optional={"qId"})
    answers = _shortest_prefixes(_strings(line, "answers"))
    return Question(f"Question: {_string(line, 'qText')}\nAnswer:", answers, tuple(range(len(answers))))


def _shortest_prefixes(answers: tuple[str, ...]) -> tuple[str, ...]:
    """Leave out every answer that another one begins: greedy text that has the longer has the shorter."""
    kept: list[str] = []
    for answer in sorted(answers):
        if not kept or not answer.startswith(kept[-1]):
            kept.append(answer)
    return tuple(kept)


def _labelled(line: Line, optional: set[str]) -> tuple[str, tuple[str, ...], int]:
    _fields(line, {"question", "choices", "label"}, optional)
    choices = _strings(line, "choices")
    return _string(line, "question"), choices, _label(line, choices)


def _fields(line: Line, required: set[str], optional: set[str]) -> None:
    faults = field_faults(line, required, optional)
    if faults:
        raise DataError(f"{line.where}: expected the fields {', '.join(sorted(required))}; {faults}")


def _string(line: Line, name: str) -> str:
    return text_of(line, name, line.fields[name])


def _strings(line: Line, name: str) -> tuple[str, ...]:
    value = line.fields[name]
    if not isinstance(value, list) or not value:
        raise DataError(f"{line.where}: {name} must be a non-empty array of strings, found {json_type(value)}")
    return tuple(text_of(line, f"{name}[{index}]", item) for index, item in enumerate(value))


def _label(line: Line, choices: tuple[str, ...]) -> int:
    label = line.fields["label"]
    if type(label) is not int or not 0 <= label < len(choices):
        raise DataError(f"{line.where}: label must be an integer from 0 to {len(choices) - 1}, found {label!r}")
    return label


# PIQA's training split and WebQuestions' test split are not at hand, so the rows at hand are split:
# the first four fifths to train on, the rest to test on.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("sciq", Rows("sciq/train.jsonl"), Rows("sciq/test.jsonl"), _sciq, "choice"),
        Task("openbookqa", Rows("openbookqa/train.jsonl"), Rows("openbookqa/test.jsonl"), _openbookqa, "choice"),
        Task(
            "piqa",
            Rows("piqa/validation_first1000.jsonl", stop=800),
            Rows("piqa/validation_first1000.jsonl", start=800),
            _piqa,
            "choice",
        ),
        Task(
            "webqs",
            Rows("webquestions/train.jsonl", stop=3022),
            Rows("webquestions/train.jsonl", start=3022),
            _webqs,
            "greedy",
        ),
    )
}

"""`obfuscatune evaluate`."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from obfuscatune.cli import options, output
from obfuscatune.cli.decoding import Pacing, counted, tell_late
from obfuscatune.cli.protection import Protection
from obfuscatune.cli.session import ModelFiles, Session, open_files, open_session
from obfuscatune.errors import ConfigError
from obfuscatune.option import Option

if TYPE_CHECKING:
    from obfuscatune.evaluation.scoring import Comparison, Metric
    from obfuscatune.training.data_files import Completion
    from obfuscatune.training.tasks import Question, Task

_QUESTIONS = "Questions"


def evaluate(
    model: options.Model = None,
    adapter: options.Adapter = None,
    provider_adapter: options.ProviderAdapter = None,
    task: Annotated[str | None, Option("A public question set: sciq, openbookqa, piqa or webqs.", _QUESTIONS)] = None,
    data_dir: Annotated[Path | None, Option("Where the task's files are.", _QUESTIONS)] = None,
    data: Annotated[Path | None, Option("Prompts and completions of your own, in JSON Lines.", _QUESTIONS)] = None,
    limit: Annotated[int | None, Option("Ask only the first so many.", _QUESTIONS, unset="all")] = None,
    batch_size: Annotated[int, Option("Rows in a forward pass.")] = 16,
    answers: Annotated[bool, Option("With --json: every single answer and its margin.")] = False,
    dtype: options.Dtype = None,
    *,
    protection: Protection,
    pacing: Pacing,
    compare_plain: Annotated[
        bool, Option("Ask the plain model too, and compare answer by answer.", options.PROTECTION)
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure how many questions a model answers right.

    A task's choices are scored as lm-evaluation-harness scores them (acc, acc_norm; exact_match for webqs). Prompts of
    your own are answered greedily up to the end of the line, and must match exactly.
    """
    if protection.plain and compare_plain:
        raise ConfigError("--plain asks the plain model alone; --compare-plain asks both: give one of them")
    for name, value in (("--limit", limit), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected at least 1, found {value}")
    questions = _load_questions(task, data_dir, data, limit, batch_size)
    wanted = protection.unless_plain()
    pacing.check(wanted)
    files = open_files(model)
    questions.check(files)
    results = []
    for chosen in [wanted, None] if compare_plain else [wanted]:
        opening = open_session(
            files, dtype=dtype, protection=chosen, adapter=adapter, provider_adapter=provider_adapter
        )
        with opening as session:
            results.append(_measure(questions, session, files, pacing if session.protected else Pacing()))
    comparisons = _compare(results)
    document = _document(task or str(data), results, comparisons, answers=answers)
    output.write_result(document, _readable(results, comparisons), as_json=as_json)


@dataclass(frozen=True)
class _TaskQuestions:
    """Those of a public question set. Every choice is scored, and counted as done."""

    task: "Task"
    questions: "Sequence[Question]"
    batch_size: int

    @property
    def units(self) -> int:
        """How many there are to count."""
        return sum(len(question.choices) for question in self.questions)

    def check(self, files: ModelFiles) -> None:
        """Raises DataError: a question does not fit the model, which was not read yet."""
        from obfuscatune.evaluation.questions import check_questions

        check_questions(self.questions, files.tokenizer, files.config)

    def ask(self, session: Session, files: ModelFiles, advance: Callable[[int], None]) -> "Sequence[Metric]":
        """Ask a model all of them; `advance` is called with the number of units done since the last call."""
        from obfuscatune.evaluation.questions import evaluate_task

        return evaluate_task(
            session.model, files.tokenizer, self.task, self.questions, batch_size=self.batch_size, advance=advance
        )


@dataclass(frozen=True)
class _OwnQuestions:
    """Prompts and completions of a file. Each prompt is answered, and counted as done."""

    path: Path
    completions: "Sequence[Completion]"
    batch_size: int

    @property
    def units(self) -> int:
        """How many there are to count."""
        return len(self.completions)

    def check(self, files: ModelFiles) -> None:
        """As of `_TaskQuestions`."""
        from obfuscatune.evaluation.questions import check_completions

        check_completions(self.path, self.completions, files.tokenizer, files.config)

    def ask(self, session: Session, files: ModelFiles, advance: Callable[[int], None]) -> "Sequence[Metric]":
        """As of `_TaskQuestions`."""
        from obfuscatune.evaluation.questions import evaluate_completions

        metric = evaluate_completions(
            session.model, files.tokenizer, self.completions, batch_size=self.batch_size, advance=advance
        )
        return (metric,)


@dataclass(frozen=True)
class _Result:
    protected: bool
    metrics: "Sequence[Metric]"
    seconds: float
    link: Mapping[str, int | float] | None
    pace: Mapping[str, float] | None


def _load_questions(
    task: str | None, data_dir: Path | None, data: Path | None, limit: int | None, batch_size: int
) -> _TaskQuestions | _OwnQuestions:
    if task is not None and data_dir is not None and data is None:
        from obfuscatune.training.tasks import find_task, load_questions

        found = find_task(task)
        return _TaskQuestions(found, load_questions(found, data_dir, limit), batch_size)
    if data is not None and task is None and data_dir is None:
        from obfuscatune.evaluation.questions import load_completions

        return _OwnQuestions(data, load_completions(data, limit), batch_size)
    raise ConfigError("give --task with --data-dir, or --data alone")


def _measure(questions: _TaskQuestions | _OwnQuestions, session: Session, files: ModelFiles, pacing: Pacing) -> _Result:
    began = time.perf_counter()
    with (
        pacing.kept(session) as pace,
        output.progress("asking" if session.protected else "asking the plain model") as meter,
    ):
        meter.expect(questions.units)
        metrics = questions.ask(session, files, meter.advance)
    tell_late(pace)
    return _Result(session.protected, metrics, time.perf_counter() - began, session.link(), counted([pace]))


def _compare(results: Sequence[_Result]) -> "list[Comparison]":
    from obfuscatune.evaluation.scoring import compare

    if len(results) < 2:
        return []
    one, other = results
    return [compare(a, b) for a, b in zip(one.metrics, other.metrics, strict=True)]


def _document(
    questions: str, results: Sequence[_Result], comparisons: "Sequence[Comparison]", *, answers: bool
) -> dict[str, object]:
    return {
        "questions": questions,
        "runs": [
            {
                "protected": result.protected,
                "seconds": result.seconds,
                "link": result.link,
                "pace": result.pace,
                "metrics": {metric.name: _metric(metric, answers=answers) for metric in result.metrics},
            }
            for result in results
        ],
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }


def _metric(metric: "Metric", *, answers: bool) -> dict[str, object]:
    summary = {"value": metric.value, "stderr": metric.stderr, "questions": len(metric.verdicts)}
    return summary | ({"answers": [asdict(verdict) for verdict in metric.verdicts]} if answers else {})


def _readable(results: Sequence[_Result], comparisons: "Sequence[Comparison]") -> str:
    lines = []
    for result in results:
        lines.append(f"{'protected' if result.protected else 'plain'} ({result.seconds:.1f} s)")
        for metric in result.metrics:
            asked = len(metric.verdicts)
            lines.append(f"  {metric.name:<12} {metric.value:.4f} +- {metric.stderr:.4f}  ({asked} questions)")
        if result.link is not None:
            lines.append(f"  {output.readable_link(result.link)}")
    for comparison in comparisons:
        count, ties = len(comparison.differing), len(comparison.ties)
        lines.append(f"answered differently by {comparison.metric}: {count}, of which ties: {ties}")
    return "\n".join(lines)

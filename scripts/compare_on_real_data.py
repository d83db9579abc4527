"""Fine-tune and evaluate on public question sets, protected and plain with one seed, and compare step by step.

    python scripts/compare_on_real_data.py --data-root ../shared/data --out benchmarks/results

Each task has a folder of its own in the data root, with train.jsonl and test.jsonl (docs/finetune.md). Everything runs
through the command line, as a user would run it. Writes a JSON file and prints the table of docs/benchmarks.md.
Exit status 1 where a loss differs by more than 1e-4, or an answer by more than a tie.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from obfuscatune.evaluation.scoring import Metric, Verdict, compare
from obfuscatune.report.page import environment

LOSS_TOLERANCE = 1e-4  # nats


def main() -> int:
    """Run all tasks; 0 where protected and plain agree."""
    arguments = parse_arguments()
    rows = [compare_task(task, arguments) for task in arguments.tasks]
    settings = {**vars(arguments), "data_root": "", "out": ""}
    document = {"settings": settings, "environment": environment(), "tasks": rows}
    arguments.out.mkdir(parents=True, exist_ok=True)
    how = "" if arguments.profile == "private" else "-" + "".join(c if c.isalnum() else "-" for c in arguments.profile)
    path = arguments.out / f"{datetime.now(UTC):%Y-%m-%d}-real-data{how}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    print(f"\nwritten: {path}", file=sys.stderr)
    return 0 if all(row["agree"] for row in rows) else 1


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--tasks", nargs="+", default=["sciq", "openbookqa"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", default="private", help="with knobs: docs/profiles.md")
    parser.add_argument("--limit", type=int, help="ask only the first so many test questions")
    return parser.parse_args()


def compare_task(task: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune and ask, on both sides; what is the same and what is not."""
    with tempfile.TemporaryDirectory() as folder:
        protected = run_side(task, arguments, Path(folder) / "protected", ["--profile", arguments.profile])
        plain = run_side(task, arguments, Path(folder) / "plain", ["--plain"])
    comparisons = [compare(one, other) for one, other in zip(metrics(protected), metrics(plain), strict=True)]
    loss_difference = max(abs(a - b) for a, b in zip(protected["losses"], plain["losses"], strict=True))
    return {
        "task": task,
        "protected": summary(protected),
        "plain": summary(plain),
        "largest_loss_difference": loss_difference,
        "final_loss_difference": abs(protected["losses"][-1] - plain["losses"][-1]),
        "questions": len(metrics(plain)[0].verdicts),
        "answers_that_differ": {c.metric: len(c.differing) for c in comparisons},
        "ties_among_them": {c.metric: len(c.ties) for c in comparisons},
        "agree": loss_difference <= LOSS_TOLERANCE and all(c.same_but_for_ties for c in comparisons),
    }


def run_side(task: str, arguments: argparse.Namespace, out: Path, how: list[str]) -> dict[str, Any]:
    """One fine-tuning and one evaluation with its adapter, through the command line."""
    data = arguments.data_root / task
    tuned = obfuscatune(
        *("finetune", "--task", task, "--data", data / "train.jsonl", "--out", out, "--seed", arguments.seed),
        *("--max-steps", arguments.steps, "--batch-size", arguments.batch_size, "--lr", arguments.lr, *how),
    )
    limit = ["--limit", arguments.limit] if arguments.limit else []
    asked = obfuscatune(
        *(
            "evaluate",
            "--task",
            task,
            "--data-dir",
            arguments.data_root,
            "--adapter",
            out / "adapter",
            "--answers",
            *limit,
            *how,
        )
    )
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    return {"tuned": tuned, "asked": asked["runs"][0], "losses": losses}


def obfuscatune(*words: object) -> dict[str, Any]:
    """Run one command with `--json`; its document."""
    command = [sys.executable, "-m", "obfuscatune", *map(str, words), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def metrics(side: dict[str, Any]) -> list[Metric]:
    """The metrics of one evaluation, answer by answer."""
    return [
        Metric(name, tuple(Verdict(**answer) for answer in metric["answers"]))
        for name, metric in side["asked"]["metrics"].items()
    ]


def summary(side: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one side."""
    return {
        "first_loss": side["losses"][0],
        "final_loss": side["losses"][-1],
        "tuning_seconds": side["tuned"]["seconds"],
        "evaluation_seconds": side["asked"]["seconds"],
        "accuracy": {name: metric["value"] for name, metric in side["asked"]["metrics"].items()},
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = [
        "| task | questions | | first loss | final loss | acc | acc_norm | tuning s | asking s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        for side in ("plain", "protected"):
            s = row[side]
            accuracy = " | ".join(f"{s['accuracy'].get(name, float('nan')):.3f}" for name in ("acc", "acc_norm"))
            lines.append(
                f"| {row['task']} | {row['questions']} | {side} | {s['first_loss']:.5f} | {s['final_loss']:.5f} "
                f"| {accuracy} | {s['tuning_seconds']:.0f} | {s['evaluation_seconds']:.0f} |"
            )
    for row in rows:
        differ, ties = sum(row["answers_that_differ"].values()), sum(row["ties_among_them"].values())
        lines.append(
            f"\n{row['task']}: largest difference of any step's loss {row['largest_loss_difference']:.1e}, of the "
            f"final loss {row['final_loss_difference']:.1e}; answers that differ {differ}, ties among them {ties}."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

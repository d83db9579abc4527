"""`--pace` and `--full-length` as users type them: the text is the same, steps are counted, and what is refused."""

from functools import partial

import pytest

from obfuscatune.training import tokens

TOKENS = 24
PERIOD, STOP = 5, "."


@pytest.fixture
def generate(obfuscatune, stories260k, worker, monkeypatch):
    """Runs `generate`; a full stop ends an answer."""
    real = tokens.stop_ids

    def stop_ids(tokenizer, generation_config):
        return [*real(tokenizer, generation_config), tokenizer.convert_tokens_to_ids(STOP)]

    monkeypatch.setattr(tokens, "stop_ids", stop_ids)
    return partial(
        obfuscatune,
        *("generate", "--model", stories260k, "--prompt", "Once upon a time", "--max-new-tokens", TOKENS),
        *("--worker", worker.address),
    )


@pytest.mark.parametrize("sampling", [(), ("--temperature", 0.8, "--seed", 3)], ids=["greedy", "sampled"])
def test_the_text_is_the_same_and_its_length_is_not_seen(generate, sampling):
    plain, paced, full = (
        generate("--json", *sampling, *options).document
        for options in ((), ("--pace", PERIOD), ("--pace", PERIOD, "--full-length"))
    )
    assert plain["text"].endswith(STOP)
    assert plain["tokens"] < TOKENS
    assert plain["pace"] is None
    for ran in (paced, full):
        assert (ran["text"], ran["tokens"]) == (plain["text"], plain["tokens"])
    assert paced["pace"]["steps"] == plain["tokens"]
    assert full["pace"]["steps"] == TOKENS
    crossings = [ran["link"]["crossings"] for ran in (plain, paced, full)]
    assert crossings[0] == crossings[1] == crossings[2] * plain["tokens"] / TOKENS


def test_what_is_shown_ends_with_the_answer(generate):
    shown = generate().stdout
    assert shown.rstrip().endswith(STOP)
    ran = generate("--pace", PERIOD, "--full-length")
    assert ran.stdout == shown


def test_late_steps_are_told(generate):
    """No step takes so short a time."""
    ran = generate("--pace", 0.001)
    assert "steps came late: a longer --pace hides more" in ran.stderr
    late, _, steps, *_ = next(line for line in ran.stderr.splitlines() if "came late" in line).split()
    assert int(late) == int(steps) - 1 > 0


def test_each_turn_of_a_chat_has_a_pace_of_its_own(obfuscatune, stories260k, worker, monkeypatch):
    lines = iter(["Hello", "And then?", ""])
    monkeypatch.setattr("obfuscatune.cli.output.read_input_line", lambda _: next(lines))
    ran = obfuscatune(
        *("chat", "--model", stories260k, "--worker", worker.address, "--max-new-tokens", 4),
        *("--pace", PERIOD, "--full-length", "--json"),
    )
    assert ran.code == 0, ran.stderr
    assert ran.document["pace"]["steps"] == 2 * 4


def test_the_answers_of_evaluate_are_the_same(obfuscatune, stories260k, notes, worker):
    command = ("evaluate", "--model", stories260k, "--data", notes, "--limit", 3, "--worker", worker.address)
    plain, paced = (
        obfuscatune(*command, "--answers", "--json", *options).document["runs"][0]
        for options in ((), ("--pace", PERIOD))
    )
    assert plain["pace"] is None
    assert paced["pace"]["steps"] > 1
    answers = [[one["answer"] for one in run["metrics"]["exact_match"]["answers"]] for run in (plain, paced)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--pace", 0), "--pace: expected milliseconds, more than 0 and up to 60,000, found 0"),
        (("--pace", "nan"), "found nan"),
        (("--pace", 60001), "found 60001"),
        (("--full-length",), "--full-length takes --pace beside it"),
        (("--plain", "--pace", 50), "--plain sends nothing that could be timed: leave it out, or --pace"),
        (
            ("--profile", "enclave", "--pace", 50),
            "--profile enclave sends nothing that could be timed: leave out --pace",
        ),
    ],
)
def test_what_is_refused(obfuscatune, options, said):
    ran = obfuscatune("generate", "--model", "/absent", "--prompt", "a", *options)
    assert (ran.code, ran.stdout) == (2, "")
    (line,) = ran.stderr.splitlines()
    assert said in line

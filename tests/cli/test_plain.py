"""The commands on a plain model: what they print, what they write, what they refuse."""

import io
import json
import shutil
import sys

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from obfuscatune.cli import chat, output
from obfuscatune.training.tasks import TASKS, load_questions

PLAIN = "PLAIN RUN: nothing is protected."
START = "Once upon a time"
STORY = ", there was a little girl named Lily. She loved to play outside in the park. One day, she saw a big, red ball."


@pytest.fixture
def tuned(obfuscatune, stories260k, notes, tmp_path):
    """A run directory of a few steps."""
    out = tmp_path / "run"
    ran = obfuscatune(
        "finetune", "--plain", "--model", stories260k, "--data", notes, "--out", out, "--max-steps", 3, "--json"
    )
    assert ran.code == 0, ran.stderr
    return out, ran


def test_finetune_prints_one_document(tuned):
    out, ran = tuned
    assert ran.document["protected"] is False
    assert ran.document["steps"] == 3
    assert ran.document["adapter"] == str(out / "adapter")
    assert ran.document["link"] is None
    assert PLAIN in ran.stderr


def test_finetune_tells_people(obfuscatune, stories260k, notes, tmp_path):
    ran = obfuscatune(
        *("finetune", "--plain", "--model", stories260k, "--data", notes, "--eval", notes),
        *("--out", tmp_path / "run", "--max-steps", 4, "--lr", 0.01),
    )
    assert ran.code == 0, ran.stderr
    curve, steps, evals, adapter = ran.stdout.splitlines()
    assert len(curve) == 4
    assert steps.startswith("4 steps in ")
    assert evals.startswith("loss on the eval records ")
    assert adapter == f"adapter: {tmp_path / 'run' / 'adapter'}"
    assert "12 examples" in ran.stderr


def test_finetune_says_that_it_stopped_early_and_which_adapter_it_made(obfuscatune, stories260k, notes, tmp_path):
    ran = obfuscatune(
        *("finetune", "--plain", "--model", stories260k, "--data", notes, "--eval", notes, "--out", tmp_path / "run"),
        *("--max-steps", 50, "--lr", 90, "--warmup-steps", 1, "--eval-every", 1, "--patience", 1, "--load-best"),
    )
    assert ran.code == 0, ran.stderr
    assert "2 steps in " in ran.stdout, "the first is taken at a rate of 0, and the second ruins the model"
    assert "stopped early: no smaller loss on the eval records than " in ran.stdout
    assert "the adapter is that of step 1" in ran.stdout


def test_the_adapter_goes_into_peft(tuned, stories260k):
    out, _ = tuned
    model = AutoModelForCausalLM.from_pretrained(stories260k)
    plain = model(torch.arange(3, 20)[None]).logits
    adapted = PeftModel.from_pretrained(model, out / "adapter").eval()
    assert not torch.equal(adapted(torch.arange(3, 20)[None]).logits, plain)


def test_a_run_file_is_a_run(obfuscatune, tuned, tmp_path):
    out, first = tuned
    ran = obfuscatune("finetune", "--config", out / "recipe.yaml", "--out", tmp_path / "again", "--json")
    assert ran.code == 0, ran.stderr
    same = ("steps", "first_loss", "last_loss", "tokens")
    assert [ran.document[key] for key in same] == [first.document[key] for key in same]


def test_a_run_is_not_overwritten_and_may_be_resumed(obfuscatune, tuned):
    out, first = tuned
    again = ("finetune", "--config", out / "recipe.yaml")
    refused = obfuscatune(*again)
    assert refused.code == 2
    assert "holds a run; go on with it by --resume" in refused.stderr
    other = obfuscatune(*again, "--resume", "--lr", "0.5")
    assert other.code == 2
    assert "this is another run: lr was" in other.stderr
    for refusal in (refused, other):
        assert "PLAIN RUN" not in refusal.stderr, "a refused run loads no model"
    resumed = obfuscatune(*again, "--resume", "--json")
    assert resumed.document["last_loss"] == first.document["last_loss"]
    assert "going on after step 3 of 3" in resumed.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--data", "{notes}", "--model", "{tmp}"), 1, "config.json"),
        (("--data", "{tmp}/absent.jsonl"), 1, "absent.jsonl: cannot be read: No such file"),
        (("--data", "{tmp}"), 1, "a directory; name a file"),
        (("--data", "{tmp}/bad.jsonl"), 1, "bad.jsonl:2: malformed JSON at column 9"),
        (("--data", "{tmp}/empty.jsonl"), 1, "empty.jsonl: the file holds no record"),
        (("--data", "{tmp}/long.jsonl"), 1, "long.jsonl:1: "),
        (("--data", "{notes}", "--max-length", "513"), 2, "--max-length: 513 tokens, and the model's window is 512"),
        (("--data", "{notes}", "--dtype", "int8"), 2, "--dtype: Input should be 'float32', 'bfloat16' or 'float64'"),
        (("--data", "{notes}", "--lora-targets", "nope"), 2, "--lora-targets: the model has no layer nope"),
        (("--data", "{notes}", "--lora-targets", "q_proj,nope"), 2, "--lora-targets: the model has no layer nope"),
        (("--data", "{notes}", "--task", "squad"), 2, "unknown task 'squad'"),
        (("--data", "{notes}", "--task", "sciq"), 1, "notes.jsonl:1: expected the fields choices, label, question"),
        (("--data", "{notes}", "--worker", "unix:/x"), 2, "plain runs without a worker"),
        (("--data", "{notes}", "--out", "{tmp}/bad.jsonl"), 1, "bad.jsonl: the disk refused: File exists"),
    ],
)
def test_what_cannot_be_done_is_one_line(obfuscatune, stories260k, notes, tmp_path, arguments, code, message):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text" "a"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "word " * 600}))
    filled = [argument.format(tmp=tmp_path, notes=notes) for argument in arguments]
    if "--model" not in filled:
        filled += ["--model", str(stories260k)]
    ran = obfuscatune("finetune", "--plain", "--json", "--out", tmp_path / "run", *filled)
    assert (ran.code, ran.stdout) == (code, "")
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert message in line


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["absent", "cut"])
def test_a_damaged_model_is_one_line(obfuscatune, stories260k, tmp_path, name, damage):
    broken = tmp_path / "model"
    shutil.copytree(stories260k, broken)
    broken.chmod(0o755)
    content = (broken / name).read_bytes()
    (broken / name).unlink()
    if damage == "cut":
        (broken / name).write_bytes(content[: len(content) // 2])
    ran = obfuscatune("generate", "--plain", "--model", broken, "--prompt", "a")
    assert ran.code == 1
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert str(broken) in line
    assert "unexpected" not in line


def test_weights_in_pickle_are_not_read(obfuscatune, stories260k, tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(stories260k / name, model / name)
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    ran = obfuscatune("generate", "--plain", "--model", model, "--prompt", "a")
    assert ran.code == 1
    assert "cannot be read as a model in safetensors" in ran.stderr


def test_generate_continues_the_prompt(obfuscatune, stories260k):
    ran = obfuscatune("generate", "--plain", "--model", stories260k, "--prompt", START, "--max-new-tokens", 48)
    assert ran.code == 0, ran.stderr
    assert ran.stdout.startswith(START + STORY)
    ran = obfuscatune("generate", "--plain", "--model", stories260k, "--prompt", START, "--json")
    assert ran.document["text"].startswith(STORY)
    assert ran.document["tokens"] == 64


def test_the_space_before_the_first_word_written_is_kept(obfuscatune, stories260k):
    options = ("generate", "--plain", "--model", stories260k, "--prompt", "Once upon a", "--max-new-tokens", 1)
    assert obfuscatune(*options).stdout == "Once upon a time\n"
    assert obfuscatune(*options, "--json").document["text"] == " time"


def test_a_prompt_with_a_token_outside_the_embedding_is_one_line(obfuscatune, stories260k, tmp_path, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    tokenizer.add_tokens(["<new>"])
    model = tmp_path / "model"
    shutil.copytree(stories260k, model)
    tokenizer.save_pretrained(model)
    ran = obfuscatune("generate", "--model", model, "--prompt", "Hi <new>")
    assert ran.code == 1
    message = "<new>' has number 512, and the model's embedding has rows 0 to 511 alone"
    assert message in ran.stderr
    assert "worker" not in ran.stderr, "none is started for it"
    questions = tmp_path / "questions.jsonl"
    lines = ({"prompt": "Hi", "completion": " you"}, {"prompt": "Hi <new>", "completion": " you"})
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ran = obfuscatune("evaluate", "--model", model, "--data", questions)
    assert ran.code == 1
    assert f"{questions}: record 2: the token" in ran.stderr
    assert message in ran.stderr
    assert "worker" not in ran.stderr
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi <new>\n"))
    ran = obfuscatune("chat", "--plain", "--model", model)
    assert ran.code == 1
    assert message in ran.stderr


def test_prompts_from_stdin_and_from_a_file_are_the_same(obfuscatune, stories260k, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text(START)
    monkeypatch.setattr(sys, "stdin", io.StringIO(START))
    for way in (("--prompt", "-"), ("--prompt-file", tmp_path / "prompt.txt")):
        ran = obfuscatune("generate", "--plain", "--model", stories260k, "--json", *way)
        assert ran.document["text"].startswith(STORY)


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), (b"\xff", "not UTF-8: byte 1 of the line")])
def test_a_prompt_file_that_is_none_is_one_line(obfuscatune, tmp_path, content, message):
    path = tmp_path / "prompt.txt"
    if content is not None:
        path.write_bytes(content)
    ran = obfuscatune("generate", "--plain", "--prompt-file", path)
    assert ran.code == 1
    assert message in ran.stderr


def test_a_prompt_that_leaves_no_room_is_one_line(obfuscatune, stories260k):
    ran = obfuscatune("generate", "--plain", "--model", stories260k, "--prompt", "word " * 400)
    assert ran.code == 1
    assert "the model takes 512 in all; shorten it or lower --max-new-tokens" in ran.stderr


def test_sampling_follows_its_seed_and_leaves_the_generator_alone(obfuscatune, stories260k):
    torch.manual_seed(0)
    state = torch.get_rng_state()

    def sample(seed):
        options = ("--temperature", 1, "--top-p", 0.9, "--seed", seed, "--json")
        return obfuscatune("generate", "--plain", "--model", stories260k, "--prompt", START, *options).document["text"]

    assert sample(1) == sample(1) != sample(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_chat_remembers_and_forgets(obfuscatune, stories260k, monkeypatch):
    options = ("chat", "--plain", "--model", stories260k, "--system", "Be kind.", "--max-new-tokens", 8)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nand you?\n"))
    messages = obfuscatune(*options, "--json").document["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[3]["content"] == "and you?"
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/reset\nand you?\n"))
    messages = obfuscatune(*options, "--json").document["messages"]
    assert [message["content"] for message in messages[:2]] == ["Be kind.", "and you?"]


def test_chat_shows_the_answers(obfuscatune, stories260k, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nhi"))
    ran = obfuscatune("chat", "--plain", "--model", stories260k, "--max-new-tokens", 8)
    assert ran.code == 0
    assert len(ran.stdout.splitlines()) == 2


def test_answers_are_shown_from_their_first_word_on(monkeypatch):
    shown = []
    monkeypatch.setattr(output, "write_part", shown.append)
    show = chat._without_leading_space()
    for part in ("\n", " ", "\n Yes", ", ", "indeed"):
        show(part)
    assert "".join(shown) == "Yes, indeed"


def test_chat_leaves_out_the_oldest_turns_when_the_window_is_full(obfuscatune, stories260k, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 50 + "\n" + "word " * 50 + "\nhello\n"))
    ran = obfuscatune("chat", "--plain", "--model", stories260k, "--max-new-tokens", 200, "--json")
    assert ran.code == 0, ran.stderr
    assert len(ran.document["messages"]) == 6
    monkeypatch.setattr(sys, "stdin", io.StringIO("word " * 400))
    ran = obfuscatune("chat", "--plain", "--model", stories260k, "--max-new-tokens", 200)
    assert ran.code == 1
    assert "shorten it" in ran.stderr


def test_evaluate_prints_one_document(obfuscatune, stories260k, shared_data):
    ran = obfuscatune(
        *("evaluate", "--plain", "--model", stories260k, "--task", "sciq", "--data-dir", shared_data),
        *("--limit", 6, "--json", "--answers"),
    )
    assert ran.code == 0, ran.stderr
    (only,) = ran.document["runs"]
    assert ran.document["comparisons"] == []
    assert only["metrics"].keys() == {"acc", "acc_norm"}
    answers = only["metrics"]["acc"]["answers"]
    gold = [question.gold[0] for question in load_questions(TASKS["sciq"], shared_data, limit=6)]
    assert only["metrics"]["acc"]["value"] == sum(a["answer"] == g for a, g in zip(answers, gold, strict=True)) / 6


@pytest.mark.parametrize("task", ["openbookqa", "piqa", "webqs"])
def test_evaluate_tells_people(obfuscatune, stories260k, shared_data, task):
    ran = obfuscatune(
        "evaluate", "--plain", "--model", stories260k, "--task", task, "--data-dir", shared_data, "--limit", 3
    )
    assert ran.code == 0, ran.stderr
    metrics = [line.split()[0] for line in ran.stdout.splitlines()[1:]]
    assert metrics == (["exact_match"] if task == "webqs" else ["acc", "acc_norm"])
    assert ran.stdout.count("(3 questions)") == len(metrics)


def test_evaluate_asks_questions_of_ones_own_with_an_adapter(obfuscatune, stories260k, notes, tuned):
    command = ("evaluate", "--plain", "--model", stories260k, "--data", notes, "--json", "--answers")
    before, after = obfuscatune(*command), obfuscatune(*command, "--adapter", tuned[0] / "adapter")
    margins = [
        [answer["margin"] for answer in ran.document["runs"][0]["metrics"]["exact_match"]["answers"]]
        for ran in (before, after)
    ]
    assert len(margins[0]) == len(margins[1]) == 12
    assert margins[0] != margins[1]


def test_an_adapter_that_is_none_is_one_line(obfuscatune, stories260k, tmp_path):
    ran = obfuscatune("generate", "--plain", "--model", stories260k, "--prompt", "a", "--adapter", tmp_path)
    assert ran.code == 1
    assert "not an adapter: there is no adapter_model.safetensors" in ran.stderr


def test_the_embedded_model_is_the_default(obfuscatune):
    from obfuscatune.assets import tiny_model_path

    ran = obfuscatune("generate", "--plain", "--prompt", START, "--max-new-tokens", 8, "--json")
    assert ran.code == 0, ran.stderr
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path())
    assert tokenizer(ran.document["text"]).input_ids

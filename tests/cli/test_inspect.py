"""`obfuscatune inspect` on the command line."""

import json

import pytest
from transformers import GPT2Config, MixtralConfig

from obfuscatune.cli.app import run

TINY = GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=50, n_positions=32)


@pytest.fixture
def tiny(tmp_path):
    TINY.save_pretrained(tmp_path)
    return str(tmp_path / "config.json")


def test_blocks_that_are_alike_share_a_line(tiny, capsys):
    assert run(["inspect", "--model", tiny, "--first-blocks", "0"]) == 0
    shown = capsys.readouterr().out
    assert "blocks 0-2  x3" in shown
    assert shown.count("mlp.c_fc") == 1
    assert "12 crossings a pass" in shown and "11 crossings a pass" in shown
    assert "\x1b" not in shown, "a pipe gets no escape codes"


def test_full_shows_every_layer(tiny, capsys):
    assert run(["inspect", "--model", tiny, "--full"]) == 0
    shown = capsys.readouterr().out
    assert [f"transformer.h.{block}.mlp.c_fc" in shown for block in range(4)] == [True, True, True, False]


def test_json_is_one_document(tiny, capsys):
    assert run(["inspect", "--model", tiny, "--json", "--dtype", "bfloat16"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert captured.err == ""
    assert [layer["runs"] for layer in document["layers"]] == ["enclave"] * 4 + ["worker"] * 8
    assert document["layers"][4]["shape"] == [16, 48]
    assert document["layers"][4]["bytes_per_token"] == {"forward": (16 + 48) * 2, "backward": (16 + 48) * 2}
    assert document["crossings"] == {"forward": 8, "backward": 8}
    assert document["parameters"] == document["enclave"]["parameters"] + document["worker"]["parameters"]
    assert document["shield_rows_per_crossing"] == 8


def test_what_is_not_offloaded_is_said(tmp_path, capsys):
    MixtralConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, vocab_size=50
    ).save_pretrained(tmp_path)
    assert run(["inspect", "--model", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "mlp.experts.down_proj" in shown and "8 experts" in shown
    assert "Not offloaded" in shown
    assert "model.layers.*.mlp.gate.weight" in shown
    assert "MixtralTopKRouter computes in its own way" in shown


def test_without_a_model_it_is_the_embedded_one(capsys):
    assert run(["inspect", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "GPT2LMHeadModel"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--dtype", "float8"], 2, "--dtype: expected one of"),
        (["--profile", "secret"], 2, "unknown profile 'secret'"),
        (["--first-blocks", "9"], 1, "no linear layers to offload"),
        (["--model", "/nowhere/at/all"], 1, "neither a config.json"),
        (["--model", "/nowhere/at/all"], 1, "there are no such names there"),
        (["--model", "nobody/nothing"], 1, "it cannot be reached, and nothing of the model was kept here"),
    ],
)
def test_each_mistake_is_one_line(arguments, code, message, tiny, capsys):
    given = arguments if "--model" in arguments else ["--model", tiny, *arguments]
    assert run(["inspect", *given]) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""


def test_help_has_an_example(capsys):
    assert run(["inspect", "--help"]) == 0
    assert "obfuscatune inspect --model" in capsys.readouterr().out

"""Run files and options."""

import re
from pathlib import Path

import pytest
import yaml

from obfuscatune.errors import ConfigError
from obfuscatune.training.recipe import Recipe, load_recipe

RUN = """\
data: train.jsonl
lr: 1e-3        # YAML 1.1 reads this as text
lora_targets: [q_proj, v_proj]
epochs: 2
"""


@pytest.fixture
def run_file(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_a_run_file_is_read(run_file):
    recipe = load_recipe(run_file(RUN), {})
    assert (recipe.data, recipe.lr, recipe.lora_targets, recipe.epochs) == (
        Path("train.jsonl"),
        1e-3,
        ("q_proj", "v_proj"),
        2,
    )


def test_options_override_the_file_and_those_not_given_do_not(run_file):
    recipe = load_recipe(run_file(RUN), {"epochs": 5, "lr": None})
    assert (recipe.epochs, recipe.lr) == (5, 1e-3)


def test_options_alone_will_do():
    assert load_recipe(None, {"data": Path("a.jsonl")}).batch_size == 8


def test_the_resolved_recipe_is_a_run_file(run_file):
    recipe = load_recipe(run_file(RUN), {})
    assert load_recipe(run_file(recipe.to_yaml()), {}) == recipe
    assert yaml.safe_load(recipe.to_yaml()).keys() == Recipe.model_fields.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: a\nlearning_rat: 1\n", "unknown key learning_rat; did you mean learning_rate?"),
        ("data: a\nzzz: 1\n", "unknown key zzz; the keys are model, data"),
        ("data: a\nbatchsize: 1\n", "unknown key batchsize; did you mean batch_size?"),
        ("data: a\nlora-r: 1\n", "unknown key lora-r; did you mean lora_r?"),
        ("data: a\n3: 1\n", "unknown key 3"),
        ("data: a\nlr: 1\nlr: 2\n", "run.yaml:3: malformed YAML: the key lr is given twice"),
        ("data: a\n? {b: 1}\n: 2\n", "run.yaml:2: malformed YAML: found unhashable key"),
        ("data: [a\n", "run.yaml:2: malformed YAML"),
        ("data: a\nlr: !!python/object:os.system {}\n", "malformed YAML: could not determine a constructor"),
        ("- a\n", "expected keys and values"),
        ("", "expected keys and values"),
        (b"data: \xff\n", "not UTF-8"),
        (b"data: \x00\n", "malformed YAML"),
        ("lr: 1\n", "data is missing: give --data"),
        ("data: a\nlr: 0\n", "run.yaml: lr: Input should be greater than 0, found 0"),
        ("data: a\nlr: fast\n", "lr: Input should be a valid number"),
        ("data: a\nschedule: cubic\n", "schedule: Input should be 'linear', 'cosine' or 'constant', found 'cubic'"),
        ("data: a\nlora_dropout: 1\n", "lora_dropout: Input should be less than 1"),
        ("data: a\nbatch_size: 0\n", "batch_size: Input should be greater than or equal to 1"),
        ("data: a\nmax_length: 1\n", "max_length: Input should be greater than or equal to 2"),
        ("data: a\ntoo_long: cut\n", "too_long: Input should be 'error', 'truncate' or 'drop'"),
        ("data: a\nlora_targets: 3\n", "lora_targets: "),
        ("data: a\nlora_targets: []\n", "lora_targets: "),
        ("data: a\nlr: .nan\n", "lr: "),
        ("data: a\nlr: .inf\n", "lr: "),
        ("data: a\neval_every: 5\n", "eval_every is given, but no eval"),
        ("data: a\nload_best: true\n", "load_best is given, but no eval"),
        ("data: a\neval: b\npatience: 2\n", "patience needs measurements while training goes on"),
        ("data: a\nwarmup_steps: 2\nwarmup_ratio: 0.1\n", "warmup_steps and warmup_ratio are both given"),
        ("data: a\nplain: true\nworker: unix:/x\n", "plain runs without a worker"),
    ],
)
def test_each_fault_is_named(run_file, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_recipe(run_file(text), {})


def test_a_fault_of_an_option_is_named_as_the_option(run_file):
    with pytest.raises(ConfigError, match=r"^--batch-size: Input should be .*, found 0$"):
        load_recipe(run_file(RUN), {"batch_size": 0})


def test_a_missing_run_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.yaml: cannot be read: No such file"):
        load_recipe(tmp_path / "absent.yaml", {})

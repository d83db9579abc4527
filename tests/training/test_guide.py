"""The guide says what the code does."""

import json
import re
from pathlib import Path

import yaml

from obfuscatune.training.data_files import ROLES, Line
from obfuscatune.training.layouts import detect_format
from obfuscatune.training.recipe import Recipe, load_recipe
from obfuscatune.training.tasks import TASKS

GUIDE = (Path(__file__).parents[2] / "docs" / "finetune.md").read_text(encoding="utf-8")


def test_the_run_file_is_one_and_shows_the_defaults(tmp_path):
    (text,) = re.findall(r"```yaml\n(.*?)```", GUIDE, re.DOTALL)
    path = tmp_path / "run.yaml"
    path.write_text(text)
    shown = load_recipe(path, {})
    default = Recipe(data=shown.data, model=shown.model, eval=shown.eval, out=shown.out)
    assert shown == default
    unmentioned = Recipe.model_fields.keys() - yaml.safe_load(text).keys()
    assert unmentioned == {
        *("task", "plain", "worker", "fleet", "base", "first_blocks", "max_steps", "warmup_ratio"),
        "provider_adapter",
        *("mask_worker", "mask_memory", "mask_budget", "public_base", "enclave_device"),
    }
    assert all(name.replace("_", "-") in GUIDE or name in GUIDE for name in unmentioned)


def test_the_example_record_is_one():
    (text,) = re.findall(r'`(\{"prompt".*?\})`', GUIDE)
    line = Line("guide:1", json.loads(text))
    detect_format(line).read(line)


def test_every_task_is_in_the_table():
    for task in TASKS.values():
        assert re.search(rf"^\| {task.name} \|.*{re.escape(task.train.file)}", GUIDE, re.MULTILINE)
    assert ", ".join(ROLES) in GUIDE

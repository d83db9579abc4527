"""Questions as lm-evaluation-harness renders them."""

import json

import pytest

from obfuscatune.errors import ConfigError, DataError
from obfuscatune.training.data_files import Line
from obfuscatune.training.tasks import TASKS, Question, find_task, load_questions

SCIQ = {"question": "What is water?", "choices": ["ice", "H2O", "salt"], "label": 1, "answer": "H2O"}
OPENBOOKQA = {"question": "Fog is likely around", "choices": ["a marsh", "a desert"], "label": 0}
PIQA = {"goal": "open a jar", "sol1": "twist", "sol2": "sing", "label": 1}
WEBQS = {"qId": "wqr1", "qText": "who was she?", "answers": ["Marie Curie", "Curie", "Marie", "Pierre"]}

# The right-hand sides are the templates of lm_eval/tasks/*/*.yaml filled in by hand; SciQ's support is empty.
RENDERED = [
    ("sciq", SCIQ, Question("\nQuestion: What is water?\nAnswer:", ("ice", "H2O", "salt"), (1,))),
    ("openbookqa", OPENBOOKQA, Question("Fog is likely around", ("a marsh", "a desert"), (0,))),
    ("piqa", PIQA, Question("Question: open a jar\nAnswer:", ("twist", "sing"), (1,))),
    # utils.py of webqs: sorted, without those that another begins; all are right.
    ("webqs", WEBQS, Question("Question: who was she?\nAnswer:", ("Curie", "Marie", "Pierre"), (0, 1, 2))),
]


@pytest.mark.parametrize(("name", "fields", "question"), RENDERED)
def test_records_are_rendered_as_the_harness_does(name, fields, question):
    assert find_task(name).read(Line("x:1", fields)) == question


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sciq", {"label": None}, "label must be an integer from 0 to 2, found None"),
        ("sciq", {"label": 3}, "label must be an integer from 0 to 2, found 3"),
        ("sciq", {"label": -1}, "label must be"),
        ("sciq", {"label": True}, "label must be"),
        ("sciq", {"label": "1"}, "label must be"),
        ("sciq", {"answer": "ice"}, "answer is not the choice that label names"),
        ("sciq", {"support": "x"}, "expected the fields choices, label, question; unknown support"),
        ("sciq", {"choices": "ice"}, "choices must be a non-empty array of strings, found a string"),
        ("sciq", {"choices": []}, "choices must be a non-empty array of strings"),
        ("sciq", {"choices": ["ice", 3]}, r"choices\[1\] must be a string, found a number"),
        ("sciq", {"question": " "}, "question is empty"),
        ("openbookqa", {"answer": "a marsh"}, "unknown answer"),
        ("piqa", {"sol2": None}, "sol2 must be a string, found null"),
        ("webqs", {"answers": []}, "answers must be a non-empty array"),
        ("webqs", {"url": "x"}, "unknown url"),
    ],
)
def test_each_fault_is_named_with_its_line(name, change, message):
    fields = {task: record for task, record, _ in RENDERED}[name] | change
    with pytest.raises(DataError, match=message) as caught:
        find_task(name).read(Line("test.jsonl:4", fields))
    assert str(caught.value).startswith("test.jsonl:4: ")


@pytest.mark.parametrize(("name", "fields", "_"), RENDERED)
def test_a_missing_field_is_named(name, fields, _):
    missing = next(key for key in fields if key != "qId")
    rest = {key: value for key, value in fields.items() if key != missing}
    with pytest.raises(DataError, match=f"missing {missing}"):
        find_task(name).read(Line("x:1", rest))


def test_the_test_rows_are_read_in_order_up_to_the_limit(tmp_path):
    folder = tmp_path / "webquestions"
    folder.mkdir()
    rows = [json.dumps({"qText": f"q{i}", "answers": ["a"]}) for i in range(3025)]
    (folder / "train.jsonl").write_text("\n".join(rows))
    task = TASKS["webqs"]
    assert [q.prompt for q in load_questions(task, tmp_path)] == [
        f"Question: q{i}\nAnswer:" for i in (3022, 3023, 3024)
    ]
    assert len(load_questions(task, tmp_path, limit=2)) == 2
    assert len(list(task.lines(tmp_path, task.train))) == 3022


def test_a_file_without_test_rows_is_refused(tmp_path):
    folder = tmp_path / "webquestions"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"qText": "q", "answers": ["a"]}\n')
    with pytest.raises(DataError, match="no test question"):
        load_questions(TASKS["webqs"], tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"sciq/test.jsonl: cannot be read"):
        load_questions(TASKS["sciq"], tmp_path)


def test_an_unknown_task_is_refused():
    with pytest.raises(ConfigError, match="unknown task 'mmlu'"):
        find_task("mmlu")


@pytest.mark.parametrize("name", TASKS)
def test_the_real_files_are_read_whole(name, shared_data):
    task = TASKS[name]
    expected = {"sciq": (11679, 1000), "openbookqa": (4957, 500), "piqa": (800, 200), "webqs": (3022, 756)}[name]
    assert (len(list(task.lines(shared_data, task.train))), len(load_questions(task, shared_data))) == expected

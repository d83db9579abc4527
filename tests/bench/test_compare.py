"""`bench check`: a result beside the last one kept of the same work and machine."""

import json
from pathlib import Path
from typing import Any

import pytest

from obfuscatune.bench.compare import compare, keep, read_result
from obfuscatune.cli.app import run
from obfuscatune.errors import ConfigError
from obfuscatune.report.charts import Bar, Bars
from tests.report.documents import check_self_contained


def result(folder: Path, name: str, other: dict[str, Any] | None = None, **ratios: float) -> Path:
    """A file with these ratios by profile; `other` settings."""
    bench = {"work": "step", "shape": "gpt2", "layers": None, "batch": 2, "length": 256, "threads": 2, "rounds": 5}
    document = {
        "bench": bench | (other or {}),
        "protected": {profile: {"ratio": ratio} for profile, ratio in ratios.items()},
        "environment": {"processor": "P", "cores": "2", "system": "Linux x86_64", "torch": "2.13.0"},
    }
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    folder = tmp_path / "kept"
    result(folder, "2026-01-01-step-gpt2-private.json", private=9.0)
    result(folder, "2026-01-02-step-gpt2-private-paper.json", private=1.5, paper=1.2)
    result(folder, "2026-01-03-step-gpt2-medium-private.json", {"shape": "gpt2-medium"}, private=1.1)
    result(folder, "2026-01-04-step-gpt2-guarded.json", guarded=2.0)
    (folder / "2026-01-05-verify.json").write_text('{"honest_calls": 1}')
    return folder


def test_each_profile_is_held_against_the_newest_of_its_own(tmp_path: Path, kept: Path) -> None:
    now = result(tmp_path, "now.json", private=1.53, guarded=1.9, enclave=1.0)
    found = {one.profile: one for one in compare(read_result(now), kept)}
    assert (found["private"].kept, found["private"].file) == (1.5, "2026-01-02-step-gpt2-private-paper.json")
    assert found["private"].change == pytest.approx(0.02)
    assert [found[name].verdict(0.03) for name in found] == ["the same", "better", "nothing kept"]
    assert [found[name].verdict(0.01) for name in found] == ["worse", "better", "nothing kept"]


def test_a_file_is_not_held_against_itself(kept: Path) -> None:
    own = kept / "2026-01-02-step-gpt2-private-paper.json"
    assert {one.kept for one in compare(read_result(own), kept, but=own)} == {9.0, None}


@pytest.mark.parametrize("other", [{"batch": 4}, {"layers": 4}, {"work": "decode"}, {"threads": 1}])
def test_other_work_is_not_compared(tmp_path: Path, kept: Path, other: dict[str, Any]) -> None:
    now = result(tmp_path, "now.json", other, private=1.5)
    with pytest.raises(ConfigError, match="no result of this work"):
        compare(read_result(now), kept)


@pytest.mark.parametrize(("ratio", "code", "word"), [(1.55, 0, "the same"), (1.6, 1, "worse")])
def test_the_command_ends_with_1_if_worse(
    tmp_path: Path, kept: Path, capsys: pytest.CaptureFixture[str], ratio: float, code: int, word: str
) -> None:
    now = result(tmp_path, "now.json", private=ratio)
    assert run(["bench", "check", str(now), "--kept", str(kept)]) == code
    assert f"| {word} | 2026-01-02" in capsys.readouterr().out
    assert run(["bench", "check", str(now), "--kept", str(kept), "--margin", "0.01", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["verdict"] == "worse"


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}'])
def test_what_is_no_result_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"is no result|no ratios"):
        read_result(path)


def test_a_result_is_kept_in_every_form(tmp_path: Path) -> None:
    picture = Bars("Steps", ("plain",), {"s": [Bar(1.0, 0.5)]}, y_label="s")
    markdown = "LoRA step, `gpt2`.\n\n| side | s |\n|---|---:|\n| plain | 1.5 |\n"
    document = {"environment": {"torch": "2 <b>"}}
    path = keep(tmp_path, "2026-step.v1", document, markdown, picture)
    assert sorted(it.suffix for it in tmp_path.iterdir()) == [".html", ".json", ".md", ".svg"]
    page = check_self_contained(path.with_suffix(".html").read_text("utf-8"))
    for text in ("2026-step.v1", "LoRA step, gpt2.", "plain", "1.5", "2 <b>"):
        assert text in page.text
    assert page.tags.count("svg") == 1 and page.tags.count("table") == 1

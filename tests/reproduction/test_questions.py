"""The data root is a folder or a data set on the hub; what is missing is named."""

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from obfuscatune.errors import ConfigError, DataError
from obfuscatune.reproduction import request
from obfuscatune.reproduction.request import find_data


def test_a_folder_is_taken_as_it_is(data_root):
    assert find_data(data_root, ["sciq", "piqa"]) == data_root


def test_a_missing_file_is_named(data_root, tmp_path):
    (tmp_path / "sciq").symlink_to(data_root / "sciq")
    assert find_data(tmp_path, ["sciq"]) == tmp_path
    with pytest.raises(DataError, match=r"openbookqa/test\.jsonl, openbookqa/train\.jsonl is missing"):
        find_data(tmp_path, ["sciq", "openbookqa"])


def test_without_a_data_root_it_says_what_is_needed():
    with pytest.raises(ConfigError, match=r"--data-root.*webquestions/train\.jsonl.*--parts error,share"):
        find_data(None, ["webqs"])


def test_from_the_hub_only_the_tasks_files_are_fetched(data_root, monkeypatch):
    asked = {}

    def fetch(repository, **options):
        asked.update(options, repository=repository)
        return str(data_root)

    monkeypatch.setattr(request, "snapshot_download", fetch)
    assert find_data("somebody/questions", ["sciq"]) == data_root
    assert asked == {
        "repository": "somebody/questions",
        "repo_type": "dataset",
        "allow_patterns": ["sciq/test.jsonl", "sciq/train.jsonl"],
    }


def test_a_hub_that_gives_nothing_is_one_error(monkeypatch):
    def fetch(*_arguments, **_options):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(request, "snapshot_download", fetch)
    with pytest.raises(DataError, match="'somebody/questions' is neither a folder here nor a data set"):
        find_data("somebody/questions", ["sciq"])

"""Files to examples: masks, lengths, policies, digests."""

import copy

import pytest

from obfuscatune.errors import ConfigError, DataError
from obfuscatune.training.data import IGNORED, Source, load_dataset

LONG = {"text": "a" * 30}
PAIR = {"prompt": "Q: 1+1\nA:", "completion": " two"}


def load(path, tokenizer, max_length=20, too_long="error", task=None, split="train"):
    return load_dataset(Source.of(path, task, split), tokenizer, max_length, too_long)


def test_labels_are_the_ids_where_trained_and_ignored_elsewhere(jsonl, tokenizer):
    (example,) = load(jsonl(PAIR), tokenizer).examples
    prompt = len("Q: 1+1\nA:")
    assert example.labels[:prompt] == (IGNORED,) * prompt
    assert example.labels[prompt:] == example.input_ids[prompt:]
    assert example.trained_tokens == len(" two") + 1


def test_the_first_token_of_a_text_is_never_predicted(jsonl, tokenizer):
    (example,) = load(jsonl({"text": "abc"}), tokenizer).examples
    assert (len(example.input_ids), example.trained_tokens) == (4, 3)


def test_a_file_has_one_layout_and_the_order_is_the_files(jsonl, tokenizer):
    dataset = load(jsonl({"text": "a"}, {"text": "bcd"}), tokenizer)
    assert [len(example.input_ids) for example in dataset.examples] == [2, 4]
    path = jsonl({"text": "a"}, PAIR)
    with pytest.raises(DataError, match=f"{path.name}:2: missing or null: text; the file's records are text, and"):
        load(path, tokenizer)


def test_columns_that_mean_nothing_are_passed_over_and_named(jsonl, tokenizer):
    path = jsonl(PAIR | {"id": 3}, PAIR | {"source": "web", "text": "all of it"})
    dataset = load(path, tokenizer)
    assert dataset.examples == load(jsonl(PAIR, PAIR), tokenizer).examples
    assert dataset.read_as == f"{path}: prompt and completion; not used: id, source, text"
    talk = {"messages": [{"role": "assistant", "content": "b", "id": 7}], "split": "train"}
    assert load(jsonl(talk), tokenizer).read_as.endswith(": conversations (messages); not used: messages[].id, split")
    assert load(jsonl(PAIR), tokenizer).read_as.endswith(": prompt and completion")


def test_columns_of_other_names_are_mapped(jsonl, tokenizer):
    renamed = {"question": PAIR["prompt"], "answer": PAIR["completion"], "prompt": "not this", "text": "nor this"}
    path = jsonl(renamed)
    columns = {"prompt": "question", "completion": "answer"}
    dataset = load_dataset(Source.of(path, None, "train", columns), tokenizer, 20)
    assert dataset.examples == load(jsonl(PAIR), tokenizer).examples
    assert dataset.read_as == f"{path}: prompt and completion; not used: text"
    with pytest.raises(DataError, match="1: there is no field query, which --fields names for prompt; found"):
        load_dataset(Source.of(path, None, "train", {"prompt": "query"}), tokenizer, 20)
    with pytest.raises(ConfigError, match="--fields: no layout has the fields question together"):
        Source.of(path, None, "train", {"question": "prompt"})
    with pytest.raises(ConfigError, match="those of a --task have theirs"):
        Source.of(path, "piqa", "train", columns)


def test_a_token_outside_the_embedding_is_named_with_its_line(jsonl, tokenizer):
    added = copy.deepcopy(tokenizer)
    added.add_tokens(["<new>"])
    path = jsonl({"text": "a"}, {"text": "a <new> b"})
    with pytest.raises(DataError, match=f"{path.name}:2: the token '<new>' has number 257, and the model's embedding"):
        load_dataset(Source.of(path, None, "train"), added, 20, vocabulary=257)
    assert len(load_dataset(Source.of(path, None, "train"), added, 20, vocabulary=258).examples) == 2


STRIPPING = (  # as Qwen3's and DeepSeek-R1's: of earlier answers the reasoning is left out
    "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
REASONED = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "hm</think>b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "oh</think>d"},
]


@pytest.fixture
def stripping(tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = STRIPPING
    return changed


def test_turns_that_the_template_rewrites_are_refused_with_their_line(jsonl, stripping):
    path = jsonl({"messages": REASONED[:2]}, {"messages": REASONED})
    with pytest.raises(DataError, match=f"{path.name}:2: this tokenizer's chat template rewrites earlier.*--split"):
        load(path, stripping, max_length=100)


def test_such_a_conversation_is_split_into_an_example_of_each_turn(jsonl, stripping):
    unreasoned = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    path = jsonl({"messages": REASONED}, {"messages": unreasoned})
    dataset = load_dataset(Source.of(path, None, "train"), stripping, 100, split=True)

    def shown(example):
        trained = [i for i, label in zip(example.input_ids, example.labels, strict=True) if label != IGNORED]
        return stripping.decode(example.input_ids), stripping.decode(trained)

    first, second, whole = map(shown, dataset.examples)
    assert first == ("<user>a<|end|><assistant>hm</think>b<|end|>", "hm</think>b<|end|>")
    context = "<user>a<|end|><assistant>b<|end|><user>c<|end|><assistant>"
    assert second == (f"{context}oh</think>d<|end|>", "oh</think>d<|end|>")
    assert whole[1] == "b<|end|>b<|end|>"  # nothing was rewritten, so nothing is split


def test_a_record_that_is_too_long_is_named_with_its_length(jsonl, tokenizer):
    path = jsonl({"text": "short"}, LONG)
    with pytest.raises(DataError, match=f"{path.name}:2: 31 tokens, and the most is 20"):
        load(path, tokenizer)


def test_the_limit_is_inclusive(jsonl, tokenizer):
    assert len(load(jsonl(LONG), tokenizer, max_length=31).examples[0].input_ids) == 31


def test_truncate_keeps_the_first_tokens(jsonl, tokenizer):
    dataset = load(jsonl({"text": "short"}, LONG), tokenizer, too_long="truncate")
    assert (dataset.truncated, dataset.dropped) == (1, 0)
    assert tokenizer.decode(dataset.examples[1].input_ids) == "a" * 20


def test_drop_leaves_the_record_out(jsonl, tokenizer):
    dataset = load(jsonl({"text": "short"}, LONG), tokenizer, too_long="drop")
    assert (len(dataset.examples), dataset.truncated, dataset.dropped) == (1, 0, 1)


def test_to_truncate_all_that_is_trained_on_is_refused(jsonl, tokenizer):
    with pytest.raises(DataError, match="1: none of the first 5 tokens is to be trained on"):
        load(jsonl(PAIR), tokenizer, max_length=5, too_long="truncate")


def test_to_drop_everything_is_refused(jsonl, tokenizer):
    with pytest.raises(DataError, match="all 1 records are longer than 20 tokens"):
        load(jsonl(LONG), tokenizer, too_long="drop")


def test_the_digest_tells_contents_apart_and_not_names(jsonl, tokenizer):
    one, same, other = (load(jsonl(r), tokenizer).digest for r in (PAIR, PAIR, {"text": "b"}))
    assert one == same != other


@pytest.fixture
def piqa_dir(tmp_path):
    folder = tmp_path / "data" / "piqa"
    folder.mkdir(parents=True)
    rows = [f'{{"goal": "g{i}", "sol1": "a", "sol2": "b", "label": {i % 2}}}\n' for i in range(1000)]
    (folder / "validation_first1000.jsonl").write_text("".join(rows))
    return tmp_path / "data"


def test_of_a_task_and_a_directory_the_rows_set_aside_are_meant(piqa_dir, tokenizer):
    train = load(piqa_dir, tokenizer, max_length=64, task="piqa")
    test = load(piqa_dir, tokenizer, max_length=64, task="piqa", split="test")
    assert (len(train.examples), len(test.examples)) == (800, 200)
    assert not set(train.examples) & set(test.examples)
    assert train.digest != test.digest
    assert tokenizer.decode(test.examples[0].input_ids) == "Question: g800\nAnswer: a<|end|>"


def test_of_a_task_and_a_file_all_rows_are_meant(piqa_dir, tokenizer):
    path = piqa_dir / "piqa" / "validation_first1000.jsonl"
    assert len(load(path, tokenizer, max_length=64, task="piqa").examples) == 1000


def test_a_directory_without_task_is_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match="a directory; name a file, or say with --task"):
        load(tmp_path, tokenizer)


def test_an_unknown_task_is_refused(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="unknown task 'squad'; the tasks are sciq, openbookqa, piqa, webqs"):
        load(tmp_path, tokenizer, task="squad")

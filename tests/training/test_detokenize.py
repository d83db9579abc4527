"""Text written after a prompt, piece by piece, is the text of prompt and pieces together."""

import pytest
from transformers import AutoTokenizer

from obfuscatune.training.detokenize import Detokenizer
from obfuscatune.training.tokens import encode_open


@pytest.fixture
def llama_like(stories260k):
    return AutoTokenizer.from_pretrained(stories260k)


def written(tokenizer, prompt, ids):
    detokenizer = Detokenizer(tokenizer, prompt)
    pieces = [detokenizer.add([one]) for one in ids]
    return [*pieces, detokenizer.rest()]


@pytest.mark.parametrize(
    "text", ["Once upon a time, there was a girl.", "Hi  two spaces\n\n new line", "café 漢字 🙂 ok"]
)
def test_a_text_cut_anywhere_is_whole_again(llama_like, tokenizer, text):
    for chosen in (llama_like, tokenizer):
        ids = encode_open(chosen, text)
        for cut in range(1, len(ids)):
            before = chosen.decode(ids[:cut], skip_special_tokens=True)
            if "\ufffd" not in before:  # else the prompt itself ends inside a character
                assert before + "".join(written(chosen, ids[:cut], ids[cut:])) == text


def test_the_space_before_the_first_word_is_kept(llama_like):
    prompt, whole = encode_open(llama_like, "Once upon a"), encode_open(llama_like, "Once upon a time")
    assert "".join(written(llama_like, prompt, whole[len(prompt) :])) == " time"


def test_a_character_of_several_tokens_comes_as_one(tokenizer):
    prompt = encode_open(tokenizer, "a")
    ids = encode_open(tokenizer, "é!")
    assert written(tokenizer, prompt, ids) == ["", "é", "!", ""]
    assert written(tokenizer, prompt, ids[:1]) == ["", "\ufffd"]  # it ended inside: shown as what it is


def test_special_tokens_are_not_shown(tokenizer):
    prompt = encode_open(tokenizer, "a")
    assert written(tokenizer, prompt, [*encode_open(tokenizer, "b"), tokenizer.eos_token_id]) == ["b", "", ""]

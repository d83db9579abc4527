"""Greedy answers, against `generate` one prompt at a time."""

import copy
import json

import pytest
import torch

from obfuscatune.errors import DataError
from obfuscatune.evaluation.questions import evaluate_completions, load_completions
from obfuscatune.training.data_files import Completion
from obfuscatune.training.tokens import encode_pair

STORY = "Once upon a time, there was a little girl named Lily. She loved to"
ASKED = [
    Completion(STORY, " play outside in the park."),
    Completion("One day, a boy named", " Tim"),
    Completion("The cat sat on the", " mat"),
    Completion("Once upon a time", ", there was"),
    Completion(STORY + " ", "eat"),
]


def greedy(model, tokenizer, prompt, tokens):
    ids = tokenizer(prompt.rstrip(), return_tensors="pt").input_ids
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=2
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).lstrip().split("\n")[0].strip()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answers_are_those_of_generate(model, tokenizer, batch_size):
    metric = evaluate_completions(model, tokenizer, ASKED, batch_size=batch_size)
    longest = len(encode_pair(tokenizer, STORY, ASKED[0].completion)[1]) + 4
    for verdict, completion in zip(metric.verdicts, ASKED, strict=True):
        assert verdict.answer == greedy(model, tokenizer, completion.prompt, longest)
        assert verdict.right is (verdict.answer == completion.completion.strip())


def test_an_exact_match_is_found_and_more_or_less_is_none(model, tokenizer):
    line = greedy(model, tokenizer, STORY, 24)
    asked = [Completion(STORY, f" {line}"), Completion(STORY, f" {line}!"), Completion(STORY, " play")]
    metric = evaluate_completions(model, tokenizer, asked[:1], batch_size=2)
    # It wrote the line and four tokens more, so it is right only where the line or the text ended there.
    assert metric.verdicts[0].right is (metric.verdicts[0].answer == line)
    assert not evaluate_completions(model, tokenizer, asked[2:], batch_size=2).verdicts[0].right


def test_an_answer_ends_with_its_line_or_with_the_text(model, tokenizer):
    (whole,) = evaluate_completions(model, tokenizer, ASKED[:1], batch_size=1).verdicts
    another_end = 300
    for ending in (tokenizer.convert_tokens_to_ids("<0x0A>"), tokenizer.eos_token_id, another_end):
        cut_short = copy.deepcopy(model)
        cut_short.generation_config.eos_token_id = [tokenizer.eos_token_id, another_end]
        written = 0

        def write_ending(_module, _inputs, logits, ending=ending):
            nonlocal written
            written += 1
            if written == 4:
                logits[..., ending] += 100.0

        cut_short.lm_head.register_forward_hook(write_ending)
        (verdict,) = evaluate_completions(cut_short, tokenizer, ASKED[:1], batch_size=1).verdicts
        assert written == 4, "it went on after its end"
        ids = tokenizer(whole.answer, add_special_tokens=False).input_ids
        assert verdict.answer.startswith(tokenizer.decode(ids[:3]))


def test_the_margin_is_the_smallest_lead(model, tokenizer):
    (verdict,) = evaluate_completions(model, tokenizer, ASKED[:1], batch_size=1).verdicts
    ids = tokenizer(STORY, return_tensors="pt").input_ids
    leads = []
    with torch.no_grad():
        for _ in range(len(encode_pair(tokenizer, STORY, ASKED[0].completion)[1]) + 4):
            top = model(ids).logits[0, -1].topk(2)
            leads.append((top.values[0] - top.values[1]).item())
            ids = torch.cat([ids, top.indices[None, :1]], dim=1)
    assert verdict.margin == pytest.approx(min(leads), abs=1e-3)


def test_a_prompt_that_leaves_no_room_is_refused(model, tokenizer):
    with pytest.raises(DataError, match="leaves no room for an answer of"):
        evaluate_completions(model, tokenizer, [Completion("Lily " * 600, "b")], batch_size=1)


def write(tmp_path, *records):
    path = tmp_path / "asked.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_completions_are_read_up_to_the_limit(tmp_path):
    path = write(tmp_path, *({"prompt": str(i), "completion": "x"} for i in range(3)))
    assert len(load_completions(path)) == 3
    assert load_completions(path, limit=1) == [Completion("0", "x")]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, "1: expected prompt and completion"),
        ({"prompt": "a", "completion": "b\nc"}, "1: the completion has several lines"),
        ({"prompt": "a"}, "1: expected the fields messages; or .* found the fields: prompt"),
    ],
)
def test_what_cannot_be_asked_is_refused(tmp_path, record, message):
    with pytest.raises(DataError, match=message):
        load_completions(write(tmp_path, record))

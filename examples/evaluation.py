"""A protected model beside the plain one: the loss of held-out text, and answers in the model's own words.

Both sides agree up to rounding: that is what "exact" means here (docs/adr/0006-what-exact-means.md).
"""

import json
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import obfuscatune
from obfuscatune.assets import clinic_notes_path, tiny_model_path

PATH = tiny_model_path()


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, records: list[dict[str, str]]) -> tuple[list[float], list[str]]:
    """The loss of each record in nats per token, and what the model answers to its prompt."""
    losses, answers = [], []
    for record in records:
        whole = tokenizer(record["prompt"] + record["completion"], return_tensors="pt")
        losses.append(model(**whole, labels=whole["input_ids"]).loss.item())
        prompt = tokenizer(record["prompt"], return_tensors="pt")
        written = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0]
        answers.append(tokenizer.decode(written[prompt["input_ids"].shape[1] :]))
    return losses, answers


def main() -> None:
    """Print both sides."""
    tokenizer = AutoTokenizer.from_pretrained(PATH)
    lines = (clinic_notes_path() / "heldout.jsonl").read_text("utf-8").splitlines()[:6]
    records = [json.loads(line) for line in lines]
    plain, plain_answers = evaluate(AutoModelForCausalLM.from_pretrained(PATH, dtype=torch.float32), tokenizer, records)
    with obfuscatune.load(PATH, profile="private", dtype="float32", base="closed") as model:
        protected, answers = evaluate(model, tokenizer, records)
    print(f"loss, plain       {sum(plain) / len(plain):.6f}")
    print(f"loss, protected   {sum(protected) / len(protected):.6f}")
    print(f"largest difference of a record {max(abs(a - b) for a, b in zip(plain, protected, strict=True)):.1e}")
    print(f"same answers {sum(a == b for a, b in zip(plain_answers, answers, strict=True))} of {len(records)}")


if __name__ == "__main__":
    main()

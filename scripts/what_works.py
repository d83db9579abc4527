"""Try architectures and PEFT's methods on a protected model beside the plain one; write the tables of what works.

python -m scripts.what_works            # in a checkout: prints the tables
python -m scripts.what_works --write    # ... into docs/compatibility.md and README.md, between their markers

Each architecture is made small with random weights. It works where logits, the gradients of LoRA factors and greedy
text are the plain model's, up to rounding; it is refused where `protect` says by name why it cannot be protected.
"""

from __future__ import annotations

import argparse
import copy
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from peft import C3AConfig, IA3Config, LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from obfuscatune import ObfuscaTuneError, local_worker, protect
from tests.contract.test_architectures import QUICK, small

ROOT = Path(__file__).resolve().parents[1]
MODEL_TYPES = tuple(sorted({*QUICK, "gemma2", "mistral", "phi", "qwen2", "qwen3"} - {"bert"}))
"""Of `bert` and other encoders the tests hold what generation does not (tests/contract)."""
TOLERANCE = 1e-3
"""Largest difference over largest plain value, in float32: what rounding leaves over two blocks is some 1e-6."""
WORKS = "yes"
NOT_ON_EXPERTS = "yes, but LoRA on all linear layers is refused: name those of the attention"
"""PEFT makes of it a LoRA of stacked experts or routers (`target_parameters`), which are not in this process."""
TARGETS = ["q_proj", "v_proj", "down_proj"]
METHODS: dict[str, Callable[[], Any]] = {
    "LoRA on all linear layers": lambda: LoraConfig(r=4, target_modules="all-linear"),
    "rsLoRA": lambda: LoraConfig(r=4, target_modules=TARGETS, use_rslora=True),
    "LoRA with norms trained": lambda: LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["norm"]),
    "LoRA with ranks by layer": lambda: LoraConfig(r=4, target_modules=TARGETS, rank_pattern={"q_proj": 7}),
    "C3A": lambda: C3AConfig(block_size=16, target_modules=["q_proj"]),
    "IA3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VeRA": lambda: VeraConfig(r=4, target_modules=["q_proj"]),
    "Prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "DoRA": lambda: LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "PiSSA": lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"),
    "OLoRA": lambda: LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="olora"),
}


def build(model_type: str) -> Any:
    """The plain model, small, in float32; the same weights each time."""
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(small(model_type), dtype=torch.float32).eval()


def adapted(model: Any, config: Any) -> Any:
    """The model with an adapter that changes what it computes; the same factors each time."""
    torch.manual_seed(2)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def gradients(model: Any, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Of all that is trained, and the logits with them."""
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    found = {name: it.grad for name, it in model.named_parameters() if it.requires_grad and it.grad is not None}
    return {"logits": output.logits.detach(), **found}


def differs(plain: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> str:
    """What is not the plain model's; empty where all is."""
    if plain.keys() != found.keys():
        return "other parameters are trained"
    for name, expected in plain.items():
        if (expected - found[name]).abs().max() > TOLERANCE * expected.abs().max():
            return f"{'logits' if name == 'logits' else 'gradients'} differ"
    return ""


def verdict(work: Callable[[], str]) -> str:
    """`yes`, or what stands in the way."""
    try:
        return work() or WORKS
    except ObfuscaTuneError as error:
        return f"refused: {re.split(r'; |: merging', str(error))[0]}"  # the reason, without the advice


def try_architecture(model_type: str, address: str) -> str:
    """Text, logits and gradients of a protected model of that type, against plain."""
    plain = build(model_type)
    ids = torch.arange(3, 12)[None]

    def text() -> str:
        with protect(copy.deepcopy(plain), address, first_blocks=0, base="closed") as protected:
            options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
            same = plain.generate(ids, **options).equal(protected.generate(ids, **options))
            return "" if same else "text differs"

    def lora(targets: str | list[str]) -> str:
        config = LoraConfig(r=4, target_modules=targets)
        with protect(copy.deepcopy(plain), address, first_blocks=0, base="closed") as protected:
            found = gradients(adapted(protected, config), ids)
        return differs(gradients(adapted(copy.deepcopy(plain), copy.deepcopy(config)), ids), found)

    def work() -> str:
        try:
            return text() or lora("all-linear")
        except ObfuscaTuneError as error:
            if "target_parameters" not in str(error):
                raise
            return lora(["o_proj"]) or NOT_ON_EXPERTS

    return verdict(work)


def try_method(name: str, address: str) -> str:
    """Gradients under one of PEFT's methods, against plain."""
    plain, ids = build("llama"), torch.arange(3, 12)[None]

    def work() -> str:
        with protect(copy.deepcopy(plain), address, first_blocks=0, base="closed") as protected:
            found = adapted(protected, METHODS[name]())
            return differs(gradients(adapted(plain, METHODS[name]()), ids), gradients(found, ids))

    return verdict(work)


def rows(names: Iterable[str], attempt: Callable[[str, str], str]) -> dict[str, str]:
    """Name and verdict of each."""
    logging.set_verbosity_error()
    with warnings.catch_warnings(), local_worker(threads=1) as worker:
        warnings.simplefilter("ignore")
        return {name: attempt(name, worker.address) for name in names}


def table(head: str, found: dict[str, str]) -> str:
    """A row each, as Markdown."""
    lines = [f"| {head} | |", "|---|---|"]
    lines += [f"| {name} | {said.replace('|', '/')} |" for name, said in found.items()]
    return "\n".join(lines)


def summary(architectures: dict[str, str], methods: dict[str, str]) -> str:
    """Both tables in two rows."""
    lines = ["| | works | refused by name, with the reason |", "|---|---|---|"]
    for head, found in (("architectures, among others", architectures), ("PEFT", methods)):
        works = ", ".join(name for name, said in found.items() if said in (WORKS, NOT_ON_EXPERTS))
        others = ", ".join(name for name, said in found.items() if said not in (WORKS, NOT_ON_EXPERTS))
        lines.append(f"| {head} | {works} | {others} |")
    return "\n".join(lines)


def put(page: Path, marker: str, text: str) -> None:
    """Replace what is between `<!-- marker -->` and `<!-- end -->`."""
    whole = page.read_text("utf-8")
    pattern = rf"(<!-- {marker} -->\n).*?(<!-- end -->)"
    if not re.search(pattern, whole, re.DOTALL):
        raise SystemExit(f"{page} has no place <!-- {marker} --> ... <!-- end -->")
    page.write_text(re.sub(pattern, lambda it: f"{it[1]}\n{text}\n\n{it[2]}", whole, flags=re.DOTALL), "utf-8")


def main() -> None:
    """Make the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="into docs/compatibility.md and README.md")
    options = parser.parse_args()
    architectures, methods = rows(MODEL_TYPES, try_architecture), rows(METHODS, try_method)
    made = {"architectures": table("architecture", architectures), "methods": table("method of PEFT", methods)}
    short = summary(architectures, methods)
    print("\n\n".join([*made.values(), short]))
    if options.write:
        for marker, text in made.items():
            put(ROOT / "docs/compatibility.md", marker, text)
        put(ROOT / "README.md", "what works", short)


if __name__ == "__main__":
    main()

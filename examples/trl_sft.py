"""TRL's `SFTTrainer` on a protected model: prompts and completions, trained on the completions alone.

Needs the extra: pip install 'obfuscatune[trl]'.
"""

import json

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import obfuscatune
from obfuscatune.assets import clinic_notes_path, tiny_model_path


def main() -> None:
    """Train six steps; leave the adapter in `adapter/`."""
    path = tiny_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.eos_token
    lines = (clinic_notes_path() / "train.jsonl").read_text("utf-8").splitlines()[:24]
    data = Dataset.from_list([{key: json.loads(line)[key] for key in ("prompt", "completion")} for line in lines])

    with obfuscatune.load(path, profile="private", dtype="float32", base="closed") as model:  # starts a worker
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                "runs/trl", max_steps=6, per_device_train_batch_size=4, learning_rate=2e-3, logging_steps=2,
                save_strategy="no", report_to="none", use_cpu=True, dataloader_pin_memory=False,
            ),
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=LoraConfig(r=16, target_modules="all-linear", fan_in_fan_out=True, task_type="CAUSAL_LM"),
        )  # fmt: skip
        trainer.train()
        trainer.save_model("adapter")


if __name__ == "__main__":
    main()

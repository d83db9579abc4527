"""LoRA by PEFT, trained by transformers' `Trainer`, on a protected model.

Everything after `load` is ordinary transformers and PEFT. The adapter and its optimizer stay in this process.
"""

import json

from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

import obfuscatune
from obfuscatune.assets import clinic_notes_path, tiny_model_path


def main() -> None:
    """Train six steps; leave the adapter in `adapter/`."""
    path = tiny_model_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = tokenizer.eos_token
    lines = (clinic_notes_path() / "train.jsonl").read_text("utf-8").splitlines()[:24]
    records = [json.loads(line) for line in lines]
    examples = [tokenizer(record["prompt"] + record["completion"]) for record in records]

    with obfuscatune.load(path, profile="private", dtype="float32", base="closed") as model:  # starts a worker
        lora = LoraConfig(r=16, target_modules="all-linear", fan_in_fan_out=True, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                "runs/trainer", max_steps=6, per_device_train_batch_size=4, learning_rate=2e-3, logging_steps=2,
                save_strategy="no", report_to="none", use_cpu=True, dataloader_pin_memory=False,
            ),
            train_dataset=examples,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )  # fmt: skip
        trainer.train()
        model.save_pretrained("adapter")  # PEFT's own format: loads into the plain model


if __name__ == "__main__":
    main()

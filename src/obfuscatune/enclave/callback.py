"""For `Trainer`: a protected model renews its secrets as its profile says."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class RekeyCallback(TrainerCallback):  # type: ignore[misc]  # transformers leaves it untyped here
    """Tells a protected model of each optimizer step. Needed where its profile has `rekey_every`, harmless elsewhere.

    Example:
        >>> Trainer(model, args, train_dataset=data, callbacks=[obfuscatune.RekeyCallback()])
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Renew what is due."""
        protection = getattr(model, "protection", None)
        if protection is not None:
            protection.after_step()

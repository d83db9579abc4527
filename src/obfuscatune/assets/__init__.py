"""What the package carries so that it can be tried without a download.

`tiny-gpt2/` is a small language model of our own (`scripts/train_tiny_model.py`), `clinic-notes/` a small invented
data set (`scripts/make_clinic_notes.py`). Each folder's README says how it was made and what was measured.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["clinic_notes_path", "tiny_model_path"]

_HERE = Path(__file__).resolve().parent


def tiny_model_path() -> Path:
    """Return the folder of the embedded model, for `from_pretrained` (weights in float16: pass `dtype`)."""
    return _HERE / "tiny-gpt2"


def clinic_notes_path() -> Path:
    """Return the folder of the embedded data set: `train.jsonl` and `heldout.jsonl`, prompt and completion."""
    return _HERE / "clinic-notes"

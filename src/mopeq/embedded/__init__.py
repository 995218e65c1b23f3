"""mopeq's embedded model: a small trained Mixture-of-Experts vision-language model, and the world it was trained on.

    model/          the checkpoint, as a user's folder looks (Qwen3-VL-MoE, 11.9 MB in bf16)
    world.py        pictures and questions from a seed; the held-out table; calibration items
    heldout.jsonl   text that neither training nor calibration has seen

Nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).resolve().parent


def model_dir() -> Path:
    """The folder of the embedded checkpoint."""
    return HERE / "model"


def heldout_text() -> Path:
    """JSON lines with `text` and `source`, kept out of training and of the built-in calibration text."""
    return HERE / "heldout.jsonl"

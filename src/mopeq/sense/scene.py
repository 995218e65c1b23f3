"""What a sensor is given, and what it gives back when it knows scores but no formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mopeq.nouns import Format, MoESpec, Sensitivity

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Scene:
    """A checkpoint, the formats in question, and for those who need it a model, calibration batches, a quantizer.

    `model(attention)` loads the model (float32 on CPU); `batches` are encoded calibration, each with `image_mask`
    where pictures are in it. `scope` is "model" or "layer", for scores that are scaled before they are combined.
    `quantizer` is a row's name in QUANTIZERS; `memory_bytes` is what candidates and moments may take at a time.
    """

    folder: Path
    spec: MoESpec
    formats: tuple[Format, ...]
    seed: int = 0
    scope: str = "model"
    model: Callable[[str | None], Any] | None = None
    batches: tuple[Batch, ...] = ()
    data_digest: str = ""
    quantizer: str = "rtn"
    memory_bytes: int = 1 << 32


def from_scores(
    scene: Scene,
    method: str,
    score_I: np.ndarray,
    stderr_I: np.ndarray | None = None,
    tokens_LE: np.ndarray | None = None,
    tokens_by_modality: Mapping[str, np.ndarray] | None = None,
    notes: tuple[str, ...] = (),
) -> Sensitivity:
    """One score a linear -> costs by the usual decline of rounding noise, score * 4^-bits (docs/methods.md)."""
    from mopeq.alloc.baselines import costs_from_scores

    cost_IF = costs_from_scores(score_I, [f.bits for f in scene.formats])
    return Sensitivity(
        method,
        tuple(i for i, _ in scene.spec.linears),
        scene.formats,
        cost_IF,
        score_I,
        stderr_I,
        tokens_LE=tokens_LE,
        tokens_by_modality=tokens_by_modality or {},
        data_digest=scene.data_digest,
        notes=notes,
    )


def spread(scene: Scene, score_LE: list[np.ndarray]) -> np.ndarray:
    """Scores of experts, shared equally among each expert's projections, so that an expert's sum is its score."""
    rows = []
    for layer, score_E in zip(scene.spec.layers, score_LE, strict=True):
        rows.append(np.repeat(np.asarray(score_E, dtype=np.float64) / len(layer.projections), len(layer.projections)))
    return np.concatenate(rows)


def unseen(scene: Scene, tokens_LE: np.ndarray) -> tuple[str, ...]:
    """A note naming the experts that no calibration token reached, if any."""
    missed = [
        f"layer {layer.layer} expert {e}"
        for i, layer in enumerate(scene.spec.layers)
        for e in range(layer.experts)
        if tokens_LE[i, e] == 0
    ]
    if not missed:
        return ()
    shown = ", ".join(missed[:8]) + (f" and {len(missed) - 8} more" if len(missed) > 8 else "")
    return (f"no calibration token reached {shown}",)

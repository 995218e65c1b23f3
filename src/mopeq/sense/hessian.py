"""The paper's Hessian trace as its code runs it: Hutchinson's estimate for the Hessian of |W|_F itself.

For f(W) = |W|_F with n entries the Hessian is (I - w w^T / |w|^2) / |w|, whose trace is (n - 1) / |w|: the estimate's
expectation in closed form, with no probes and no data (MoPEQ, arXiv 2509.02512).
"""

from __future__ import annotations

import math

import numpy as np
import torch

from mopeq.kernels.extent import squares
from mopeq.nouns import MoELayer, Sensitivity
from mopeq.progress import progress
from mopeq.sense.scene import Scene, from_scores
from mopeq.stream import each_expert


def closed_form(w: torch.Tensor) -> float:
    """(n-1)/|W|_F of one matrix. A zero matrix, whose norm has no Hessian, counts 0."""
    norm = math.sqrt(squares(w))
    return (w.numel() - 1) / norm if norm else 0.0


def scores(scene: Scene) -> np.ndarray:
    """The closed form for every linear of the spec."""

    def work(layer: MoELayer, e: int, weights: dict[str, torch.Tensor]) -> list[float]:
        return [closed_form(weights[q]) for q in layer.projections]

    found: list[float] = []
    with progress("sense: hessian", scene.spec.expert_params, "weights") as p:
        for layer, _, scores_P in each_expert(scene.folder, scene.spec, scene.spec.layers, work):
            found += scores_P
            p.step(layer.params / layer.experts)
    return np.array(found)


def sense(scene: Scene) -> Sensitivity:
    return from_scores(scene, "hessian", scores(scene))

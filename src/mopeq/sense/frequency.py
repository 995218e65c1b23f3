"""Activation frequency: how many calibration tokens the router sends to each expert (MoPEQ's baseline).

Tokens are also counted gate-weighted and by modality; padding is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopeq.data.encode import no_padding
from mopeq.nouns import Sensitivity
from mopeq.progress import progress
from mopeq.seam import model_layers, plain_forward, watch
from mopeq.sense.scene import Scene, from_scores, shows, spread, unseen, walk


class Counts:
    """Per MoE layer and expert: tokens routed, by modality, and the sum of their gate weights."""

    def __init__(self, scene: Scene, model: Any, now: Callable[[], int]):
        """`now()` is the number of the batch that moves."""
        layers = scene.spec.layers
        shape = (len(layers), max(layer.experts for layer in layers))
        self.tokens = {name: torch.zeros(shape, dtype=torch.int64) for name in ("text", "image")}
        self.gate_weight = torch.zeros(shape, dtype=torch.float64)
        number = {layer.layer: i for i, layer in enumerate(layers)}
        self.row = {id(module): number[layer.layer] for layer, module in model_layers(scene.spec, model)}
        self.experts, self.batches, self.now = shape[1], scene.batches, now

    def masks(self) -> dict[str, Tensor]:
        """Which positions of the batch that moves count as what."""
        batch = self.batches[self.now()]
        valid = no_padding(batch).flatten()
        image = batch.get("image_mask", torch.zeros_like(valid)).bool().flatten()
        return {"text": valid & ~image, "image": valid & image}

    def __call__(self, module: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        self.see(module, index_TK, weight_TK)
        return plain_forward(module, x_TH, index_TK, weight_TK)

    def see(self, module: Any, index_TK: Tensor, weight_TK: Tensor) -> None:
        """Count one layer's routing of the batch that moves."""
        row, masks = self.row[id(module)], self.masks()
        inside_TK = (index_TK >= 0) & (index_TK < self.experts)
        for name, mask_T in masks.items():
            chosen = index_TK[mask_T.to(index_TK.device)[:, None] & inside_TK]
            self.tokens[name][row] += torch.bincount(chosen, minlength=self.experts).cpu()
        counted = (masks["text"] | masks["image"]).to(index_TK.device)[:, None] & inside_TK
        weights = torch.bincount(index_TK[counted], weight_TK[counted].detach().double(), minlength=self.experts)
        self.gate_weight[row] += weights.cpu()

    def take(self) -> dict[str, Tensor]:
        """What was counted since the last time, for `add`; counting begins anew."""
        counted = {f"tokens_{name}": t for name, t in self.tokens.items()} | {"gate_weight": self.gate_weight}
        taken = {name: t.clone() for name, t in counted.items()}
        for tensor in counted.values():
            tensor.zero_()
        return taken

    def add(self, taken: Mapping[str, Tensor]) -> None:
        self.gate_weight += taken["gate_weight"]
        for name, tokens in self.tokens.items():
            tokens += taken[f"tokens_{name}"]

    @property
    def total(self) -> np.ndarray:
        return (self.tokens["text"] + self.tokens["image"]).numpy()


def count(scene: Scene) -> Counts:
    """Show the model all calibration batches and count where the router sends their tokens."""
    with walk(scene, exact=False) as walking:
        counts = Counts(scene, walking.model, lambda: walking.now)
        with watch(walking.model, counts), progress("sense: frequency", len(scene.spec.layers), "layers") as p:
            for visit in walking.forward(shows(walking, scene.batches), layers_only=True):
                visit.run()
                p.step(len(visit.layers))
    return counts


def sense(scene: Scene) -> Sensitivity:
    counts = count(scene)
    return from_scores(scene, "frequency", expert_scores(scene, counts), **token_facts(scene, counts))


def expert_scores(scene: Scene, counts: Counts) -> np.ndarray:
    return spread(scene, [counts.total[i, : layer.experts] for i, layer in enumerate(scene.spec.layers)])


def token_facts(scene: Scene, counts: Counts) -> dict[str, Any]:
    """What every sensor that showed data tells of it."""
    modalities = {name: t.numpy() for name, t in counts.tokens.items() if int(t.sum())}
    return {
        "tokens_LE": counts.total,
        "tokens_by_modality": modalities | {"gate_weight": counts.gate_weight.numpy()},
        "notes": unseen(scene, counts.total),
    }

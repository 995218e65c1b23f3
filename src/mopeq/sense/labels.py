"""The true loss of labels that the model itself draws, at every position that predicts.

With labels sampled from the model, E[g g^T] of the loss's gradients is the Fisher information, which is the Hessian
of KL(original || changed) at the original.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mopeq.data.encode import model_inputs, no_padding
from mopeq.sense.scene import Batch
from mopeq.walk.walking import Walk

DRAWN = 256  # rows whose labels are drawn at a time


def sampled_loss(walking: Walk, batch: Batch, generator: torch.Generator) -> Tensor:
    """The summed loss (nats) of labels drawn from the model's own predictions, over the positions that predict."""
    logits_SV = predicting_logits(walking.model, batch, walking.device)
    labels_S = torch.cat([draw(rows, generator) for rows in logits_SV.detach().split(DRAWN)])
    return torch.nn.functional.cross_entropy(logits_SV, labels_S.to(walking.device), reduction="sum")


def predicting_logits(model: Any, batch: Batch, device: Any) -> Tensor:
    """[S, V] at the positions that predict, float32."""
    predicts_BT = predicting(batch).to(device)
    logits_SV: Tensor = model(**model_inputs(batch, device), use_cache=False).logits[predicts_BT].float()
    return logits_SV


def draw(logits_SV: Tensor, generator: torch.Generator) -> Tensor:
    """A label for each row, by inverse distribution on the CPU, so that every device draws alike."""
    cumulative = logits_SV.double().softmax(-1).cumsum(-1).cpu()
    u = torch.rand(len(cumulative), 1, generator=generator, dtype=torch.float64) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, u).squeeze(-1).clamp_max(cumulative.shape[-1] - 1)


def skip_draws(generator: torch.Generator, count: int) -> None:
    """Leave a generator as drawing that many labels does."""
    for rows in torch.empty(count).split(DRAWN):
        torch.rand(len(rows), 1, generator=generator, dtype=torch.float64)


def predicting(batch: Batch) -> Tensor:
    """Positions [B, T] whose prediction counts: those before an answer's tokens, else all that are no padding."""
    valid = no_padding(batch)
    if "answer_mask" not in batch:
        return valid & ~batch.get("image_mask", torch.zeros_like(valid)).bool()
    ahead = torch.zeros_like(valid)
    ahead[:, :-1] = batch["answer_mask"][:, 1:].bool()
    return ahead & valid

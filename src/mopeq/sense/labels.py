"""The true loss of labels that the model itself draws, at every position that predicts.

With labels sampled from the model, E[g g^T] of the loss's gradients is the Fisher information, which is the Hessian
of KL(original || changed) at the original.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mopeq.data.encode import model_inputs, no_padding
from mopeq.sense.scene import Batch
from mopeq.walk.walking import Walk

DRAWN = 1 << 21  # probabilities that labels are drawn from at a time: they stay in a cache
BLOCK = 128  # of the vocabulary


def sampled_loss(walking: Walk, batch: Batch, generator: torch.Generator) -> Tensor:
    """The summed loss (nats) of labels drawn from the model's own predictions, over the positions that predict."""
    logits_SV = predicting_logits(walking.model, batch, walking.device)
    u_S = torch.rand(len(logits_SV), generator=generator, dtype=torch.float64)  # on the CPU: every device draws alike
    loss: Tensor = SampledLoss.apply(logits_SV, u_S.to(walking.device))
    return loss


def predicting_logits(model: Any, batch: Batch, device: Any) -> Tensor:
    """[S, V] at the positions that predict, float32."""
    predicts_BT = predicting(batch)
    logits_BTV = model(**model_inputs(batch, device), use_cache=False).logits
    chosen: Tensor = logits_BTV.flatten(0, 1) if predicts_BT.all() else logits_BTV[predicts_BT.to(device)]
    return chosen.float()


class SampledLoss(torch.autograd.Function):
    """The summed cross entropy (nats) of a label for each row, drawn by the inverse of its distribution at u in [0, 1).

    Its gradient, probabilities less one at the label, is made with it, some rows at a time, from the exponentials that
    the drawing needs too.
    """

    @staticmethod
    def forward(ctx: Any, logits_SV: Tensor, u_S: Tensor) -> Tensor:
        gradient_SV = torch.empty_like(logits_SV)
        loss = torch.zeros((), dtype=torch.float64, device=logits_SV.device)
        size = max(1, DRAWN // logits_SV.shape[-1])
        for logits, u, p in zip(logits_SV.split(size), u_S.split(size), gradient_SV.split(size), strict=True):
            shifted = logits - logits.amax(-1, keepdim=True)
            label_S1, total_S1 = draw(torch.exp(shifted, out=p), u)
            loss += (total_S1.log() - shifted.gather(-1, label_S1)).sum()
            p /= total_S1.float()
            p.scatter_add_(-1, label_S1, p.new_full(label_S1.shape, -1.0))
        ctx.save_for_backward(gradient_SV)  # let go once it was taken, though the loss is kept
        return loss.to(logits_SV.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (gradient_SV,) = ctx.saved_tensors
        return gradient_SV if g == 1 else gradient_SV * g, None


def draw(p_SV: Tensor, u_S: Tensor) -> tuple[Tensor, Tensor]:
    """A label for each row of probabilities, not yet divided by their sum, and that sum in float64, both [S, 1].

    First a block of the vocabulary is drawn, then a word in it, so that most words are added up once and no more.
    """
    words = p_SV.shape[-1]
    p_SNB = functional.pad(p_SV, (0, -words % BLOCK)).unflatten(-1, (-1, BLOCK))
    upto_SN = p_SNB.sum(-1, dtype=torch.float64).cumsum(-1)
    u_S1 = u_S[:, None] * upto_SN[:, -1:]
    block_S1 = torch.searchsorted(upto_SN, u_S1, right=True).clamp_max(upto_SN.shape[-1] - 1)
    before_S1 = functional.pad(upto_SN, (1, 0)).gather(1, block_S1)
    inside_SB = p_SNB.take_along_dim(block_S1[..., None], 1).squeeze(1).double().cumsum(-1)
    end_S1 = torch.nextafter(inside_SB[:, -1:], torch.zeros_like(u_S1))  # its sum may be rounded otherwise
    word_S1 = torch.searchsorted(inside_SB, torch.minimum(u_S1 - before_S1, end_S1), right=True).clamp_max(BLOCK - 1)
    return (block_S1 * BLOCK + word_S1).clamp_max(words - 1), upto_SN[:, -1:]


def skip_draws(generator: torch.Generator, count: int) -> None:
    """Leave a generator as drawing that many labels does."""
    torch.rand(count, generator=generator, dtype=torch.float64)


def predicting(batch: Batch) -> Tensor:
    """Positions [B, T] whose prediction counts: those before an answer's tokens, else all that are no padding."""
    valid = no_padding(batch)
    if "answer_mask" not in batch:
        return valid & ~batch.get("image_mask", torch.zeros_like(valid)).bool()
    ahead = torch.zeros_like(valid)
    ahead[:, :-1] = batch["answer_mask"][:, 1:].bool()
    return ahead & valid

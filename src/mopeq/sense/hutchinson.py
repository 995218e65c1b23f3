"""Hessian traces of the true loss (the paper's text; HAWQ-V2): E[v^T H v] = tr(H) for Rademacher v.

One Hessian-vector product with v over all experts at once serves every matrix: the cross terms of different matrices
have zero mean. Each (batch, probe) is one sample; the standard error is over samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopeq.data.encode import model_inputs, no_padding
from mopeq.nouns import MoELayer, Sensitivity
from mopeq.progress import progress
from mopeq.seam import model_layers, stored, views, watch
from mopeq.sense.frequency import Counts, token_facts
from mopeq.sense.scene import Scene, from_scores, whole_model

PROBES = 2  # per batch


def sense(scene: Scene) -> Sensitivity:
    model = whole_model(scene, "eager", "--sensitivity hutchinson, which differentiates twice,")
    pairs = model_layers(scene.spec, model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    weights = [w for _, module in pairs for w in stored(module)]
    for weight in weights:
        weight.requires_grad_(True)
    now = [0]
    counts = Counts(scene, model, lambda: now[0])
    generator = torch.Generator().manual_seed(scene.seed)
    samples_SI: list[np.ndarray] = []
    sizes: list[int] = []
    total = sum(batch["input_ids"].numel() for batch in scene.batches)
    with progress("sense: hutchinson", total, "tokens") as p:
        for now[0], batch in enumerate(scene.batches):
            with watch(model, counts):
                loss = mean_loss(model, batch)
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            for probe in range(PROBES):
                v = [rademacher(w, generator) for w in weights]
                hv = torch.autograd.grad(gradients, weights, v, retain_graph=probe + 1 < PROBES)
                samples_SI.append(blocks(scene, pairs, [a * b for a, b in zip(v, hv, strict=True)]))
                sizes.append(batch["input_ids"].numel())
            p.step(batch["input_ids"].numel())
    mean_I, stderr_I = weighted_mean(np.stack(samples_SI), np.array(sizes, dtype=np.float64))
    return from_scores(scene, "hutchinson", mean_I, stderr_I, **token_facts(scene, counts))


def mean_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean next-token loss (nats) over a batch; over the answer's tokens alone where there is an answer."""
    device = next(model.parameters()).device
    inputs = model_inputs(batch, device)
    logits_BTV = model(**inputs, use_cache=False).logits
    targets = inputs["input_ids"][:, 1:].clone()
    valid = batch.get("answer_mask", no_padding(batch))
    targets[~valid.to(device)[:, 1:].bool()] = -100
    return torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), targets.flatten())


def rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs, drawn on the CPU so that every device sees the same."""
    signs = torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8)
    return (signs * 2 - 1).to(like.dtype).to(like.device)


def blocks(scene: Scene, pairs: list[tuple[MoELayer, Any]], products: list[Tensor]) -> np.ndarray:
    """v * Hv summed over each linear [I]; linears the model does not build get 0."""
    by_layer, left = {}, iter(products)
    for layer, module in pairs:
        product = views(module, [next(left) for _ in stored(module)])
        sums = torch.stack([product[q].double().sum((1, 2)) for q in layer.projections], dim=1)
        by_layer[layer.layer] = sums.flatten().cpu().numpy()
    zero = {x.layer: np.zeros(x.experts * len(x.projections)) for x in scene.spec.layers}
    return np.concatenate([by_layer.get(n, zero[n]) for n in zero])


def weighted_mean(samples_SI: np.ndarray, weight_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of samples weighted by their tokens, and its standard error (infinite for a single sample)."""
    share_S = weight_S / weight_S.sum()
    mean_I = share_S @ samples_SI
    if len(share_S) < 2:
        return mean_I, np.full_like(mean_I, np.inf)
    effective = 1 / float((share_S**2).sum())
    variance_I = share_S @ (samples_SI - mean_I) ** 2 * effective / (effective - 1)
    return mean_I, np.sqrt(variance_I / effective)

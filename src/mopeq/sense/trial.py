"""Maps tried before one is taken: the true loss, KL(original || quantized), of the matrices that sensing quantized.

Costs are to second order, without terms between matrices, and, where data is little, of matrices that were fitted to
the very tokens they are measured on: a map may promise much there and lose to one width for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mopeq.nouns import LinearId, MoELayer, PrecisionMap
from mopeq.progress import progress
from mopeq.quant import QUANTIZERS
from mopeq.rundir import CANDIDATES
from mopeq.seam import weights
from mopeq.sense.labels import predicting, predicting_logits
from mopeq.sense.quadratic import chosen_candidates
from mopeq.sense.scene import Batch, Scene, walk
from mopeq.tables import pick
from mopeq.tensors import QWeight
from mopeq.walk.walking import Walk

HELD = 1 << 27  # of the original's log probabilities held: positions times vocabulary
Matrices = Iterator[tuple[str, int, Tensor]]  # projection, expert, [out, in]


@dataclass(frozen=True)
class Trial:
    """The true losses of a map and of one width for all (KL, nats a position, the mean of text and pictures), and the
    standard error of their difference: by rows, as the positions of one tell much the same. `tokens` were shown;
    `fresh`: neither was made from them."""

    map_kl: float
    uniform_kl: float
    error: float
    tokens: int
    fresh: bool


def trial(
    scene: Scene, map_: PrecisionMap, uniform: PrecisionMap, batches: Sequence[Batch], fresh: bool
) -> Trial | None:
    """None where the candidates were not kept, or the model's experts cannot be replaced in place."""
    kept = all(scene.kept.has(f"{CANDIDATES}{layer.layer}") for layer in scene.spec.layers)
    anew = scene.parts is not None and not QUANTIZERS[scene.quantizer].needs_data  # a walk did not keep them
    if scene.spec.adapted or not (kept or anew):
        return None
    found = []
    with progress("allocate: trial", 3, "passes") as p, walk(scene) as walking:
        # first: in memory the maps' matrices replace the original's
        said = shown(walking, batches, None, lambda number, said_SV: said_SV)
        p.step()
        for tried in (map_, uniform):
            change = partial(put, scene, chosen if kept else quantized, tried)
            found.append(shown(walking, batches, change, partial(row_means, batches, said)))
            p.step()
    return Trial(*compared(batches, *found), sum(b["input_ids"].numel() for b in batches), fresh)


def shown(
    walking: Walk,
    batches: Sequence[Batch],
    change: Callable[[MoELayer, Any], None] | None,
    take: Callable[[int, Tensor], Tensor],
) -> list[Tensor]:
    """Of each batch `take(number, log probabilities [S, V])` at some of its predicting positions, the layers changed
    before they run."""
    found: dict[int, Tensor] = {}

    def look(number: int, batch: Batch) -> None:
        logits_SV = predicting_logits(walking.model, batch, walking.device)
        some_SV = logits_SV[held(len(logits_SV), logits_SV.shape[1], len(batches))]
        found[number] = take(number, some_SV.log_softmax(-1))

    with torch.no_grad():
        for visit in walking.forward([partial(look, number, batch) for number, batch in enumerate(batches)]):
            if change is not None:
                for layer, module in visit.layers:
                    change(layer, module)
            visit.run()
    return [found[number] for number in range(len(batches))]


def put(
    scene: Scene,
    matrices: Callable[[Scene, MoELayer, Any, PrecisionMap], Matrices],
    map_: PrecisionMap,
    layer: MoELayer,
    module: Any,
) -> None:
    """Replace a layer's experts by those of a map."""
    own = weights(module)
    for p, e, w_NC in matrices(scene, layer, module, map_):
        own[p][e].copy_(w_NC)


def chosen(scene: Scene, layer: MoELayer, module: Any, map_: PrecisionMap) -> Matrices:
    """What sensing kept."""
    found = chosen_candidates(scene.kept, layer, map_, scene.formats)
    if found is None:
        return
    for i, parts in found[0].items():
        yield i.projection, i.expert, QWeight.unpack(parts, map_[i], *layer.shapes[i.projection]).dequantize()


def quantized(scene: Scene, layer: MoELayer, module: Any, map_: PrecisionMap) -> Matrices:
    """What a quantizer makes that needs no data, of the original's weights."""
    quantize = pick(QUANTIZERS, scene.quantizer, "quantization method")
    for p, w_ENC in weights(module).items():
        for e in range(layer.experts):
            fmt = map_[LinearId(layer.layer, e, p)]
            yield p, e, quantize(w_ENC[e].float(), fmt, seed=scene.seed).dequantize()


def held(positions: int, vocabulary: int, batches: int) -> slice:
    """Every so many of a batch's positions, so that all batches' fit in what is held."""
    most = max(1, HELD // (batches * vocabulary))
    return slice(None, None, max(1, -(-positions // most)))


def row_means(batches: Sequence[Batch], said: Sequence[Tensor], number: int, other_SV: Tensor) -> Tensor:
    """The mean KL over the positions of each row of a batch that has some."""
    row_S, said_SV = predicting(batches[number]).nonzero()[:, 0], said[number]
    row_S = row_S[held(len(row_S), said_SV.shape[1], len(batches))].to(said_SV.device)
    kl_S = (said_SV.exp() * (said_SV - other_SV)).sum(-1).double()
    _, which_S, counts = row_S.unique(return_inverse=True, return_counts=True)
    return kl_S.new_zeros(len(counts)).index_add_(0, which_S, kl_S) / counts


def compared(batches: Sequence[Batch], first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[float, float, float]:
    """Means over rows, of text and of pictures, and the mean of these; the standard error of their difference."""
    image = ["image_mask" in batch for batch in batches]
    kinds = [
        [
            torch.cat([rows for rows, is_image in zip(each, image, strict=True) if is_image == kind])
            for each in (first, second)
        ]
        for kind in sorted(set(image))
    ]
    # of one row nothing is known: as much as both tell
    apart = [float((a - b).var() / len(a) if len(a) > 1 else (a + b).square().mean()) for a, b in kinds]
    means = [sum(float(kind[i].mean()) for kind in kinds) / len(kinds) for i in (0, 1)]
    return means[0], means[1], sum(apart) ** 0.5 / len(kinds)

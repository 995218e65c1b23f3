"""What a sensor is given, how it shows data to the model, and what it gives back when it knows scores alone."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mopeq.data.encode import model_inputs, no_padding
from mopeq.kernels.dense import quick_linears
from mopeq.nouns import Format, MoESpec, Sensitivity
from mopeq.rundir import Kept
from mopeq.seam import Seen
from mopeq.walk.parts import Parts, resident
from mopeq.walk.shelf import return_freed, shelf
from mopeq.walk.walking import Run, Walk

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Scene:
    """A checkpoint, the formats in question, and for those who need it a model, calibration batches, a quantizer.

    `model(attention)` loads the model (float32 on CPU); `batches` are encoded calibration, each with `image_mask`
    where pictures are in it; `fitted` is what quantizers see of it, where that is not what they are judged by (what was
    fitted to data errs less on it than elsewhere). `scope` is "model" or "layer", for scores that are scaled before
    they are combined. `quantizer` is a row's name in QUANTIZERS. Where the model is not to be in memory whole,
    `parts(exact, attention)` gives it layer by layer, and activations beyond `memory_bytes` wait in `scratch`. `kept`
    has what an earlier run did.
    """

    folder: Path
    spec: MoESpec
    formats: tuple[Format, ...]
    seed: int = 0
    scope: str = "model"
    model: Callable[[str | None], Any] | None = None
    batches: tuple[Batch, ...] = ()
    fitted: tuple[Batch, ...] | None = None
    data_digest: str = ""
    quantizer: str = "rtn"
    memory_bytes: int = 1 << 32
    parts: Callable[[bool, str | None], Parts] | None = None
    scratch: Path | None = None
    kept: Kept = field(default_factory=Kept)


@contextmanager
def walk(scene: Scene, exact: bool = True, attention: str | None = None) -> Iterator[Walk]:
    """The scene's model, to show batches to. exact: experts' weights in float32, else perhaps in the source's dtype.
    `attention` as `load_model` takes it."""
    gc.freeze()  # what is there by now, libraries above all, is not looked through again and again
    try:
        with quick_linears():
            if scene.parts is not None:
                with shelf(scene.scratch, scene.memory_bytes) as kept:
                    yield Walk(scene.parts(exact, attention), kept)
                return
            assert scene.model is not None
            model = scene.model(attention)
            return_freed()  # loading leaves holes
            model.requires_grad_(False)
            yield Walk(resident(model, scene.spec))
    finally:
        gc.unfreeze()


def shows(walking: Walk, batches: Sequence[Batch]) -> list[Run]:
    """Runs that show each batch to the model, for those who watch; what it answers is dropped."""

    return [partial(show, walking, batch) for batch in batches]


def show(walking: Walk, batch: Batch) -> None:
    """Show a batch to the model for those who watch its layers; its head does no more than it must."""
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(walking.model.forward).parameters else {}
    walking.model(**model_inputs(batch, walking.device), **few, use_cache=False)


def real_rows(batch: Batch, device: Any) -> Callable[[Seen], Tensor | None]:
    """Of what an expert saw of a batch: which rows [S] are no padding; None where all are."""
    valid_T = no_padding(batch).flatten()
    if valid_T.all():
        return lambda seen: None
    valid_T = valid_T.to(device)
    return lambda seen: valid_T[seen.tokens]


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

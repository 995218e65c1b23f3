"""Sensitivity of the true loss under the real quantizer, to second order (docs/methods.md).

With dW = Q_f(W) - W of the real quantizer, x a matrix's inputs and g the loss's gradient at its outputs:

    fisher      1/2 sum_t (g_t^T dW x_t)^2 / tokens          labels sampled from the model at every position
    fisher-seq  1/2 sum_rows (sum_t g_t^T dW x_t)^2 / tokens
    error       sum_t weight_t^2 |dW x_t|^2 / tokens         no gradients

One forward and one backward pass serve every expert, projection and format at once. With labels sampled
from the model, E[g g^T] is the Fisher information, which is the Hessian of KL(original || changed) at the original.

Text and pictures: sums are kept apart by row (a row with pictures counts as image) and divided by that modality's own
number of predicting positions; where both were shown, the cost is the mean of the two, so that a caption's few tokens
weigh as much as a page of text. What is left out: terms between different matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mopeq.alloc.halves import regret
from mopeq.nouns import Format, LinearId, MoELayer, PrecisionMap, Sensitivity
from mopeq.progress import Progress, progress
from mopeq.quant import QUANTIZERS
from mopeq.quant.descent import slices
from mopeq.rundir import CANDIDATES, Kept
from mopeq.seam import Seen, plain_forward, shown, watch, weights
from mopeq.sense.forms import loss_increases, output_errors
from mopeq.sense.frequency import Counts, token_facts
from mopeq.sense.labels import predicting, sampled_loss, skip_draws
from mopeq.sense.moments import Adding, Moments
from mopeq.sense.scene import Batch, Scene, real_rows, shows, walk
from mopeq.stream import naming
from mopeq.tables import pick
from mopeq.tensors import QWeight
from mopeq.walk.walking import Run, Visit, Walk

CHUNK = 1 << 23  # weights quantized at a time
SETTLED = 0.015  # of the predicted loss, that maps of halves may lose (docs/accuracy.md)


def fisher(scene: Scene) -> Sensitivity:
    return sense(scene, "fisher")


def fisher_seq(scene: Scene) -> Sensitivity:
    return sense(scene, "fisher-seq")


def error(scene: Scene) -> Sensitivity:
    return sense(scene, "error")


@dataclass
class Sums:
    """Running sums over batches of one modality, for means and their standard errors: s is a batch's sum, n its
    predicting positions."""

    s: np.ndarray
    ss: np.ndarray
    sn: np.ndarray
    n: float = 0.0
    nn: float = 0.0

    def add(self, s: np.ndarray, n: float) -> None:
        self.s += s
        self.ss += s * s
        self.sn += s * n
        self.n += n
        self.nn += n * n

    def mean(self) -> np.ndarray:
        return self.s / self.n

    def variance(self) -> np.ndarray:
        """Of the mean, by linearisation of the ratio sum(s) / sum(n)."""
        mean = self.mean()
        return np.maximum(self.ss - 2 * mean * self.sn + mean**2 * self.nn, 0) / self.n**2


class Taker:
    """Watches the layers of a visit and takes each batch's quadratic forms: {(batch, layer, projection): [E, F]}."""

    def __init__(self, kind: str, scene: Scene, walking: Walk):
        self.kind, self.scene, self.walking = kind, scene, walking
        self.counts = Counts(scene, walking.model, lambda: walking.now)
        self.counted: dict[int, dict[str, Tensor]] = {}  # by batch
        self.counting = True
        self.done: set[int] = set()  # batches whose forms are there, or are others' to take
        self.layer_of: dict[int, MoELayer] = {}  # by id of the experts module
        self.candidates: dict[tuple[int, str], list[QWeight]] = {}  # per format
        self.found: dict[tuple[int, int, str], Tensor] = {}

    def count_batch(self) -> dict[str, Tensor]:
        """What was counted of the batch that moved last, also added to what is known of it."""
        counts = self.counts.take()
        before = self.counted.get(self.walking.now)
        self.counted[self.walking.now] = {k: v if before is None else v + before[k] for k, v in counts.items()}
        return counts

    def __call__(self, module: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        if self.counting:
            self.counts.see(module, index_TK, weight_TK)
        layer = self.layer_of.get(id(module))
        if layer is None:
            return plain_forward(module, x_TH, index_TK, weight_TK)
        if self.kind != "error":
            x_TH.requires_grad_(True)  # so that the first layer's matrices have gradients; the weights need none
        now, batch = self.walking.now, self.scene.batches[self.walking.now]
        real, rows = real_rows(batch, x_TH.device), batch["input_ids"].shape[0]
        row_length = x_TH.shape[0] // rows
        w = weights(module)
        for p in layer.projections:
            shape = (layer.experts, len(self.scene.formats))
            self.found[now, layer.layer, p] = torch.zeros(shape, dtype=torch.float64, device=x_TH.device)

        def see(seen: Seen) -> None:
            keep = real(seen)
            row_S = shown(seen.tokens, keep) // row_length
            for p, y in seen.outputs.items():
                x = shown(seen.inputs[p], keep)
                w_NC, found = w[p].detach()[seen.expert], self.found[now, layer.layer, p][seen.expert]
                candidates = [q[seen.expert] for q in self.candidates[layer.layer, p]]
                if self.kind == "error":
                    found += output_errors(candidates, w_NC, x, shown(seen.weight, keep))
                    continue

                row = row_S if self.kind == "fisher-seq" else None
                take = partial(loss_increases, candidates, w_NC, x, row, rows)
                y.register_hook(partial(add_taken, found, take, keep))  # runs in the backward pass

        return plain_forward(module, x_TH, index_TK, weight_TK, see)


def add_taken(found_F: Tensor, take: Callable[[Tensor], Tensor], keep_S: Tensor | None, g_SN: Tensor) -> None:
    """Hook of a projection's outputs, called with their gradient."""
    found_F += take(shown(g_SN, keep_S))


def sense(scene: Scene, kind: str) -> Sensitivity:
    with walk(scene, exact=kind != "error") as walking:
        taker = Taker(kind, scene, walking)
        used = (take_in_memory if walking.whole else take_walking)(taker)
    every = len(scene.batches)
    for number in range(used):
        taker.counts.add(taker.counted[number])
    costs = [estimate(scene, layer, taker.found, used) for layer in scene.spec.layers]
    facts = token_facts(scene, taker.counts)
    if used < every:
        seen, all_ = (sum(b["input_ids"].numel() for b in scene.batches[:n]) for n in (used, every))
        more = f"{kind} settled after {seen:,} of {all_:,} calibration tokens: maps of their halves cost within"
        facts["notes"] += (f"{more} {SETTLED:.1%} of the whole's",)
    return Sensitivity(
        kind,
        tuple(i for i, _ in scene.spec.linears),
        scene.formats,
        by_linear([c["mean"] for c in costs]),
        stderr_IF=np.sqrt(by_linear([c["variance"] for c in costs])),
        halves_HIF=halves_of(scene, costs, used),
        unit="score" if kind == "error" else "nats per token",
        data_digest=scene.data_digest,
        **facts,
    )


def take_in_memory(taker: Taker) -> int:
    """Batch by batch through the whole model, until the costs have settled; how many batches that took."""
    scene, walking = taker.scene, taker.walking
    visit = next(visits_of(taker))
    taker.layer_of = {id(module): layer for layer, module in visit.layers}
    take_up(taker)
    kept = next(n for n in range(len(scene.batches) + 1) if n not in taker.counted)  # without a gap
    if (used := settled_after(taker, kept)) is not None:
        return used
    seen: dict[int, Moments] = {}
    if unseen := to_see(scene, visit.layers):
        with progress("sense: moments", len(fitted(scene)), "batches") as p:
            seen = moments_ahead(scene, walking, visit, unseen, p.step)
    with progress("sense: candidates", candidate_weights(scene, [layer for layer, _ in visit.layers]), "weights") as p:
        taker.candidates = candidates(scene, walking, visit.layers, seen, p.step)
    taker.done = set(taker.counted)  # from here on: moments were of all batches
    with progress(f"sense: {taker.kind}", len(scene.batches), "batches") as p, watch(walking.model, taker):
        for number, _ in enumerate(visit.each()):
            if number not in taker.counted:
                keep(taker)
            p.step(1)
            if number >= kept and number + 1 in stops(len(scene.batches)) and settled(scene, taker.found, number + 1):
                return number + 1
    raise AssertionError("all batches are always enough")


def take_walking(taker: Taker) -> int:
    """All batches layer by layer, and how many were enough: each layer comes once, so settling saves nothing here.

    A quantizer that must see data does so on the way forward; what it makes is kept for the way back.
    """
    scene, walking = taker.scene, taker.walking
    needs_data = QUANTIZERS[scene.quantizer].needs_data
    held: dict[tuple[int, str], list[QWeight]] = {}
    with progress(f"sense: {taker.kind}", len(scene.spec.layers), "layers") as p:
        for visit in visits_of(taker):
            taker.counting = not visit.backward
            taking = visit.backward or taker.kind == "error"
            todo = [pair for pair in visit.layers if not scene.kept.has(f"layer-{pair[0].layer}")]
            if not visit.backward if needs_data else taking:  # candidates count as half of a layer
                make = to_see(scene, todo) if needs_data else todo
                tick = partial(part_of, p, 0.5 * len(make) / max(1, candidate_weights(scene, [x for x, _ in make])))
                seen = moments_ahead(scene, walking, visit, make) if needs_data else {}
                held |= candidates(scene, walking, make, seen, tick)
                p.step((len(visit.layers) - len(make)) / 2)
            if taking:
                there = [(layer, module) for layer, module in todo if (layer.layer, layer.projections[0]) not in held]
                taker.candidates = held | kept_candidates(scene, there)
                taker.layer_of = {id(module): layer for layer, module in todo}
            with watch(walking.model, taker):
                for _ in visit.each():
                    taker.count_batch()
            if taking:
                keep_layers(taker, [layer for layer, _ in visit.layers])
                taker.candidates, taker.layer_of = {}, {}
                p.step(len(visit.layers) / 2)
            done = {layer.layer for layer, _ in visit.layers if taking or scene.kept.has(f"{CANDIDATES}{layer.layer}")}
            held = {key: ways for key, ways in held.items() if key[0] not in done}  # before the next layer comes
    used = settled_after(taker, len(scene.batches))
    assert used is not None
    return used


def keep_layers(taker: Taker, layers: Sequence[MoELayer]) -> None:
    """Have the run directory keep what all batches left of these layers, or take what it has kept of them."""
    for layer in layers:
        if (kept := taker.scene.kept.load(item := f"layer-{layer.layer}")) is None:
            forms = {f"{n}.{p}": f.cpu().numpy() for (n, at, p), f in taker.found.items() if at == layer.layer}
            taker.scene.kept.save(item, forms)
            continue
        for name, form in kept.items():
            number, _, projection = name.partition(".")
            taker.found[int(number), layer.layer, projection] = torch.from_numpy(form)


def candidate_weights(scene: Scene, layers: Sequence[MoELayer]) -> int:
    """Weights to be quantized for these layers' candidates, each format's counted."""
    return len(scene.formats) * sum(layer.params for layer in layers)


def part_of(p: Progress, share: float, amount: float) -> None:
    p.step(share * amount)


def settled_after(taker: Taker, batches: int) -> int | None:
    """The fewest of the first batches that are enough; None where more than those are wanted."""
    ends = [n for n in stops(len(taker.scene.batches)) if n <= batches]
    return next((n for n in ends if settled(taker.scene, taker.found, n)), None)


def stops(batches: int) -> list[int]:
    """After how many batches it is asked whether they were enough: 4, 8, 16, … and all."""
    return [n for n in (4 << k for k in range(40)) if n < batches] + [batches]


def settled(scene: Scene, found: Mapping[tuple[int, int, str], Tensor], used: int) -> bool:
    """Whether the first batches are as good as all: maps made from their halves cost hardly more than theirs."""
    if used == len(scene.batches):
        return True
    costs = [estimate(scene, layer, found, used) for layer in scene.spec.layers]
    if (halves_HIF := halves_of(scene, costs, used)) is None:
        return False
    bytes_IF = np.array([[fmt.nbytes(*shape) for fmt in scene.formats] for _, shape in scene.spec.linears])
    return regret(by_linear([c["mean"] for c in costs]), halves_HIF, bytes_IF) <= SETTLED


def by_linear(layers_EPF: Sequence[np.ndarray]) -> np.ndarray:
    """Layers' [E, P, F] as [I, F], in the order of the spec's linears."""
    return np.concatenate([layer.reshape(-1, layer.shape[-1]) for layer in layers_EPF])


def visits_of(taker: Taker) -> Iterator[Visit]:
    """All batches through the model, and back where gradients are asked for; those done are left out."""
    scene, walking = taker.scene, taker.walking
    generator = torch.Generator().manual_seed(scene.seed)

    def unless_done(number: int, run: Run) -> Tensor | None:
        if number not in taker.done:
            return run()
        if taker.kind != "error":
            skip_draws(generator, int(predicting(scene.batches[number]).sum()))
        return None

    runs = shows(walking, scene.batches)
    if taker.kind != "error":
        runs = [partial(sampled_loss, walking, b, generator) for b in scene.batches]
    once = [partial(unless_done, number, run) for number, run in enumerate(runs)]
    unquantized = any(not scene.kept.has(f"{CANDIDATES}{layer.layer}") for layer in scene.spec.layers)
    ahead = shows(walking, fitted(scene)) if QUANTIZERS[scene.quantizer].needs_data and unquantized else []
    if taker.kind == "error":
        return walking.forward(once, layers_only=True, ahead=ahead)
    return walking.gradients(once, ahead)


def share(scene: Scene, kind: str, layers: Sequence[int], batches: Sequence[int]) -> None:
    """A part of sensing a model in memory, for `sense` to take up: the candidates of some layers; or some batches,
    once all candidates are there."""
    with walk(scene, exact=kind != "error") as walking:
        assert walking.whole
        taker = Taker(kind, scene, walking)
        visit = next(visits_of(taker))
        if layers:
            mine = [pair for pair in visit.layers if pair[0].layer in layers]
            candidates(scene, walking, mine, moments_ahead(scene, walking, visit, to_see(scene, mine)))
        if batches:
            taker.layer_of = {id(module): layer for layer, module in visit.layers}
            seen = moments_ahead(scene, walking, visit, to_see(scene, visit.layers))
            taker.candidates = candidates(scene, walking, visit.layers, seen)
            taker.done = set(range(len(scene.batches))) - set(batches)
            with watch(walking.model, taker):
                for number, _ in enumerate(visit.each()):
                    if number in batches:
                        keep(taker)


def keep(taker: Taker) -> None:
    """Have the run directory keep what the batch that moved last left."""
    number, counts = taker.walking.now, taker.count_batch()
    forms = {f"{layer}.{p}": form for (n, layer, p), form in taker.found.items() if n == number}
    taker.scene.kept.save(f"batch-{number}", {name: t.cpu().numpy() for name, t in (counts | forms).items()})


def take_up(taker: Taker) -> None:
    """The batches that are kept: their forms and counts given to the taker."""
    for number in range(len(taker.scene.batches)):
        if (kept := taker.scene.kept.load(f"batch-{number}")) is not None:
            tensors = {name: torch.from_numpy(array) for name, array in kept.items()}
            for name in [name for name in tensors if "." in name]:
                layer, _, p = name.partition(".")
                taker.found[number, int(layer), p] = tensors.pop(name)
            taker.counted[number] = tensors


def estimate(
    scene: Scene, layer: MoELayer, found: Mapping[tuple[int, int, str], Tensor], used: int
) -> dict[str, np.ndarray]:
    """A layer's costs by the first batches: `mean` [E, P, F] and its `variance`; `halves` [2, E, P, F] the means of
    each of `by_halves`, for checking what was made from the other ([0, …] where there are none)."""
    unused = torch.zeros(layer.experts, len(scene.formats), dtype=torch.float64)  # a picture tower's, without pictures
    values = [
        torch.stack([found.get((n, layer.layer, p), unused) for p in layer.projections], 1).cpu().numpy()
        for n in range(used)
    ]
    whole = summed(scene, values, range(used))
    halves = [summed(scene, values, half) for half in by_halves(scene, used)]
    return {
        "mean": np.mean([s.mean() for s in whole], axis=0),
        "variance": np.sum([s.variance() for s in whole], axis=0) / len(whole) ** 2,
        "halves": np.array([np.mean([s.mean() for s in half], axis=0) for half in halves]).reshape(
            -1, *values[0].shape
        ),
    }


def by_halves(scene: Scene, used: int) -> list[list[int]]:
    """Every other of the first batches of each modality, and those between; nothing where one has a single batch."""
    image = ["image_mask" in batch for batch in scene.batches[:used]]
    kinds = [[n for n in range(used) if image[n] == kind] for kind in set(image)]
    return [sorted(n for kind in kinds for n in kind[h::2]) for h in (0, 1)] if min(map(len, kinds)) > 1 else []


def halves_of(scene: Scene, costs: Sequence[Mapping[str, np.ndarray]], used: int) -> np.ndarray | None:
    """All layers' costs by half of the data [2, I, F]."""
    halves = range(len(by_halves(scene, used)))
    return np.stack([by_linear([c["halves"][h] for c in costs]) for h in halves]) if halves else None


def summed(scene: Scene, values: Sequence[np.ndarray], which: Sequence[int]) -> list[Sums]:
    """Sums of some batches, a modality each."""
    sums: dict[str, Sums] = {}
    for batch, value in ((scene.batches[n], values[n]) for n in which):
        zero = np.zeros_like(value)
        kept = sums.setdefault("image" if "image_mask" in batch else "text", Sums(zero, zero.copy(), zero.copy()))
        kept.add(value, float(predicting(batch).sum()))
    return list(sums.values())


def fitted(scene: Scene) -> Sequence[Batch]:
    """What a quantizer that must see data is fitted to."""
    return scene.batches if scene.fitted is None else scene.fitted


def to_see(scene: Scene, pairs: Sequence[tuple[MoELayer, Any]]) -> list[tuple[MoELayer, Any]]:
    """Those of some layers whose quantizer must have seen the data, and has not quantized them yet."""
    if not QUANTIZERS[scene.quantizer].needs_data:
        return []
    return [(layer, module) for layer, module in pairs if not scene.kept.has(f"{CANDIDATES}{layer.layer}")]


def moments_ahead(
    scene: Scene,
    walking: Walk,
    visit: Visit,
    pairs: Sequence[tuple[MoELayer, Any]],
    step: Callable[[], None] = lambda: None,
) -> dict[int, Moments]:
    """The moments of layers of a visit, by layer number, of the batches that go ahead; `step` is told of each."""
    if walking.whole and not pairs:
        return {}
    adding = Adding(walking, fitted(scene), pairs)
    with watch(walking.model, adding):
        for _ in visit.ahead():
            step()
    return {layer.layer: adding.take(module) for layer, module in pairs}


def candidates(
    scene: Scene,
    walking: Walk,
    pairs: Sequence[tuple[MoELayer, Any]],
    seen: dict[int, Moments],
    tick: Callable[[float], None] = lambda weights: None,
) -> dict[tuple[int, str], list[QWeight]]:
    """What the real quantizer makes of some layers: {(layer, projection): one QWeight [E, …] a format}.

    `seen` are moments, let go one by one; `tick` is told how many weights have been quantized, each format's counted.
    """
    keeps = walking.whole or QUANTIZERS[scene.quantizer].needs_data  # others cost a walk less than writing and reading
    made = kept_candidates(scene, pairs) if keeps else {}
    for layer, module in pairs:
        if (layer.layer, layer.projections[0]) in made:
            tick(candidate_weights(scene, [layer]))
            continue
        moments = seen.pop(layer.layer, None)
        if moments is not None:
            moments.fill_starved()
        found = every_way(scene, layer, weights(module), moments, tick)
        made |= {(layer.layer, p): ways for p, ways in found.items()}
        tokens_E, finite = (np.zeros(0), True) if moments is None else (moments.tokens_E.numpy(), moments.finite)
        del moments  # before what is kept is packed
        spare = 2 * candidate_bytes(scene.spec.layers, scene.formats)
        if keeps and scene.kept.folder and (not walking.whole or scene.kept.room > spare):  # a walk must keep them
            packed = {(p, f): q.pack() for p, ways in found.items() for f, q in enumerate(ways)}
            arrays = {f"{p}.{f}.{k}": t.cpu().numpy() for (p, f), part in packed.items() for k, t in part.items()}
            scene.kept.save(f"{CANDIDATES}{layer.layer}", arrays | {"tokens": tokens_E, "finite": np.array(finite)})
    return made


def every_way(
    scene: Scene,
    layer: MoELayer,
    matrices: Mapping[str, Tensor],
    moments: Moments | None,
    tick: Callable[[float], None],
) -> dict[str, list[QWeight]]:
    """A layer's matrices in every format, a few experts at a time: {projection: one QWeight [E, …] a format}."""
    quantize = pick(QUANTIZERS, scene.quantizer, "quantization method")
    made: dict[str, list[QWeight]] = {}
    for p, w_ENC in matrices.items():  # room for all at once: parts that stay among others that go leave holes
        shape = (layer.experts, *layer.shapes[p])
        made[p] = [QWeight.empty(*shape, fmt, w_ENC.device) for fmt in scene.formats]
    for b in slices(layer.experts, max(1, CHUNK // max(w[0].numel() for w in matrices.values()))):
        inputs = {} if moments is None else moments.inputs(b)
        for p, w_ENC in matrices.items():
            w = w_ENC[b].float()
            if moments is not None:  # such quantizers work on inputs x outputs: turned once for all formats
                w = w.mT.contiguous().mT
            for found in made[p]:
                with naming(layer, p, range(layer.experts)[b], w):
                    found[b] = quantize(w, found.format, moments=inputs.get(p), seed=scene.seed)
                tick(w.numel())
    return made


def candidate_bytes(layers: Sequence[MoELayer], formats: Sequence[Format]) -> int:
    """Layers' candidates as they are kept: packed."""
    return sum(
        layer.experts * fmt.nbytes(*shape) for layer in layers for fmt in formats for shape in layer.shapes.values()
    )


def kept_candidates(scene: Scene, pairs: Sequence[tuple[MoELayer, Any]]) -> dict[tuple[int, str], list[QWeight]]:
    """Those that an earlier run made: the dearest part of sensing."""
    made: dict[tuple[int, str], list[QWeight]] = {}
    for layer, module in pairs:
        kept = scene.kept.load(f"{CANDIDATES}{layer.layer}")
        if kept is None:
            continue
        device = weights(module)[layer.projections[0]].device
        for p in layer.projections:
            made[layer.layer, p] = []
            for f, fmt in enumerate(scene.formats):
                parts = {k: torch.from_numpy(kept[f"{p}.{f}.{k}"]).to(device) for k in fmt.shapes(1, 1)}
                made[layer.layer, p].append(QWeight.unpack(parts, fmt, *layer.shapes[p]))
    return made


def chosen_candidates(
    kept: Kept, layer: MoELayer, map_: PrecisionMap, formats: Sequence[Format]
) -> tuple[dict[LinearId, dict[str, Tensor]], np.ndarray] | None:
    """What the quantizer made of a layer when it was sensed: of each matrix the tensors of the map's format,
    and the tokens that reached each expert [E] (none where it needs no data). None where that is not kept, or was made
    of overflowing data."""
    found = kept.load(f"{CANDIDATES}{layer.layer}")
    if found is None or not found["finite"]:
        return None
    linears = [LinearId(layer.layer, e, p) for e in range(layer.experts) for p in layer.projections]
    stems = {i: f"{i.projection}.{formats.index(map_[i])}" for i in linears}
    return {
        i: {k: torch.from_numpy(found[f"{stems[i]}.{k}"][i.expert]) for k in map_[i].shapes(1, 1)} for i in linears
    }, found["tokens"]

"""Packed layers of a job, each a file of the run directory, and the shards made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mopeq.checkpoint import read_json
from mopeq.errors import BadInput
from mopeq.job import Job, by_layers_or_whole, sense_digest, source_model
from mopeq.nouns import LinearId, MoELayer, PrecisionMap, members_by_format, parse_size
from mopeq.packed import json_bytes, write_atomic
from mopeq.progress import progress, say
from mopeq.quant import QUANTIZERS
from mopeq.rundir import CANDIDATES, Kept, RunDir, stage_digest
from mopeq.tables import pick

if TYPE_CHECKING:
    from mopeq.data.calibration import Calibration
    from mopeq.tensors import QWeight
    from mopeq.tune import Tuned

AT_A_TIME = 1 << 24  # weights that are quantized together, in float32


def quantize_layers(
    job: Job, run: RunDir, map_: PrecisionMap, calibration: Calibration | None
) -> tuple[dict[int, Path], list[str]]:
    """Every layer's experts in the map's formats, each layer a file of the run directory; notes name fallbacks."""
    o = job.options
    shown = calibration if calibration and QUANTIZERS[o.method].needs_data else None
    data = shown.digest if shown else None
    digest = stage_digest("quantize", source=job.spec.digest, method=o.method, map=map_.digest, seed=o.seed, data=data)
    files = {layer.layer: run.layer_path(digest, layer.layer) for layer in job.spec.layers}
    if done := [file for file in files.values() if file.exists()]:
        say(f"quantize: {len(done)} of {len(files)} layers taken from {run.path}")
    sensed = run.kept(sense_digest(job, calibration)) if o.tries_quantizers else Kept()
    if job.sensing_quantizes:
        take_from_sensing(job, sensed, map_, files)
    if o.ray:
        from mopeq import cluster

        cluster.quantize(job, run, map_, files, data)
    quantize_files(job, run, map_, files, calibration)
    if not o.run:  # another budget is tried with these, and made of them
        sensed.drop()
    notes = [file.with_suffix(".txt") for file in files.values()]
    return files, [note.read_text() for note in notes if note.exists()]


def take_from_sensing(job: Job, kept: Kept, map_: PrecisionMap, files: Mapping[int, Path]) -> None:
    """Write the layers that the quantizer made when they were sensed: it need not make them again."""
    from mopeq.assemble import write_layer
    from mopeq.sense.quadratic import chosen_candidates

    todo = [x for x in job.spec.layers if not files[x.layer].exists() and kept.has(f"{CANDIDATES}{x.layer}")]
    if not todo:
        return
    with progress("quantize: as sensed", sum(layer.params for layer in todo), "weights") as p:
        for layer in todo:
            if (found := chosen_candidates(kept, layer, map_, job.options.formats)) is not None:
                packed, tokens_E = found
                note_starved(files[layer.layer], layer, [e for e, n in enumerate(tokens_E.tolist()) if n == 0])
                write_layer(files[layer.layer], job.spec, job.folder, layer, packed)
            p.step(layer.params)


def note_starved(file: Path, layer: MoELayer, experts: list[int]) -> None:
    """Beside a layer's file, to outlive a pause."""
    if experts:
        said = f"layer {layer.layer}: no calibration token reached experts {experts}; tuned on the layer's mean"
        write_atomic(file.with_suffix(".txt"), said.encode())


def refuse_overflow(layer: int) -> None:
    raise BadInput(
        f"layer {layer}: what calibration sends through its experts is not finite in float32",
        "the source is damaged, or the data is; data-free: --sensitivity hessian --method rtn",
    )


def quantize_files(
    job: Job, run: RunDir, map_: PrecisionMap, files: Mapping[int, Path], calibration: Calibration | None
) -> None:
    """Make those of some layers' files that are not there."""
    if calibration is None or not QUANTIZERS[job.options.method].needs_data:
        quantize_missing(job, run, map_, files, None, None)
    elif not all(file.exists() for file in files.values()):
        by_layers_or_whole(job, lambda parts: quantize_missing(job, run, map_, files, calibration, parts))


def quantize_missing(
    job: Job, run: RunDir, map_: PrecisionMap, files: Mapping[int, Path], shown: Calibration | None, parts: Any
) -> None:
    """Make the layers whose files are not there, and beside each a note where its experts saw no data."""
    from mopeq.assemble import write_layer
    from mopeq.quant.apart import quantize_apart

    todo = [layer for layer in job.spec.layers if layer.layer in files and not files[layer.layer].exists()]
    with progress(f"quantize: {job.options.method}", sum(layer.params for layer in todo), "weights") as p:
        if shown is None:
            o = job.options
            last_first = todo[::-1]  # scores were read in the other order: what memory still caches comes first
            for layer, apart in quantize_apart(job.folder, job.spec, last_first, map_, o.method, o.seed, p.step):
                write_layer(files[layer.layer], job.spec, job.folder, layer, apart)
            return
        for layer, weights, seen in layers_with_moments(job, run, todo, shown, parts):
            if seen is not None:
                if not seen.finite:
                    refuse_overflow(layer.layer)
                note_starved(files[layer.layer], layer, seen.starved)
                seen.fill_starved()
            else:  # a head for multi-token prediction, say
                unbuilt = f"layer {layer.layer}: the model does not build it, so its experts saw no data"
                write_atomic(files[layer.layer].with_suffix(".txt"), f"{unbuilt}; rounded to nearest".encode())
            packed: dict[LinearId, dict[str, Any]] = {}
            for projection in layer.projections:
                w = weights.pop(projection)
                packed |= quantize_projection(job, map_, layer.layer, projection, w, seen)
                p.step(w.numel())
            write_layer(files[layer.layer], job.spec, job.folder, layer, packed)


def layers_with_moments(
    job: Job, run: RunDir, todo: list[MoELayer], shown: Calibration | None, parts: Any
) -> Iterator[tuple[MoELayer, dict[str, Any], Any]]:
    """(layer, {projection: weights [E, out, in]}, moments or None) of each layer, in the order they come."""
    from mopeq.stream import read_layer

    left = {layer.layer: layer for layer in todo}
    if shown is not None and todo:
        from mopeq.seam import weights
        from mopeq.sense.moments import collect, gather
        from mopeq.walk.shelf import shelf
        from mopeq.walk.walking import Walk

        label_seed = job.options.seed if QUANTIZERS[job.options.method].needs_gradients else None
        if parts is None:
            model = source_model(job, None)
            for layer, seen in collect(model, job.spec, shown.batches, job.work_memory, set(left), label_seed):
                yield left.pop(layer.layer), read_layer(job.folder, job.spec, layer), seen
        else:
            with shelf(run.scratch, job.work_memory) as kept:
                walking = Walk(parts(label_seed is not None), kept)
                for layer, module, seen in gather(walking, shown.batches, set(left), label_seed):
                    yield left.pop(layer.layer), weights(module), seen
    for layer in left.values():
        yield layer, read_layer(job.folder, job.spec, layer), None


def quantize_projection(
    job: Job, map_: PrecisionMap, layer: int, projection: str, w_ENC: Any, moments: Any
) -> dict[LinearId, dict[str, Any]]:
    """One projection of a layer's experts, those of a format together."""
    from mopeq.stream import naming

    method = pick(QUANTIZERS, job.options.method, "quantization method")
    by_format = members_by_format(map_, job.spec.layer(layer), projection)
    packed: dict[LinearId, dict[str, Any]] = {}
    size = max(1, AT_A_TIME // (w_ENC.shape[1] * w_ENC.shape[2]))
    parts = [(f, all_[at : at + size]) for f, all_ in by_format.items() for at in range(0, len(all_), size)]
    for fmt, members in parts:
        m = None if moments is None else moments.of(projection)[members]
        g = moments.gradients[projection][members] if moments is not None and moments.gradients else None
        w = w_ENC[members].float()
        w = w if m is None else w.to(m.device)
        with naming(job.spec.layer(layer), projection, members, w):
            made = method(w, fmt, moments=m, gradients=g, seed=job.options.seed)
        packed |= by_expert(layer, projection, members, made)
    return dict(sorted(packed.items()))


def by_expert(layer: int, projection: str, members: list[int], q: QWeight) -> dict[LinearId, dict[str, Any]]:
    """The stored tensors of each expert of a batch."""
    parts = {k: v.cpu() for k, v in q.pack().items()}
    return {LinearId(layer, e, projection): {k: v[i] for k, v in parts.items()} for i, e in enumerate(members)}


def tune_layers(
    job: Job, run: RunDir, map_: PrecisionMap, files: dict[int, Path], calibration: Calibration | None
) -> tuple[dict[int, Path], list[str]]:
    """The quantized layers with their scales tuned end to end, if that was asked for; as they are where it does not
    lower the KL on held-back calibration. A note says which."""
    if job.options.tune == "none":
        return files, []
    assert calibration is not None
    made_from = {n: path.parent.name for n, path in files.items()}
    digest = stage_digest("tune", layers=made_from, data=calibration.digest)
    tuned = {n: run.layer_path(digest, n) for n in files}
    said = run.layer_path(digest, 0).parent / "tuned.json"  # written last
    if said.exists():
        say(f"tune: taken from {said.parent}")
        facts = read_json(said)
    else:
        found = tune_files(job, map_, files, tuned, calibration)
        facts = {"before": found.before, "after": found.after}
        write_atomic(said, json_bytes(facts))
    better = facts["after"] < facts["before"]
    note = f"scales tuned end to end: KL on held-back calibration {facts['before']:.4g} -> {facts['after']:.4g}"
    return (tuned, [note]) if better else (files, [f"{note}, so they are left as they were"])


def tune_files(
    job: Job, map_: PrecisionMap, files: Mapping[int, Path], tuned: Mapping[int, Path], calibration: Calibration
) -> Tuned:
    from mopeq.assemble import read_layer_file, write_layer
    from mopeq.tensors import Pieces
    from mopeq.tune import hold_back, tune_scales

    pieces: Pieces = {}
    for layer in job.spec.layers:
        pieces |= read_layer_file(files[layer.layer], layer, map_)
    with progress("tune: scales", len(hold_back(calibration.batches)[0]), "batches") as p:
        found = tune_scales(source_model(job, None), job.spec, calibration.batches, pieces, p.step)
    for layer in job.spec.layers:
        packed: dict[LinearId, dict[str, Any]] = {}
        for projection in layer.projections:
            for members, q in found.pieces[layer.layer, projection]:
                packed |= by_expert(layer.layer, projection, members, q)
        write_layer(tuned[layer.layer], job.spec, job.folder, layer, dict(sorted(packed.items())))
    return found


def write_checkpoint(job: Job, out: Path, map_: PrecisionMap, files: Mapping[int, Path]) -> int:
    """Shards and the files around them; the folder is not sealed yet. Returns the payload."""
    from mopeq.assemble import Supply, write_around, write_shards

    other = job.options.other
    supply = Supply(job.folder, job.spec, other, files)
    total = job.fixed + map_.nbytes(job.spec)
    with progress("write", total, "bytes") as p:
        digest = stage_digest("write", layers={n: path.parent.name for n, path in files.items()})
        size = parse_size(job.options.shard_size)
        payload = write_shards(out, job.spec, map_, other, supply, size, p.step, digest)
    write_around(job.folder, out, job.spec, map_, other, payload)
    return payload

"""From quantized layers to a checkpoint folder: shards, config, the files around them, and the way back.

Tensors are streamed: no more than one source tensor or one layer's part is held at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopeq.checkpoint import read_header, read_json, shard_files
from mopeq.errors import BadInput
from mopeq.families import UNNAMED
from mopeq.nouns import (
    PADDING,
    Format,
    LinearId,
    MoELayer,
    MoESpec,
    OutputTensor,
    PrecisionMap,
    TensorInfo,
    digest_of,
    members_by_format,
)
from mopeq.packed import (
    MANIFEST,
    MAP,
    RUN,
    index_json,
    is_written,
    json_bytes,
    mark_written,
    quantization_config,
    shard_names,
    split_shards,
    write_atomic,
    write_safetensors,
)
from mopeq.plan import is_packable, kept_dtype, output_tensors
from mopeq.quant.rtn import packed as rounded
from mopeq.stream import TORCH_DTYPE, read_biases, read_tensor, refuse_sick
from mopeq.tensors import Pieces, QWeight, tensor_data

AT_A_TIME = 1 << 20  # weights of a matrix dequantized at a time: what passes by stays in the caches
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def kept_tensor(folder: Path, spec: MoESpec, name: str, other: Format | None) -> Tensor:
    """A tensor that is no routed expert's, in the dtype it is written in, or packed from; BadInput if not finite."""
    info, role = spec.tensors[name], spec.roles[name]
    tensor = read_tensor(folder, info)
    if other is None or not is_packable(info, role):
        tensor = tensor.to(TORCH_DTYPE[kept_dtype(info, role)])  # first: float32's largest are infinite in bf16
    return refuse_sick(name, tensor)


class Supply:
    """Gives the bytes of each output tensor in turn, from the source or from the quantized layers."""

    def __init__(self, folder: Path, spec: MoESpec, other: Format | None, layer_files: Mapping[int, Path]):
        self.folder, self.spec, self.other = folder, spec, other
        self.packed: dict[str, Tensor] = {}  # parts of the source matrix packed last
        self.stored: dict[str, tuple[Path, TensorInfo]] = {}
        for path in layer_files.values():
            self.stored |= {name: (path, info) for name, info in read_header(path)[0].items()}

    def __call__(self, out: OutputTensor) -> memoryview | bytes:
        if not out.nbytes:
            return b""
        if out.name in self.stored:
            path, info = self.stored[out.name]
            with open(path, "rb") as file:
                file.seek(info.offset)
                return file.read(info.nbytes)
        if out.name in self.spec.tensors:
            return tensor_data(kept_tensor(self.folder, self.spec, out.name, self.other))
        if out.name == PADDING:
            return bytes(out.nbytes)
        if out.name not in self.packed:
            stem = out.name.rpartition(".")[0]
            source = f"{stem}.weight"
            assert self.other is not None and is_packable(self.spec.tensors[source], self.spec.roles[source])
            w = kept_tensor(self.folder, self.spec, source, self.other)
            try:
                self.packed = {f"{stem}.{k}": v for k, v in rounded(w, self.other).items()}
            except BadInput as problem:
                raise BadInput(f"{source}: {problem.line}", problem.hint) from None
        return tensor_data(self.packed[out.name])


def write_shards(
    out: Path,
    spec: MoESpec,
    map_: PrecisionMap,
    other: Format | None,
    supply: Supply,
    shard_bytes: int,
    step: Any,
    made_from: str,
) -> int:
    """Write all shards and their index; returns the payload. `step(nbytes)` is told of progress. Shards that another
    run wrote from the same layers (their digest is `made_from`) are left as they are."""
    shards = split_shards(output_tensors(spec, map_, other), shard_bytes)
    names = shard_names(len(shards))
    for stale in (*out.glob("model*.safetensors"), *out.glob("model.safetensors.index.json")):
        if stale.name not in names:
            stale.unlink()

    def give(tensor: OutputTensor) -> memoryview | bytes:
        step(tensor.nbytes)
        return supply(tensor)

    for name, shard in zip(names, shards, strict=True):
        digest = digest_of([made_from, other.name if other else None, [[t.name, t.dtype, t.shape] for t in shard]])
        if is_written(out, name, digest):
            step(sum(t.nbytes for t in shard))
        else:
            write_safetensors(out / name, shard, give)
            mark_written(out, name, digest)
    if len(shards) > 1:
        write_atomic(out / "model.safetensors.index.json", json_bytes(index_json(shards)))
    return sum(t.nbytes for shard in shards for t in shard)


def write_layer(
    path: Path, spec: MoESpec, folder: Path, layer: MoELayer, weights: dict[LinearId, dict[str, Tensor]]
) -> None:
    """One quantized layer with its biases, under the final names, as the run directory keeps it."""
    biases = read_biases(folder, spec, layer)
    named: dict[str, Tensor] = {}
    for linear, parts in weights.items():
        stem = f"{layer.prefix}.{linear.expert}.{linear.projection}_proj"
        named |= {f"{stem}.{suffix}": tensor for suffix, tensor in parts.items()}
        if linear.projection in biases:
            named[f"{stem}.bias"] = biases[linear.projection][linear.expert]
    dtypes = {dtype: name for name, dtype in TORCH_DTYPE.items()}
    outputs = [OutputTensor(name, dtypes[t.dtype], tuple(t.shape)) for name, t in named.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, outputs, lambda o: tensor_data(named[o.name]))


def read_layer_file(path: Path, layer: MoELayer, map_: PrecisionMap) -> Pieces:
    """What `write_layer` wrote."""
    header = read_header(path)[0]
    found: Pieces = {}
    for p in layer.projections:
        pieces = found[layer.layer, p] = []
        for fmt, members in members_by_format(map_, layer, p).items():
            stems = [f"{layer.prefix}.{e}.{p}_proj" for e in members]
            parts = {
                k: torch.stack([read_tensor(path.parent, header[f"{stem}.{k}"]) for stem in stems])
                for k in fmt.shapes(*layer.shapes[p])
            }
            pieces.append((members, QWeight.unpack(parts, fmt, *layer.shapes[p])))
    return found


def write_around(
    source: Path, out: Path, spec: MoESpec, map_: PrecisionMap, other: Format | None, payload: int
) -> None:
    """config.json, the precision map, and every small file of the source but code and weights."""
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.name.startswith(".") or path.suffix == ".py" or path.name.endswith(WEIGHTS):
            continue
        if path.name.endswith(".index.json") or path.name in ("config.json", "README.md", MANIFEST, MAP, RUN):
            continue
        body = read_json(path) if path.suffix == ".json" else None
        if isinstance(body, dict) and "auto_map" in body:
            write_atomic(out / path.name, json_bytes({k: v for k, v in body.items() if k != "auto_map"}))
        else:
            shutil.copyfile(path, out / path.name)
    config = {k: v for k, v in spec.config.items() if k != "auto_map"}
    if not config.get("architectures") and config["model_type"] in UNNAMED:
        config["architectures"] = [UNNAMED[config["model_type"]]]
    config["quantization_config"] = quantization_config(map_, other.name if other else None, spec.nbytes, payload)
    write_atomic(out / "config.json", json_bytes(config))
    write_atomic(out / "precision_map.json", json_bytes(map_.to_json()))


# ------------------------------------------------------------------------------------------- the way back


class PackedReader:
    """Reads a packed folder's tensors one by one and dequantizes them: the slow, obvious way, for checks and export."""

    def __init__(self, out: Path):
        self.out = out
        self.tensors: dict[str, TensorInfo] = {}
        for path in shard_files(out):
            self.tensors |= read_header(path)[0]

    def read(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise BadInput(f"{name} is missing from {self.out}", "the checkpoint is damaged; make it again")
        return read_tensor(self.out, self.tensors[name])

    def qweight(self, stem: str, fmt: Format, shape: tuple[int, int]) -> QWeight:
        return QWeight.unpack({k: self.read(f"{stem}.{k}") for k in fmt.shapes(*shape)}, fmt, *shape)


def dense_tensors(out: Path, spec: MoESpec, map_: PrecisionMap, other: Format | None) -> Iterator[tuple[str, Tensor]]:
    """The source's tensors, by the source's names and layout, with the values that the packed folder holds (float32
    where they were packed)."""
    reader = PackedReader(out)
    for name in spec.tensors:
        if spec.roles[name] != "routed expert":
            yield name, dense_tensor(reader, spec, other, name)
    for layer in spec.layers:
        yield from dense_layer(reader, spec, layer, map_)


def dense_tensor(reader: PackedReader, spec: MoESpec, other: Format | None, name: str) -> Tensor:
    """One of the source's tensors that are no routed experts."""
    info = spec.tensors[name]
    if other is not None and is_packable(info, spec.roles[name]):
        q = reader.qweight(name.removesuffix(".weight"), other, (info.shape[0], info.shape[1]))
        value, step = torch.empty(info.shape), max(1, AT_A_TIME // info.shape[1])
        for at in range(0, info.shape[0], step):
            value[at : at + step] = q[at : at + step].dequantize()
        return value
    assert reader.tensors[name].dtype == kept_dtype(info, spec.roles[name])
    return reader.read(name)


def dense_layer(
    reader: PackedReader, spec: MoESpec, layer: MoELayer, map_: PrecisionMap, only: str | None = None
) -> Iterator[tuple[str, Tensor]]:
    """One layer's experts and biases (or but the tensor `only`), put back into the source's layout."""
    whole: dict[str, Tensor] = {}
    for is_bias, places in ((False, layer.places), (True, layer.bias_places)):
        for p, place in places.items():
            for e in range(layer.experts):
                if only is not None and place.name(e) != only:
                    continue
                stem = f"{layer.prefix}.{e}.{p}_proj"
                if is_bias:
                    value = reader.read(f"{stem}.bias")
                else:
                    value = reader.qweight(stem, map_[LinearId(layer.layer, e, p)], layer.shapes[p]).dequantize()
                if place.per_expert:
                    yield place.name(e), value.T.contiguous() if place.transposed else value
                    continue
                info = spec.tensors[place.tensor]
                stored = whole.setdefault(place.tensor, torch.empty(info.shape, dtype=value.dtype))
                target = (stored.unflatten(0, (layer.experts, -1)) if place.flat else stored)[e]
                target = target.T if place.transposed else target
                target[place.part(target.shape[0])] = value
    yield from whole.items()

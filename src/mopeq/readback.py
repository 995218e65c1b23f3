"""Read the finished folder back and compare: exit 0 with a broken model is the commonest fault of this field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mopeq.assemble import PackedReader, dense_layer, dense_tensor, dense_tensors
from mopeq.checkpoint import shard_files
from mopeq.errors import MopeqError, first_line
from mopeq.models import load_config, load_model, logits_of, model_class, quiet_transformers
from mopeq.nouns import Format, MoESpec, PrecisionMap
from mopeq.packed import unsealed_allowed
from mopeq.progress import say
from mopeq.seam import model_layers
from mopeq.stream import read_tensor
from mopeq.walk.parts import CannotWalk, Parts, empty_model
from mopeq.walk.walking import Walk

TOKENS = 16
TOLERANCE = 1e-3  # of the logits' spread, float32: widths, names or layouts gone wrong miss it by far


def some_tokens(config: Any, seed: int) -> Tensor:
    """A row of random token ids without special ones, which may stand for pictures."""
    text = config.get_text_config()
    special = {v for c in (config, text) for k, v in vars(c).items() if k.endswith("_id") and isinstance(v, int)}
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(min(text.vocab_size, 30000), generator=generator)
    return torch.tensor([i for i in ids.tolist() if i not in special][:TOKENS])[None]


def load_dense(source: Path, out: Path, spec: MoESpec, map_: PrecisionMap, other: Format | None) -> Any:
    """The source's model with the packed folder's values put in its own tensors, loaded by transformers' own path."""
    quiet_transformers()
    config = load_config(source)
    state = dict(dense_tensors(out, spec, map_, other))
    model, info = model_class(config).from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
    )
    if info["missing_keys"]:
        raise MopeqError(
            f"{source}: {sorted(map(str, info['missing_keys']))[0]} is missing", "please report this model"
        )
    return model.eval()


def dense_parts(source: Path, out: Path, spec: MoESpec, map_: PrecisionMap, other: Format | None) -> Parts:
    """As `load_dense`, one layer at a time."""
    reader = PackedReader(out)
    layer_of = {
        place.name(e): layer
        for layer in spec.layers
        for place in (*layer.places.values(), *layer.bias_places.values())
        for e in range(layer.experts)
    }

    def read(name: str) -> Tensor:
        if name in layer_of:
            return next(value for _, value in dense_layer(reader, spec, layer_of[name], map_, name))
        return dense_tensor(reader, spec, other, name)

    model = empty_model(load_config(source), torch.float32)
    return Parts(model, model_layers(spec, model), spec.tensors, read)


def packed_parts(out: Path) -> Parts:
    """The packed folder's model, one layer at a time, by the modules and the code that serve it."""
    from mopeq.plugins.hf import MopeqConfig, MopeqQuantizer

    config = load_config(out)
    fields = config.quantization_config
    quantizer = MopeqQuantizer(fields if isinstance(fields, MopeqConfig) else MopeqConfig.from_dict(fields))
    model = empty_model(config, torch.float32)
    quantizer.preprocess_model(model=model, dtype=torch.float32, checkpoint_files=[str(f) for f in shard_files(out)])
    experts = tuple(f"{prefix}." for prefix in quantizer.prefixes.values())
    names = [name for name in quantizer.tensors if not name.startswith(experts)]
    return Parts(model, (), names, lambda name: read_tensor(out, quantizer.tensors[name]), quantizer=quantizer)


def walked_logits(parts: Parts, ids: Tensor) -> Tensor:
    found: list[Tensor] = []
    for visit in Walk(parts).forward([lambda: found.append(logits_of(parts.model, ids).double())]):
        visit.run()
    return found[0]


def read_back(
    source: Path, out: Path, spec: MoESpec, map_: PrecisionMap, other: Format | None, seed: int, loads: bool
) -> float:
    """Largest logit difference between the packed model and the dequantized reference, relative to the logits'
    spread. MopeqError if it exceeds TOLERANCE or is not finite.

    `loads`: there is memory to load the packed model as its users will, by plain `from_pretrained`. Else, and for the
    reference, one layer's weights are in memory at a time, where the model can be walked.
    """
    ids = some_tokens(load_config(source), seed)
    try:
        with unsealed_allowed():
            found = loaded_logits(out, ids) if loads else walked_logits(packed_parts(out), ids)
        wanted = walked_logits(dense_parts(source, out, spec, map_, other), ids)
    except CannotWalk as problem:
        say(f"read back: with the whole model in memory, since {problem.why}")
        with unsealed_allowed(), torch.no_grad():
            found = loaded_logits(out, ids)
            wanted = logits_of(load_dense(source, out, spec, map_, other), ids).double()
    return compare_logits(found, wanted)


@torch.no_grad()
def loaded_logits(out: Path, ids: Tensor) -> Tensor:
    try:
        model = load_model(out, torch.float32, "cpu")
    except MopeqError:
        raise
    except Exception as problem:  # transformers raises whatever its loader raises
        raise MopeqError(
            f"the packed checkpoint does not load: {first_line(problem)}",
            "it was not sealed; try --other-bits 16, and please report this model",
        ) from None
    return logits_of(model, ids).double()


def compare_logits(found: Tensor, wanted: Tensor) -> float:
    spread = float(wanted.std())
    worst = float((found - wanted).abs().max()) / max(spread, 1e-30)
    if not torch.isfinite(found).all() or not worst <= TOLERANCE:
        raise MopeqError(
            f"the packed model's logits differ from the dequantized reference by {worst:.2g} of their spread",
            "the checkpoint was not sealed and will not load; please report this model",
        )
    return worst

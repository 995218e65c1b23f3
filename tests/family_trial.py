"""One MoE family tried from end to end: a tiny model of it, packed at 2, 3 and 4 bits mixed, against a dense reference.

The reference is the family's own model, loaded by transformers from its official tensor names, where each routed
expert's values were read off the packed files by a bit loop written here. tests/equivalence/test_every_family.py and
tools/try_families.py run it.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tiny_families
import torch
from made import payload, stored
from safetensors import safe_open

from mopeq.checkpoint import open_checkpoint
from mopeq.families import ADAPTERS
from mopeq.families.standard import read_spec
from mopeq.nouns import Format, LinearId, MoESpec, make_map
from mopeq.progress import silence
from mopeq.seam import plain_forward, watch

WIDTHS = (2, 3, 4)
TOLERANCE = 1e-4  # of the logits' spread, in float32


@dataclass(frozen=True)
class Trial:
    """What came of it. Differences are of the logits, relative to their spread in the reference."""

    family: str
    model_class: str
    model_type: str
    adapter: str  # the experts class that a row of ADAPTERS serves, or ""
    modules: int  # packed experts modules
    text: float
    watched: float  # the original's own logits when its experts are watched and computed one by one
    picture: float | None  # None: the family takes no pictures
    moved: float  # how far the packed model's logits lie from the original's: that packing is seen at all
    predicted_bytes: int
    bytes_weights: int


def try_family(family: str, room: Path) -> Trial:
    """Make, pack, load and compare one family below `room`; AssertionError or mopeq's own error where it fails."""
    from made import quantize

    source, out = room / family, room / f"{family}-packed"
    tiny_families.model_of(family).to(torch.bfloat16).save_pretrained(source)
    spec = read_spec(open_checkpoint(source))
    linears = [linear for linear, _ in spec.linears]
    bits = [WIDTHS[i % 3] for i in range(len(linears))]
    random.Random(family).shuffle(bits)
    chosen = dict(zip(linears, bits, strict=True))
    map_file = room / f"{family}-map.json"
    map_file.write_text(json.dumps(make_map(spec, [Format(b) for b in bits]).to_json()))
    with silence():
        facts = quantize(source, out, map=map_file)
    assert sorted(facts["counts"]) == ["2g64a", "3g64a", "4g64a"], facts["counts"]
    assert facts["predicted_bytes"] == facts["bytes_weights"] == payload(out)

    model_class = tiny_families.classes(family)[1]
    packed = load(model_class, out)
    original = load(model_class, source)
    state = read_all(source) | {n: t for n, t in read_all(out).items() if n in spec.tensors}
    reference = load(
        model_class, None, config=original.config, state_dict=state | dequantized(source, out, spec, chosen)
    )
    packed.save_pretrained(room / f"{family}-again")
    assert stored(room / f"{family}-again") == stored(out), "saved again, the tensors differ"
    modules = sum(type(m).__name__ == "QuantizedExperts" for m in packed.modules())
    assert modules == len(spec.layers), f"{modules} packed modules for {len(spec.layers)} layers of experts"

    text = tiny_families.text_inputs(original)
    wanted = logits(reference, text)
    shown = tiny_families.picture_inputs(original)
    return Trial(
        family,
        model_class.__name__,
        spec.model_type,
        next((type(m).__name__ for m in original.modules() if type(m).__name__ in ADAPTERS), ""),
        modules,
        difference(logits(packed, text), wanted),
        watched(original, text),
        None if shown is None else difference(logits(packed, shown), logits(reference, shown)),
        difference(logits(original, text), wanted),
        facts["predicted_bytes"],
        facts["bytes_weights"],
    )


def other_bits(family: str, room: Path) -> None:
    """Pack every other matrix too, at 8 bits (mopeq compares logits before it is done), and load it with transformers.
    Raises where either fails."""
    from made import quantize

    source = room / f"{family}-other"
    tiny_families.model_of(family).to(torch.bfloat16).save_pretrained(source)
    with silence():
        quantize(source, room / f"{family}-other-packed", other_bits=8)
    load(tiny_families.classes(family)[1], room / f"{family}-other-packed")


def load(model_class: Any, folder: Path | None, **more: Any) -> Any:
    """By transformers alone; every tensor must be there."""
    model, info = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **more)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    return model.eval()


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = tiny_families.speaker(model)(**inputs, use_cache=False).logits.double()
    assert bool(torch.isfinite(found).all())
    return found


def watched(model: Any, inputs: dict[str, Any]) -> float:
    """How far watching its experts, as the sensitivities do, moves a model's logits."""
    seen: set[int] = set()

    def see(module: Any, x_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        seen.add(id(module))
        return plain_forward(module, x_TH, index_TK, weight_TK)

    before = logits(model, inputs)
    with watch(model, see):
        after = logits(model, inputs)
    assert seen, "no experts module was seen"
    return difference(after, before)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.std())


# ----------------------------------------------------------------------------------- read off the packed files


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            found |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return found


def values(stored: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Rows of bytes as a little-endian bit stream each -> [rows, count] whole numbers."""
    stream = np.unpackbits(stored, axis=1, bitorder="little")[:, : count * bits].reshape(len(stored), count, bits)
    return (stream.astype(np.int64) << np.arange(bits)).sum(-1)


def dequantized(source: Path, out: Path, spec: MoESpec, chosen: dict[LinearId, int]) -> dict[str, torch.Tensor]:
    """The source's routed tensors, by their names and in their layout, with the packed folder's values.

    Each must resemble the tensor it replaces: two layouts that were both read wrongly would otherwise agree.
    """
    before, packed = read_all(source), read_all(out)
    after = {}
    for layer in spec.layers:
        for p, place in layer.places.items():
            for e in range(layer.experts):
                stem, (n, c) = f"{layer.prefix}.{e}.{p}_proj", layer.shapes[p]
                bits = chosen[LinearId(layer.layer, e, p)]
                codes = values(packed[f"{stem}.qweight"].numpy(), bits, c)
                zeros = values(packed[f"{stem}.zeros"].numpy(), bits, n).T.repeat(64, 1)[:, :c]
                scales = packed[f"{stem}.scales"].numpy().astype(np.float64).repeat(64, 1)[:, :c]
                w = torch.from_numpy((codes - zeros) * scales).float()
                w = w.T if place.transposed else w
                name = place.name(e)
                if place.per_expert:
                    after[name] = w.contiguous()
                    continue
                whole = after.setdefault(name, torch.full(before[name].shape, torch.nan))
                mine = (whole.unflatten(0, (layer.experts, -1)) if place.flat else whole)[e]
                rows = mine.T if place.transposed else mine
                rows[place.part(rows.shape[0])] = w.T if place.transposed else w
    for name, w in after.items():
        alike = float(torch.corrcoef(torch.stack([w.flatten(), before[name].float().flatten()]))[0, 1])
        assert alike > 0.85, f"{name} resembles the source's by {alike:.2f} only"
    return after

"""What making a checkpoint takes in memory, told from headers and options: whether `--max-memory` can be met, and how.

Estimates, on the high side; `bench/large.py` measures them. The unit is bytes.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mopeq.families.standard import TOP_K_KEYS, config_counts
from mopeq.nouns import Format, MoELayer, MoESpec, PackedTensor
from mopeq.plan import other_outputs
from mopeq.quant import QUANTIZERS, moment_bytes
from mopeq.sense import SENSORS

if TYPE_CHECKING:
    from mopeq.options import Options

PROCESS = 450 << 20  # Python, torch and transformers
PASSING = 1 << 30  # what a batch needs on its way through a layer, and steps in between
# numbers of a batch's token that a layer's graph holds: by expert chosen, of its width and its inner width, and of its
# width besides (1 to 10 were measured)
ROUTED, UNROUTED = (2, 5), 12
MANY = 8  # experts that a token is sent to, where a config does not say
AROUND = 1 << 29  # what steps in between need beside a graph
STACKED = 6.2  # bytes of a layer's weight that loading takes beside, where experts lie apart; 6.2 were measured
BENT = 700  # the same for second derivatives, by token and channel of a batch; 590 were measured
# times a batch's logits for a loss's gradients (2.2 were measured), and for its second derivatives (3.5)
FIRST, SECOND = 2.3, 3.6
SHOWN = 2048  # tokens of a batch of text
PARAMETER = 5  # what one of a part takes while the part runs in float32; 6.3 and what is stored were measured
# times their hidden states that waiting tokens take beside borders: before a head (4.0 to 4.5 were measured), before a
# layer (2.0 to 2.5), and pictures', of which a vision tower's states and features wait too
WAITING, PASSED, SEEING = 4.5, 2.5, 8.0
HELD = 3.3  # times a layer's packed experts, while they are stored and put in order; 2.9 was measured
FEW = 8  # experts of a layer that are compared when it is read back, more where that many do not hold all its formats
SHARE = 0.9  # of the memory that is free, where --max-memory says nothing


def available_memory() -> int:
    """Bytes of memory the system says are available now."""
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 1 << 62  # elsewhere the system itself must say no


def allowed_bytes(options: Options) -> int:
    return int(SHARE * available_memory()) if options.memory_bytes is None else options.memory_bytes


def stored_bytes(spec: MoESpec, layer: MoELayer) -> int:
    """A layer's routed experts as the source stores them."""
    places = {place.name(e) for place in layer.places.values() for e in range(layer.experts)}
    return sum(spec.tensors[name].nbytes for name in places)


def shown_bytes(layers: list[MoELayer], options: Options) -> int:
    """What a sensor and a calibrated quantizer hold of some layers beside their weights: candidates (a byte a weight
    and format), moments."""
    candidates = moments = 0
    if options.tries_quantizers:
        candidates = len(options.formats) * sum(layer.params for layer in layers)
    if QUANTIZERS[options.method].needs_data:
        moments = sum(moment_bytes(layer, QUANTIZERS[options.method].needs_gradients) for layer in layers)
    return candidates + moments


def shelf_bytes(spec: MoESpec, tokens: int, ahead: int, back: bool, probes: int = 0) -> int:
    """What a walk's tokens leave in memory or on disk while they wait: hidden states before a part; where they come
    `back`, those of every decoder layer. `ahead`: tokens that only go as far as the last MoE layer. `probes`: tokens
    come once for each, and with every layer's states wait their speeds."""
    tokens *= max(1, probes)
    width = 4 * max(layer.shapes["up"][1] for layer in spec.layers)
    stems = {part_of(layer.prefix).rpartition(".")[0] for layer in spec.layers}
    borders = sum(part.rpartition(".")[0] in stems for part in other_parts(spec)[0]) if back else 0
    waiting = max(WAITING * tokens, PASSED * (tokens + ahead))
    if "vision tower" in spec.roles.values():
        waiting = SEEING * (tokens + ahead)
    kept = max(0, borders - 1) + (borders if probes else 0)
    return int(width * (tokens * kept + waiting))


def bent_bytes(layer: MoELayer, options: Options) -> int:
    """What a batch needs on its way through a layer for second derivatives, where a sensor asks for them."""
    if not (options.senses and SENSORS[options.sensitivity].probes):
        return 0
    return BENT * layer.shapes["up"][1] * min(options.calib_tokens, SHOWN)


def graph_bytes(spec: MoESpec, layer: MoELayer, options: Options) -> int:
    """What a batch's graph holds of a layer for a loss's gradients, where a sensor asks for them."""
    if not (options.senses and SENSORS[options.sensitivity].needs_gradients):
        return 0
    inner, width = layer.shapes["up"]
    chosen = next((k for _, k in config_counts(spec.config, TOP_K_KEYS) if k > 0), MANY)
    routed = chosen * (ROUTED[0] * width + ROUTED[1] * inner)
    return 4 * min(options.calib_tokens, SHOWN) * (routed + UNROUTED * width)


def whole_bytes(spec: MoESpec, options: Options) -> int:
    """With the whole model in float32: what is fastest to show data to."""
    tuned = 12 * spec.expert_params if options.tune != "none" else 0  # originals, packed values and gradients beside
    graph = sum(max(bent_bytes(layer, options), graph_bytes(spec, layer, options)) for layer in spec.layers)
    shown = graph + logits_bytes(spec, options) + shown_bytes(list(spec.layers), options)
    at_work = PASSING + max(tuned, shown)
    apart = (layer for layer in spec.layers if any(place.per_expert for place in layer.places.values()))
    stacked = max((STACKED * layer.params for layer in apart), default=0)
    loading = spec.nbytes + int(stacked)  # its files are mapped
    return PROCESS + 4 * spec.params + max(loading, at_work)


def loaded_bytes(spec: MoESpec, expert_bytes: int, other: Format | None) -> int:
    """A finished checkpoint loaded to be compared: what is packed as it is stored, all else in float32; what lies
    outside the experts comes from mapped files."""
    outputs = other_outputs(spec, other)
    others = sum(t.nbytes + (t.nbytes if t.dtype == "U8" else 4 * math.prod(t.shape)) for t in outputs)
    return PROCESS + PASSING + expert_bytes + others


def layer_bytes(spec: MoESpec, options: Options, walked: bool = True) -> int:
    """One layer at a time, or another part of the model: a walk holds a decoder layer, an embedding or a head. Not
    `walked`: beside steps that show data to the whole model."""
    parts, resident = other_parts(spec)
    biggest = max((PARAMETER * count + largest for count, largest in parts.values()), default=0)
    if options.senses and SENSORS[options.sensitivity].needs_gradients and walked:
        biggest = max(biggest, head_bytes(spec, options))
    for layer in spec.layers:
        beside = PARAMETER * parts.get(part_of(layer.prefix), (0, 0))[0]
        steps = [read_back_bytes(spec, layer, options), packing_bytes(spec, layer, options)]
        if options.needs_data and walked:
            passing = max(PASSING, bent_bytes(layer, options), AROUND + graph_bytes(spec, layer, options))
            steps.append(passing + 4 * layer.params + shown_bytes([layer], options))
        biggest = max(biggest, beside + max(steps))
    return PROCESS + resident + biggest


def head_bytes(spec: MoESpec, options: Options) -> int:
    """A head that turns a batch into logits, and these into a loss that a sensor differentiates."""
    heads = [t.count for name, t in spec.tensors.items() if spec.roles[name] == "embedding" and len(t.shape) == 2]
    return PARAMETER * max(heads, default=0) + logits_bytes(spec, options)


def logits_bytes(spec: MoESpec, options: Options) -> int:
    """A batch's logits, their loss and its gradients."""
    held = 4 * min(options.calib_tokens, SHOWN) * (SECOND if SENSORS[options.sensitivity].probes else FIRST)
    words = (t.shape[0] for name, t in spec.tensors.items() if spec.roles[name] == "embedding" and len(t.shape) == 2)
    return int(held * max(words, default=0))


def other_parts(spec: MoESpec) -> tuple[dict[str, tuple[int, int]], int]:
    """({part: (parameters outside routed experts, bytes of its largest tensor)}, bytes of what no part holds).

    A part is what has a number, `model.layers.3`, or an embedding or head by itself; the rest is resident, in float32.
    """
    parts: dict[str, tuple[int, int]] = {}
    resident = 0
    for name, tensor in spec.tensors.items():
        if spec.roles[name] == "routed expert":
            continue
        if (key := part_of(name)) == name and spec.roles[name] != "embedding":
            resident += 4 * tensor.count
            continue
        count, largest = parts.get(key, (0, 0))
        parts[key] = count + tensor.count, max(largest, tensor.nbytes)
    return parts, resident


def part_of(name: str) -> str:
    """`model.layers.3.mlp.experts` -> `model.layers.3`; a name without a number is its own part."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else name


def widest_bytes(layer: MoELayer, options: Options) -> int:
    """A layer's routed experts, packed as wide as the options allow (a given map may take any width)."""
    formats = options.formats if options.map is None else (Format(8, min(options.groups)),)
    return layer.experts * sum(max(f.nbytes(*shape) for f in formats) for shape in layer.shapes.values())


def packing_bytes(spec: MoESpec, layer: MoELayer, options: Options) -> int:
    """A layer's packed experts and, where their stored bytes do not lie apart, all of them read."""
    infos = (spec.tensors[place.name(0)] for place in layer.places.values() if not place.per_expert)
    together = any(isinstance(info, PackedTensor) for info in infos)
    read = stored_bytes(spec, layer) + 2 * layer.params if together else 0
    return read + widest_bytes(layer, options)


def read_back_bytes(spec: MoESpec, layer: MoELayer, options: Options) -> int:
    """A layer's packed experts, stored and put in order, and a few (readback.py) in float32: these twice, and a third
    more, while they are put into the source's layout. All of them where their module has an adapter."""
    formats = len(options.formats) if options.map is None else 8
    few = layer.experts if spec.adapted else min(layer.experts, max(FEW, len(layer.shapes) * formats))
    return 10 * layer.params * few // layer.experts + int(HELD * widest_bytes(layer, options))

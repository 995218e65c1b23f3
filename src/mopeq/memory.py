"""What making a checkpoint takes in memory, told from headers and options: whether `--max-memory` can be met, and how.

Estimates, on the high side; `bench/large.py` measures them. The unit is bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mopeq.nouns import MoELayer, MoESpec
from mopeq.quant import QUANTIZERS, moment_bytes
from mopeq.sense import SENSORS

if TYPE_CHECKING:
    from mopeq.options import Options

PROCESS = 450 << 20  # Python, torch and transformers
PASSING = 1 << 30  # what a batch needs on its way through a layer, and steps in between
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
    if options.senses and SENSORS[options.sensitivity].by_method:
        candidates = len(options.formats) * sum(layer.params for layer in layers)
    if QUANTIZERS[options.method].needs_data:
        moments = sum(moment_bytes(layer, QUANTIZERS[options.method].needs_gradients) for layer in layers)
    return candidates + moments


def whole_bytes(spec: MoESpec, options: Options) -> int:
    """With the whole model in float32: what is fastest to show data to."""
    tuned = 12 * spec.expert_params if options.tune != "none" else 0  # originals, packed values and gradients beside
    return PROCESS + PASSING + 4 * spec.params + max(tuned, shown_bytes(list(spec.layers), options))


def loaded_bytes(spec: MoESpec, expert_bytes: int) -> int:
    """A finished checkpoint loaded to be compared: its experts packed, all else in float32."""
    return PROCESS + PASSING + expert_bytes + 4 * (spec.params - spec.expert_params)


def layer_bytes(spec: MoESpec, options: Options) -> int:
    """One layer at a time. Its dequantized weights in float32 are held twice, and a third more, while a finished
    checkpoint is read back and put into the source's layout."""
    biggest = 0
    for layer in spec.layers:
        steps = [stored_bytes(spec, layer) + 2 * layer.params, 10 * layer.params]
        if options.needs_data:
            steps.append(PASSING + 4 * layer.params + shown_bytes([layer], options))
        biggest = max(biggest, *steps)
    return PROCESS + biggest

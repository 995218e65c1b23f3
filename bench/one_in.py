"""The loss of changing single experts, measured: each of a sample stored alone in the narrowest format.

    python bench/one_in.py OUT --data eval.tsv --experts 48

For each sampled expert of OUT's source the KL to the original over the data; written to OUT/.mopeq/one_in.json, from
which `mopeq report OUT` tells how well each sensitivity ranks them. The sample is stratified: the same number a layer.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mopeq.checkpoint import read_json
from mopeq.data.processor import load_processor
from mopeq.data.readers import builtin, read
from mopeq.evaluate.compare import Logits, compare
from mopeq.models import load_model, pick_device
from mopeq.nouns import MoESpec
from mopeq.packed import RUN, json_bytes, write_atomic
from mopeq.progress import progress, say
from mopeq.quant.rtn import quantize
from mopeq.seam import model_layers, weights
from mopeq.verbs.evaluate import by_task, logits_of, rows
from mopeq.verbs.map import job_of


def measure(out: Path, data: list[Path], experts: int, limit: int, window: int, seed: int, on: str) -> dict[str, Any]:
    """The sample's losses, as they are written."""
    started, job = time.monotonic(), job_of(read_json(out / RUN), None, None)
    fmt = min(job.options.formats, key=lambda f: (f.bits, -f.group_size))
    model = load_model(job.folder, torch.float32, pick_device(on))
    processor = load_processor(job.folder)
    items = [item for path in data for item in read(path)] if data else builtin()
    asked = by_task([item for item in items if item.text is None and item.answer is not None], None, limit)
    shown = rows(items, processor, model.config, window, limit, asked)
    run = logits_of(model)
    with torch.no_grad():
        before = [run(batch).cpu() for batch in shown]
    found, modules = [], {layer.layer: module for layer, module in model_layers(job.spec, model)}
    chosen = sample(job.spec, experts, seed)
    with progress("one in", len(chosen), "experts") as p:
        for layer, e in chosen:
            kept = {}
            with torch.no_grad():
                for name, w_ENC in weights(modules[layer]).items():
                    kept[name] = w_ENC[e].clone()
                    w_ENC[e] = quantize(w_ENC[e : e + 1].float(), fmt).dequantize()[0]
                measured = compare(shown, in_turn(before), run)
                for name, w_ENC in weights(modules[layer]).items():
                    w_ENC[e] = kept[name]
            found.append({"layer": layer, "expert": e, "kl": measured.all.kl})
            p.step(1)
    return {
        "source_digest": job.spec.digest,
        "format": fmt.name,
        "data": [path.name for path in data],
        "tokens": measured.all.tokens,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "rows": found,
    }


def in_turn(logits: list[torch.Tensor]) -> Logits:
    """The logits kept, batch by batch."""
    left = iter(logits)
    return lambda _: next(left)


def sample(spec: MoESpec, experts: int, seed: int) -> list[tuple[int, int]]:
    """About `experts` of them, as many of each layer, without repeats."""
    rng, each = np.random.RandomState(seed), max(1, experts // len(spec.layers))
    return [
        (layer.layer, int(e))
        for layer in spec.layers
        for e in sorted(rng.permutation(layer.experts)[: min(each, layer.experts)])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a packed checkpoint whose source is where it was")
    parser.add_argument(
        "--data", type=Path, action="append", default=[], help=".jsonl, .tsv, .txt; built-in text if none"
    )
    parser.add_argument("--experts", type=int, default=48)
    parser.add_argument("--limit", type=int, default=8, help="windows of text, and items of a task")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    a = parser.parse_args()
    body = measure(a.out, a.data, a.experts, a.limit, a.window, a.seed, a.device)
    write_atomic(a.out / ".mopeq" / "one_in.json", json_bytes(body))
    losses = [row["kl"] for row in body["rows"]]
    say(f"{len(losses)} experts at {body['format']}: KL {min(losses):.2e} to {max(losses):.2e}, in {body['seconds']} s")


if __name__ == "__main__":
    main()

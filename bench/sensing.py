"""What the gradient passes of sensing cost a calibration token, against a training step of the same model, by turns.

    python bench/sensing.py --model MODEL --calib text.jsonl --batches 4

A training step is forward, backward to every parameter, no optimizer. Candidates' quantization is told apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from mopeq.data.calibration import calibrate_with
from mopeq.data.encode import model_inputs
from mopeq.job import open_job
from mopeq.models import load_config, load_model, pick_device
from mopeq.options import Options
from mopeq.sense import quadratic
from mopeq.sense.scene import Scene


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", action="append", default=[])
    parser.add_argument("--batches", type=int, default=4, help="of 8 windows")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--quantizer", default="gptq")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    job, device = open_job(args.model, Options()), pick_device(args.device)
    shown = calibrate_with(job.folder, load_config(job.folder), args.calib, args.batches * 8 * 256, 0)
    rows = shown.batches[: args.batches]
    tokens = sum(batch["input_ids"].numel() for batch in rows)
    model = load_model(job.folder, torch.float32, device)
    made: dict[Any, Any] = {}
    apart = [0.0]
    quantize = quadratic.candidates

    def candidates(*given: Any) -> Any:
        started = time.monotonic()
        if not made:
            made.update(quantize(*given))
        apart[0] += time.monotonic() - started
        return dict(made)

    quadratic.candidates = candidates
    scene = Scene(
        job.folder, job.spec, Options().formats, model=lambda _: model, batches=rows, quantizer=args.quantizer
    )
    steps, passes = [], []
    for turn in range(args.turns + 1):  # the first warms up, and makes the candidates
        model.requires_grad_(True)
        started = time.monotonic()
        for batch in rows:
            ids = batch["input_ids"].to(device)
            logits = model(**model_inputs(batch, device), use_cache=False).logits[:, :-1].flatten(0, 1)
            torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:].flatten()).backward()
            model.zero_grad()
        steps.append((time.monotonic() - started) / tokens)
        apart[0], started = 0.0, time.monotonic()
        quadratic.fisher(scene)
        passes.append((time.monotonic() - started - apart[0]) / tokens)
        if turn == 0:
            print(f"candidates ({args.quantizer}, {len(Options().formats)} formats): {apart[0]:.1f} s")
    ratios = [p / s for p, s in zip(passes[1:], steps[1:], strict=True)]
    print(
        f"{tokens} tokens, {torch.get_num_threads()} threads: a training step {1e6 * min(steps[1:]):.0f} us a token,"
        f" sensing {1e6 * min(passes[1:]):.0f}; ratio {statistics.median(ratios):.2f}"
        f" ({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()

"""What each way of choosing widths costs, at exactly equal bytes: sensitivities x allocators x quantizers.

    python bench/accuracy.py --model ../shared/models/bench-lm --calib ../shared/data/text_calib.jsonl \
        --eval ../shared/data/text_eval.jsonl -o results.jsonl

Every matrix is quantized once per quantizer and format; an arm then puts the dequantized values of its map into the
model (a checkpoint read back gives the same logits, which `quantize` checks) and measures it against the original.
The budget of an average is the bytes of `--per expert` at that average; every other arm is given those bytes and
spends as much of them as its shapes can. Resumable: rows already in the output are not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mopeq.data.calibration import calibrate_with
from mopeq.data.encode import batches
from mopeq.data.joining import joined
from mopeq.data.processor import load_processor
from mopeq.data.readers import read
from mopeq.evaluate.compare import compare
from mopeq.evaluate.generate import answerer
from mopeq.evaluate.tasks import run_tasks, task_places
from mopeq.models import load_config, load_model, pick_device
from mopeq.nouns import LinearId, Sensitivity
from mopeq.options import Options
from mopeq.progress import say
from mopeq.quant import QUANTIZERS
from mopeq.seam import model_layers, weights
from mopeq.sense import SENSORS
from mopeq.sense.moments import collect
from mopeq.sense.scene import Scene
from mopeq.stages import Job, open_job, solve
from mopeq.tables import pick

AVERAGES = (2.0, 2.5, 3.0, 3.5, 4.0)


def arms(average: float) -> list[tuple[str, dict[str, Any]]]:
    """(name, options) of the arms at an average of code bits."""
    scores = ("frequency", "hessian", "hutchinson", "hybrid", "error", "fisher", "fisher-seq")
    found: list[tuple[str, dict[str, Any]]] = []
    if average in (2.0, 3.0, 4.0):
        found.append(("uniform", {"allocate": "uniform"}))
    if average in (2.0, 4.0):
        return found  # every map of that budget is the uniform one
    if average != 3.0:
        found += [(f"random {seed}", {"allocate": "random", "seed": seed}) for seed in range(3)]
    found.append(("inverted hessian", {"allocate": "inverted", "sensitivity": "hessian"}))
    found += [(f"{s}, expert", {"sensitivity": s}) for s in scores]
    for s in ("fisher", "fisher-seq", "error"):
        found.append((f"{s}, projection", {"sensitivity": s, "per": "projection"}))
    found.append(("fisher, layer-projection", {"sensitivity": "fisher", "per": "layer-projection"}))
    found.append(("fisher, layer", {"sensitivity": "fisher", "per": "layer"}))
    return found


class Bench:
    """One model with everything that arms share."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = pick_device(args.device)
        self.job = open_job(args.model, Options())
        config = load_config(self.job.folder)
        self.calibration = calibrate_with(self.job.folder, config, args.calib, args.calib_tokens, args.seed)
        self.processor = load_processor(self.job.folder)
        items = [item for path in args.eval for item in read(path)]
        texts = [item for item in items if item.text is not None]
        asked = [item for item in items if item.text is None]
        self.asked = [asked[i] for of in task_places(asked).values() for i in of[: args.items]] if asked else []
        rows = [*list(batches(texts, self.processor, config, args.window))[: args.windows]]
        rows += list(batches(self.asked, self.processor, config, args.window)) if self.asked else []
        self.rows = list(joined(rows))
        self.model = load_model(self.job.folder, torch.float32, self.device)
        self.originals = {
            layer.layer: {p: w.clone() for p, w in weights(m).items()}
            for layer, m in model_layers(self.job.spec, self.model)
        }
        with torch.no_grad():
            self.logits = [self.run(batch).cpu() for batch in self.rows]
        self.sensitivities: dict[tuple[str, str], Sensitivity] = {}
        self.quantized: dict[str, dict[tuple[int, str, str], torch.Tensor]] = {}
        self.seconds: dict[str, float] = {}

    def run(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {k: v.to(self.device) for k, v in batch.items() if not k.endswith("_mask") or k == "attention_mask"}
        return self.model(**inputs, use_cache=False).logits

    def restore(self) -> None:
        with torch.no_grad():
            for layer, module in model_layers(self.job.spec, self.model):
                for p, w in weights(module).items():
                    w.copy_(self.originals[layer.layer][p])

    def sensitivity(self, name: str, method: str) -> Sensitivity:
        key = (name, method if SENSORS[name].by_method else "")
        if key not in self.sensitivities:
            shown = self.calibration
            tokens = self.args.hutchinson_tokens if name == "hutchinson" else None
            rows = shown.batches if tokens is None else first_tokens(shown.batches, tokens)
            scene = Scene(
                self.job.folder,
                self.job.spec,
                Options().formats,
                self.args.seed,
                model=lambda attention: load_model(self.job.folder, torch.float32, self.device, attention),
                batches=rows,
                data_digest=shown.digest,
                quantizer=method,
            )
            started = time.monotonic()
            self.sensitivities[key] = pick(SENSORS, name, "sensitivity")(scene)
            self.seconds[f"sense {name} {key[1]}".strip()] = round(time.monotonic() - started, 1)
        return self.sensitivities[key]

    def values(self, method: str) -> dict[tuple[int, str, str], torch.Tensor]:
        """{(layer, projection, format): dequantized [E, out, in]} by one quantizer."""
        if method not in self.quantized:
            self.restore()
            moments = {}
            if QUANTIZERS[method].needs_data:
                for layer, m in collect(self.model, self.job.spec, self.calibration.batches, 1 << 33):
                    m.fill_starved()
                    moments[layer.layer] = m
            started = time.monotonic()
            quantize = pick(QUANTIZERS, method, "quantization method")
            found = {}
            for layer, parts in self.originals.items():
                for p, w in parts.items():
                    for fmt in Options().formats:
                        m = moments[layer].of(p) if moments else None
                        found[layer, p, fmt.name] = quantize(w, fmt, moments=m, seed=self.args.seed).dequantize()
            self.seconds[f"quantize {method}, 3 formats"] = round(time.monotonic() - started, 1)
            say(f"{method}: {self.seconds[f'quantize {method}, 3 formats']} s for 3 formats")
            self.quantized[method] = found
        return self.quantized[method]

    def put(self, map_: Any, method: str) -> None:
        """Load the model's experts with a map's dequantized values."""
        values = self.values(method)
        with torch.no_grad():
            for layer, module in model_layers(self.job.spec, self.model):
                for p, w in weights(module).items():
                    for e in range(layer.experts):
                        w[e] = values[layer.layer, p, map_[LinearId(layer.layer, e, p)].name][e]

    def measure(self) -> dict[str, Any]:
        at = iter(self.logits)
        result = compare(self.rows, lambda _: next(at), self.run).to_json()
        kept = {k: result[k] for k in ("kl", "kl_median", "kl_p99", "ppl", "ppl_against", "top1_agreement", "tokens")}
        kept |= {f"kl_{name}": part["kl"] for name, part in result["by_modality"].items()}
        if self.asked and self.args.tasks:
            tasks = run_tasks(self.asked, answerer(self.model, self.processor))
            scores = {name: task["score"] for name, task in tasks.items()}
            kept |= {"accuracy": sum(scores.values()) / len(scores), "tasks": scores}
        return kept

    def arm(self, name: str, options: dict[str, Any], average: float | None, method: str) -> dict[str, Any]:
        """Solve one arm's map, put it in, measure."""
        fit = None
        if average is not None:
            fit = replace_options(self.job, avg_bits=average).predicted_bytes
        job = replace_options(self.job, **options, fit=fit)
        needs = options.get("allocate") not in ("uniform", "random")
        sensitivity = self.sensitivity(job.options.sensitivity, method) if needs else None
        map_ = solve(job, sensitivity)
        self.put(map_, method)
        code_bits = map_.code_bits(job.spec) / job.spec.expert_params
        facts = {"bytes": job.fixed + map_.nbytes(job.spec), "budget": fit, "code_bits": code_bits, "map": map_.digest}
        return {"arm": name, "average": average, "method": method} | facts | self.measure()


def replace_options(job: Job, **options: Any) -> Job:
    return Job(job.checkpoint, job.revision, job.spec, replace(job.options, **options))


def first_tokens(rows: tuple[Any, ...], tokens: int) -> tuple[Any, ...]:
    kept, seen = [], 0
    for batch in rows:
        if seen >= tokens:
            break
        kept.append(batch)
        seen += batch["input_ids"].numel()
    return tuple(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", action="append", default=[])
    parser.add_argument("--eval", action="append", required=True)
    parser.add_argument("--calib-tokens", type=int, default=65536)
    parser.add_argument("--hutchinson-tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64, help="windows of text measured")
    parser.add_argument("--items", type=int, default=40, help="items of each task measured")
    parser.add_argument("--tasks", action="store_true", help="also answer the tasks (slow)")
    parser.add_argument("--methods", default="rtn,signround,gptq")
    parser.add_argument("--averages", default=",".join(map(str, AVERAGES)))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    done = set()
    if args.output.exists():
        rows = [json.loads(line) for line in args.output.read_text().splitlines()]
        done = {(r["arm"], r["average"], r["method"]) for r in rows if "arm" in r}
    bench = Bench(args)
    with open(args.output, "a") as file:

        def keep(name: str, options: dict[str, Any], average: float | None, method: str) -> None:
            if (name, average, method) in done:
                return
            row = bench.arm(name, options, average, method)
            shown = f"KL {row['kl']:.4f}  ppl {row['ppl']:.3f}" + (
                f"  {row['accuracy']:.3f}" if "accuracy" in row else ""
            )
            say(f"{method:9} {average or 0:.1f} {name:26} {row['bytes']:>10} {row['code_bits']:.3f}  {shown}")
            file.write(json.dumps(row) + "\n")
            file.flush()

        for method in args.methods.split(","):
            for average in map(float, args.averages.split(",")):
                for name, options in arms(average):
                    keep(name, options, average, method)
            for scope in ("model", "layer"):
                for s in ("hessian", "hutchinson", "frequency"):
                    keep(f"kmeans {scope}, {s}", {"allocate": "kmeans", "scope": scope, "sensitivity": s}, None, method)
        facts = {"seconds": bench.seconds, "device": bench.device, "calibration": bench.calibration.digest}
        file.write(json.dumps(facts | {"model": Path(args.model).name, "threads": torch.get_num_threads()}) + "\n")


if __name__ == "__main__":
    main()

"""What each way of choosing widths costs, at exactly equal bytes: sensitivities x allocators x quantizers.

    python bench/accuracy.py --model bench-lm --calib text_calib.jsonl --eval text_eval.jsonl --window 256 -o lm.jsonl
    python bench/accuracy.py --table lm.jsonl --plot lm.svg

The second prints tables and, where its arms are there, what had to be reached beside what was found.
Every matrix is quantized once per quantizer and format; an arm then puts the dequantized values of its map into the
model (a checkpoint read back gives the same logits, which `quantize` checks) and measures it against the original.
The budget of an average is the bytes of `--per expert` at that average; every other arm is given those bytes and
spends as much of them as its shapes can. `--fit` has arms at any other bytes too, such as another tool took
(bench/peers.py). Each seed draws its own calibration, samples and random mix. Resumable: rows
already in the output are not made again.

Of questions the share is counted whose answer a greedy generation would give word for word: every token of the answer,
its end too, is the model's first choice after the ones before it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import torch

from mopeq.data.calibration import calibrate_with, front
from mopeq.data.encode import batches, model_inputs
from mopeq.data.joining import joined
from mopeq.data.processor import load_processor
from mopeq.data.readers import read
from mopeq.deciding import solve
from mopeq.evaluate.compare import compare
from mopeq.evaluate.tasks import task_places
from mopeq.job import Job, open_job
from mopeq.models import load_config, load_model, pick_device
from mopeq.nouns import Format, Sensitivity, members_by_format
from mopeq.options import Options
from mopeq.progress import say
from mopeq.quant import QUANTIZERS, sensed_as
from mopeq.report.charts import DASHES, Axis, scatter_frame
from mopeq.report.render import unit_of
from mopeq.report.svg import number, svg
from mopeq.seam import model_layers, weights
from mopeq.sense import SENSORS
from mopeq.sense.moments import Moments, collect
from mopeq.sense.scene import Scene
from mopeq.tables import Row, pick
from mopeq.tensors import QWeight
from mopeq.tune import tune_scales

AVERAGES = (2.0, 2.25, 2.5, 3.0, 3.5, 4.0)
KMEANS = {"allocate": "kmeans", "scope": "model", "sensitivity": "hessian"}
AS_KMEANS = "fisher, projection, kmeans' bytes"  # those of the model-wide map by hessian
PROJECTION, GROUPED = "fisher, projection", "fisher, projection, groups 64,128"
NARROW = ", widths 1 to 4"  # of an arm that may give 1 bit too
# (quantizer, arm), what it is compared with, at an average or the other's own bytes; ratio of KL at most
WANTED: tuple[tuple[tuple[str, str], tuple[str, str], float | None, str], ...] = (
    (("gptq", AS_KMEANS), ("gptq", "kmeans model, hessian"), None, "0.50"),
    (("gptq", PROJECTION), ("gptq", "random"), 2.5, "0.65"),
    (("gptq", PROJECTION), ("gptq", "uniform"), 3.0, "0.80"),
    (("gptq", PROJECTION), ("gptq", "fisher, layer-projection"), 2.5, "0.92 language, 0.80 vision-language"),
    (("gptq", "uniform"), ("plain gptq", "uniform"), 2.0, "0.70"),
    (("twosided", "uniform"), ("plain gptq", "uniform"), 2.0, "0.70"),
    (("twosided", GROUPED), ("plain gptq", "uniform"), 2.0, "0.70"),
    (("twosided+tune", GROUPED), ("plain gptq", "uniform"), 2.0, "0.70"),
)
BESIDE = {"plain gptq": Row("plain_gptq:quantize", "the baseline", needs_data=True, sensed_as="gptq")}


def arms(average: float) -> list[tuple[str, dict[str, Any]]]:
    """(name, options) of the arms at an average of code bits."""
    scores = ("frequency", "hessian", "hutchinson", "hybrid", "error", "fisher", "fisher-seq")
    found: list[tuple[str, dict[str, Any]]] = []
    if average in (2.0, 3.0, 4.0):
        found.append(("uniform", {"allocate": "uniform"}))
    ours = {"sensitivity": "fisher", "per": "projection"}
    found.append((GROUPED, ours | {"group_size": "64,128"}))
    if average < 3.0:
        found.append((PROJECTION + NARROW, ours | {"bits": "1,2,3,4"}))
        found.append((GROUPED + NARROW, ours | {"bits": "1,2,3,4", "group_size": "64,128"}))
    if average in (2.0, 4.0):
        return found  # every other map of that budget is the uniform one
    if average != 3.0:
        found.append(("random", {"allocate": "random"}))
    found.append(("inverted hessian", {"allocate": "inverted", "sensitivity": "hessian"}))
    found += [(f"{s}, expert", {"sensitivity": s}) for s in scores]
    for s in ("fisher", "fisher-seq", "error"):
        found.append((f"{s}, projection", {"sensitivity": s, "per": "projection"}))
    found.append(("fisher, layer-projection", {"sensitivity": "fisher", "per": "layer-projection"}))
    found.append(("fisher, layer", {"sensitivity": "fisher", "per": "layer"}))
    return found


class Bench:
    """One model with everything that the arms of a seed share."""

    def __init__(self, args: argparse.Namespace, seed: int):
        self.args, self.seed = args, seed
        self.device = pick_device(args.device)
        self.job = open_job(args.model, Options())
        config = load_config(self.job.folder)
        self.calibration = calibrate_with(self.job.folder, config, args.calib, args.calib_tokens, seed, judging=True)
        self.processor = load_processor(self.job.folder)
        items = [item for path in args.eval for item in read(path)]
        texts = [item for item in items if item.text is not None]
        asked = [item for item in items if item.text is None]
        rows = [*list(batches(texts, self.processor, config, args.window))[: args.windows]]
        for task, places in (task_places(asked) if asked else {}).items():
            of = batches([asked[i] for i in places[: args.items]], self.processor, config, args.window)
            rows += [row | {f"{task}_task": torch.ones(1, 1)} for row in of]
        self.rows = list(joined(rows))
        self.model = load_model(self.job.folder, torch.float32, self.device)
        self.originals = {
            layer.layer: {p: w.detach().clone() for p, w in weights(m).items()}
            for layer, m in model_layers(self.job.spec, self.model)
        }
        with torch.no_grad():
            self.logits = [self.run(batch).cpu() for batch in self.rows]
        self.sensitivities: dict[tuple[str, str, tuple[Format, ...]], Sensitivity] = {}
        self.moments: dict[bool, dict[int, Moments]] = {}  # with gradients or without, by layer
        self.quantized: dict[tuple[str, Format], dict[tuple[int, str], QWeight]] = {}
        self.seconds: dict[str, float] = {}

    def run(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {k: v for k, v in model_inputs(batch, self.device).items() if not k.endswith("_task")}
        return self.model(**inputs, use_cache=False).logits

    def restore(self) -> None:
        with torch.no_grad():
            for layer, module in model_layers(self.job.spec, self.model):
                for p, w in weights(module).items():
                    w.copy_(self.originals[layer.layer][p])

    def sensitivity(self, name: str, method: str, formats: tuple[Format, ...]) -> Sensitivity:
        method = sensed_as(method.partition("+")[0])
        key = (name, method if SENSORS[name].by_method else "", formats)
        if key not in self.sensitivities:
            shown, fits = self.calibration, SENSORS[name].by_method and QUANTIZERS[method].needs_data
            rows = list(shown.judges if fits else shown.batches)
            if name == "hutchinson":
                rows = front(iter(rows), self.args.hutchinson_tokens)
            scene = Scene(
                self.job.folder,
                self.job.spec,
                formats,
                self.seed,
                model=lambda attention: load_model(self.job.folder, torch.float32, self.device, attention),
                batches=tuple(rows),
                fitted=shown.batches,
                data_digest=shown.judged_digest if fits else shown.digest,
                quantizer=method,
            )
            started = time.monotonic()
            self.sensitivities[key] = pick(SENSORS, name, "sensitivity")(scene)
            self.seconds[f"sense {name} {key[1]} {len(formats)} formats"] = round(time.monotonic() - started, 1)
        return self.sensitivities[key]

    def seen(self, gradients: bool) -> dict[int, Moments]:
        """Each layer's moments."""
        if gradients not in self.moments:
            self.restore()
            found = self.moments[gradients] = {}
            batches, label_seed = self.calibration.batches, self.seed if gradients else None
            for layer, moments in collect(self.model, self.job.spec, batches, 1 << 33, label_seed=label_seed):
                moments.fill_starved()
                found[layer.layer] = moments
        return self.moments[gradients]

    def values(self, method: str, fmt: Format) -> dict[tuple[int, str], QWeight]:
        """{(layer, projection): matrices [E, out, in]} in a format by one quantizer."""
        if (method, fmt) not in self.quantized:
            row = QUANTIZERS[method]
            moments = self.seen(row.needs_gradients) if row.needs_data else {}
            started = time.monotonic()
            quantize = pick(QUANTIZERS, method, "quantization method")
            found = {}
            for layer, parts in self.originals.items():
                for p, w in parts.items():
                    m = moments[layer].of(p) if moments else None
                    g = moments[layer].gradients.get(p) if moments else None
                    found[layer, p] = quantize(w, fmt, moments=m, gradients=g, seed=self.seed)
            self.seconds[f"quantize {method} {fmt.name}"] = round(time.monotonic() - started, 1)
            self.quantized[method, fmt] = found
        return self.quantized[method, fmt]

    def put(self, map_: Any, method: str) -> dict[str, float]:
        """Load the model's experts with a map's values, with scales tuned where the method says so; facts of that."""
        plain, _, tuned = method.partition("+")
        pieces: dict[tuple[int, str], list[tuple[list[int], QWeight]]] = {}
        for layer in self.job.spec.layers:
            for p in layer.projections:
                by_format = members_by_format(map_, layer, p)
                pieces[layer.layer, p] = [
                    (es, self.values(plain, f)[layer.layer, p][es]) for f, es in by_format.items()
                ]
        facts = {}
        if tuned:
            self.restore()
            started = time.monotonic()
            found = tune_scales(self.model, self.job.spec, self.calibration.batches, pieces)
            pieces, facts = found.pieces, {"held_before": found.before, "held_after": found.after}
            facts["tune_seconds"] = round(time.monotonic() - started, 1)
        with torch.no_grad():
            for layer, module in model_layers(self.job.spec, self.model):
                for p, w in weights(module).items():
                    for members, q in pieces[layer.layer, p]:
                        w[members] = q.dequantize()
        return facts

    def measure(self) -> dict[str, Any]:
        with torch.no_grad():
            ours = [self.run(batch) for batch in self.rows]
        at, mine = iter(self.logits), iter(ours)
        result = compare(self.rows, lambda _: next(at), lambda _: next(mine)).to_json()
        kept = {k: result[k] for k in ("kl", "kl_median", "kl_p99", "ppl", "ppl_against", "top1_agreement", "tokens")}
        kept |= {f"kl_{name}": part["kl"] for name, part in result["by_modality"].items()}
        if tasks := answered(self.rows, ours):
            kept |= {"accuracy": sum(tasks.values()) / len(tasks), "tasks": tasks}
        return kept

    def solved(self, options: dict[str, Any], fit: int | None, method: str) -> tuple[Job, Any]:
        """(the arm's job, its map)."""
        job = replace_options(self.job, **{"seed": self.seed, "per": "expert"} | options, fit=fit)
        needs = options.get("allocate") not in ("uniform", "random")
        sensitivity = self.sensitivity(job.options.sensitivity, method, job.options.formats) if needs else None
        return job, solve(job, sensitivity)

    def bytes_of(self, options: dict[str, Any], method: str) -> int:
        job, map_ = self.solved(options, None, method)
        return int(job.fixed + map_.nbytes(job.spec))

    def arm(self, name: str, options: dict[str, Any], average: float | None, method: str) -> dict[str, Any]:
        """Solve one arm's map, put it in, measure."""
        options, asked = dict(options), {k: n for k, n in options.items() if k == "fit"}
        fit = options.pop("fit", None)
        if (other := options.pop("bytes_of", None)) is not None:
            fit = self.bytes_of(other, method)
        elif average is not None:
            fit = replace_options(self.job, avg_bits=average, per="expert").predicted_bytes
        job, map_ = self.solved(options, fit, method)
        tuning = self.put(map_, method)
        code_bits = map_.code_bits(job.spec) / job.spec.expert_params
        facts = {"bytes": job.fixed + map_.nbytes(job.spec), "budget": fit, "code_bits": code_bits, "map": map_.digest}
        row = {"arm": name, "average": average, "method": method, "seed": self.seed} | asked
        return row | facts | tuning | self.measure()


def answered(rows: list[dict[str, torch.Tensor]], logits: list[torch.Tensor]) -> dict[str, float]:
    """{task: share of items whose every answer token is the first choice}."""
    right: dict[str, list[float]] = {}
    for batch, logits_BTV in zip(rows, logits, strict=True):
        task = next((k.removesuffix("_task") for k in batch if k.endswith("_task")), None)
        if task is not None:
            said_BT = logits_BTV[:, :-1].argmax(-1).cpu() == batch["input_ids"][:, 1:]
            right.setdefault(task, []).extend((said_BT | ~batch["answer_mask"][:, 1:]).all(1).float().tolist())
    return {task: sum(r) / len(r) for task, r in right.items()}


def replace_options(job: Job, **options: Any) -> Job:
    return Job(job.checkpoint, job.revision, job.spec, replace(job.options, **options))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", type=Path, help="print the tables of this output, and measure nothing")
    parser.add_argument("--plot", type=Path, help="with --table: its picture too, bytes against KL (.svg)")
    parser.add_argument("--model")
    parser.add_argument("--calib", action="append", default=[])
    parser.add_argument("--eval", action="append", default=[])
    parser.add_argument("--calib-tokens", type=int, default=65536)
    parser.add_argument("--hutchinson-tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64, help="windows of text measured")
    parser.add_argument("--items", type=int, default=200, help="items of each task measured")
    parser.add_argument("--methods", default="rtn,signround,gptq", help="quantizers; gptq+tune: and tune its scales")
    parser.add_argument("--averages", default=",".join(map(str, AVERAGES)))
    parser.add_argument("--fit", default="", help="whole checkpoints' bytes that arms are given too, by commas")
    parser.add_argument("--only", default="", help="arms so named, or whose names contain it, by semicolons")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if args.table:
        rows = [r for r in map(json.loads, args.table.read_text().splitlines()) if "arm" in r]
        tables(rows)
        if args.plot:
            args.plot.write_text(picture(rows), encoding="utf-8")
        return
    QUANTIZERS.update(BESIDE)
    done = set()
    if args.output.exists():
        rows = [json.loads(line) for line in args.output.read_text().splitlines()]
        done = {(*place(r), r["method"], r["seed"]) for r in rows if "arm" in r}
    with open(args.output, "a") as file:
        for seed in map(int, args.seeds.split(",")):
            bench = Bench(args, seed)
            for method in args.methods.split(","):
                for average, name, options in asked_arms(args):
                    if (name, average, options.get("fit"), method, seed) not in done:
                        row = bench.arm(name, options, average, method)
                        more = f"  {row['accuracy']:.3f}" if "accuracy" in row else ""
                        say(
                            f"{seed} {method:9} {average or 0:.2f} {name:26} {row['bytes']:>10} {row['code_bits']:.3f}"
                            f"  KL {row['kl']:.4f}  ppl {row['ppl']:.3f}{more}"
                        )
                        file.write(json.dumps(row) + "\n")
                        file.flush()
            facts = {"seed": seed, "seconds": bench.seconds, "device": bench.device}
            file.write(json.dumps(facts | {"model": Path(args.model).name, "threads": torch.get_num_threads()}) + "\n")


def asked_arms(args: argparse.Namespace) -> list[tuple[float | None, str, dict[str, Any]]]:
    found: list[tuple[float | None, str, dict[str, Any]]]
    found = [(a, *arm) for a in map(float, filter(None, args.averages.split(","))) for arm in arms(a)]
    for size in map(int, filter(None, args.fit.split(","))):
        found += [(None, name, options | {"fit": size}) for name, options in arms(2.5)]
    for scope in ("model", "layer"):
        for s in ("hessian", "hutchinson", "frequency"):
            found.append((None, f"kmeans {scope}, {s}", KMEANS | {"scope": scope, "sensitivity": s}))
    found.append((None, AS_KMEANS, {"sensitivity": "fisher", "per": "projection", "bytes_of": KMEANS}))
    names, parts = {name for _, name, _ in found}, args.only.split(";")
    return [arm for arm in found if any(arm[1] == part if part in names else part in arm[1] for part in parts)]


def tables(rows: list[dict[str, Any]]) -> None:
    """Markdown of results: a table a quantizer, mean of the seeds, and the k-means maps at their own bytes."""
    for method in dict.fromkeys(r["method"] for r in rows):
        mine = [r for r in rows if r["method"] == method]
        budgets = sorted({r["average"] for r in mine if r["average"] is not None})
        small = digits(mine)
        for field, shown, places in (("kl", "KL", small), ("ppl", "perplexity", 2), ("accuracy", "accuracy", 4)):
            if not budgets or not all(field in r for r in mine):
                continue
            print(f"\n### {method}, {shown}\n\n| widths by | " + " | ".join(map(str, budgets)) + " |")
            print("|---" * (1 + len(budgets)) + "|")
            for arm in dict.fromkeys(r["arm"] for r in mine if r["average"] is not None):
                cells = [[r[field] for r in mine if (r["arm"], r["average"]) == (arm, a)] for a in budgets]
                print(f"| {arm} | " + " | ".join(spread(c, places) for c in cells) + " |")
        clustered = dict.fromkeys(place(r) for r in mine if r["average"] is None)
        if clustered:
            print(f"\n| {method}: map | bytes | code bits | KL |\n|---|---|---|---|")
        for at in clustered:
            of = [r for r in mine if place(r) == at]
            nbytes, bits, kl = mean(of, "bytes"), mean(of, "code_bits"), spread([r["kl"] for r in of], small)
            print(f"| {at[0]} | {nbytes:,.0f} | {bits:.3f} | {kl} |")
    reached(rows)


def reached(rows: list[dict[str, Any]]) -> None:
    """Markdown of what had to be reached: ratios of mean KL, and of each seed's, at equal bytes."""
    lines = []
    for (method, arm), (other, beside), average, wanted in WANTED:
        ours, theirs = (
            {r["seed"]: r["kl"] for r in rows if (r["method"], r["arm"], r["average"]) == (m, a, average)}
            for m, a in ((method, arm), (other, beside))
        )
        if seeds := sorted(ours.keys() & theirs.keys()):
            ratio = sum(ours[s] for s in seeds) / sum(theirs[s] for s in seeds)
            each = [ours[s] / theirs[s] for s in seeds]
            place = average or f"{mean([r for r in rows if r['arm'] == beside], 'code_bits'):.2f}"
            found = f"{ratio:.2f} ({min(each):.2f} to {max(each):.2f}, {len(seeds)})"
            lines.append(f"| {method}: {arm} | {other}: {beside} | {place} | {wanted} | {found} |")
    if lines:
        print(
            "\n| | against | code bits | KL's ratio at most | found (by seed, seeds) |",
            "|---|---|---|---|---|",
            sep="\n",
        )
        print(*lines, sep="\n")


STYLE = """svg{--page:#fdfcfa;--ink:#1b1e24;--soft:#5a616d;--rule:#dedbd4;--h0:#0072b2;--h1:#c24e00;--h2:#00805c;
font:12px ui-sans-serif,system-ui,"Segoe UI",Roboto,"Noto Sans","DejaVu Sans",sans-serif;fill:var(--ink)}
@media (prefers-color-scheme:dark){svg{--page:#14161a;--ink:#e6e4df;--soft:#a0a4ac;--rule:#33373f;
--h0:#6cb8f0;--h1:#f0a33a;--h2:#3fcf9f}}
.page{fill:var(--page)}.ax{fill:var(--soft);font-size:10.5px}.c{text-anchor:middle}.e{text-anchor:end}
.grid{stroke:var(--rule);fill:none}.arm{stroke-width:1.6;fill:none}.arm.flat{stroke-width:2.6}
.h0{stroke:var(--h0)}.h1{stroke:var(--h1)}.h2{stroke:var(--h2)}.flat{stroke:var(--soft)}
rect.at,circle.at{fill:var(--page);stroke-width:1.6}"""
SIZE, LEGEND, LETTER = (800, 400), 230, 6.6  # a quantizer's panel; of its width, what the names take; a letter


def picture(rows: list[dict[str, Any]]) -> str:
    """Bytes against KL (log), a panel a quantizer and a line an arm: means of the seeds, bars from least to most."""
    methods = list(dict.fromkeys(r["method"] for r in rows))
    unit = unit_of([r["bytes"] for r in rows])
    (width, height), title = SIZE, "bytes of weights against KL, a line a way of choosing widths"
    panels = [panel([r for r in rows if r["method"] == m], m, unit) for m in methods]
    body = f'<style>{STYLE}</style><rect class="page" width="100%" height="100%"/>' + "".join(
        f'<g transform="translate(0 {i * height})">{p}</g>' for i, p in enumerate(panels)
    )
    frame = f' xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height * len(panels)}"'
    return f"{svg(width, height * len(panels), body, title, 'pareto', frame)}\n"


def panel(rows: list[dict[str, Any]], method: str, unit: tuple[int, str]) -> str:
    (width, height), lines = SIZE, arm_points(rows, unit[0])
    start = width - max(LEGEND, 62 + round(LETTER * max(map(len, lines))))  # the names' column
    xs, ys = zip(*((x, y) for points in lines.values() for x, *ks in points for y in ks), strict=True)
    pad = 0.04 * (max(xs) - min(xs)) or 0.05 * max(xs)
    across = Axis(min(xs) - pad, max(xs) + pad, 64, start)
    upward = Axis(math.log10(min(ys)) - 0.08, math.log10(max(ys)) + 0.08, height - 44, 34, log=True)
    body = [f'<text x="{across.start}" y="20">{escape(method)}</text>']
    body.append(scatter_frame(across, upward, unit[1], "KL, nats per token"))
    for n, (arm, points) in enumerate(lines.items()):
        places = [(across.at(x), *(upward.at(k) for k in ks)) for x, *ks in points]
        y = 40 + 18 * n
        body.append(drawn(arm, n, places))
        body.append(drawn(arm, n, [(start + x, y, y, y) for x in (18, 42)]))
        body.append(f'<text x="{start + 54}" y="{y + 4}">{escape(arm)}</text>')
    return "".join(body)


def arm_points(rows: list[dict[str, Any]], unit: int) -> dict[str, list[tuple[float, float, float, float]]]:
    """{arm: (size, mean KL, least, most) by size}; the arms that lose most where all are measured first."""
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for arm in dict.fromkeys(r["arm"] for r in rows):
        of = [[r for r in rows if place(r) == at] for at in {place(r) for r in rows if r["arm"] == arm}]
        kls = [(mean(c, "bytes") / unit, [r["kl"] for r in c]) for c in of if c]
        found[arm] = sorted((x, sum(k) / len(k), min(k), max(k)) for x, k in kls)
    middle = [r["average"] for r in rows if r["average"] is not None and r["arm"] != "uniform"]
    most = max(sorted(set(middle)), key=middle.count, default=None)
    at = {r["arm"]: r["kl"] for r in rows if r["average"] == most}
    return dict(sorted(found.items(), key=lambda kv: -at.get(kv[0], math.inf)))


def drawn(arm: str, n: int, places: list[tuple[float, float, float, float]]) -> str:
    """The n-th arm's line, bars and marks; squares and a solid grey line for one width."""
    name, dashes = ("flat", "") if arm == "uniform" else (f"h{n % 3}", DASHES[n // 3 % len(DASHES)])
    line = "L".join(f"{number(x)} {number(y)}" for x, y, *_ in places)
    body = [f'<path class="arm {name}" stroke-dasharray="{dashes}" d="M{line}"/>']
    for x, y, low, high in places:
        body.append(f'<path class="arm {name}" d="M{number(x)} {number(low)}V{number(high)}"/>')
        box = f'<rect class="at {name}" x="{number(x - 3.5)}" y="{number(y - 3.5)}" width="7" height="7"/>'
        body.append(box if arm == "uniform" else f'<circle class="at {name}" cx="{number(x)}" cy="{number(y)}" r="3"/>')
    return "".join(body)


def place(row: dict[str, Any]) -> tuple[str, float | None, int | None]:
    """(arm, average, bytes it was given in place of one)."""
    return row["arm"], row["average"], row.get("fit")


def mean(rows: list[dict[str, Any]], field: str) -> float:
    return sum(r[field] for r in rows) / len(rows)


def digits(rows: list[dict[str, Any]]) -> int:
    """Decimal places that show two digits of the least KL, four at least."""
    return max(4, 1 - math.floor(math.log10(min(r["kl"] for r in rows) or 1)))


def spread(values: list[float], places: int) -> str:
    """The mean, and half the range where several seeds differ."""
    if not values:
        return ""
    half = (max(values) - min(values)) / 2
    return f"{sum(values) / len(values):.{places}f}" + (f" ± {half:.{places}f}" if half else "")


if __name__ == "__main__":
    main()

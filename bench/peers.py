"""Another tool's whole recipe on the same model: the same calibration tokens, experts, count of bytes and measure.

    python bench/peers.py --model bench-lm --calib text_calib.jsonl --eval text_eval.jsonl --window 256 --windows 128 \
        --recipe w2g64+sym+ext --recipe w3g64 --recipe autoscheme-2.5 --recipe gptq-w2g64 -o peers.jsonl

Needs auto-round (tried with 0.16.1), and for `gptq-` recipes GPTQModel (tried with 7.7.0). A recipe is auto-round's
SignRound at one width and group size, its AutoScheme at an average of code bits, or GPTQModel's plain GPTQ. `+sym`
stores no zero points, `+ext` turns on auto-round's extension for low widths (of use with `+sym`), `+neuqi` its search
for scales and zero points. Only the routed experts are quantized, all else keeps its 16 bits. The dequantized experts
are put into the original model and measured as bench/accuracy.py measures; bytes are what mopeq's format takes for
the same widths and groups. That the tool did what was asked is checked: no group of a matrix holds more values than
its width has codes, and nothing but experts has changed.

A vision-language model's experts are calibrated on text alone, which is auto-round's own default: the text that mopeq
is shown and, in place of the questions, that of its judges. Tried on the embedded model, rows with pictures served
auto-round worse (docs/accuracy.md). GPTQModel was not tried on such a model.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import re
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accuracy import Bench, replace_options
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad

from mopeq.data.processor import tokenizer_of
from mopeq.models import load_model
from mopeq.nouns import Format, PrecisionMap, make_map
from mopeq.progress import say
from mopeq.seam import experts_modules, model_layers, weights

WIDTHS = (2, 3, 4)  # what AutoScheme may choose from, as mopeq may
ROWS = 8  # windows in a batch, both tools' default
SCORED = 128  # windows on which AutoScheme judges widths: what it advises for 2 bits
MULTIPLE = 32  # auto-round leaves a matrix at 16 bits, unasked, whose sides are not multiples of it; GPTQModel fails


@dataclass(frozen=True)
class Made:
    """A tool's model: every parameter by name, experts dequantized, and the bits of each linear layer that has some."""

    tensors: dict[str, Tensor]
    bits: dict[str, int]


@dataclass(frozen=True)
class Recipe:
    """What is asked of the other tool: a width, or an average for which it chooses the widths."""

    tool: str
    bits: int | None
    average: float | None
    group_size: int
    symmetric: bool
    switches: dict[str, bool]

    @classmethod
    def parse(cls, name: str) -> Recipe:
        first, *more = name.split("+")
        tool, bits, average, group_size = "auto-round", None, None, 64
        if fixed := re.fullmatch(r"(gptq-)?w(\d)g(\d+)", first):
            tool, bits, group_size = "gptqmodel" if fixed[1] else tool, int(fixed[2]), int(fixed[3])
        elif chosen := re.fullmatch(r"autoscheme-(\d(?:\.\d+)?)", first):
            average = float(chosen[1])
        known = {"sym"} if tool == "gptqmodel" else {"sym", "ext", "neuqi"}
        if not (fixed or chosen) or set(more) - known:
            raise SystemExit(f"error: no recipe is called {name!r}\nhint: for example w2g64+sym+ext, autoscheme-2.5")
        switches = {"enable_alg_ext": "ext" in more, "enable_neuqi": "neuqi" in more}
        return cls(tool, bits, average, group_size, "sym" in more, {k: on for k, on in switches.items() if on})

    def format(self, bits: int) -> Format:
        return Format(bits, self.group_size, "s" if self.symmetric else "a")

    def scheme(self, bits: int) -> Any:
        from auto_round.schemes import QuantizationScheme

        return QuantizationScheme(
            bits=bits, group_size=self.group_size, sym=self.symmetric, data_type="int", act_bits=16
        )


class Peer:
    """Another tool on the model of a bench, shown the windows that mopeq is shown."""

    def __init__(self, bench: Bench, iters: int, samples: int | None):
        self.bench, self.iters = bench, iters
        shown, pictured = bench.calibration.batches, any("image_mask" in b for b in bench.calibration.batches)
        batches = (*shown, *bench.calibration.judges) if pictured else shown
        rows = [batch["input_ids"] for batch in batches if "image_mask" not in batch]
        # it drops what is shorter than the others
        self.windows_ST = torch.cat([ids for ids in rows if ids.shape[1] == rows[0].shape[1]])[:samples]
        self.kept = [name for name, module in bench.model.named_modules() if isinstance(module, nn.Linear)]

    def batches(self, tokenizer: Any, seqlen: int, dataset_name: str, seed: int, bs: int, nsamples: int) -> Any:
        """In place of the tool's own loader of named data sets, so that it sees these tokens and no others."""
        shown = self.windows_ST[:nsamples].split(bs)
        return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in shown]

    def auto_round(self, recipe: Recipe) -> tuple[Made, float]:
        """(what auto-round makes; seconds)."""
        from auto_round import AutoRound, calib_dataset
        from auto_round.auto_scheme import delta_loss

        calib_dataset.get_dataloader = delta_loss.get_dataloader = self.batches
        bench = self.bench
        model = wide_model(bench.job.folder)
        scheme = self.choosing(recipe, model) if recipe.bits is None else recipe.scheme(recipe.bits)
        started = time.monotonic()
        tuned = AutoRound(
            model,
            tokenizer_of(bench.processor),
            scheme=scheme,
            layer_config={name: {"bits": 16, "data_type": "float"} for name in self.kept},
            processor=bench.processor,
            dataset="calibration",
            iters=self.iters,
            seqlen=self.windows_ST.shape[1],
            nsamples=len(self.windows_ST),
            batch_size=ROWS,
            device_map="cpu" if bench.device == "cpu" else 0,
            seed=bench.seed,
            low_cpu_mem_usage=False,
            **recipe.switches,
        )
        model, _ = tuned.quantize()
        seconds = time.monotonic() - started
        bits = {name: module.bits for name, module in model.named_modules() if hasattr(module, "bits")}
        return Made(dict(model.named_parameters()), bits), seconds

    def gptqmodel(self, recipe: Recipe) -> tuple[Made, float]:
        """(what GPTQModel's plain GPTQ makes, read back from its file; seconds without saving and loading)."""
        cores = os.cpu_count() or 1
        os.cpu_count = lambda: max(cores, 8)  # type: ignore[method-assign]  # its pools fail where they see few cores
        from gptqmodel import GPTQModel, QuantizeConfig

        assert recipe.bits is not None
        data = [{"input_ids": ids.tolist(), "attention_mask": [1] * len(ids)} for ids in self.windows_ST]
        kept: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in self.kept}
        options = {"bits": recipe.bits, "group_size": recipe.group_size, "sym": recipe.symmetric, "dynamic": kept}
        with tempfile.TemporaryDirectory() as wide, tempfile.TemporaryDirectory() as made:
            wide_model(self.bench.job.folder).save_pretrained(wide)
            tokenizer_of(self.bench.processor).save_pretrained(wide)
            device = "cpu" if self.bench.device == "cpu" else "cuda:0"
            model = GPTQModel.load(wide, QuantizeConfig(**options), device=device)
            started = time.monotonic()
            model.quantize(data, batch_size=ROWS)
            seconds = time.monotonic() - started
            model.save(made)
            stored = {k: t for path in Path(made).glob("*.safetensors") for k, t in load_file(path).items()}
        tensors = {k: t for k, t in stored.items() if k.endswith(".weight")}
        linears = [k.removesuffix(".qweight") for k in stored if k.endswith(".qweight")]
        for name in linears:
            tensors[f"{name}.weight"] = dequantized(stored, name, recipe.bits)
        return Made(tensors, dict.fromkeys(linears, recipe.bits)), seconds

    def choosing(self, recipe: Recipe, model: Any) -> Any:
        """AutoScheme at the recipe's average, rounded up to whole layers, as its unit is the experts of a layer.

        Its own average counts every linear layer of the decoder and an untied head, those that keep their 16 bits too.
        """
        from auto_round import AutoScheme

        assert recipe.average is not None
        # AutoScheme turns it on and leaves it on; recomputed by it, tuning's compiled code met other shapes and died
        model.supports_gradient_checkpointing = False
        layers = len(self.bench.job.spec.layers)
        reached = math.ceil(recipe.average * layers) / layers
        experts = sum(w.numel() for _, module in experts_modules(model) for w in weights(module).values())
        head = model.get_output_embeddings().weight
        counted = [m.weight for m in model.get_decoder().modules() if isinstance(m, nn.Linear)]
        counted += [] if head is model.get_input_embeddings().weight else [head]
        kept = sum(w.numel() for w in counted)
        return AutoScheme(
            avg_bits=(reached * experts + 16 * kept) / (experts + kept) + 1e-4,  # its sums are in floats
            options=[recipe.scheme(bits) for bits in WIDTHS],
            ignore_scale_zp_bits=True,
            nsamples=min(SCORED, len(self.windows_ST)),
            seqlen=self.windows_ST.shape[1],
            batch_size=ROWS,
            low_gpu_mem_usage=False,
        )

    def put(self, made: Made, recipe: Recipe) -> PrecisionMap:
        """Load the bench's experts with the tool's, after the checks; the widths it gave."""
        bench, formats = self.bench, {}
        names = {id(module): name for name, module in experts_modules(bench.model)}
        with torch.no_grad():
            for layer, module in model_layers(bench.job.spec, bench.model):
                for p, w_ENC in weights(module).items():
                    for e, w_NC in enumerate(w_ENC):
                        linear = f"{names[id(module)]}.{e}.{p}_proj"
                        w_NC.copy_(leading(made.tensors[f"{linear}.weight"], w_NC))
                        fmt = recipe.format(made.bits[linear])
                        if (most := values_in_a_group(w_NC, fmt.group_size)) > fmt.max_code + 1:
                            raise SystemExit(f"error: {linear} has {most} values in a group at {fmt.bits} bits")
                        formats[layer.layer, e, p] = fmt
        for name, w in bench.model.named_parameters():
            kept = not name.startswith(tuple(names.values()))
            if kept and not torch.equal(w.cpu(), leading(made.tensors[name], w).float().cpu()):
                raise SystemExit(f"error: {name} changed, which was to keep its 16 bits")
        spec = bench.job.spec
        return make_map(spec, [formats[i.layer, i.expert, i.projection] for i, _ in spec.linears])

    def row(self, name: str) -> dict[str, Any]:
        """Quantize by a recipe, measure."""
        bench, recipe = self.bench, Recipe.parse(name)
        spec = bench.job.spec
        made, seconds = self.gptqmodel(recipe) if recipe.tool == "gptqmodel" else self.auto_round(recipe)
        map_ = self.put(made, recipe)
        widths = {
            str(layer.layer): sorted({map_[i].bits for i in map_ if i.layer == layer.layer}) for layer in spec.layers
        }
        average = recipe.average or recipe.bits
        facts = {
            "bytes": bench.job.fixed + map_.nbytes(spec),
            "expert_bytes": map_.nbytes(spec),
            "budget": replace_options(bench.job, avg_bits=average, per="expert").predicted_bytes,
            "code_bits": map_.code_bits(spec) / spec.expert_params,
            "widths": widths,
            "tokens_shown": self.windows_ST.numel(),
            "seconds": round(seconds, 1),
            "parameters_per_second": round(spec.expert_params / seconds),
            "device": bench.device,
        }
        iters = {} if recipe.tool == "gptqmodel" else {"iters": self.iters}
        tool = f"{recipe.tool} {version(recipe.tool)}"
        return {"tool": tool, "recipe": name, "seed": bench.seed} | iters | facts | bench.measure()


def wide_model(folder: Path) -> Any:
    """The checkpoint's model, the experts' inner width grown with zeros to a multiple that the tools quantize.

    It is the same function, and its groups are the same, as their ranges hold zero in any case.
    """
    model = load_model(folder, torch.bfloat16, "cpu")
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.moe_intermediate_size += -text.moe_intermediate_size % MULTIPLE
    wide = type(model)._from_config(config, dtype=torch.bfloat16).eval()
    fused = {f"{name}.gate_up_proj" for name, _ in experts_modules(model)}
    with torch.no_grad():
        for (name, w), own in zip(wide.named_parameters(), model.parameters(), strict=True):
            w.zero_()
            # gate's rows and up's lie one after the other
            for half, own_half in zip(*(t.chunk(2, 1) if name in fused else (t,) for t in (w, own)), strict=True):
                leading(half, own_half).copy_(own_half)
    return wide


def leading(big: Tensor, small: Tensor) -> Tensor:
    """The first rows, columns, … of a tensor, as many as another has."""
    return big[tuple(slice(n) for n in small.shape)]


def dequantized(stored: dict[str, Tensor], name: str, bits: int) -> Tensor:
    """One matrix [out, in] of a file in the GPTQ format: codes in streams along `in`, zeros less 1 along `out`."""
    scales_GN, group_C = stored[f"{name}.scales"].float(), stored[f"{name}.g_idx"].long()
    codes_CN = unpacked(stored[f"{name}.qweight"], bits).T
    zeros_GN = (unpacked(stored[f"{name}.qzeros"].T, bits) + 1) % 2**bits
    return (scales_GN[group_C] * (codes_CN - zeros_GN[group_C])).T


def unpacked(words_WN: Tensor, bits: int) -> Tensor:
    """[N, W * 32 / bits] codes of N little-endian bit streams in words of 32 bits."""
    bits_NB = (words_WN.T.long()[..., None] >> torch.arange(32)).bitwise_and(1).flatten(1)
    return (bits_NB.unflatten(1, (-1, bits)) << torch.arange(bits)).sum(-1)


def values_in_a_group(w_NC: Tensor, group_size: int) -> int:
    """The most distinct values that a group along C holds."""
    w_NC = pad(w_NC, (0, -w_NC.shape[1] % group_size), mode="replicate") if w_NC.shape[1] % group_size else w_NC
    sorted_NGg = w_NC.unflatten(1, (-1, group_size)).sort(-1).values
    return 1 + int((sorted_NGg.diff(dim=-1) != 0).sum(-1).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--calib", action="append", default=[])
    parser.add_argument("--eval", action="append", default=[])
    parser.add_argument("--recipe", action="append", required=True)
    parser.add_argument("--iters", type=int, default=200, help="its default; its best recipe has 1000")
    parser.add_argument("--samples", type=int, help="windows of the calibration shown (default: all)")
    parser.add_argument("--calib-tokens", type=int, default=65536)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["AR_AUTO_SCHEME_CACHE"] = cache  # scores are kept by the data's name, and here it has none
        for seed in map(int, args.seeds.split(",")):
            bench = Bench(args, seed)
            for name in args.recipe:
                bench.restore()
                row = Peer(bench, args.iters, args.samples).row(name)
                shown = f"{row['bytes']:>10} {row['code_bits']:.3f}  KL {row['kl']:.4f}  {row['seconds']} s"
                say(f"{seed} {name:20} {shown}")
                with open(args.output, "a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()

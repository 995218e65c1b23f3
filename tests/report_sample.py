"""Made-up subjects of a report: plain data, no checkpoint behind them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mopeq.nouns import PROJECTIONS, Format, LinearId, PrecisionMap, Sensitivity
from mopeq.report.explore import Explorer
from mopeq.report.facts import Missing, Part, Subject, read_evaluation, senses_of, widths_of

FORMATS = (Format(2), Format(3), Format(4))


def linears(layers: int, experts: int) -> list[LinearId]:
    return [LinearId(1 + n, e, p) for n in range(layers) for e in range(experts) for p in PROJECTIONS]


def precision_map(layers: int, experts: int, seed: int, tied: bool = False) -> PrecisionMap:
    """Random widths, layers numbered from 1; `tied`: the same for an expert's projections."""
    widths = np.random.default_rng(seed).integers(0, 3, (layers, experts, 1 if tied else 3))
    ids = linears(layers, experts)
    formats = [FORMATS[widths[i.layer - 1, i.expert, 0 if tied else PROJECTIONS.index(i.projection)]] for i in ids]
    prefixes = {1 + n: f"model.layers.{1 + n}.mlp.experts" for n in range(layers)}
    return PrecisionMap(dict(zip(ids, formats, strict=True)), prefixes)


def sensitivity(layers: int, experts: int, seed: int) -> Sensitivity:
    """Costs over six decades, tokens of two modalities; no token reached layer 2's expert 3."""
    rng = np.random.default_rng(seed)
    ids = linears(layers, experts)
    cost_IF = np.exp(rng.normal(-9, 2, (len(ids), 1))) * 4.0 ** -np.array([[2, 3, 4]])
    tokens = {name: rng.poisson(40, (layers, experts)) for name in ("text", "image")}
    for count in tokens.values():
        count[1, 3] = 0
    return Sensitivity(
        method="fisher",
        linears=tuple(ids),
        formats=FORMATS,
        cost_IF=cost_IF,
        tokens_LE=tokens["text"] + tokens["image"],
        tokens_by_modality=tokens,
        unit="nats per token",
        data_digest="0123",
    )


def evaluation(kl: float = 0.04) -> dict[str, Any]:
    """What `mopeq eval --json` prints, of text and pictures and two tasks."""

    def part(factor: float, tokens: int) -> dict[str, Any]:
        mean = kl * factor
        return {
            "kl": mean,
            "kl_median": mean / 5,
            "kl_p99": mean * 9,
            "kl_max": mean * 50,
            "kl_ci95": [mean * 0.9, mean * 1.1],
            "ppl": 10.5,
            "ppl_against": 10.0,
            "top1_agreement": 0.93,
            "tokens": tokens,
            "predicted": tokens - 1,
            "rows": 12,
        }

    tasks = {
        "chart": {"Overall": 71.5, "score": 0.715, "n": 200, "ci95": [0.649, 0.773]},
        "yesno": {"Overall": 97.0, "score": 0.97, "n": 100, "ci95": [0.915, 0.99]},
    }
    modalities = {"text": part(0.8, 6000), "image": part(1.3, 3000)}
    where = {"out": "/out", "against": "/source", "data": ["held.tsv"], "window": 2048, "limit": None}
    return part(1, 9000) | {"by_modality": modalities, "tasks": tasks} | where


def subject(
    name: str = "sample", layers: int = 3, experts: int = 8, seed: int = 0, tied: bool = False, **changes: Any
) -> Subject:
    """A subject with everything; `changes` are fields of its own."""
    widths = widths_of(precision_map(layers, experts, seed, tied))
    full = Subject(
        name=name,
        source="a-model",
        model_type="qwen3_vl_moe",
        params=5_900_000,
        expert_params=4_400_000,
        bytes_source=11_800_000,
        bytes_weights=4_600_000 + 1000 * seed,
        code_bits=2.5,
        effective_bits=2.8,
        bytes_by_bits={"2": 4_300_000, "3": 4_800_000, "4": 5_400_000},
        parts=(
            Part("routed expert", 8_800_000, 1_600_000, {"codes": 1_400_000, "scales": 180_000, "zero points": 20_000}),
            Part("attention", 3_000_000, 3_000_000),
        ),
        widths=widths,
        senses=senses_of(sensitivity(layers, experts, seed), widths, "loss to second order"),
        evaluation=read_evaluation(evaluation(0.04 / (1 + seed))),
        recipe="fisher and knapsack per projection, rtn",
        made=(("Options", (("--seed", "0"),)), ("Versions", (("mopeq", "0.1.0"),))),
        notes=("a note of the run",),
        command="mopeq quantize a-model -o sample",
        missing={},
    )
    return replace(full, **changes)


def explored(layers: int, experts: int) -> Subject:
    """A subject whose budgets can be explored, by projection, at the sizes of a 30 B model's experts."""
    shapes = {"gate": (768, 2048), "up": (768, 2048), "down": (2048, 768)}
    rng = np.random.default_rng(0)
    cost_JF = np.exp(rng.normal(-9, 1.2, (layers * experts * 3, 1))) * 4.0 ** -np.array([[2, 3, 4]])
    explorer = Explorer(
        per="projection",
        formats=FORMATS,
        layers=tuple((1 + n, f"model.layers.{1 + n}.mlp.experts", experts, shapes) for n in range(layers)),
        cost_JF=cost_JF,
        unit="nats per token",
        other={"attention": 10**9, "embedding": 6 * 10**8},
        start=16 * 10**8 + layers * experts * sum(Format(3).nbytes(*shape) for shape in shapes.values()),
        command=("mopeq quantize a-model -o NEW --fit ", " --run RUN"),
    )
    return subject(layers=layers, experts=experts, explorer=explorer)


def bare(name: str = "bare") -> Subject:
    """A checkpoint that was neither sensed nor evaluated."""
    missing = {
        "sensitivity": Missing("No sensitivity was taken.", "mopeq quantize a-model -o NEW --allocate knapsack"),
        "evaluation": Missing("It was not evaluated.", "mopeq eval bare --against a-model --data DATA"),
    }
    return subject(name, senses=None, evaluation=None, missing=missing)

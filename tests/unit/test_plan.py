"""The byte planned is the byte written: sums over one list of tensors, budgets spent to the last reachable byte.

Over synthetic headers of any odd shape; the real files are compared in tests/e2e.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from headers import checkpoint, olmoe, olmoe_config, olmoe_shapes
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from made import room, source
from warm import SOURCES

from mopeq.deciding import solve
from mopeq.errors import BadInput
from mopeq.families.standard import read_spec
from mopeq.job import Job
from mopeq.nouns import Budget, Format, LinearId, MoESpec, Sensitivity
from mopeq.options import Options
from mopeq.packed import split_shards
from mopeq.plan import (
    PER,
    fixed_bytes,
    is_packable,
    kept_dtype,
    kv_bytes_per_token,
    largest_layer_bytes,
    make_problem,
    other_format,
    output_tensors,
    target,
    uniform_bytes,
)
from mopeq.stages import forecast

SLOW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
ALLOCATORS = st.sampled_from(["knapsack", "random", "inverted"])


def job(spec: MoESpec, **options: Any) -> Job:
    return Job(checkpoint({}, {}), "", spec, Options(**options))


def scored(spec: MoESpec, formats: tuple[Format, ...], seed: int) -> Sensitivity:
    """Any costs: not convex, not even falling; raw scores beside them."""
    rng = np.random.default_rng(seed)
    linears = tuple(i for i, _ in spec.linears)
    return Sensitivity(
        "made up", linears, formats, rng.lognormal(size=(len(linears), len(formats))), rng.lognormal(size=len(linears))
    )


SPECS = st.builds(
    olmoe,
    experts=st.integers(1, 5),
    layers=st.integers(1, 3),
    hidden=st.integers(1, 70),
    inner=st.integers(1, 70),
    vocab=st.integers(1, 30),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
    tie=st.booleans(),
)
WIDTHS = st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True).map(tuple)
GROUPS = st.lists(st.sampled_from([1, 7, 16, 32, 64, 100]), min_size=1, max_size=2, unique=True).map(tuple)


# ------------------------------------------------------------------------------------------- one list of tensors


@SLOW
@given(SPECS, WIDTHS, GROUPS, st.sampled_from([4, 8, 16]), st.integers(0, 2**32 - 1))
def test_a_payload_is_the_sum_of_its_tensors(
    spec: MoESpec, bits: tuple[int, ...], groups: tuple[int, ...], other: int, seed: int
) -> None:
    """Every tensor named once; fixed bytes and experts' bytes add up, for any map at all."""
    from mopeq.nouns import make_map

    o = Options(bits=bits, group_size=groups, other_bits=other)
    rng = np.random.default_rng(seed)
    map_ = make_map(spec, [o.formats[i] for i in rng.integers(len(o.formats), size=len(spec.linears))])
    outputs = list(output_tensors(spec, map_, o.other))
    names = [t.name for t in outputs]
    assert len(names) == len(set(names))
    total = sum(t.nbytes for t in outputs)
    assert total == fixed_bytes(spec, o.other) + map_.nbytes(spec)
    by_hand = 0
    for name, t in spec.tensors.items():
        if spec.roles[name] == "routed expert":
            _, layer, expert, p = name.replace("model.layers.", "x.").replace("mlp.experts.", "").split(".")[:4]
            by_hand += map_[LinearId(int(layer), int(expert), p.removesuffix("_proj"))].nbytes(*t.shape)
        elif other < 16 and len(t.shape) == 2 and ".mlp.gate." not in name:
            by_hand += Format(other, o.groups[0]).nbytes(*t.shape)
        elif t.dtype == "F32" and len(t.shape) == 2 and ".mlp.gate." not in name:
            by_hand += t.nbytes // 2  # float32 matrices are stored as bf16
        else:
            by_hand += t.nbytes
    assert total == by_hand


@SLOW
@given(SPECS, WIDTHS, GROUPS, st.sampled_from(PER), st.floats(1, 8), ALLOCATORS, st.integers(0, 1000))
def test_average_bits_are_spent_exactly(
    spec: MoESpec, bits: tuple[int, ...], groups: tuple[int, ...], per: str, avg: float, allocate: str, seed: int
) -> None:
    """Never above the budget, and whatever the costs the same bytes: what `plan` predicts from headers."""
    j = job(spec, bits=bits, group_size=groups, per=per, avg_bits=avg, allocate=allocate, seed=seed)
    assume(avg >= min(bits))
    predicted = j.predicted_bytes
    first = solve(j, scored(spec, j.options.formats, seed))
    other = solve(j, scored(spec, j.options.formats, seed + 1))
    for map_ in (first, other):
        assert sum(t.nbytes for t in output_tensors(spec, map_, None)) == predicted
        assert map_.code_bits(spec) <= avg * spec.expert_params + 1e-6
    assert first.code_bits(spec) == other.code_bits(spec)
    tied(spec, per, first)


@SLOW
@given(
    SPECS,
    WIDTHS,
    GROUPS,
    st.sampled_from(PER),
    st.floats(0, 1),
    ALLOCATORS,
    st.sampled_from([4, 8, 16]),
    st.integers(0, 1000),
)
def test_a_size_is_spent_exactly(
    spec: MoESpec,
    bits: tuple[int, ...],
    groups: tuple[int, ...],
    per: str,
    share: float,
    allocate: str,
    other: int,
    seed: int,
) -> None:
    o = {"bits": bits, "group_size": groups, "per": per, "allocate": allocate, "other_bits": other, "seed": seed}
    widest, narrowest = (
        job(spec, **o | {"fit": size}).predicted_bytes for size in (2**60, least_bytes(job(spec, **o)))
    )
    assert widest is not None and narrowest is not None
    fit = int(narrowest + share * (widest - narrowest))
    j = job(spec, **o, fit=fit)
    predicted = j.predicted_bytes
    assert predicted is not None and narrowest <= predicted <= fit
    map_ = solve(j, scored(spec, j.options.formats, seed))
    assert sum(t.nbytes for t in output_tensors(spec, map_, j.options.other)) == predicted
    tied(spec, per, map_)


def least_bytes(j: Job) -> int:
    return j.fixed + int(j.problem.bytes_JF.min(1).sum())


def tied(spec: MoESpec, per: str, map_: Any) -> None:
    """What `--per` ties has one format."""
    keys = {
        "projection": lambda i: i,
        "gate-up": lambda i: (i.layer, i.expert, i.projection == "down"),
        "expert": lambda i: (i.layer, i.expert),
        "layer-projection": lambda i: (i.layer, i.projection),
        "layer": lambda i: i.layer,
    }[per]
    seen: dict[Any, Format] = {}
    for linear, _ in spec.linears:
        assert seen.setdefault(keys(linear), map_[linear]) == map_[linear]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 2),
    WIDTHS,
    st.sampled_from(["expert", "projection"]),
    st.floats(0, 1),
)
def test_no_larger_total_can_be_reached(
    hidden: int, inner: int, experts: int, bits: tuple[int, ...], per: str, share: float
) -> None:
    """Against brute force over every map of a small model: --fit in bytes, --avg-bits in code bits, then bytes."""
    spec = olmoe(layers=1, experts=experts, hidden=hidden, inner=inner)
    j = job(spec, bits=bits, per=per, group_size=16)
    p = j.problem
    choices = list(itertools.product(range(len(p.formats)), repeat=len(p.bytes_JF)))
    assume(len(choices) <= 5000)
    items = np.arange(len(p.bytes_JF))
    totals = [(int(p.code_JF[items, c].sum()), int(p.bytes_JF[items, c].sum())) for c in map(list, choices)]
    low, high = min(b for _, b in totals), max(b for _, b in totals)
    fit = int(low + share * (high - low)) + j.fixed
    found = target(spec, p, Budget(fit_bytes=fit), j.fixed)
    assert found.expert_bytes == max(b for _, b in totals if b + j.fixed <= fit) and found.code_bits is None
    avg = min(bits) + share * (max(bits) - min(bits))
    limit = avg * spec.expert_params + 1e-6
    found = target(spec, p, Budget(avg_bits=avg), j.fixed)
    code = max(c for c, _ in totals if c <= limit)
    assert (found.code_bits, found.expert_bytes) == (code, max(b for c, b in totals if c == code))


# --------------------------------------------------------------------------------------------------- refusals


@SLOW
@given(SPECS, WIDTHS, GROUPS, st.sampled_from([4, 8, 16]), st.floats(0, 0.999))
def test_what_cannot_be_met_names_what_can(
    spec: MoESpec, bits: tuple[int, ...], groups: tuple[int, ...], other: int, share: float
) -> None:
    """The hint's value works when followed, and one byte less does not."""
    o: dict[str, Any] = {"bits": bits, "group_size": groups, "other_bits": other}
    least = least_bytes(job(spec, **o))
    with pytest.raises(BadInput, match="cannot hold this model") as refused:
        _ = job(spec, **o, fit=int(share * least)).predicted_bytes
    hinted = refused.value.hint.removeprefix("try --fit ").split(",")[0]
    assert job(spec, **o, fit=hinted).predicted_bytes == least == int(hinted)
    with pytest.raises(BadInput):
        _ = job(spec, **o, fit=least - 1).predicted_bytes


def test_a_budget_short_by_a_little_is_told_in_bytes() -> None:
    """ "0.15 MiB cannot hold it, it takes 0.15 MiB" would help nobody."""
    least = least_bytes(job(olmoe()))
    with pytest.raises(BadInput) as refused:
        _ = job(olmoe(), fit=least - 1).predicted_bytes
    assert f"{least - 1:,} bytes" in refused.value.line and f"takes {least:,}" in refused.value.line


def test_averages_that_cannot_be_met() -> None:
    with pytest.raises(BadInput, match="cannot be met") as refused:
        _ = job(olmoe(), bits="3,4", avg_bits=2.9).predicted_bytes
    assert "--avg-bits 3" in refused.value.hint
    assert job(olmoe(), bits="3,4", avg_bits=3).predicted_bytes == job(olmoe(), bits="3").predicted_bytes


def test_uniform_takes_one_width() -> None:
    spec = olmoe()
    for bits in (2, 3, 4):
        j = job(spec, allocate="uniform", avg_bits=bits)
        assert (
            j.predicted_bytes == forecast(j)["bytes_by_bits"][str(bits)] == uniform_bytes(spec, Format(bits), j.fixed)
        )
        assert set(solve(j, None).formats.values()) == {Format(bits)}
    with pytest.raises(BadInput, match="none of 2, 3, 4") as refused:
        _ = job(spec, allocate="uniform", avg_bits=2.6).predicted_bytes
    assert "--avg-bits 3" in refused.value.hint
    between = job(spec, allocate="uniform", fit=uniform_bytes(spec, Format(3), job(spec).fixed) + 5)
    assert between.predicted_bytes == uniform_bytes(spec, Format(3), between.fixed)
    with pytest.raises(BadInput, match="cannot hold"):
        _ = job(spec, allocate="uniform", fit=10).predicted_bytes


# ------------------------------------------------------------------------------------------------ what is stored


def test_other_bits_pack_every_matrix_but_routers_and_experts() -> None:
    shapes = olmoe_shapes(layers=1) | {
        "model.visual.patch_embed.weight": ("BF16", (4, 3, 2, 2)),
        "model.visual.pos_embed": ("F32", (5, 4)),
        "model.layers.0.mlp.gate.e_score_correction_bias": ("F32", (3,)),
        "model.counts.weight": ("I64", (3, 4)),
    }
    spec = read_spec(checkpoint(shapes, olmoe_config()))
    packable = {
        n for n, t in spec.tensors.items() if spec.roles[n] != "routed expert" and is_packable(t, spec.roles[n])
    }
    stem = "model.layers.0.self_attn"
    assert packable == {"model.embed_tokens.weight", "lm_head.weight", *(f"{stem}.{p}_proj.weight" for p in "qkvo")}
    assert other_format(16, 64) is None and other_format(8, 32) == Format(8, 32)
    for odd in (2, 3, 32):
        with pytest.raises(BadInput, match="not offered"):
            other_format(odd, 64)


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "kept"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (4, 4), "F32", "BF16"),
        ("model.layers.0.self_attn.q_proj.weight", (4, 4), "F16", "F16"),
        ("model.layers.0.self_attn.q_proj.weight", (4, 4), "BF16", "BF16"),
        ("model.layers.0.self_attn.q_proj.weight", (4, 4), "F64", "F64"),
        ("model.layers.0.self_attn.q_proj.bias", (4,), "F32", "F32"),
        ("model.norm.weight", (4,), "F32", "F32"),
        ("model.conv.weight", (4, 3, 2), "F32", "F32"),
        ("model.layers.0.mlp.gate.weight", (3, 4), "F32", "F32"),
        ("model.layers.0.mlp.gate.e_score_correction_bias", (3,), "F32", "F32"),
        ("model.pos_embed", (5, 4), "F32", "BF16"),
        ("model.table", (5, 4), "I64", "I64"),
    ],
)
def test_dtypes_of_what_is_not_packed(name: str, shape: tuple[int, ...], dtype: str, kept: str) -> None:
    spec = read_spec(checkpoint(olmoe_shapes() | {name: (dtype, shape)}, olmoe_config()))
    assert kept_dtype(spec.tensors[name], spec.roles[name]) == kept


def test_shards_are_filled_in_order() -> None:
    spec = olmoe()
    map_ = solve(job(spec), scored(spec, Options().formats, 0))
    outputs = list(output_tensors(spec, map_, None))
    for limit in (1, 100, 1000, 10**9):
        shards = split_shards(outputs, limit)
        assert [t for shard in shards for t in shard] == outputs
        assert all(len(s) == 1 or sum(t.nbytes for t in s) <= limit for s in shards)
    assert len(split_shards(outputs, 10**9)) == 1 and len(split_shards(outputs, 1)) == len(outputs)


# --------------------------------------------------------------------------------------------------- the forecast


def test_forecast_counts() -> None:
    spec = olmoe(layers=2, experts=3, hidden=16, inner=12, vocab=20, tie=True)
    f = forecast(job(spec, avg_bits=3))
    experts = 2 * 3 * 3 * 16 * 12
    other = 20 * 16 + 2 * (4 * 16 * 16 + 16 + 3 * 16) + 16
    assert f["params"] == experts + other and f["expert_params"] == experts
    assert f["bytes_bf16"] == f["bytes_source"] == 2 * (experts + other)
    assert list(f["bytes_by_bits"]) == ["2", "3", "4"] or set(f["bytes_by_bits"]) == {"2", "3", "4"}
    assert f["bytes_other"] == 2 * other and f["layers"] == 2 and f["experts"] == 6
    assert sum(f["bytes_by_role"].values()) == f["bytes_source"]
    assert f["run"]["weights_bytes"] == f["predicted_bytes"] == f["budget_bytes"]
    assert f["run"]["largest_layer_bytes"] == largest_layer_bytes(spec) == 2 * experts // 2
    assert json.loads(json.dumps(f)) == f


def test_group_sizes_want_a_budget_of_bytes() -> None:
    """One of code bits leaves the smallest groups free of charge, and what a map leaves is padding: that is said."""
    asks: list[tuple[dict[str, Any], bool]] = [({"avg_bits": 3.0}, True), ({"fit": "70%"}, False)]
    for asked, said in asks:
        notes = forecast(job(olmoe(), group_size="64,128", **asked))["notes"]
        assert any("--fit" in note for note in notes) == said


def test_a_width_of_1_is_named_near_2_bits() -> None:
    """Where it paid: sensing tries the quantizer, the budget lies near the narrowest width, and that is 2."""
    asks: list[tuple[dict[str, Any], bool]] = [
        ({"avg_bits": 2.0}, True),
        ({"avg_bits": 2.35}, True),
        ({"avg_bits": 2.2, "bits": "2,3,8", "group_size": "64,128"}, True),
        ({"avg_bits": 2.45}, False),
        ({"avg_bits": 1.2, "bits": "1,2,3"}, False),
        ({"avg_bits": 3.1, "bits": "3,4"}, False),
        ({"avg_bits": 2.0, "sensitivity": "hessian"}, False),
        ({"avg_bits": 2.0, "allocate": "uniform"}, False),
    ]
    for asked, said in asks:
        notes = " ".join(forecast(job(olmoe(), **asked))["notes"])
        widths = asked.get("bits", "2,3,4")
        assert (f"--bits 1,{widths} may lose less" in notes) == ("narrowest" in notes) == said, asked


def test_kmeans_has_no_prediction_but_bounds() -> None:
    """Two layers of three like experts: the least at equal scores; at most, one expert (of each layer) is narrow."""
    for scope, narrow in (("model", 1), ("layer", 2)):
        f = forecast(job(olmoe(), allocate="kmeans", bits="2,4", per="expert", scope=scope))
        assert f["predicted_bytes"] is None and f["budget_bytes"] is None
        least, most = f["bytes_by_bits"]["2"], f["bytes_by_bits"]["4"]
        assert f["minimum_bytes"] == least and f["maximum_bytes"] == most - narrow * (most - least) // 6


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("per", ["projection", "expert", "layer"])
def test_kmeans_stays_within_its_bounds(per: str, scope: str) -> None:
    """And meets both: the least where all scores are equal, the most where the low ones stand alone (where items
    are alike: the bound does not ask whether two of them are the smallest)."""
    spec = olmoe(experts=5, layers=2)
    asked = job(spec, allocate="kmeans", bits="2,3,8", per=per, scope=scope)
    f, seen = forecast(asked), []
    for seed in range(30):
        s = scored(spec, asked.options.formats, seed)
        if seed == 0:
            s = replace(s, score_I=np.ones(len(s.linears)))
        elif seed == 1:  # in every layer and in the model, two items stand apart at the low end
            at = asked.problem.item_of_I
            first = np.flatnonzero(np.diff(asked.problem.layer_of_J, prepend=-1))
            score_J = np.full(len(asked.problem.layer_of_J), 9.0)
            score_J[first[0] if scope == "model" else first] = 1
            if per != "layer":
                score_J[first[0] + 1 if scope == "model" else first + 1] = 4
            s = replace(s, score_I=score_J[at] / np.bincount(at)[at])
        seen.append(asked.fixed + solve(asked, s).nbytes(spec))
        assert f["minimum_bytes"] <= seen[-1] <= f["maximum_bytes"]
    assert seen[0] == f["minimum_bytes"] and (seen[1] == f["maximum_bytes"] or per == "projection")


def test_kv_cache() -> None:
    plain = {"num_hidden_layers": 3, "num_attention_heads": 8, "hidden_size": 64}
    assert kv_bytes_per_token(plain) == 2 * 3 * 2 * 8 * 8
    assert kv_bytes_per_token(plain | {"num_key_value_heads": 2, "head_dim": 10}) == 2 * 3 * 2 * 2 * 10
    assert kv_bytes_per_token({"text_config": plain}) == kv_bytes_per_token(plain)
    latent = plain | {"qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16}
    assert kv_bytes_per_token(latent) == 2 * 3 * 8 * (12 + 8 + 16)
    for lost in plain:
        assert kv_bytes_per_token({k: v for k, v in plain.items() if k != lost}) is None
    assert kv_bytes_per_token({}) is None and kv_bytes_per_token(plain | {"hidden_size": "64"}) is None


def test_ties_follow_make_problem() -> None:
    spec = olmoe(layers=2, experts=3)
    sizes = {"projection": 18, "gate-up": 12, "expert": 6, "layer-projection": 6, "layer": 2}
    for per, count in sizes.items():
        p = make_problem(spec, Options().formats, per)
        assert p.bytes_JF.shape == (count, 3)
        assert p.item_of_I.tolist() == sorted(p.item_of_I.tolist()) or per == "layer-projection"
        assert int(p.bytes_JF[:, 0].sum()) == sum(Format(2).nbytes(*s) for _, s in spec.linears)
        assert p.layer_of_J.tolist() == [i * 2 // count for i in range(count)]
    with pytest.raises(BadInput):
        make_problem(spec, Options().formats, "weight")


# -------------------------------------------------------------------------------------------- without waking torch

HEAVY = ("torch", "transformers", "scipy", "PIL", "jinja2")


def modules_after(code: str) -> set[str]:
    """Which heavy modules a fresh interpreter has loaded after running `code`."""
    check = f"\nimport sys; print('HEAVY', *[m for m in {HEAVY} if m in sys.modules])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(SOURCES)}
    ran = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return set(ran.stdout.rpartition("HEAVY")[2].split())


def test_import_mopeq_is_light() -> None:
    assert modules_after("import mopeq") == set()


def test_plan_wakes_no_torch() -> None:
    folder = source("olmoe")
    code = (
        "from mopeq.cli import run_command\n"
        "for m in ([], ['--allocate', 'random']):\n"
        f"    assert run_command(['plan', {str(folder)!r}, '--json', *m], False) == 0"
    )
    assert modules_after(code) == set()
    assert modules_after(f"import mopeq; mopeq.plan({str(folder)!r})") == set()


def test_help_wakes_no_torch() -> None:
    verbs = ["", "plan", "quantize", "map", "run", "eval", "report", "verify", "demo"]
    lines = "\n".join(f"assert run_command({[v, '--help'] if v else ['--help']!r}, False) == 0" for v in verbs)
    assert modules_after(f"from mopeq.cli import run_command\n{lines}") == set()


def test_help_costs_little_beside_the_libraries_it_stands_on() -> None:
    """Of processor time, the least of three each, turn about."""
    code = (
        "import resource, subprocess, sys\n"
        "def spent(*words):\n"
        "    before = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "    subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL, check=True)\n"
        "    after = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime\n"
        "libraries = '-c', 'import numpy, wrapt, typer.rich_utils, rich.markdown'\n"
        "pairs = [(spent('-m', 'mopeq.cli', '--help'), spent(*libraries)) for _ in range(3)]\n"
        "print(min(a for a, _ in pairs) / min(b for _, b in pairs))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(SOURCES)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert float(ran.stdout) < 2


def test_python_gives_the_same_twice() -> None:
    """`mopeq.plan` is a function, though a module of that name exists; and so is `mopeq.evaluate`."""
    folder = source("olmoe")
    code = (
        "import mopeq, json\n"
        f"first, second = mopeq.plan({str(folder)!r}), mopeq.plan({str(folder)!r})\n"
        "assert first == second and first['predicted_bytes'] > 0\n"
        "from mopeq import plan, quantize\n"
        "from mopeq.plan import PER\n"
        "import mopeq.stages, mopeq.evaluate\n"
        f"assert callable(mopeq.plan) and callable(mopeq.quantize) and plan({str(folder)!r}) == first\n"
    )
    assert modules_after(code) == set()
    assert room().exists() and isinstance(folder, Path)

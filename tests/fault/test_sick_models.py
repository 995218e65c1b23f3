"""Sick weights, each through every quantizer alone and through the line: handled, or refused by name.

Handled means: codes, finite scales, and errors that the format explains. Never NaN out, never an expert left in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from made import copy, header_of, quantize, room, source, stored
from safetensors.torch import load_file, save_file
from torch import Tensor

from mopeq.assemble import PackedReader
from mopeq.checkpoint import open_checkpoint
from mopeq.errors import BadInput, MopeqError
from mopeq.families.standard import read_spec
from mopeq.nouns import Format, LinearId
from mopeq.packed import read_map
from mopeq.progress import silence
from mopeq.quant import QUANTIZERS
from mopeq.tables import pick
from mopeq.verbs.verify import verify

N, C = 24, 80  # outputs, inputs: at group size 64 the last group is a short one
FORMATS = [Format(1), Format(2), Format(3), Format(4), Format(8), Format(3, 64, "s"), Format(2, 7), Format(4, 128)]


def healthy(seed: int = 0) -> Tensor:
    return torch.randn(3, N, C, generator=torch.Generator().manual_seed(seed)) * 0.05


def with_expert(change: Callable[[Tensor], Any]) -> Tensor:
    """Three experts, of which the middle one is changed in place."""
    w = healthy()
    change(w[1])
    return w


def outlier_channel(w: Tensor) -> None:
    w[:, 70] *= 1000


HANDLED: dict[str, Tensor] = {
    "healthy": healthy(),
    "all zero": with_expert(Tensor.zero_),
    "constant": with_expert(lambda w: w.fill_(0.03)),
    "constant and negative": with_expert(lambda w: w.fill_(-0.03)),
    "an outlier channel": with_expert(outlier_channel),
    "one huge weight": with_expert(lambda w: w[3, 75:76].fill_(60000.0)),
    "below the smallest scale": with_expert(lambda w: w.mul_(1e-9)),
    "a row of zeros": with_expert(lambda w: w[5].zero_()),
    "a zero last group": with_expert(lambda w: w[:, 64:].zero_()),
}
REFUSED: dict[str, tuple[Tensor, str]] = {
    "NaN": (with_expert(lambda w: w[3, 9:10].fill_(torch.nan)), "NaN"),
    "all NaN": (with_expert(lambda w: w.fill_(torch.nan)), "NaN"),
    "infinite": (with_expert(lambda w: w[3, 9:10].fill_(torch.inf)), "infinite"),
    "minus infinite": (with_expert(lambda w: w[3, 9:10].fill_(-torch.inf)), "infinite"),
    "beyond fp16": (with_expert(lambda w: w[3, 9:10].fill_(1e30)), "beyond fp16"),
}


def inputs(kind: str) -> Tensor | None:
    """Second moments of what three experts were shown."""
    x = torch.randn(3, 50, C, generator=torch.Generator().manual_seed(1))
    moments: Tensor = x.mT @ x
    if kind == "never reached":
        moments[1] = 0
    elif kind == "one token":
        moments[1] = x[1, :1].T @ x[1, :1]
    elif kind == "an outlier channel":
        x[:, :, 9] *= 1e4
        moments = x.mT @ x
    elif kind == "a dead channel":
        x[:, :, 9] = 0
        moments = x.mT @ x
    elif kind == "not finite":
        moments[1] = torch.nan
    return moments if kind != "none" else None


SHOWN = ("none", "plenty", "never reached", "one token", "an outlier channel", "a dead channel", "not finite")


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("method", QUANTIZERS)
def test_what_is_handled(method: str, fmt: Format) -> None:
    """Finite, of the right shape, and no further off than a group's range allows; zeros stay zeros."""
    run = pick(QUANTIZERS, method, "method")
    for shown in SHOWN if QUANTIZERS[method].needs_data else SHOWN[:1]:
        for ill, w in HANDLED.items():
            q = run(w.clone(), fmt, moments=inputs(shown), seed=0)
            value, where = q.dequantize(), f"{ill}, inputs: {shown}"
            assert q.codes.dtype == torch.uint8 and int(q.codes.max()) <= fmt.max_code, where
            assert value.shape == w.shape and bool(value.isfinite().all()), where
            assert bool((q.scales.float() > 0).all()) and bool(q.scales.isfinite().all()), where
            worst = (value - w).abs().flatten(1).amax(1)
            span = w.flatten(1).amax(1).clamp(min=0) - w.flatten(1).amin(1).clamp(max=0)
            assert bool((worst <= 2 * span + 1e-6).all()), (where, worst, span)
            if ill == "all zero":
                assert not value[1].any(), where
            if ill.startswith("constant") and fmt.bits > 1 and fmt.scheme == "a" and shown in ("none", "plenty"):
                assert float((value[1] - w[1]).abs().max()) < 0.03 / 2, where


@pytest.mark.parametrize("ill", REFUSED)
@pytest.mark.parametrize("method", QUANTIZERS)
def test_what_is_refused(method: str, ill: str) -> None:
    w, word = REFUSED[ill]
    for shown in ("none", "plenty"):
        with pytest.raises(BadInput) as refused:
            pick(QUANTIZERS, method, "method")(w.clone(), Format(3), moments=inputs(shown), seed=0)
        assert word in refused.value.line, refused.value.line


# ------------------------------------------------------------------------------------------------------ the line

DATA = {"calib_tokens": 8}  # so few that experts are left out


def changed(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """A copy of the tiny model with its tensors changed in place."""
    for shard in sorted(folder.glob("*.safetensors")):
        tensors = load_file(shard)
        change(tensors)
        save_file(tensors, shard, metadata={"format": "pt"})
    return folder


def expert(tensors: dict[str, Tensor], number: int, what: Callable[[Tensor], Any]) -> None:
    for name, tensor in tensors.items():
        if f".experts.{number}." in name:
            what(tensor)


def sicken(tensors: dict[str, Tensor]) -> None:
    """Every ill that is handled, in one model."""
    expert(tensors, 0, Tensor.zero_)
    expert(tensors, 1, lambda w: w.fill_(0.03))
    expert(tensors, 2, lambda w: w[:, 5].mul_(100))
    expert(tensors, 3, lambda w: w.mul_(1e-9))


@pytest.fixture(scope="session")
def sick() -> Path:
    """hidden 72, intermediate 40: short last groups at group size 64 and 16."""
    return changed(copy(source("olmoe", hidden_size=72), room() / "sick"), sicken)


def check_whole(folder: Path, out: Path) -> None:
    """Every routed matrix is packed and finite, none is left as it was; zeros are zeros; the folder verifies."""
    verify(out)
    spec, map_ = read_spec(open_checkpoint(folder)), read_map(out)
    reader = PackedReader(out)
    names = [name for path in out.glob("*.safetensors") for name in header_of(path)]
    assert not [name for name in names if ".experts." in name and name.endswith(".weight")]
    for linear, shape in spec.linears:
        stem = f"{spec.layer(linear.layer).prefix}.{linear.expert}.{linear.projection}_proj"
        value = reader.qweight(stem, map_[linear], shape).dequantize()
        assert bool(value.isfinite().all()), stem
        if linear.expert == 0:
            assert not value.any(), stem
    from mopeq.models import load_model, logits_of

    logits = logits_of(load_model(out, torch.float32, "cpu"), torch.arange(3, 40)[None])
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("group", [64, 16])
@pytest.mark.parametrize("method", QUANTIZERS)
def test_sick_experts_through_the_line(method: str, group: int, sick: Path, tmp_path: Path) -> None:
    data = DATA | {"calib": (tiny.write_text(tmp_path / "text.txt", 1),)} if QUANTIZERS[method].needs_data else {}
    with silence():
        facts = quantize(sick, tmp_path / "out", allocate="uniform", method=method, group_size=group, **data)
    check_whole(sick, tmp_path / "out")
    if data:
        assert any("no calibration token reached experts [" in note for note in facts["notes"]), facts["notes"]


@pytest.mark.parametrize(
    "sensitivity", ["fisher", "fisher-seq", "error", "frequency", "hutchinson", "hybrid", "hessian"]
)
def test_sick_experts_are_sensed(sensitivity: str, sick: Path, tmp_path: Path) -> None:
    """Costs are finite, the budget is met, and who was not reached is named."""
    calib = (tiny.write_text(tmp_path / "text.txt", 1),)
    with silence():
        facts = quantize(sick, tmp_path / "out", sensitivity=sensitivity, calib=calib, avg_bits=2.6, **DATA)
    assert facts["bytes_weights"] == facts["predicted_bytes"]
    with np.load(next((tmp_path / "out" / ".mopeq" / "sensitivity").glob("*.npz"))) as saved:
        assert np.isfinite(saved["cost_IF"]).all()
        notes = saved["facts"].tobytes().decode()
    assert sensitivity == "hessian" or "no calibration token reached layer" in notes
    verify(tmp_path / "out")


SPOILED: dict[str, tuple[float, str]] = {
    "NaN": (float("nan"), "NaN"),
    "infinite": (float("inf"), "infinite"),
    "beyond fp16": (1e30, "beyond fp16"),
}


@pytest.mark.parametrize("ill", SPOILED)
@pytest.mark.parametrize("method", QUANTIZERS)
def test_refused_by_the_line(method: str, ill: str, tmp_path: Path) -> None:
    """The matrix is named, and nothing is left that could be taken for a checkpoint."""
    value, word = SPOILED[ill]

    def spoil(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if "layers.1.mlp.experts.4.up_proj" in name:
                tensor[3, 7] = value

    folder = changed(copy(source("olmoe"), tmp_path / "model"), spoil)
    calib = (tiny.write_text(tmp_path / "text.txt", 1),)
    with pytest.raises(BadInput) as refused, silence():
        quantize(folder, tmp_path / "out", allocate="uniform", method=method, calib=calib, calib_tokens=64)
    assert word in refused.value.line and "layers.1" in refused.value.line and ".4.up" in refused.value.line
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file() and ".mopeq" not in p.parts]


def test_activations_that_overflow_are_refused(tmp_path: Path) -> None:
    """Finite weights whose products are not: calibration would be about nothing."""

    def spoil(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("layers.1.post_attention_layernorm.weight"):
                tensor.fill_(3e38)

    folder = changed(copy(source("olmoe"), tmp_path / "model"), spoil)
    calib = (tiny.write_text(tmp_path / "text.txt", 1),)
    for more in ({"sensitivity": "fisher"}, {"sensitivity": "error"}, {"method": "gptq", "allocate": "uniform"}):
        with pytest.raises(BadInput) as refused, silence():
            quantize(folder, tmp_path / "out", calib=calib, calib_tokens=64, **more)
        assert "not finite" in refused.value.line and "layer " in refused.value.line, (more, refused.value.line)
    with pytest.raises(MopeqError, match="logits are not finite"), silence():
        quantize(folder, tmp_path / "out")
    assert not (tmp_path / "out" / "mopeq_manifest.json").exists()


def test_the_same_bytes_for_healthy_experts_beside_sick_ones(sick: Path, tmp_path: Path) -> None:
    """Rounded to nearest, a healthy expert does not notice its neighbours."""
    with silence():
        quantize(source("olmoe", hidden_size=72), tmp_path / "healthy", allocate="uniform")
        quantize(sick, tmp_path / "sick", allocate="uniform")
    one, other = stored(tmp_path / "healthy"), stored(tmp_path / "sick")
    for name in (n for n in one if ".experts.4." in n or ".experts.5." in n):
        assert one[name] == other[name], name
    assert LinearId(0, 4, "up") in read_map(tmp_path / "sick").formats

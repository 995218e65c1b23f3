"""The paper's methods and ours on tiny models: what each promises, checked against something slower."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from made import quantize

from mopeq.data.calibration import calibrate_with
from mopeq.job import open_job
from mopeq.models import load_config, load_model
from mopeq.nouns import Format, LinearId
from mopeq.options import Options
from mopeq.quant import gptq, rtn, signround
from mopeq.seam import model_layers, weights
from mopeq.sense import hessian, hutchinson, quadratic
from mopeq.sense.scene import Scene
from mopeq.walk.parts import resident
from mopeq.walk.walking import Walk

FORMATS = Options().formats


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("olmoe"), "olmoe", dtype=torch.float32)


@pytest.fixture(scope="module")
def scene(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    text = tiny.write_text(tmp_path_factory.mktemp("text") / "calib.txt")
    shown = calibrate_with(source, load_config(source), [text], 1500, 0)
    spec = open_job(source, Options()).spec
    return Scene(
        source, spec, FORMATS, 0, model=lambda a: load_model(source, torch.float32, "cpu", a), batches=shown.batches
    )


@pytest.mark.parametrize("scheme", ["a", "s"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_tuned_rounding_beats_nearest_on_the_same_inputs(bits: int, scheme: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    w = torch.randn(3, 24, 80, generator=generator) * 0.1
    x = torch.randn(3, 200, 80, generator=generator) @ (torch.eye(80) + 0.2 * torch.randn(80, 80, generator=generator))
    moments, fmt = x.mT @ x, Format(bits, 32, scheme)

    def error(q: torch.Tensor) -> torch.Tensor:
        return ((q.double() - w.double()) @ x.double().mT).square().sum((1, 2))

    nearest = error(rtn.quantize(w, fmt).dequantize(torch.float64))
    for method in (signround, gptq):
        tuned = method.quantize(w, fmt, moments=moments)
        assert tuned.codes.max() < 2**bits
        assert (error(tuned.dequantize(torch.float64)) < nearest).all(), method.__name__


def test_hutchinson_of_the_norm_agrees_with_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(6, 9, generator=generator, dtype=torch.float64).requires_grad_()
    gradient = torch.autograd.grad(w.norm(), w, create_graph=True)[0]
    samples = []
    for _ in range(400):
        v = torch.randint(0, 2, w.shape, generator=generator).double() * 2 - 1
        samples.append((v * torch.autograd.grad(gradient, w, v, retain_graph=True)[0]).sum().item())
    mean, stderr = np.mean(samples), np.std(samples, ddof=1) / len(samples) ** 0.5
    closed = hessian.closed_form(w.detach())
    assert abs(mean - closed) < 4 * stderr


def test_hutchinson_agrees_with_the_exact_trace_of_a_small_loss(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert's down projection of the last layer: its exact Hessian diagonal by one product per parameter."""
    monkeypatch.setattr(hutchinson, "PROBES", 48)
    shown = Scene(**{**vars(scene), "batches": tuple({k: v[:1, :24] for k, v in b.items()} for b in scene.batches[:1])})
    found = hutchinson.sense(shown)
    model = load_model(scene.folder, torch.float32, "cpu", "eager")
    pairs = model_layers(scene.spec, model)
    layer, module = pairs[-1]
    at = [i for i, linear in enumerate(found.linears) if linear.layer == layer.layer and linear.projection == "down"]
    e = int(np.argmax(np.abs(found.score_I[at])))
    loss = hutchinson.mean_loss(Walk(resident(model, scene.spec)), shown.batches[0])
    gradient = torch.autograd.grad(loss, module.down_proj, create_graph=True)[0]
    whole = sum(
        torch.autograd.grad(gradient[e, r, c], module.down_proj, retain_graph=True)[0][e, r, c].item()
        for r in range(module.down_proj.shape[1])
        for c in range(module.down_proj.shape[2])
    )
    assert abs(found.score_I[at[e]] - whole) < 5 * found.stderr_I[at[e]]


def test_fisher_is_the_quadratic_form_it_says(scene: Scene) -> None:
    """Against a direct evaluation: each matrix's error put in by hand, one token's gradient at a time."""
    shown = Scene(**{**vars(scene), "batches": tuple({k: v[:1, :12] for k, v in b.items()} for b in scene.batches[:1])})
    found = quadratic.fisher(shown)
    model = load_model(scene.folder, torch.float32, "cpu", None)
    layer, module = model_layers(scene.spec, model)[-1]
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def eager(self: object, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        w = weights(module)
        for t in range(x.shape[0]):
            for k in range(index.shape[1]):
                e = int(index[t, k])
                h = module.act_fn(w["gate"][e] @ x[t]) * (w["up"][e] @ x[t])
                y = w["down"][e] @ h
                y.retain_grad()
                if e == 0:
                    seen.append((h.detach(), y, torch.tensor(t)))
                out = out.index_add(0, torch.tensor([t]), (weight[t, k] * y)[None])
        return out

    for parameter in model.parameters():
        parameter.requires_grad_(True)
    module.forward = lambda x, i, w: eager(module, x, i, w)
    walking = Walk(resident(model, scene.spec))
    quadratic.sampled_loss(walking, shown.batches[0], torch.Generator().manual_seed(0)).backward()
    assert seen, "expert 0 must see a token for this test to say anything"
    w = weights(module)["down"].detach()
    for f, fmt in enumerate(FORMATS):
        delta = (rtn.quantize(w, fmt).dequantize() - w)[0].double()
        direct = 0.5 * sum(float(y.grad.double() @ (delta @ h.double())) ** 2 for h, y, _ in seen) / 12
        at = found.linears.index(LinearId(layer.layer, 0, "down"))
        assert found.cost_IF[at, f] == pytest.approx(direct, rel=1e-3)


@pytest.mark.parametrize("kind", sorted(tiny.MAKERS))
def test_the_whole_line_on_every_layout(kind: str, tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", kind)
    for n, options in enumerate(
        [
            {"avg_bits": 2.5},
            {"fit": "60%", "other_bits": 8, "per": "projection"},
            {"allocate": "kmeans", "other_bits": 4},
        ]
    ):
        made = quantize(source, tmp_path / str(n), **options)
        assert made["read_back"] < 1e-4
        assert made["bytes_weights"] == made["predicted_bytes"]


@pytest.mark.parametrize("sensitivity", ["frequency", "hybrid", "hutchinson", "fisher", "fisher-seq", "error"])
def test_every_sensitivity_with_a_calibrated_quantizer(sensitivity: str, source: Path, tmp_path: Path) -> None:
    text = tiny.write_text(tmp_path / "calib.txt")
    options = {"sensitivity": sensitivity, "calib": (text,), "calib_tokens": 800, "per": "projection", "fit": "55%"}
    first = quantize(source, tmp_path / "a", method="gptq", **options)
    again = quantize(source, tmp_path / "b", method="gptq", **options)
    assert first["map"] == again["map"]
    shards = sorted(p.name for p in (tmp_path / "a").glob("model*.safetensors"))
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in shards)

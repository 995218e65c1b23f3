"""A model walked layer by layer against the same model in memory: logits, gradients, and what sensors make of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import made
import numpy as np
import pytest
import tiny
import torch
from made import quantize
from shared_files import shared
from tiny_families import families, model_of, picture_inputs, speaker, text_inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import mopeq.embedded
import mopeq.models
from mopeq import readback
from mopeq.data.encode import model_inputs
from mopeq.errors import BadInput, MopeqError
from mopeq.job import open_job
from mopeq.kernels import tiles
from mopeq.memory import layer_bytes, whole_bytes
from mopeq.models import load_model
from mopeq.nouns import LinearId
from mopeq.options import Options
from mopeq.packed import read_map
from mopeq.progress import silence
from mopeq.rundir import CANDIDATES, Kept
from mopeq.seam import Seen, model_layers, plain_forward, stored, views, watch
from mopeq.sense import SENSORS, hutchinson, quadratic
from mopeq.sense.scene import Scene
from mopeq.tables import pick
from mopeq.verbs.evaluate import evaluate
from mopeq.walk import shelf as shelf_module
from mopeq.walk.parts import CannotWalk, Part, Parts, Resident, source_parts
from mopeq.walk.shelf import Shelf
from mopeq.walk.walking import Walk

KINDS = ("olmoe", "deepseek_v2", "gpt_oss", "mixtral", "qwen3_vl_moe", "embedded", "bench-lm")


def folder_of(kind: str) -> Path:
    if kind == "embedded":
        return Path(mopeq.embedded.__file__).parent / "model"
    return shared("models/bench-lm") if kind == "bench-lm" else made.source(kind)


@pytest.fixture(autouse=True)
def what_waits_lies_on_the_shelf(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small it is: a table or a mask too."""
    monkeypatch.setattr(shelf_module, "LEAST", 1)


@cache
def shown(kind: str) -> tuple[dict[str, Tensor], ...]:
    """Rows of random ids, two lengths, one with padding; with pictures where the model sees."""
    job = open_job(folder_of(kind), Options())
    text = job.spec.config.get("text_config", job.spec.config)
    generator = torch.Generator().manual_seed(1)
    batches = []
    for rows, length in ((2, 24), (1, 33)):
        ids = torch.randint(5, min(text["vocab_size"], 300), (rows, length), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    batches[0]["attention_mask"][1, -5:] = 0
    if "vision_config" in job.spec.config:
        batches.append(with_picture(job.spec.config, generator))
        batches.append({k: torch.cat([v, v]) for k, v in with_picture(job.spec.config, generator).items()})
    return tuple(batches)


def with_picture(config: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """One row with a picture of 4 x 6 patches, as Qwen3-VL's processor would give it."""
    vision = config["vision_config"]
    width = 3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    seen = 24 // vision["spatial_merge_size"] ** 2
    ids = torch.randint(5, 250, (1, 20 + seen), generator=generator)
    ids[0, 4], ids[0, 5 : 5 + seen] = config["vision_start_token_id"], config["image_token_id"]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == config["image_token_id"]).int(),
        "pixel_values": torch.randn(24, width, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
    }


def walk_of(kind: str, whole: bool, **options: Any) -> Walk:
    job = open_job(folder_of(kind), Options())
    return Walk(source_parts(job.folder, job.spec, whole=whole, exact=options.pop("exact", True)), **options)


def logits(walk: Walk, batches: tuple[dict[str, Tensor], ...]) -> list[Tensor]:
    found: dict[int, Tensor] = {}

    def run(number: int) -> Callable[[], None]:
        def one() -> None:
            found[number] = walk.model(**model_inputs(batches[number]), use_cache=False).logits

        return one

    with watch(walk.model, plain_forward):
        for visit in walk.forward([run(n) for n in range(len(batches))]):
            visit.run()
    return [found[n] for n in range(len(batches))]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_model_in_memory(kind: str, tmp_path: Path) -> None:
    model = load_model(folder_of(kind), torch.float32, "cpu")
    with torch.no_grad(), watch(model, plain_forward):
        wanted = [model(**model_inputs(batch), use_cache=False).logits for batch in shown(kind)]
    shelf = Shelf(tmp_path, 0)
    walks = (walk_of(kind, True), walk_of(kind, False, exact=False), walk_of(kind, False, shelf=shelf))
    for walk in (*walks, walk_of(kind, False)):
        for a, b in zip(logits(walk, shown(kind)), wanted, strict=True):
            assert torch.equal(a, b)
    assert shelf.written > len(walk.parts.parts) * len(wanted) and not list(tmp_path.iterdir())


def gradients(walk: Walk, batches: tuple[dict[str, Tensor], ...]) -> dict[tuple[int, int, int, str], Tensor]:
    """{(batch, layer, expert, projection): the loss's gradient at its outputs}."""
    found: dict[tuple[int, int, int, str], Tensor] = {}
    layer_of = {id(m): layer.layer for part in walk.parts.parts for layer, m in part.layers}

    def watcher(module: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            x_TH.requires_grad_(True)

        def see(seen: Seen) -> None:
            for p, y in seen.outputs.items() if torch.is_grad_enabled() else ():
                key = (walk.now, layer_of[id(module)], seen.expert, p)
                y.register_hook(lambda g, key=key: found.__setitem__(key, g.clone()))

        return plain_forward(module, x_TH, index_TK, weight_TK, see)

    def run(number: int) -> Callable[[], Tensor]:
        def one() -> Tensor:
            batch = batches[number]
            out = walk.model(**model_inputs(batch), use_cache=False).logits
            return torch.nn.functional.cross_entropy(out.flatten(0, 1), batch["input_ids"].flatten(), reduction="sum")

        return one

    with watch(walk.model, watcher):
        for visit in walk.gradients([run(n) for n in range(len(batches))]):
            visit.run()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_whole_loss(kind: str, tmp_path: Path) -> None:
    wanted = gradients(walk_of(kind, True), shown(kind))
    for shelf in (Shelf(), Shelf(tmp_path, 0)):
        found = gradients(walk_of(kind, False, shelf=shelf), shown(kind))
        assert found.keys() == wanted.keys() and len(found) > 20
        worst = max(float((found[k] - wanted[k]).norm() / wanted[k].norm().clamp_min(1e-30)) for k in wanted)
        assert worst < 1e-6, worst
    assert shelf.written > 0 and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------- what is made of the data shown


def scene_of(kind: str, walked: bool, quantizer: str, scratch: Path) -> Scene:
    job = open_job(folder_of(kind), Options())

    def parts(exact: bool, attention: str | None) -> Parts:
        return source_parts(job.folder, job.spec, attention=attention, exact=exact)

    def model(attention: str | None) -> Any:
        return load_model(job.folder, torch.float32, "cpu", attention)

    batches = tuple(b | {"image_mask": b["mm_token_type_ids"] == 1} if "pixel_values" in b else b for b in shown(kind))
    more = {"parts": parts, "memory_bytes": 0, "scratch": scratch} if walked else {}
    return Scene(job.folder, job.spec, Options().formats, 3, model=model, batches=batches, quantizer=quantizer, **more)


@pytest.mark.parametrize("kind", ["olmoe", "deepseek_v2", "qwen3_vl_moe", "gpt_oss"])
@pytest.mark.parametrize(
    ("sensor", "quantizer"),
    [
        ("frequency", "rtn"),
        ("error", "rtn"),
        ("fisher", "rtn"),
        ("fisher-seq", "rtn"),
        ("fisher", "signround"),
        ("hutchinson", "rtn"),
    ],
)
def test_sensitivities_are_the_same_bit_for_bit(kind: str, sensor: str, quantizer: str, tmp_path: Path) -> None:
    found = [pick(SENSORS, sensor, "sensor")(scene_of(kind, walked, quantizer, tmp_path)) for walked in (False, True)]
    assert np.array_equal(found[0].cost_IF, found[1].cost_IF) and found[0].cost_IF.any()
    assert found[0].notes == found[1].notes
    assert found[0].tokens_LE is not None and np.array_equal(found[0].tokens_LE, found[1].tokens_LE)
    for name in ("stderr_IF", "stderr_I"):
        a, b = (getattr(one, name) for one in found)
        assert (a is None and b is None) or np.array_equal(a, b)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["olmoe", "qwen3_vl_moe"])
@pytest.mark.parametrize(("sensor", "quantizer"), [("fisher", "gptq"), ("fisher-seq", "signround"), ("error", "gptq")])
def test_what_was_fitted_to_other_data_is_judged(kind: str, sensor: str, quantizer: str, tmp_path: Path) -> None:
    """Costs are those of the matrices that the other data makes, walked or not, kept on disk or not."""
    sense = pick(SENSORS, sensor, "sensor")
    found = []
    for walked in (False, True):
        scene = scene_of(kind, walked, quantizer, tmp_path / "scratch")
        judged = replace(scene, batches=scene.batches[1:], fitted=scene.batches[:1])
        kept = Kept(tmp_path / f"kept-{walked}")
        found += [sense(judged), sense(replace(judged, kept=kept))]
    kept.drop(but=CANDIDATES)
    found.append(sense(replace(judged, fitted=(), kept=kept)))  # none need be seen again
    fitted = replace(judged, fitted=None, batches=scene.batches[:1], kept=Kept(tmp_path / "made"))
    other = sense(fitted)
    fitted.kept.drop(but=CANDIDATES)
    found.append(sense(replace(fitted, batches=judged.batches)))
    for one in found:
        assert np.array_equal(one.cost_IF, found[0].cost_IF) and np.array_equal(one.tokens_LE, found[0].tokens_LE)
    assert found[0].cost_IF.sum() > 1.05 * other.cost_IF.sum() > 0, "what was fitted to data errs less there"


@pytest.mark.parametrize("kind", ["olmoe", "qwen3_vl_moe"])
@pytest.mark.parametrize("sensor", ["fisher", "error"])
def test_costs_that_settle_early_are_the_same_walked_or_not(
    kind: str, sensor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory no batch is run beyond; walked, those beyond are not counted: both are as if they were not there."""
    sense, enough = pick(SENSORS, sensor, "sensor"), len(shown(kind))
    whole, walked = (scene_of(kind, walked, "rtn", tmp_path / "scratch") for walked in (False, True))
    more = replace(whole, batches=whole.batches + whole.batches[:1])
    alone = sense(replace(more, batches=more.batches[:enough]))
    monkeypatch.setattr(quadratic, "stops", lambda batches: [enough, batches])
    monkeypatch.setattr(quadratic, "SETTLED", 1e9)
    monkeypatch.setattr(quadratic, "Adding", None)  # moments, which this quantizer does not ask for
    kept = Kept(tmp_path / "kept")
    for scene in (replace(more, kept=kept), replace(walked, batches=more.batches)):
        found = sense(scene)
        assert np.array_equal(found.cost_IF, alone.cost_IF) and np.array_equal(found.halves_HIF, alone.halves_HIF)
        assert np.array_equal(found.tokens_LE, alone.tokens_LE)
        assert "settled after" in found.notes[-1] and "settled" not in "".join(alone.notes)
    assert sorted(path.name for path in kept.folder.glob("batch-*")) == [f"batch-{n}.npz" for n in range(enough)]
    monkeypatch.setattr(quadratic, "SETTLED", -1.0)
    assert not np.array_equal(sense(more).cost_IF, alone.cost_IF), "what has not settled sees all"


@pytest.mark.parametrize(("kind", "method"), [("olmoe", "signround"), ("gpt_oss", "signround"), ("olmoe", "twosided")])
def test_the_line_writes_the_same_bytes_within_less_memory(kind: str, method: str, tmp_path: Path) -> None:
    same_bytes_within_less(kind, tmp_path, "fisher", method)


def test_the_line_by_second_derivatives_within_less_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And it is the same where a walk was interrupted on its way back."""
    same_bytes_within_less("qwen3_vl_moe", tmp_path, "hutchinson", "rtn")
    asked: dict[str, Any] = {"sensitivity": "hutchinson", "method": "rtn", "calib": (tmp_path / "calib.txt",)}
    job = open_job(folder_of("qwen3_vl_moe"), Options(**asked, calib_tokens=600))
    asked |= {"calib_tokens": 600, "max_memory": layer_bytes(job.spec, job.options)}
    with silence():
        with monkeypatch.context() as patch:
            patch.setattr(hutchinson.Prober, "take", interrupted)
            with pytest.raises(KeyboardInterrupt):
                quantize(job.folder, tmp_path / "again", **asked)
        quantize(job.folder, tmp_path / "again", **asked)
    assert made.digests(tmp_path / "again") == made.digests(tmp_path / "whole")


def interrupted(prober: Any) -> None:
    raise KeyboardInterrupt


def same_bytes_within_less(kind: str, tmp_path: Path, sensitivity: str, method: str) -> None:
    """Where `--max-memory` has no room for the whole model, the layers are walked; nothing else differs."""
    text = tiny.write_text(tmp_path / "calib.txt")
    asked = {"sensitivity": sensitivity, "method": method, "calib": (text,), "calib_tokens": 600}
    job = open_job(folder_of(kind), Options(**asked))
    least = layer_bytes(job.spec, job.options)
    assert least < whole_bytes(job.spec, job.options)
    lines: list[list[str]] = []
    for out, limit in (("whole", None), ("walked", least)):
        lines.append(
            loads_of(lambda out=out, limit=limit: quantize(job.folder, tmp_path / out, max_memory=limit, **asked))
        )
    assert lines[0] and not lines[1], "the model is loaded whole where it fits, and only there"
    assert made.digests(tmp_path / "whole") == made.digests(tmp_path / "walked")
    with pytest.raises(BadInput, match="max-memory"):
        quantize(job.folder, tmp_path / "less", max_memory=least - 1, **asked)


@pytest.mark.parametrize("room", [0, pytest.param(300_000, marks=pytest.mark.slow)])
def test_batches_that_wait_on_disk_change_no_byte(room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text and pictures, those that go ahead and those that judge, there and back: all of it on disk, or a part."""
    asked = {"sensitivity": "fisher", "method": "gptq", "calib_tokens": 700}
    job = open_job(folder_of("embedded"), Options(**asked))
    written: list[Path] = []
    write = Shelf.write
    monkeypatch.setattr(Shelf, "write", lambda shelf, what: written.append(write(shelf, what)) or written[-1])
    monkeypatch.setattr("mopeq.job.Job.work_memory", room)
    with silence():
        quantize(job.folder, tmp_path / "whole", **asked)
        assert not written
        quantize(job.folder, tmp_path / "walked", max_memory=layer_bytes(job.spec, job.options), **asked)
    assert len(written) > 100 and not any(path.exists() for path in written)
    assert made.digests(tmp_path / "whole") == made.digests(tmp_path / "walked")


def test_a_disk_without_room_for_what_waits_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any work, and only where it would lie there."""
    asked: dict[str, Any] = {"sensitivity": "fisher", "calib": (tiny.write_text(tmp_path / "calib.txt"),)}
    least = layer_bytes(open_job(made.source("olmoe"), Options(**asked)).spec, Options(**asked))
    monkeypatch.setattr("mopeq.checks.free_bytes", lambda path: 10**6)
    with silence():
        quantize(made.source("olmoe"), tmp_path / "out", max_memory=least + 10**9, calib_tokens=64, **asked)
        monkeypatch.setattr("mopeq.job.Job.work_memory", 0)
        with pytest.raises(BadInput, match=r"has 0.95 MiB free; .* --sensitivity fisher takes [\d.]+ MiB") as error:
            quantize(made.source("olmoe"), tmp_path / "two", max_memory=least, calib_tokens=4096, **asked)
    assert "fewer --calib-tokens" in error.value.hint
    assert not list((tmp_path / "two").rglob("*.npz"))


@pytest.mark.slow
@pytest.mark.parametrize("family", families())
def test_every_family_waits_on_disk_as_in_memory(family: str, tmp_path: Path) -> None:
    """Forward and back, text and pictures, everything on disk: the same bits."""
    model = model_of(family).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    model, job = model.float(), open_job(tmp_path / "source", Options())
    batches = [inputs(model, seed) for inputs in (text_inputs, picture_inputs) for seed in (0, 1)]
    batches = [batch for batch in batches if batch is not None]
    for backward in (False, True):
        found: list[list[Tensor]] = []
        for shelf in (Shelf(), Shelf(tmp_path, 0)):
            try:
                found.append(answers(Walk(source_parts(job.folder, job.spec), shelf), batches, backward))
            except CannotWalk:
                break
            assert sorted(tmp_path.iterdir()) == [tmp_path / "source"]
        assert len(found) == 2 or not found
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and (not found or shelf.written)


def answers(walk: Walk, batches: list[dict[str, Tensor]], backward: bool) -> list[Tensor]:
    """Each batch's logits, or the gradients of their squares at the experts' inputs."""
    found: dict[tuple[int, int], Tensor] = {}
    layer_of = {id(m): layer.layer for part in walk.parts.parts for layer, m in part.layers}

    def watcher(module: Any, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            key = (walk.now, layer_of[id(module)])
            x_TH.requires_grad_(True).register_hook(lambda g: found.__setitem__(key, g.clone()))
        return plain_forward(module, x_TH, index_TK, weight_TK)

    def run(number: int, batch: dict[str, Tensor]) -> Tensor:
        said = speaker(walk.model)(**batch, use_cache=False).logits
        if not backward:
            found[number, 0] = said
        return said.double().square().sum()

    runs = [partial(run, number, batch) for number, batch in enumerate(batches)]
    with watch(walk.model, watcher):
        for visit in walk.gradients(runs) if backward else walk.forward(runs):
            visit.run()
    return [found[key] for key in sorted(found)]


class Leans(torch.nn.Module):
    """A layer that is given a table, or takes its model's."""

    def __init__(self, model: Any):
        super().__init__()
        self.linear, self._model = torch.nn.Linear(64, 64), (model,)

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        return x + self.linear(x) * (self._model[0].table if table is None else table)


class MakesOnce(torch.nn.Module):
    """The first batch makes the table of all."""

    def __init__(self, gives: bool):
        super().__init__()
        self.layers = torch.nn.ModuleList(Leans(self) for _ in range(3))
        self.table, self.gives = None, gives

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(64.0).cos() * torch.ones(32, 1)
        for layer in self.layers:
            x = layer(x, self.table) if self.gives else layer(x)
        return x


@pytest.mark.parametrize("gives", [False, True])
def test_a_table_that_one_batch_makes_and_only_layers_use(gives: bool, tmp_path: Path) -> None:
    model: Any = MakesOnce(gives).requires_grad_(False)
    parts = [Part(f"layers.{i}", layer, True, (1, i), ()) for i, layer in enumerate(model.layers)]
    inputs = [torch.randn(32, 64) for _ in range(3)]
    found: list[list[Tensor]] = []

    def run(x: Tensor) -> Tensor:
        y = model(x)
        found[-1].append(y.detach().clone())
        return y.square().sum()

    for backward in (False, True):
        for shelf in (Shelf(), Shelf(tmp_path, 0)):
            model.table, walk = None, Walk(Resident(model, parts, "cpu"), shelf)
            xs = [x.clone().requires_grad_(backward) for x in inputs]
            runs = [partial(run, x) for x in xs]
            found.append([])
            for visit in walk.gradients(runs) if backward else walk.forward(runs):
                visit.run()
            found[-1] += [x.grad for x in xs if x.grad is not None]
        assert all(torch.equal(a, b) for a, b in zip(*found[-2:], strict=True)) and shelf.written
    assert len(found[-1]) == 2 * len(inputs) and not list(tmp_path.iterdir())


def test_batches_that_go_ahead_end_at_the_last_experts() -> None:
    walk, ahead = walk_of("olmoe", False), []

    def show(batch: dict[str, Tensor]) -> None:
        walk.model(**model_inputs(batch), use_cache=False)

    some = [partial(show, batch) for batch in shown("olmoe")]
    for visit in walk.forward(some[:1], ahead=some):
        ahead.append(sum(1 for _ in visit.ahead()))
        assert sum(1 for _ in visit.each()) == 1
    assert ahead == [2, 2, 2, 0]  # the embedding, two layers, the head


def test_eval_walks_the_original_where_both_do_not_fit(tmp_path: Path) -> None:
    text = tiny.write_text(tmp_path / "text.txt")
    out, _ = made.packed("qwen3_vl_moe")
    with silence():
        whole, walked = (
            evaluate(out, made.source("qwen3_vl_moe"), [text], window=32, max_memory=limit) for limit in (None, 1)
        )
    assert whole == walked and whole["kl"] > 0 and whole["rows"] > 3


# ---------------------------------------------------------------------------------------------- second derivatives


def curved(walk: Walk, scene: Scene) -> Tensor:
    """v * Hv of each batch, layer, expert and projection, by probes."""
    prober: Any = hutchinson.Prober(scene, walk)
    prober.counts.see = lambda *routing: None  # an encoder's and a decoder's tokens are two things
    losses = [partial(square, walk, batch) for batch in scene.batches for _ in range(hutchinson.PROBES)]
    with watch(walk.model, prober), sdpa_kernel(SDPBackend.MATH):
        for visit in walk.curvatures(losses):
            for _ in visit.each():
                if visit.backward:
                    prober.take()
    return torch.from_numpy(prober.samples_SI(len(losses)))


def square(walk: Walk, batch: dict[str, Tensor]) -> Tensor:
    return speaker(walk.model)(**model_inputs(batch), use_cache=False).logits.square().mean()


def twice(walk: Walk, scene: Scene) -> Tensor:
    """The same, plainly: the gradient by all experts' weights, differentiated along the same signs."""
    samples = []
    pairs = model_layers(scene.spec, walk.model)
    owned = {layer.layer: stored(module) for layer, module in pairs}  # once, where layers share them
    weights = [w for ws in owned.values() for w in ws]
    for w in weights:
        w.requires_grad_(True)
    for number in range(len(scene.batches) * hutchinson.PROBES):
        batch, probe = divmod(number, hutchinson.PROBES)
        v: list[Tensor] = []
        for layer, module in {layer.layer: (layer, module) for layer, module in pairs}.values():
            place = (scene.seed, batch, probe, layer.layer)
            signs = {
                p: torch.stack(
                    [hutchinson.signs((*place, e, i), *layer.shapes[p], "cpu") for e in range(layer.experts)]
                )
                for i, p in enumerate(layer.projections)
            }
            matrices = views(module, stored(module))
            v += torch.autograd.grad([matrices[p] for p in signs], stored(module), list(signs.values()))
        with watch(walk.model, plain_forward), sdpa_kernel(SDPBackend.MATH):
            loss = square(walk, scene.batches[batch])
        g = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
        hv = iter(torch.autograd.grad(g, weights, v, materialize_grads=True))
        signed = iter(v)
        by_layer = {}
        for layer, module in {layer.layer: (layer, module) for layer, module in pairs}.values():
            product = views(module, [next(signed) * next(hv) for _ in stored(module)])
            by_layer[layer.layer] = torch.stack([product[p].double().sum((1, 2)) for p in layer.projections], 1)
        zeros = {x.layer: torch.zeros(x.experts, len(x.projections)) for x in scene.spec.layers}
        samples.append(torch.cat([by_layer.get(n, zeros[n]).flatten() for n in zeros]))
    for w in weights:
        w.requires_grad_(False)
    return torch.stack(samples).detach()


@pytest.mark.parametrize(
    "family", [f if f in ("olmoe", "qwen3_vl_moe") else pytest.param(f, marks=pytest.mark.slow) for f in families()]
)
def test_every_family_curves_as_in_memory(family: str, tmp_path: Path) -> None:
    """Text and pictures, in memory and on disk, against second derivatives by the weights themselves."""
    model = model_of(family).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    model, job = model.float(), open_job(tmp_path / "source", Options())
    batches = tuple(b for b in (text_inputs(model), picture_inputs(model)) if b is not None)
    scene, parts = Scene(job.folder, job.spec, (), batches=batches), partial(source_parts, job.folder, job.spec)
    try:
        walks = [Walk(parts(attention="eager"), shelf) for shelf in (Shelf(), Shelf(tmp_path, 0))]
        found = [curved(walk, scene) for walk in walks]
    except CannotWalk:
        return
    assert walks[1].shelf.written and sorted(tmp_path.iterdir()) == [tmp_path / "source"]
    whole = Walk(parts(attention="eager", whole=True))
    wanted = twice(whole, scene)
    assert float(wanted.abs().max()) > 0
    for one in (curved(whole, scene), *found):
        assert float((one - wanted).norm() / wanted.norm()) < 2e-6


@pytest.mark.parametrize("kind", ["embedded", "mixtral"])
def test_second_derivatives_of_the_loss_walked(kind: str, tmp_path: Path) -> None:
    whole, walked = (hutchinson.sense(scene_of(kind, walked, "rtn", tmp_path)) for walked in (False, True))
    for name in ("score_I", "stderr_I"):
        assert getattr(walked, name) == pytest.approx(getattr(whole, name), rel=1e-4, abs=1e-6)
    assert np.array_equal(whole.tokens_LE, walked.tokens_LE) and np.abs(whole.score_I).max() > 1e-3


def loads_of(work: Callable[[], Any]) -> list[str]:
    """The folders that `work` loads whole."""
    found: list[str] = []

    def counting(folder: Path, *args: Any) -> Any:
        found.append(str(folder))
        return load_model(folder, *args)

    with pytest.MonkeyPatch.context() as patch, silence():
        patch.setattr(mopeq.models, "load_model", counting)
        work()
    return found


def test_ids_moved_to_an_embedding_that_is_not_loaded() -> None:
    """Llama 4's text model moves ids to where it sees the embedding's weight: on meta they would say nothing."""
    batches, found = shown("olmoe"), []
    for whole in (True, False):
        walk = walk_of("olmoe", whole)
        decoder, weight = walk.model.model, walk.model.get_input_embeddings()
        plain = decoder.forward
        decoder.forward = lambda input_ids, plain=plain, weight=weight, **more: plain(
            input_ids=input_ids.to(weight.weight.device), **more
        )
        found.append(logits(walk, batches))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_made_beside_a_layer_that_is_not_loaded_is_refused() -> None:
    walk = walk_of("olmoe", False)
    decoder, weight = walk.model.model, walk.model.get_input_embeddings()
    plain = decoder.forward
    decoder.forward = lambda input_ids, **more: plain(
        input_ids=torch.zeros_like(input_ids, device=weight.weight.device), **more
    )
    with pytest.raises(CannotWalk, match=r"embed_tokens is given"):
        logits(walk, shown("olmoe"))


def test_state_that_crosses_layers_is_refused() -> None:
    """A layer that changes what it was given cannot be run again for its gradients."""
    walk = walk_of("olmoe", False)
    layer = next(part for part in walk.parts.parts if part.layers).module
    plain = layer.forward
    layer.forward = lambda hidden, *args, **kwargs: plain(hidden.mul_(1.5), *args, **kwargs)
    with pytest.raises(CannotWalk, match="layers.0"):
        gradients(walk, shown("olmoe"))
    bending = walk.curvatures([partial(square, walk, batch) for batch in shown("olmoe")])
    with pytest.raises(CannotWalk, match=r"layers\.0 changes"):
        all(visit.run() is None for visit in bending)
    layer.forward = plain
    assert logits(walk_of("olmoe", False), shown("olmoe"))[0].isfinite().all()


def test_a_batch_that_fails_ends_the_walk() -> None:
    """The error comes out, no thread stays behind, and the model is as it was."""
    walk = walk_of("olmoe", False)
    before = {p.name: p.module.forward for p in walk.parts.parts}
    with pytest.raises(IndexError):
        logits(walk, (*shown("olmoe"), {"input_ids": torch.tensor([[10**6]])}))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batch ")]
    assert all(p.module.forward == before[p.name] for p in walk.parts.parts)
    assert all(t.is_meta for p in walk.parts.parts if p.streamed for t in p.module.parameters())


@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss", "qwen3_vl_moe", "deepseek_v2"])
def test_read_back_takes_a_few_experts_of_every_format(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison holds, loaded or walked; and it fails where a stored matrix is taken for another one's."""
    out, _ = made.packed(kind)
    spec, map_ = open_job(made.source(kind), Options()).spec, read_map(out)
    monkeypatch.setattr(readback, "FEW", 2)
    pairs = [(layer, None) for layer in spec.layers]
    monkeypatch.setattr(readback, "is_stacked", lambda layer, module: True)
    few = readback.few_experts(pairs, map_, 0)
    for layer in spec.layers:
        assert 2 <= len(few[layer.layer]) < layer.experts
        for p in layer.projections:
            found, all_ = (
                {map_[LinearId(layer.layer, e, p)] for e in s} for s in (few[layer.layer], range(layer.experts))
            )
            assert found == all_
    for loads in (True, False):
        with silence():
            away = readback.read_back(made.source(kind), out, spec, map_, None, 0, loads)
        assert away < 1e-4
    original = readback.dense_layer

    def swapped(reader: Any, spec: Any, layer: Any, map_: Any, only: str) -> Any:
        """Gate's and up's places in the source exchanged, in the last layer alone."""
        if layer == spec.layers[-1]:
            places = dict(layer.places)
            places["gate"], places["up"] = places["up"], places["gate"]
            layer = replace(layer, places=places)
        return original(reader, spec, layer, map_, only)

    monkeypatch.setattr(readback, "dense_layer", swapped)
    with pytest.raises(MopeqError, match="differ"), silence():
        readback.read_back(made.source(kind), out, spec, map_, None, 0, False)


@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_model_is_walked_again_and_again(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts let go of what kernels made of them, and nobody makes the stored tensors of that, layer by layer: but
    for an embedding that a head shares, which stays, once a pass."""
    source, out = tiny.write(tmp_path / "source", "olmoe", tie_word_embeddings=tied), tmp_path / "out"
    with silence():
        quantize(source, out, other_bits=8)
    spec, ids = open_job(source, Options()).spec, torch.arange(5, 25)[None]
    wanted = readback.loaded_logits(out, ids, spec, {})
    every = {layer.layer: range(layer.experts) for layer in spec.layers}
    parts = readback.packed_parts(out, spec, every)
    taken: list[tuple[int, int]] = []
    original = tiles.take_out
    monkeypatch.setattr(tiles, "take_out", lambda *given: (taken.append(given[2]), original(*given)))
    for i in range(3):
        assert torch.equal(readback.walked_logits(parts, ids), wanted)
        assert taken == [parts.model.get_input_embeddings().shape] * (i if tied else 0)
        streamed = [t for p in parts.parts if p.streamed for t in (*p.module.parameters(), *p.module.buffers())]
        assert all(t.is_meta for t in streamed if t.numel() > 1000)

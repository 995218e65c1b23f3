"""Maps tried before one is taken: their KL against a plain computation, walked or not, and what follows from it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import made
import pytest
import tiny
import torch

from mopeq.checks import load_calibration
from mopeq.deciding import decide, solve
from mopeq.job import Job, open_job, scene_of, sense_digest, source_parts
from mopeq.models import load_model
from mopeq.nouns import PrecisionMap, make_map
from mopeq.options import Options
from mopeq.progress import silence
from mopeq.rundir import Kept, RunDir
from mopeq.seam import model_layers, weights
from mopeq.sense.labels import predicting, predicting_logits
from mopeq.sense.quadratic import chosen_candidates
from mopeq.sense.trial import Trial, trial
from mopeq.stages import quantize, sense
from mopeq.tensors import QWeight


def asked(folder: Path, **more: object) -> dict[str, object]:
    calib = (tiny.write_text(folder / "calib.txt", lines=400),)
    return {"avg_bits": 3, "method": "gptq", "calib": calib, "calib_tokens": 600} | more


def plain_map(job: Job) -> PrecisionMap:
    return make_map(job.spec, [job.options.formats[1] for _ in job.spec.linears], None)


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_losses_are_a_plain_computations_walked_or_not(method: str, tmp_path: Path) -> None:
    job = open_job(made.source("olmoe"), Options(**asked(tmp_path, method=method)))
    run = RunDir(tmp_path / "run")
    with silence():
        calibration = load_calibration(job)
        sensitivity = sense(job, run, calibration)
        assert calibration is not None
        scene, batches = scene_of(job, run, sense_digest(job, calibration), calibration), calibration.batches
        maps = (solve(job, sensitivity), plain_map(job))
        assert maps[0].digest != maps[1].digest
        found = trial(scene, *maps, batches, False)
        walked = trial(replace(scene, parts=partial(source_parts, job)), *maps, batches, False)
        assert trial(replace(scene, kept=RunDir(tmp_path / "none").kept("x")), *maps, batches, False) is None
    assert found is not None and walked is not None and 0 < found.error < found.map_kl + found.uniform_kl
    assert (found.map_kl, found.uniform_kl) == pytest.approx((walked.map_kl, walked.uniform_kl), rel=1e-6)
    model = load_model(job.folder, torch.float32, "cpu")
    said, wanted = [predicting_logits(model, b, "cpu").double().log_softmax(-1) for b in batches], []
    with torch.no_grad():
        for map_ in maps:
            for layer, module in model_layers(job.spec, model):
                chosen = chosen_candidates(scene.kept, layer, map_, job.options.formats)
                assert chosen is not None
                for i, parts in chosen[0].items():
                    q = QWeight.unpack(parts, map_[i], *layer.shapes[i.projection])
                    weights(module)[i.projection][i.expert].copy_(q.dequantize())
            rows = []
            for b, p in zip(batches, said, strict=True):
                kl = (p.exp() * (p - predicting_logits(model, b, "cpu").double().log_softmax(-1))).sum(-1)
                rows += [kl[predicting(b).nonzero()[:, 0] == r].mean() for r in range(len(b["input_ids"]))]
            wanted.append(float(torch.stack(rows).mean()))
    assert (found.map_kl, found.uniform_kl) == pytest.approx(wanted, rel=1e-4)


def test_a_map_is_taken_if_it_wins_by_more_than_chance(tmp_path: Path) -> None:
    job = open_job(made.source("olmoe"), Options(**asked(tmp_path)))
    with silence():
        sensitivity = sense(job, RunDir(tmp_path / "run"), load_calibration(job))
    best = solve(job, sensitivity).digest
    for found, wins in (
        (Trial(0.8, 1.0, 0.05, 512, True), True),
        (Trial(0.8, 1.0, 0.15, 512, True), False),
        (Trial(1.1, 1.0, 0.01, 512, True), False),
    ):
        map_, notes = decide(job, sensitivity, lambda ours, theirs, found=found: found)
        assert (map_.digest == best) == wins and ("every matrix gets" in notes[-1]) != wins
        assert "512 tokens" in notes[0] and "neither was made from" in notes[0]


def test_a_trial_that_the_disk_lacks_room_for_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Kept, "room", 0)
    quantize(made.source("olmoe"), tmp_path / "out", **asked(tmp_path))
    assert "allocate: the map is not tried: of what sensing quantized not all is on disk" in capsys.readouterr().err


def test_the_trial_is_of_other_text_and_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line tries its map on further tokens of the data; the same command, killed later, need not do it again."""
    shown: list[torch.Tensor] = []

    def look(scene, map_, uniform, batches, fresh):  # type: ignore[no-untyped-def]
        shown.extend(b["input_ids"] for b in batches)
        assert not any(
            torch.equal(r, o) for b in batches for r in b["input_ids"] for s in scene.batches for o in s["input_ids"]
        )
        return trial(scene, map_, uniform, batches, fresh)

    monkeypatch.setattr("mopeq.sense.trial.trial", look)
    options = asked(tmp_path, run=tmp_path / "run")
    with silence():
        first = quantize(made.source("olmoe"), tmp_path / "one", **options)
        assert shown and list((tmp_path / "run" / "trials").glob("*.json"))
        shown.clear()
        second = quantize(made.source("olmoe"), tmp_path / "two", **options)
    assert not shown and first["map"] == second["map"] and first["notes"] == second["notes"]
    assert any("neither was made from" in note for note in first["notes"])

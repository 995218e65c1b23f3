"""The run directory: what is saved reads back, what is damaged is named, and one run at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from headers import olmoe
from warm import SOURCES

from mopeq.errors import BadInput
from mopeq.nouns import Format, PrecisionMap, Sensitivity, make_map
from mopeq.rundir import Kept, RunDir, free_bytes, read_sensitivity, stage_digest

SPEC = olmoe(layers=2, experts=3)
FORMATS = (Format(2), Format(3, 32), Format(4, 64, "s"))


def sensitivity(full: bool) -> Sensitivity:
    rng = np.random.default_rng(0)
    linears = tuple(i for i, _ in SPEC.linears)
    cost_IF = rng.lognormal(size=(len(linears), len(FORMATS)))
    if not full:
        return Sensitivity("fisher", linears, FORMATS, cost_IF)
    return Sensitivity(
        "hutchinson",
        linears,
        FORMATS,
        cost_IF,
        score_I=rng.normal(size=len(linears)),
        stderr_I=rng.lognormal(size=len(linears)),
        tokens_LE=rng.integers(0, 99, (2, 3)),
        tokens_by_modality={"text": rng.integers(0, 9, (2, 3)), "image": rng.integers(0, 9, (2, 3))},
        unit="nats/token",
        data_digest="abc",
        notes=("expert 3 of layer 1 saw no token",),
    )


@pytest.mark.parametrize("full", [True, False])
def test_a_sensitivity_reads_back(full: bool, tmp_path: Path) -> None:
    run, s = RunDir(tmp_path / "run"), sensitivity(full)
    assert run.load_sensitivity("d") is None
    run.save_sensitivity("d", s)
    again = run.load_sensitivity("d")
    assert again is not None
    for field in fields(Sensitivity):
        mine, other = getattr(s, field.name), getattr(again, field.name)
        if field.name == "tokens_by_modality":
            assert mine.keys() == other.keys() and all(np.array_equal(mine[k], other[k]) for k in mine)
        elif isinstance(mine, np.ndarray):
            assert np.array_equal(mine, other) and mine.dtype == other.dtype
        else:
            assert mine == other, field.name


def test_the_same_sensitivity_is_the_same_bytes(tmp_path: Path) -> None:
    """Times would make a resumed run differ from an undisturbed one."""
    for name in ("a", "b"):
        RunDir(tmp_path / name).save_sensitivity("d", sensitivity(True))
    first, second = (RunDir(tmp_path / n).sensitivity_path("d").read_bytes() for n in ("a", "b"))
    assert first == second


@pytest.mark.parametrize("keep", [0, 1, 10, 100, -1])
def test_a_cut_sensitivity_is_named(keep: int, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.save_sensitivity("d", sensitivity(True))
    path = run.sensitivity_path("d")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BadInput) as error:
        read_sensitivity(path)
    assert str(path) in error.value.line and "delete" in error.value.hint and "\n" not in error.value.line


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """An array of objects would run code when loaded."""
    run = RunDir(tmp_path)
    run.save_sensitivity("d", sensitivity(False))
    path = run.sensitivity_path("d")
    with np.load(path) as arrays:
        kept = dict(arrays)
    np.savez(path, **kept | {"cost_IF": np.array([{"a": 1}], dtype=object)})
    with pytest.raises(BadInput):
        read_sensitivity(path)
    assert all(name.endswith(".npy") for name in zipfile.ZipFile(path).namelist())


def test_a_map_reads_back(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    map_ = make_map(SPEC, [FORMATS[i % 3] for i in range(len(SPEC.linears))])
    run.save_map(map_.digest, map_, {"why": "test"})
    body = json.loads(run.map_path(map_.digest).read_text())
    assert body["made_from"] == {"why": "test"}
    assert PrecisionMap.from_json(body) == map_ == run.load_map(map_.digest)
    assert run.load_map("none") is None


def test_events_are_lines(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "new")
    run.event("start", job="x")
    run.event("done")
    rows = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows] == ["start", "done"] and rows[0]["job"] == "x" and "time" in rows[0]


def test_digests_follow_every_input() -> None:
    base = stage_digest("sense", source="a", seed=0)
    others = [
        stage_digest("sense", source="a", seed=1),
        stage_digest("sense", source="b", seed=0),
        stage_digest("allocate", source="a", seed=0),
        stage_digest("sense", source="a", seed=0, more=None),
    ]
    assert len({base, *others}) == 5 and base == stage_digest("sense", seed=0, source="a") and len(base) == 16


def test_what_a_killed_run_left_waiting_is_cleared(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    left = run.scratch / "tmp123" / "0.border"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"hidden states")
    with run.locked():
        assert not left.exists()


def test_one_run_at_a_time_and_the_lock_dies_with_its_holder(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run.locked():
        with pytest.raises(BadInput, match="another run is at work"), RunDir(run.path).locked():
            pass
        code = (
            "from pathlib import Path\nfrom mopeq.rundir import RunDir\n"
            f"with RunDir(Path({str(run.path)!r})).locked(): pass"
        )
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(SOURCES)}
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert ran.returncode != 0 and "another run is at work" in ran.stderr
    with run.locked():
        pass
    killed = (
        "import os, signal\nfrom pathlib import Path\nfrom mopeq.rundir import RunDir\n"
        f"with RunDir(Path({str(run.path)!r})).locked():\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", killed], env=environment).returncode == -9
    with run.locked():
        pass


def test_free_disk_of_a_place_that_is_not_there_yet(tmp_path: Path) -> None:
    stats = os.statvfs(tmp_path)
    found = free_bytes(tmp_path / "not" / "yet")
    assert 0 < found <= stats.f_blocks * stats.f_frsize


# ------------------------------------------------------------------------------------------- items of a stage


def test_items_are_kept_until_their_stage_is_there(tmp_path: Path) -> None:
    kept = RunDir(tmp_path).kept("abc")
    assert kept.load("batch-0") is None and not kept.has("batch-0")
    arrays = {"a": np.arange(6.0).reshape(2, 3), "of.two": np.array([1, 2], np.uint8)}
    kept.save("batch-0", arrays)
    found = kept.load("batch-0")
    assert found is not None and kept.has("batch-0") and set(found) == set(arrays)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)
    assert RunDir(tmp_path).kept("other").load("batch-0") is None
    kept.drop()
    assert not kept.has("batch-0") and not list((tmp_path / "sensitivity").iterdir())


def test_some_items_outlive_the_others(tmp_path: Path) -> None:
    kept = RunDir(tmp_path).kept("abc")
    for name in ("batch-0", "candidates-3", "candidates-12"):
        kept.save(name, {"a": np.ones(1)})
    kept.drop(but="candidates-")
    assert [kept.has(name) for name in ("batch-0", "candidates-3", "candidates-12")] == [False, True, True]
    Kept().drop(but="candidates-")
    RunDir(tmp_path).kept("never").drop(but="candidates-")


def test_a_damaged_item_is_named(tmp_path: Path) -> None:
    kept = RunDir(tmp_path).kept("abc")
    kept.save("layer-1", {"mean": np.ones(50)})
    path = next(tmp_path.rglob("layer-1.npz"))
    raw = path.read_bytes()
    for data in (raw[:40], b"", raw[:-30], raw[:60] + b"xx" + raw[62:]):
        path.write_bytes(data)
        with pytest.raises(BadInput, match=r"layer-1\.npz") as refused:
            kept.load("layer-1")
        assert "made again" in refused.value.hint


def test_nothing_is_kept_without_a_folder() -> None:
    kept = Kept()
    kept.save("batch-0", {"a": np.ones(1)})
    assert kept.load("batch-0") is None and not kept.has("batch-0") and kept.room > 1 << 60
    kept.drop()


def test_room_for_items(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    assert abs(kept.room - free_bytes(tmp_path)) < 1 << 30


def test_checks_that_went_well_are_remembered(tmp_path: Path) -> None:
    assert not RunDir(tmp_path).has_done("abc")
    RunDir(tmp_path).set_done("abc")
    assert RunDir(tmp_path).has_done("abc") and not RunDir(tmp_path).has_done("abd")

"""`--ray` on a cluster of two nodes, one of which is killed in the middle: the same bytes as on one machine. And the
curve: what each of 1, 2 and 4 nodes of one thread has to do (`-m slow -s -k nodes_share`)."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from made import digests, quantize, room, source
from warm import SOURCES

from mopeq import cluster as ours
from mopeq.cluster import Order, parts
from mopeq.errors import BadInput
from mopeq.progress import silence

DATA: dict[str, Any] = {"sensitivity": "fisher", "method": "gptq", "calib_tokens": 6144, "avg_bits": 2.6}


def test_items_are_dealt_out_whole() -> None:
    for items in range(9):
        for count in range(1, 6):
            dealt = parts(range(items), count)
            assert [i for part in dealt for i in part] == list(range(items)) and all(dealt)
            assert len(dealt) == min(count, items)
            assert max(map(len, dealt), default=0) - min(map(len, dealt), default=0) <= 1


def test_without_ray_or_a_cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BadInput, match="not installed") as refused, silence():
        quantize(source("olmoe"), tmp_path / "out", ray="auto")
    assert "mopeq[ray]" in refused.value.hint


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without CPUs; nodes are the tests' to add."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'mopeq[ray]'")
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["PYTHONPATH"] = os.pathsep.join([*SOURCES, str(Path(__file__).parent)])  # workers import `timed`
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="session")
def alone() -> dict[str, str]:
    out = room() / "alone"
    with silence():
        quantize(source("olmoe", num_hidden_layers=4), out, **asked())
    return digests(out)


def asked() -> dict[str, Any]:
    path = room() / "cluster.txt"
    return DATA | {"calib": (path if path.exists() else tiny.write_text(path),)}


def when(there: Callable[[], bool], act: Callable[[], object], happened: list[float]) -> threading.Thread:
    """Act as soon as something is there, in a thread."""

    def watch() -> None:
        end = time.monotonic() + 300
        while time.monotonic() < end and not there():
            time.sleep(0.005)
        act()
        happened.append(time.monotonic())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage", ["sensitivity", "quantized"])
def test_a_node_is_killed(stage: str, cluster: Any, alone: dict[str, str], tmp_path: Path) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    out, happened = tmp_path / "out", list[float]()
    folder = out / ".mopeq" / stage
    kind = "*/*.npz" if stage == "sensitivity" else "*/*.safetensors"
    thread = when(
        lambda: any(folder.glob(kind)), lambda: cluster.remove_node(nodes.pop(), allow_graceful=False), happened
    )
    with silence():
        quantize(source("olmoe", num_hidden_layers=4), out, ray=cluster.address, **asked())
    ended = time.monotonic()
    thread.join()
    assert happened and happened[0] < ended, "the node outlived the run"
    assert digests(out) == alone
    for node in nodes:
        cluster.remove_node(node)


@pytest.mark.timeout(900)
def test_without_data_and_with_a_refusal(cluster: Any, tmp_path: Path) -> None:
    """Data-free layers are shared too; what a task refuses is told as if it had been refused here."""
    from made import copy
    from safetensors.torch import load_file, save_file

    node = cluster.add_node(num_cpus=1)
    with silence():
        quantize(source("olmoe"), tmp_path / "here")
        quantize(source("olmoe"), tmp_path / "there", ray=cluster.address)
        assert digests(tmp_path / "here") == digests(tmp_path / "there")
        spoiled = copy(source("olmoe"), tmp_path / "spoiled")
        for shard in spoiled.glob("*.safetensors"):
            tensors = load_file(shard)
            for name in tensors:
                if "layers.1.mlp.experts.4.up" in name:
                    tensors[name][0, 0] = float("nan")
            save_file(tensors, shard, metadata={"format": "pt"})
        with pytest.raises(BadInput, match="NaN"):
            quantize(spoiled, tmp_path / "none", ray=cluster.address)
    cluster.remove_node(node)


def timed(order: Order) -> tuple[int, str, str] | None:
    """`work`, with a note beside the run of the CPU seconds that this task took its worker."""
    from mopeq.cluster import work  # not what the test put in its place

    started = time.process_time()
    said = work(order)
    stage = "quantize" if order.map is not None else "batches" if order.batches else "candidates"
    facts = {"stage": stage, "first": (*order.layers, *order.batches)[0], "cpu": time.process_time() - started}
    note = order.run.parent.parent / f"task-{stage}-{facts['first']}.json"
    note.write_text(json.dumps(facts))
    return said


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nodes_share_the_work(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes on 1, 2 and 4 nodes of one thread. Printed: CPU seconds of each task and of the machine that asks;
    `path` is their sum when tasks of a stage run side by side, so what a run takes where every node has a core."""
    import torch

    model = source("olmoe", num_hidden_layers=8, hidden_size=192, intermediate_size=128, num_experts=12)
    text = tiny.write_text(tmp_path / "calib.txt", lines=200)
    asked = DATA | {"calib": (text,), "calib_tokens": 16384}
    monkeypatch.setattr(ours, "work", timed)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        started = time.process_time()
        with silence():
            quantize(model, tmp_path / "alone", **asked)
        print(json.dumps({"nodes": 0, "path": round(time.process_time() - started, 1)}))
        for count in (1, 2, 4):
            nodes = [cluster.add_node(num_cpus=1) for _ in range(count)]
            place = tmp_path / str(count)
            clock, started = time.monotonic(), time.process_time()
            with silence():
                quantize(model, place / "out", ray=cluster.address, **asked)
            asking, seconds = time.process_time() - started, time.monotonic() - clock
            tasks: dict[str, list[float]] = {}
            for facts in (json.loads(note.read_text()) for note in sorted(place.glob("task-*.json"))):
                tasks.setdefault(facts["stage"], []).append(round(facts["cpu"], 1))
            path = asking + sum(max(cpu) for cpu in tasks.values())
            shown = {"nodes": count, "path": round(path, 1), "asking": round(asking, 1), "tasks": tasks}
            print(json.dumps(shown | {"seconds": round(seconds)}))
            # what sensing quantized is not quantized again
            assert set(tasks) == {"candidates", "batches"} and all(len(x) == count for x in tasks.values())
            assert digests(place / "out") == digests(tmp_path / "alone")
            for node in nodes:
                cluster.remove_node(node)
    finally:
        torch.set_num_threads(before)

"""`--ray` on a cluster of two nodes, one of which is killed in the middle: the same bytes as on one machine."""

from __future__ import annotations

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

from mopeq.cluster import parts
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
    os.environ["PYTHONPATH"] = os.pathsep.join(SOURCES)
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.fixture(scope="module")
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

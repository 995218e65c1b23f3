"""What making a checkpoint takes: told from headers, not below what was measured and not far above it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import made
import pytest
import torch
from headers import olmoe

from mopeq.checks import check_memory
from mopeq.errors import BadInput
from mopeq.job import open_job
from mopeq.memory import PROCESS, layer_bytes, loaded_bytes, shelf_bytes, whole_bytes
from mopeq.options import Options
from mopeq.seam import plain_forward, watch
from mopeq.sense.hutchinson import Prober, mean_loss
from mopeq.sense.labels import sampled_loss
from mopeq.sense.scene import Scene, shows
from mopeq.walk.parts import source_parts
from mopeq.walk.shelf import Shelf, return_freed
from mopeq.walk.walking import Walk

DATA_FREE: dict[str, Any] = {"sensitivity": "hessian", "method": "rtn"}
GIB = 1 << 30


@pytest.mark.parametrize(
    ("shape", "options", "measured"),
    [  # peak of `mopeq quantize --max-memory` on a Qwen3-MoE of this shape and two layers, walked, GiB
        ({"experts": 256, "hidden": 1024, "inner": 512, "vocab": 320}, {"other_bits": 8}, 0.94),
        ({"experts": 256, "hidden": 1024, "inner": 512, "vocab": 320}, {"bits": "8", "avg_bits": 8}, 1.70),
        ({"experts": 8, "hidden": 1024, "inner": 64, "vocab": 300_000}, {}, 2.24),
        ({"experts": 8, "hidden": 1024, "inner": 64, "vocab": 300_000}, {"other_bits": 4}, 1.96),
    ],
)
def test_without_data(shape: dict[str, int], options: dict[str, Any], measured: float) -> None:
    told = layer_bytes(olmoe(**shape), Options(**DATA_FREE, **options)) / GIB
    assert measured <= told <= 1.35 * measured


@pytest.mark.parametrize("tokens", [24576, 65536])
def test_many_tokens(tokens: int) -> None:
    """The same of an OLMoE by `fisher` and `gptq`, with nothing but tokens that is large: 0.95 GiB for either count,
    where 24,576 that waited in memory took 2.64."""
    shape = {"experts": 2, "hidden": 2048, "inner": 16, "vocab": 320}
    told = layer_bytes(olmoe(**shape), Options(calib_tokens=tokens, bits="2,3")) / GIB
    assert 0.95 <= told <= 1.7 * 0.95


def test_second_derivatives() -> None:
    """4.88 GiB were measured for `hutchinson` and `rtn` on 2,048 tokens and three layers of DeepSeek-V2-Lite, two of
    them MoE (4.23 with one, whose inputs have no speed); of an OLMoE with nothing large but 8,192 tokens 1.00."""
    asked: dict[str, Any] = {"sensitivity": "hutchinson", "method": "rtn"}
    wide = {"experts": 64, "hidden": 2048, "inner": 1408, "vocab": 102_400, "layers": 1}
    assert 4.88 <= layer_bytes(olmoe(**wide), Options(**asked)) / GIB <= 1.3 * 4.88
    narrow = {"experts": 2, "hidden": 2048, "inner": 16, "vocab": 320}
    assert 1.0 <= layer_bytes(olmoe(**narrow), Options(**asked)) / GIB <= 3.4
    assert whole_bytes(olmoe(**wide), Options(**asked)) > whole_bytes(olmoe(**wide), Options(**asked, calib_tokens=256))


def test_a_whole_model_under_gradients() -> None:
    """9.51 GiB were measured where two layers of DeepSeek-V2-Lite, one of them MoE, were loaded for `fisher`; of a
    layer's graph of 2,048 tokens, eight experts each, 0.43 GiB at 2,048 channels and 128 inside, and 0.63 at 1,024."""
    asked: dict[str, Any] = {"sensitivity": "fisher", "method": "rtn"}
    wide = {"experts": 64, "hidden": 2048, "inner": 1408, "vocab": 102_400, "layers": 1}
    assert 9.0 <= whole_bytes(olmoe(**wide), Options(**asked, calib_tokens=2048)) / GIB <= 1.2 * 9.51
    for inner, measured in ((128, 0.43), (1024, 0.63)):
        shape = {"experts": 16, "hidden": 2048, "inner": inner, "vocab": 320, "layers": 40}
        with_graph, without = (
            whole_bytes(olmoe(**shape), Options(sensitivity=x, method="rtn")) for x in ("fisher", "error")
        )
        assert measured <= (with_graph - without) / 40 / GIB <= 1.5 * measured


def test_logits_are_counted() -> None:
    """2.2 times a batch's were measured with `fisher`, and 3.5 with `hutchinson`, the head among them."""
    spec = olmoe(experts=2, hidden=64, inner=16, vocab=300_000)
    for sensitivity, held in (("fisher", 2.2), ("hutchinson", 3.5)):
        told = layer_bytes(spec, Options(sensitivity=sensitivity, method="rtn")) - PROCESS
        assert 1.0 <= told / (held * 4 * 300_000 * 2048) <= 1.2


def test_waiting_tokens_take_disk_and_no_memory(tmp_path: Path) -> None:
    """There and back, some ahead: six times the tokens peak at what one batch takes more or less, where all wait in
    memory at all their hidden states; and on disk there is never more than is told."""
    folder = made.source("olmoe", hidden_size=128)
    few, many, (memory, _) = in_a_process_of_its_own(folder, tmp_path)
    states = 4 * 128 * 24 * TOKENS
    assert many[0] - few[0] < states // 2 and memory - many[0] > 3 * states
    told = shelf_bytes(open_job(folder, Options()).spec, 24 * TOKENS, 24 * TOKENS, True)
    assert 0.5 * told < many[1] <= told
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_speeds_take_disk_and_no_memory(tmp_path: Path) -> None:
    """The same for second derivatives: each batch twice, and with every state its speed."""
    folder = made.source("olmoe", hidden_size=512)
    few, many = in_a_process_of_its_own(folder, tmp_path, "[(2, Shelf(shelf, 0), 2), (10, Shelf(shelf, 0), 2)]")
    assert many[0] - few[0] < 4 * 512 * 10 * TOKENS // 2
    told = shelf_bytes(open_job(folder, Options()).spec, 10 * TOKENS, 0, True, probes=2)
    assert 0.5 * told < many[1] <= told


TOKENS = 2048  # of a batch
CASES = "[(4, Shelf(shelf, 0)), (24, Shelf(shelf, 0)), (24, Shelf())]"


def in_a_process_of_its_own(folder: Path, shelf: Path, cases: str = CASES) -> list[tuple[int, int]]:
    """What 4 and 24 batches take that wait on disk, and 24 in memory: other tests leave holes in a process's memory."""
    lines = (
        "import json, sys; from pathlib import Path; from test_memory import Shelf, walked\n"
        "folder, shelf = map(Path, sys.argv[1:])\n"
        f"print(json.dumps([walked(folder, *case) for case in {cases}]))\n"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", lines, str(folder), str(shelf)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    if "the system does not tell a peak" in ended.stderr:
        pytest.skip("the system does not tell a peak")
    assert ended.returncode == 0, ended.stderr
    return [tuple(found) for found in json.loads(ended.stdout.splitlines()[-1])]


def walked(folder: Path, count: int, shelf: Shelf, probes: int = 0) -> tuple[int, int]:
    """Bytes that the process grew by while so many batches, and as many ahead or all along probes, were walked; the
    most on disk."""
    job = open_job(folder, Options())
    batches = [{"input_ids": torch.full((8, TOKENS // 8), 5 + n)} for n in range(count)]
    walk = Walk(source_parts(job.folder, job.spec, attention="eager" if probes else None), shelf)
    generator = torch.Generator().manual_seed(0)
    on_disk = 0
    return_freed()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    except OSError:
        sys.exit("the system does not tell a peak")
    before = status("VmRSS")
    losses = [partial(sampled_loss, walk, b, generator) for b in batches]
    visits, watcher = walk.gradients(losses, shows(walk, batches)), plain_forward
    if probes:
        watcher = Prober(Scene(folder, job.spec, (), batches=tuple(batches)), walk)
        visits = walk.curvatures([partial(mean_loss, walk, b) for b in batches for _ in range(probes)])
    with watch(walk.model, watcher):
        for visit in visits:
            for _ in chain(visit.ahead(), visit.each()):
                if shelf.folder is not None:
                    on_disk = max(on_disk, sum(path.stat().st_size for path in shelf.folder.iterdir()))
    return status("VmHWM") - before, on_disk


def status(name: str) -> int:
    """Bytes, as the system tells them of this process."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def test_a_model_is_loaded_from_mapped_files() -> None:
    """4.54 GiB were measured where a checkpoint with an embedding of 300,000 words was loaded, its files among them."""
    spec = olmoe(experts=8, hidden=1024, inner=64, vocab=300_000)
    assert 4.54 <= loaded_bytes(spec, 0, None) / GIB <= 1.3 * 4.54
    assert whole_bytes(spec, Options(**DATA_FREE)) >= PROCESS + 6 * spec.params


def test_an_adapter_asks_for_all_experts() -> None:
    spec = olmoe(experts=256, hidden=256, inner=128)
    some, every = (layer_bytes(replace(spec, adapted=adapted), Options(**DATA_FREE)) for adapted in (False, True))
    assert every - some == 10 * spec.layers[0].params * (256 - 9) // 256


def test_a_refusal_by_a_byte_tells_bytes() -> None:
    folder = made.source("olmoe")
    need = layer_bytes(open_job(folder, Options(**DATA_FREE)).spec, Options(**DATA_FREE))
    check_memory(open_job(folder, Options(**DATA_FREE, max_memory=str(need))))
    with pytest.raises(BadInput, match=f"takes {need:,} bytes, --max-memory allows {need - 1:,}$"):
        check_memory(open_job(folder, Options(**DATA_FREE, max_memory=str(need - 1))))

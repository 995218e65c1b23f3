"""The CPU kernel against the reference in float64: every width, group and shape, every instruction set there is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernels import CASES, MODULES, distance, pack_module, routing, written_out

from mopeq.kernels import build, cpu, ref
from mopeq.kernels.choice import choose
from mopeq.nouns import Format
from mopeq.tensors import pack_bits, unpack_bits
from mopeq.verbs.layers import Shape, random_experts, random_routing

needs_library = pytest.mark.skipif(build.library()[0] is None, reason=f"no CPU kernel: {build.library()[1]}")
PALETTE = [Format(bits, group, scheme) for bits in range(1, 9) for group in (16, 48, 64) for scheme in "as"]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that torch hands out is full of NaN: what is not written, or read before that, shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert bool(torch.empty(5).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


def test_it_builds_where_there_is_a_compiler() -> None:
    """Else every test below would be skipped in silence."""
    assert (build.library()[0] is not None) == (build.compiler() is not None), build.library()[1]


@pytest.mark.slow
@pytest.mark.parametrize("cc", ["gcc", "clang"])
@pytest.mark.parametrize("file", [build.SOURCE, build.ROUND, build.GPTQ, build.FORMS], ids=lambda file: file.stem)
def test_each_compiler_understands_all_of_it(cc: str, file: Path, tmp_path: Path) -> None:
    """Clang only warns where it ignores what instructions a function is for."""
    if shutil.which(cc) is None:
        pytest.skip(f"no {cc}")
    flags = (*build.FLAGS, "-O1", "-c", "-Werror", "-Wno-unused-command-line-argument", "-o", str(tmp_path / "made.o"))
    done = subprocess.run([cc, *flags, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def levels() -> list[int]:
    lib = build.library()[0]
    return list(range(lib.mopeq_level() + 1)) if lib is not None else [0]


@needs_library
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", MODULES)
def test_agrees_with_the_reference(kind: str, case: str) -> None:
    packed, truth = pack_module(kind, CASES.index(case), PALETTE)
    truth["module"] = truth["module"].double()
    x, index, weight = routing(case, seed=CASES.index(case))
    wanted = written_out(kind, truth, x, index, weight)
    found = cpu.experts_forward(packed, x.float(), index, weight.float()).detach()
    assert found.dtype == torch.float32 and found.shape == x.shape and bool(torch.isfinite(found).all())
    assert distance(found, wanted) < 1e-5
    whole = cpu.kept_of(packed, cpu.of_experts)[0].whole
    assert (whole is not None) == (kind == "olmoe")  # the others' gates, biases and norms are torch's


def whole_layer(layer: Any, x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, level: int) -> torch.Tensor:
    """The layer's output by one call, twice, in memory full of NaN."""
    whole = cpu.kept_of(layer, cpu.of_experts)[0].whole
    assert whole is not None
    found = []
    for _ in range(2):
        found.append(torch.empty(len(x), layer.shapes["down"][0]))
        cpu.call(whole, x, index, weight, found[-1:], level=level)
        cpu._rooms.room.fill_(255)
    assert torch.equal(*found)
    return found[0]


SHAPES_OF_LAYERS = [  # hidden, inner, group
    (112, 37, 16), (100, 64, 32), (36, 129, 64), (65, 63, 48), (520, 200, 128), (640, 320, 80), (7, 1, 64),
    (1100, 128, 1024), (256, 192, 64),
]  # fmt: skip


@needs_library
@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("at", range(len(SHAPES_OF_LAYERS)))
def test_a_whole_layer_in_one_call(at: int, level: int) -> None:
    """Every width beside every other, tokens that share experts, choices twice or of experts that are elsewhere."""
    hidden, inner, group = SHAPES_OF_LAYERS[at]
    for tokens in (0, 1, 2, 3, 20):
        for scheme in "as":
            shape = Shape(hidden, inner, 9, 3)
            layer = random_experts(shape, tuple(range(1, 9)), group=group, seed=at + tokens, scheme=scheme)
            x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(at))
            index, weight = random_routing(shape, tokens, at)
            if tokens > 2:
                index[1, 1], index[0, 2], index[2, 0] = index[1, 0], -1, 9
            wanted = ref.experts_forward(layer, x.double(), index, weight.double())
            found = whole_layer(layer, x, index, weight, level)
            assert distance(found, wanted) < 1e-5, (tokens, scheme)


@needs_library
@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("times", [1e2, 1e3, 1e5])
def test_one_loud_input_does_not_drown_its_neighbours(times: float, level: int) -> None:
    """An input channel whose weights are 0, as of outliers that the model does not listen to."""
    layer = random_experts(Shape(200, 96, 4, 2), (3, 4))
    for p in ("gate", "up"):
        for tier in layer.tiers(p):
            assert tier.zeros is not None
            codes = unpack_bits(tier.codes, tier.format.bits, 200)
            codes[:, :, 5] = unpack_bits(tier.zeros, tier.format.bits, 96)[:, 0]
            tier.codes.copy_(pack_bits(codes, tier.format.bits))
    x = torch.randn(6, 200, generator=torch.Generator().manual_seed(1))
    x[:, 5] *= times
    index, weight = random_routing(Shape(200, 96, 4, 2), 6, 0)
    wanted = ref.experts_forward(layer, x.double(), index, weight.double())
    found = whole_layer(layer, x, index, weight, level)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


@needs_library
def test_a_copy_has_tables_of_its_own() -> None:
    layer = random_experts(Shape(128, 64, 4, 2), (3,))
    x, (index, weight) = torch.randn(2, 128), random_routing(Shape(128, 64, 4, 2), 2, 0)
    before = cpu.experts_forward(layer, x, index, weight)
    copied = deepcopy(layer)
    copied.use_tiers()
    for tier in copied.tiers("down"):
        tier.scale_bits.zero_()
    assert bool((cpu.experts_forward(copied, x, index, weight) == 0).all())
    layer.down_3g64a_tiles = torch.zeros_like(layer.get_buffer("down_3g64a_tiles"))  # other memory under the same name
    assert bool(before.any()) and bool((cpu.experts_forward(layer, x, index, weight) == 0).all())


@needs_library
def test_calls_from_several_threads_do_not_meet() -> None:
    shape = Shape(512, 256, 8, 2)
    layer = random_experts(shape, (2, 3, 4))
    x, (index, weight) = torch.randn(8, 512), random_routing(shape, 8, 0)
    wanted = [cpu.experts_forward(layer, x[t : t + 1], index[t : t + 1], weight[t : t + 1]) for t in range(8)]

    def call(t: int) -> bool:
        with torch.inference_mode():
            return all(
                torch.equal(cpu.experts_forward(layer, x[t : t + 1], index[t : t + 1], weight[t : t + 1]), wanted[t])
                for _ in range(50)
            )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(8)))


@needs_library
@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_group_and_odd_shape(bits: int, level: int) -> None:
    """Relative error of the norm, in and out of all remainders; outputs are NaN before."""
    for at, (hidden, group) in enumerate([(112, 16), (100, 32), (36, 64), (65, 48), (520, 128), (640, 80), (7, 64)]):
        for tokens in (1, 2, 3, 9):
            layer = random_experts(Shape(hidden, 37, 3, 2), (bits,), group=group, seed=at, scheme="as"[tokens % 2])
            x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(at))
            y = cpu.project(layer, ["up"], x, torch.full((tokens, 1), 2), level=level)["up"]
            wanted = x.double() @ layer.qweight(2, "up").dequantize(torch.float64).T
            assert float((y - wanted).norm() / wanted.norm()) < 2e-6, (hidden, group, tokens)


@needs_library
@pytest.mark.parametrize("kind", ["gpt_oss", "olmoe"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations(dtype: torch.dtype, kind: str) -> None:
    packed, truth = pack_module(kind, 3, PALETTE)
    x, index, weight = routing("many", seed=3)
    x = (x * 0.5).to(dtype)
    wanted = written_out(kind, truth, x, index, weight)
    found = cpu.experts_forward(packed.to(dtype), x, index, weight.float())
    assert found.dtype == dtype and distance(found, wanted) < (4e-3 if dtype == torch.float16 else 3e-2)


@needs_library
@pytest.mark.parametrize("level", levels())
def test_two_parts_lose_nothing_that_bfloat16_has(level: int) -> None:
    """Against float64 on the same rounded activations: less than a tenth of what rounding the result costs."""
    for bits in range(1, 9):
        layer = random_experts(Shape(520, 37, 3, 2), (bits,), group=(16, 32, 64, 128)[bits % 4])
        for tokens in (1, 2, 3, 9):
            x = torch.randn(tokens, 520, generator=torch.Generator().manual_seed(bits)).bfloat16().float()
            index, wanted = torch.full((tokens, 1), 2), x.double() @ layer.qweight(2, "up").dequantize(torch.float64).T
            y = cpu.project(layer, ["up"], x, index, 2, level)["up"]
            lost = (wanted.bfloat16() - wanted).norm()
            assert float((y - wanted).norm()) < 0.1 * lost < 1e-3 * float(wanted.norm()), (bits, tokens)


@needs_library
def test_the_same_bits_on_any_number_of_threads() -> None:
    layer = random_experts(Shape(256, 160, 16, 4), (2, 3, 4), seed=1)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    index, weight = random_routing(Shape(256, 160, 16, 4), 5, 1)
    before = torch.get_num_threads()
    try:
        answers = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            answers += [cpu.experts_forward(layer, x, index, weight) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, answers[0]) for a in answers)


@needs_library
def test_activations_that_are_not_finite_are_not_hidden() -> None:
    layer = random_experts(Shape(128, 64, 4, 2), (3,))
    x = torch.zeros(3, 128)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    index, weight = random_routing(Shape(128, 64, 4, 2), 3, 0)
    y = cpu.experts_forward(layer, x, index, weight)
    assert bool((y[0] == 0).all()) and bool(y[1].isnan().all()) and bool(y[2].isnan().all())


@needs_library
def test_auto_takes_it_for_few_tokens_only() -> None:
    shape = Shape(64, 32, 8, 2)
    layer = random_experts(shape, (3,))
    few, many = torch.zeros(2, 64), torch.zeros(8 * cpu.few(), 64)
    assert choose(layer, few, random_routing(shape, 2, 0)[0]) == "cpu"
    assert choose(layer, many, random_routing(shape, len(many), 0)[0]) == "torch"
    assert choose(layer, few.double(), random_routing(shape, 2, 0)[0]) == "torch"
    assert choose(layer, few.requires_grad_(), random_routing(shape, 2, 0)[0]) == "torch"


FORK = """
import os, torch
from mopeq.kernels import cpu
from mopeq.verbs.layers import Shape, random_experts
torch.set_num_threads(3)
layer, x = random_experts(Shape(256, 512, 4, 2), (3,)), torch.ones(1, 256)
def call():
    return cpu.project(layer, ["gate", "up"], x, torch.tensor([[1]]))["up"].numpy()
before = call()
child = os.fork()
if child == 0:
    os._exit(0 if (call() == before).all() else 3)
assert (call() == before).all()
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_library
def test_torch_s_own_threads_are_used() -> None:
    """Not threads that would take the cores from those which torch leaves waiting there."""
    code = (
        "import os, torch\n"
        "from mopeq.kernels.build import library, openmp\n"
        "from mopeq.verbs.layers import Shape, random_experts, random_routing\n"
        "torch.set_num_threads(3)\n"
        "torch.ones(1 << 20).exp()\n"  # wakes them
        "before = len(os.listdir('/proc/self/task'))\n"
        "assert library()[0] is not None and openmp()\n"
        "layer = random_experts(Shape(256, 512, 4, 2), (3,))\n"
        "for _ in range(3): layer(torch.ones(1, 256), *random_routing(Shape(256, 512, 4, 2), 1, 0))\n"
        "assert len(os.listdir('/proc/self/task')) == before\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], timeout=100, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@needs_library
def test_after_a_fork_one_thread_does_it() -> None:
    assert subprocess.run([sys.executable, "-c", FORK], timeout=100).returncode == 0


CHILD = """
import torch
from mopeq.verbs.layers import Shape, random_experts, random_routing
layer = random_experts(Shape(64, 32, 8, 2), (3,))
print(float(layer(torch.ones(1, 64), *random_routing(Shape(64, 32, 8, 2), 1, 0)).norm()))
"""


def run_child(tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    full: Any = os.environ | {"XDG_CACHE_HOME": str(tmp_path)} | env
    return subprocess.run([sys.executable, "-c", CHILD], env=full, capture_output=True, text=True, check=True)


def test_without_a_compiler_one_line_says_so_and_torch_answers(tmp_path: Path) -> None:
    found = run_child(tmp_path, PATH=str(tmp_path), CC="")
    lines = [line for line in found.stderr.splitlines() if line.startswith("mopeq:")]
    assert lines == [
        "mopeq: packed experts run on plain torch, which is slower: no cpu kernel,"
        " it needs a C compiler (cc, gcc or clang)"
    ]
    assert float(found.stdout) > 0


@needs_library
def test_a_cache_that_others_can_write_to_is_not_loaded(tmp_path: Path) -> None:
    lib, folder = build.library()[0], tmp_path / "mopeq"
    assert lib is not None
    folder.mkdir(mode=0o700)
    shutil.copy2(lib._name, folder)  # compiling it anew takes a while
    assert "no cpu kernel" not in run_child(tmp_path, PATH=str(tmp_path), CC="").stderr
    folder.chmod(0o777)
    assert "others can write to" in run_child(tmp_path).stderr

"""The order of the CPU kernel: C against torch, and modules that change into it and back."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from test_kernels_linear import packed

from mopeq.kernels import build, cpu, grouped, ref, tiles
from mopeq.nouns import Format
from mopeq.plugins.experts import Tier, TiledTier
from mopeq.plugins.matrices import PackedEmbedding, PackedLinear, TiedLinear
from mopeq.tensors import QWeight
from mopeq.verbs.layers import Shape, random_experts, random_routing

needs_library = pytest.mark.skipif(build.library()[0] is None, reason=f"no CPU kernel: {build.library()[1]}")
SHAPES = [(1, 7), (16, 64), (37, 112), (200, 520), (64, 96), (63, 65)]
SMALL = Shape(96, 64, 6, 2)


def random_matrix(fmt: Format, out: int, inner: int) -> QWeight:
    g = torch.Generator().manual_seed(out + inner + fmt.bits)
    codes = torch.randint(0, 2**fmt.bits, (out, inner), generator=g, dtype=torch.uint8)
    scales = torch.randn(out, fmt.groups(inner), generator=g).half()
    zeros = torch.randint(0, 2**fmt.bits, scales.shape, generator=g, dtype=torch.uint8)
    return QWeight(codes, scales, zeros if fmt.scheme == "a" else None, fmt)


def same(a: QWeight, b: QWeight) -> bool:
    zeros = a.zeros is b.zeros is None or (
        a.zeros is not None and b.zeros is not None and torch.equal(a.zeros, b.zeros)
    )
    return zeros and torch.equal(a.codes, b.codes) and torch.equal(a.scales, b.scales)


@needs_library
@pytest.mark.parametrize("scheme", ["a", "s"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_into_tiles_and_out_of_them(bits: int, scheme: str) -> None:
    for shape in SHAPES:
        for group in (16, 48, 64, 1024):
            q = random_matrix(Format(bits, group, scheme), *shape)
            stored = q.pack()
            held = [
                stored["qweight"],
                stored["scales"].view(torch.int16),
                *[stored[n] for n in ("zeros",) if n in stored],
            ]
            made = torch.full((tiles.size(q.format, shape),), 255, dtype=torch.uint8)
            tiles.fill(made, q.format, shape, *held)
            every = torch.arange(shape[0])
            assert same(tiles.read(made, q.format, shape, every), q)
            assert same(tiles.rows(made, q.format, shape, slice(None)), q)
            some, index = slice(shape[0] // 3, shape[0]), torch.randint(0, shape[0], (5,))
            assert same(tiles.rows(made, q.format, shape, some), q[some])
            assert same(tiles.rows(made, q.format, shape, index), q[index])  # type: ignore[index]
            again = [torch.full_like(t, 77) for t in held]
            tiles.take_out(made, q.format, shape, *again)
            assert all(torch.equal(a, b) for a, b in zip(again, held, strict=True))


def test_no_byte_more_than_the_checkpoint_has() -> None:
    for bits in range(1, 9):
        for shape in ((2048, 1024), (1536, 2560), (2880, 2880), (50304, 2048)):
            for fmt in (Format(bits, group, scheme) for group in (32, 64, 128) for scheme in "as"):
                extra = tiles.size(fmt, shape) - fmt.nbytes(*shape)
                assert extra == 0, (fmt, shape)


@needs_library
def test_many_threads_order_alike() -> None:
    q, before = random_matrix(Format(3, 64, "a"), 500, 320), torch.get_num_threads()
    made = [torch.empty(tiles.size(q.format, q.shape), dtype=torch.uint8) for _ in range(2)]  # type: ignore[arg-type]
    stored = q.pack()
    try:
        for threads, one in zip((1, 3), made, strict=True):
            torch.set_num_threads(threads)
            tiles.fill(one, q.format, (500, 320), stored["qweight"], stored["scales"], stored["zeros"])
            assert same(tiles.rows(one, q.format, (500, 320), slice(None)), q)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*made)


@needs_library
def test_without_the_library_torch_takes_tiles_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, or where a pickled model is loaded that ran elsewhere."""
    layer, module = random_experts(SMALL, (2, 3, 8)), packed(PackedLinear, 37, 112, Format(4, 32, "a"))
    before = [layer.state_dict(), module.state_dict()]
    layer.use_tiles(), module.use_tiles()
    monkeypatch.setattr(tiles, "library", lambda: (None, "not here"))
    for m, wanted in zip((layer, module), before, strict=True):
        found = m.state_dict()
        assert found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


@needs_library
@pytest.mark.parametrize("scheme", ["a", "s"])
def test_a_layer_that_has_run_is_saved_copied_and_loaded_as_ever(scheme: str) -> None:
    layer = random_experts(SMALL, (2, 3, 4), scheme=scheme)
    x, (index, weight) = torch.randn(3, 96), random_routing(SMALL, 3, 0)
    held, wanted = {k: v.clone() for k, v in layer.state_dict().items()}, ref.experts_forward(layer, x, index, weight)
    views = layer.state_dict()  # of the tiers' memory

    def run(one: object) -> torch.Tensor:
        with torch.inference_mode():
            return cpu.experts_forward(one, x, index, weight)

    found = run(layer)
    assert torch.allclose(found, wanted, atol=1e-5)
    assert all(isinstance(t, TiledTier) for p in layer.projections for t in layer.tiers(p))
    assert not set(layer.tier_names()) & set(dict(layer.named_buffers()))  # nobody takes tiles for what is stored
    assert all(torch.equal(views[k], held[k]) for k in held)  # nor did what others hold change
    nbytes = sum(t.nbytes for t in layer.buffers())
    assert torch.allclose(grouped.experts_forward(layer, x, index, weight), wanted, atol=1e-5)
    assert torch.equal(ref.experts_forward(layer, x, index, weight), wanted)

    stream = io.BytesIO()
    torch.save(layer.to(torch.bfloat16), stream)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(io.BytesIO(stream.getvalue()), weights_only=False),
    ):
        assert isinstance(other.tiers("up")[0], TiledTier) and torch.equal(run(other), found)
        saved = other.state_dict()
        assert saved.keys() == held.keys() and all(torch.equal(saved[k], held[k]) for k in held)
        assert isinstance(other.tiers("up")[0], Tier) and torch.equal(run(other), found)
        other.load_state_dict(saved)  # into a layer that has run
        assert torch.equal(run(other), found)
        for t in saved.values():
            t.zero_()
        other.load_state_dict(saved)
        assert not run(other).any() and torch.equal(run(layer), found)
    layer.use_tiers()
    assert sum(t.nbytes for t in layer.buffers()) <= nbytes < 1.3 * sum(t.nbytes for t in layer.buffers())


@needs_library
def test_what_is_let_go_of_is_free() -> None:
    layer, module = random_experts(SMALL, (3,)), packed(PackedLinear, 48, 128, Format(4, 32, "a"))
    (
        cpu.experts_forward(layer, torch.randn(1, 96), *random_routing(SMALL, 1, 0)),
        cpu.linear(module, torch.randn(1, 128)),
    )
    seen = [weakref.ref(t) for t in (layer.get_buffer("up_3g64a_tiles"), module.get_buffer("tiles_"))]
    layer.state_dict(), module.state_dict()
    assert all(ref() is None for ref in seen)
    seen = [weakref.ref(t) for t in (layer.get_buffer("up_3g64a_qweight"), module.get_buffer("qweight_"))]
    layer.use_tiles(), module.use_tiles()
    assert all(ref() is None for ref in seen)


@needs_library
def test_memory_that_cannot_be_written_to(tmp_path: Path) -> None:
    """Mapped files: others read them too."""
    layer = random_experts(SMALL, (3,))
    x, (index, weight) = torch.randn(1, 96), random_routing(SMALL, 1, 0)
    torch.save({n: layer.get_buffer(n) for n in layer.tier_names()}, tmp_path / "held.pt")
    bytes_there = (tmp_path / "held.pt").read_bytes()
    wanted = ref.experts_forward(layer, x, index, weight)
    for name, value in torch.load(tmp_path / "held.pt", mmap=True).items():
        setattr(layer, name, value)
    assert torch.allclose(cpu.experts_forward(layer, x, index, weight), wanted, atol=1e-5)
    assert (tmp_path / "held.pt").read_bytes() == bytes_there


@needs_library
@pytest.mark.parametrize("kind", [PackedLinear, PackedEmbedding])
def test_a_matrix_that_has_run_is_saved_copied_and_loaded_as_ever(kind: type) -> None:
    module = packed(kind, 43, 112, Format(3, 32, "a"))
    head = TiedLinear(module) if kind is PackedEmbedding else module
    x, ids = torch.randn(2, 112), torch.tensor([[42, 0, 17]])
    held, weight = {k: v.clone() for k, v in module.state_dict().items()}, module.weight
    with torch.inference_mode():
        found = head(x)
    assert "tiles_" in dict(module.named_buffers()) and "qweight_" not in dict(module.named_buffers())
    assert torch.equal(module.weight, weight) and torch.equal(module.rows(ids[0], torch.float32), weight[ids[0]])
    assert torch.allclose(grouped.linear(module, x), x @ weight.T, atol=1e-5)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        saved = other.state_dict()
        assert saved.keys() == held.keys() and all(torch.equal(saved[k], held[k]) for k in held)
        assert torch.equal(cpu.linear(other, x), cpu.linear(module, x))
        other.load_state_dict(saved)
        assert torch.equal(cpu.linear(other, x), cpu.linear(module, x))
    assert torch.equal(head(x), found)


def test_from_and_to_what_gpus_read() -> None:
    """A module may go to a GPU after it ran here, and come back."""
    layer, module = random_experts(Shape(128, 64, 4, 2), (2, 3)), packed(PackedLinear, 48, 128, Format(4, 32, "a"))
    for one in (layer, module):
        held = {k: v.clone() for k, v in one.state_dict().items()}
        for change in ("use_tiles", "arena", "use_tiles", "arena"):
            if change == "arena" or build.library()[0] is not None:
                getattr(one, change)()
            names = {"arena_data", "arena_table"} if change == "arena" else {"tiles"}
            assert all(
                n in names or n == "like_" or n.strip("_").endswith(tuple(names)) for n, _ in one.named_buffers()
            )
            found = copy.deepcopy(one).state_dict()
            assert found.keys() == held.keys() and all(torch.equal(found[k], held[k]) for k in held)

"""Packed matrices outside the experts: a linear layer, an embedding, a tied head, against their values in float64."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from mopeq.kernels import build, cpu, grouped
from mopeq.kernels.choice import choose_linear
from mopeq.nouns import Format
from mopeq.plugins.matrices import PackedEmbedding, PackedLinear, PackedMatrix, TiedLinear
from mopeq.quant import rtn
from mopeq.tensors import pack_bits, unpack_bits, unpack_some

needs_library = pytest.mark.skipif(build.library()[0] is None, reason=f"no CPU kernel: {build.library()[1]}")
SHAPES = [(1, 7, 16), (37, 112, 16), (64, 100, 32), (129, 36, 64), (63, 65, 48), (200, 520, 128), (100, 1100, 1024)]


def packed(kind: type[PackedMatrix], out: int, inner: int, fmt: Format, bias: bool = False) -> PackedMatrix:
    """A sealed module of random weights."""
    torch.manual_seed(out + inner + fmt.bits)
    original = nn.Linear(inner, out, bias=bias) if kind is PackedLinear else nn.Embedding(out, inner)
    module = kind(fmt, original)
    for name, value in rtn.packed(original.weight.data, fmt).items():
        setattr(module, name, nn.Parameter(value, requires_grad=False))
    module.seal()
    return module


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach()
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


@needs_library
@pytest.mark.parametrize("scheme", ["a", "s"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_a_linear_layer(bits: int, scheme: str) -> None:
    for out, inner, group in SHAPES:
        module = packed(PackedLinear, out, inner, Format(bits, group, scheme), bias=True)
        truth = module.weight.double()
        for shape in ((0,), (1,), (2, 3), (5, 1), (19,)):
            x = torch.randn(*shape, inner)
            wanted = x.double() @ truth.T + module.bias.double()
            found = module(x)
            assert found.shape == wanted.shape and found.dtype == torch.float32
            assert choose_linear(module, x) == "cpu" or x.numel() > cpu.few() * inner
            assert apart(found, wanted) < 1e-5 and apart(cpu.linear(module, x) + module.bias, wanted) < 1e-5
            assert apart(grouped.linear(module, x) + module.bias, wanted) < 1e-5
            low = cpu.linear(module, x.bfloat16())
            assert low.dtype == torch.bfloat16 and apart(low, x.bfloat16().double() @ truth.T) < 4e-3


@needs_library
def test_what_is_kept_for_a_matrix_follows_its_tensors() -> None:
    """Other tensors in their place, other values in them, and a copy of the module."""
    module, other = (packed(PackedLinear, 24, 96, Format(4, 32, "a")) for _ in range(2))
    x = torch.randn(2, 96)
    before = cpu.linear(module, x)
    copied = deepcopy(module)
    copied.use_stored()
    copied.scales_.zero_()
    assert bool((cpu.linear(copied, x) == 0).all()) and torch.equal(cpu.linear(module, x), before)
    other.qweight_.zero_()
    module.use_stored()
    module.qweight_ = other.qweight_
    assert apart(cpu.linear(module, x), x.double() @ module.weight.double().T) < 1e-5
    module.use_stored()
    module.qweight_.fill_(255)
    assert apart(cpu.linear(module, x), x.double() @ module.weight.double().T) < 1e-5


@needs_library
def test_strided_activations_and_many() -> None:
    module = packed(PackedLinear, 24, 96, Format(4, 32, "a"))
    x = torch.randn(96, 40).T
    assert not x.is_contiguous() and apart(module(x), x.double() @ module.weight.double().T) < 1e-5
    many = torch.randn(cpu.few() + 1, 96)
    assert choose_linear(module, many) == "torch"
    assert apart(module(many), many.double() @ module.weight.double().T) < 1e-5


def test_gradients_reach_what_comes_before() -> None:
    """As LoRA on other layers needs; the packed matrix itself has none."""
    module = packed(PackedLinear, 24, 96, Format(4, 32, "a"))
    x = torch.randn(3, 96, requires_grad=True)
    assert choose_linear(module, x) == "torch"
    module(x).square().sum().backward()
    again = x.detach().double().requires_grad_()
    (again @ module.weight.double().T).square().sum().backward()
    assert x.grad is not None and again.grad is not None and apart(x.grad, again.grad) < 1e-5


@needs_library
def test_one_graph_for_the_compiler() -> None:
    module = packed(PackedLinear, 24, 96, Format(4, 32, "a"))
    copied = deepcopy(module)
    copied.scales_.zero_()
    with torch.no_grad():
        for m in (module, copied):  # a copy is a module of its own there, too
            x = torch.randn(2, 96)
            assert torch.equal(torch.compile(m, fullgraph=True, backend="aot_eager")(x), m(x))


@needs_library
def test_modules_compiled_one_by_one_share_a_graph() -> None:
    """With the setting that docs/serving.md names: else each would be compiled for its own number."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    modules = [packed(PackedLinear, 24, 96, Format(4, 32, "a")) for _ in range(5)]
    x = torch.randn(2, 96)
    with torch.no_grad(), torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        for m in modules:
            m.compile(fullgraph=True, backend="aot_eager")
            assert torch.equal(m(x), m.forward(x))
    assert counters["stats"]["unique_graphs"] == 2  # the second learns that numbers differ
    torch._dynamo.reset()


@pytest.mark.parametrize("bits", range(1, 9))
def test_an_embedding_and_a_head_tied_to_it(bits: int) -> None:
    table = packed(PackedEmbedding, 43, 80, Format(bits, 32, "a"))
    ids = torch.tensor([[0, 42, 7, 7], [41, 1, 0, 8]])
    assert torch.equal(table(ids), table.weight[ids])
    x = torch.randn(3, 80)
    assert apart(TiedLinear(table)(x), x.double() @ table.weight.double().T) < 1e-5


@pytest.mark.parametrize("bits", range(1, 9))
def test_some_codes_of_a_stream(bits: int) -> None:
    for n in (1, 7, 8, 9, 61):
        codes = torch.randint(0, 2**bits, (3, n), dtype=torch.uint8)
        stream, at = pack_bits(codes, bits), torch.randint(0, n, (20,))
        assert torch.equal(unpack_some(stream, bits, at), unpack_bits(stream, bits, n)[:, at])

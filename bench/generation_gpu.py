"""A language model in DeepSeek-VL2-Base's shape, of random weights, at work: tokens a second, packed and in bf16.

    python bench/generation_gpu.py all_packed packed gemv grouped_mm batched_mm [--compile] [--profile]

Each step is one CUDA graph over a fixed cache, the next token included; one sequence, from an empty cache. `packed` has
mopeq's experts (2, 3, 4 bits in equal shares, group 64), `all_packed` also every other matrix but routers at 4 bits, as
`--other-bits 4` makes them; `grouped_mm` and `batched_mm` are transformers' two ways in bf16; `gemv` is bf16 by the
gather-GEMV that `mopeq bench` compares with. --compile has torch.compile make the whole model, in one graph: packed
modules and `gemv` experts are one operator each in it. Packed models are finished as mopeq's loader does it: linear
layers joined, norms and routers by one kernel each. Everything else is the same.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from mopeq.plugins.matrices import join
from mopeq.plugins.quick import quicken
from mopeq.verbs.layers import SHAPES, Shape, random_experts

WIDTHS = (2, 3, 4)
CACHE = 512  # positions
TOKENS = 128  # generated for one time
BASE = dict(num_hidden_layers=30, vocab_size=129280, intermediate_size=12288, num_attention_heads=32)
SMALL = dict(num_hidden_layers=3, vocab_size=100, intermediate_size=96, num_attention_heads=4)


class FixedCache:
    """One layer's keys and values of CACHE positions, written where `at` says: what a CUDA graph can replay."""

    def __init__(self, at: Tensor):
        self.at, self.keys, self.values = at, None, None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None:
            self.keys, self.values = (t.new_zeros(*t.shape[:2], CACHE, t.shape[3]) for t in (keys, values))
        self.keys.index_copy_(2, self.at, keys)
        self.values.index_copy_(2, self.at, values)
        return self.keys, self.values

    def get_seq_length(self, *_: Any) -> int:
        return 0


@torch.library.custom_op("bench::gemv", mutates_args=())
def gathered(w: Tensor, x: Tensor, ids: Tensor, choices: int, columns: int) -> Tensor:
    """[pairs, N]: each pair's expert's matrix of w [E, N, K] times its row of x."""
    from mopeq.verbs.gemv import gemv

    y = x.new_empty(ids.numel(), w.shape[1])
    gemv[(-(-w.shape[1] // 8), ids.numel())](w, x, y, ids, w.shape[2], w.shape[1], choices, 8, columns)
    return y


@gathered.register_fake
def _(w: Tensor, x: Tensor, ids: Tensor, choices: int, columns: int) -> Tensor:
    return x.new_empty(ids.numel(), w.shape[1])


class GemvExperts(nn.Module):
    """bf16 experts by a gather-GEMV: the best bf16 we know for one token."""

    def __init__(self, original: Any):
        super().__init__()
        self.top, self.down = original.gate_up_proj, original.down_proj

    def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ids, k, (_, hidden, inner) = index.flatten(), index.shape[1], self.down.shape
        top = gathered(self.top, x, ids, k, 512)
        h = silu(top[:, :inner]) * top[:, inner:]
        out = gathered(self.down, h, ids, 1, 256)
        return (out.view(-1, k, hidden) * weight.to(out.dtype)[..., None]).sum(1)


def pack_the_rest(model: Any, device: str) -> None:
    """Every linear layer and the embedding but routers (which are no such modules), as random codes of 4 bits."""
    from mopeq.nouns import Format
    from mopeq.plugins.matrices import PackedEmbedding, PackedLinear

    fmt, generator = Format(4, 64), torch.Generator(device).manual_seed(1)
    for name, original in list(model.named_modules()):
        if type(original) not in (nn.Linear, nn.Embedding):
            continue
        made: Any = (PackedLinear if type(original) is nn.Linear else PackedEmbedding)(fmt, original)
        for suffix, (_, shape) in fmt.shapes(*original.weight.shape).items():
            if suffix == "scales":
                value = (torch.rand(shape, generator=generator, device=device) * 0.004 + 0.002).half()
            else:
                value = torch.randint(0, 256, shape, generator=generator, device=device, dtype=torch.uint8)
            setattr(made, suffix, nn.Parameter(value, requires_grad=False))
        made.seal()
        model.set_submodule(name, made)


def model_of(way: str, shape: Shape, sizes: dict[str, int], device: str, dtype: torch.dtype) -> Any:
    """The model, its experts in that `way`."""
    from transformers import AutoModelForCausalLM, DeepseekV2Config

    packed = way in (
        "packed",
        "all_packed",
    )  # then no experts are made in bf16 first: one tiny one is, and its width made up for
    inner = 8 if packed else shape.inner
    config = DeepseekV2Config(
        hidden_size=shape.hidden, moe_intermediate_size=inner, n_shared_experts=2 * shape.inner // inner,
        n_routed_experts=1 if packed else shape.experts, num_experts_per_tok=shape.choices, q_lora_rank=None,
        first_k_dense_replace=1, n_group=1, topk_group=1, max_position_embeddings=4096, **sizes,
        num_key_value_heads=sizes["num_attention_heads"],
    )  # fmt: skip
    how = way if way in ("grouped_mm", "batched_mm") else "eager"
    with torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa", experts_implementation=how
        ).eval()
    for seed, layer in enumerate(model.model.layers[1:]):
        moe = layer.mlp
        router = torch.randn(shape.experts, shape.hidden, device=device, dtype=dtype) * 0.02
        moe.gate.weight, moe.gate.num_experts = nn.Parameter(router, requires_grad=False), shape.experts
        if packed:
            moe.experts = random_experts(shape, WIDTHS, device, seed=seed)
        elif way == "gemv":
            moe.experts = GemvExperts(moe.experts)
    if way == "all_packed":
        pack_the_rest(model, device)
    if packed:  # as a packed checkpoint is loaded
        join(model)
        quicken(model)
    return model


def with_cache(cache: FixedCache, forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs | {"past_key_values": cache})

    return call


def rate(model: Any, device: str, compiled: bool, profiled: bool) -> tuple[float, int]:
    """(tokens a second, how many different ones); a table of the kernels of one token is printed if `profiled`."""
    ids, at, made = (torch.zeros(*size, dtype=torch.long, device=device) for size in ((1, 1), (1,), (CACHE,)))
    for layer in model.model.layers:
        layer.forward = with_cache(FixedCache(at), layer.forward)
    forward = model
    places = torch.arange(CACHE, device=device)

    def step() -> None:
        mask = (places <= at)[None, None, None]
        out = forward(input_ids=ids, position_ids=at[None], attention_mask=mask, past_key_values=FixedCache(at))
        ids.copy_(out.logits[:, -1:].argmax(-1))
        made.index_copy_(0, at, ids[0])
        at.add_(1)

    with torch.inference_mode():
        step()  # which makes the caches
        if compiled:
            forward = torch.compile(model, dynamic=False, fullgraph=True)
        for _ in range(3):
            step()
        replay: Callable[[], Any] = step
        if device != "cpu":
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            replay = graph.replay
        times = []
        for _ in range(5):
            at.zero_(), ids.zero_()
            began = time.perf_counter()
            for _ in range(TOKENS):
                replay()
            at.item()  # waits
            times.append(time.perf_counter() - began)
        if profiled:
            print(kernels(replay, TOKENS // 4))
    return TOKENS / statistics.median(times), len(made[:TOKENS].unique())


def kernels(replay: Callable[[], Any], tokens: int) -> str:
    """The kernels of a token by their names: how many, and µs, the costliest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(tokens):
            replay()
        torch.cuda.synchronize()
    rows = [(e.device_time_total / tokens, e.count / tokens, e.key) for e in profile.key_averages()]
    total = f"{sum(n for _, n, _ in rows):.0f} kernels, {sum(us for us, _, _ in rows):.0f} µs a token"
    return "\n".join([total, *(f"{n:7.1f} {us:9.1f} µs  {key[:110]}" for us, n, key in sorted(rows, reverse=True))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ways", nargs="+", choices=["all_packed", "packed", "gemv", "grouped_mm", "batched_mm"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true", help="also print which kernels a token takes")
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU, to try this file")
    args = parser.parse_args()
    device, dtype = ("cpu", torch.float32) if args.small else ("cuda", torch.bfloat16)
    shape, sizes = (Shape(64, 32, 8, 2), SMALL) if args.small else (SHAPES["DeepSeek-VL2-Base"], BASE)
    for way in args.ways:
        model = model_of(way, shape, sizes, device, dtype)
        found, different = rate(model, device, args.compile, args.profile)
        weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
        print(f"{way}: {found:.1f} tokens/s, weights {weights / 1e9:.3f} GB, {different} different tokens", flush=True)
        del model
        torch.compiler.reset()
        if device != "cpu":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

"""One MoE layer on a CPU: mopeq's mixed widths against ggml (llama.cpp's engine) at K-quants of equal bytes.

    python bench/cpu_peers.py --library PATH --threads 1,2

PATH is a shared library that exports ggml's functions: `libggml-*.so` of a llama.cpp build (name libggml-cpu.so; the
others lie beside it), or the extension of a Python package that holds them all. Both run the same routings, turn about,
so that whatever else the machine does falls on both; weights rotate, so that no cache holds them. One thread's times
are its processor time, which other programs lengthen less; several threads' are by the clock. ggml takes its
activations as 8-bit integers, mopeq as 22-bit ones.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_int, c_int64, c_size_t, c_void_p
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from mopeq.plugins.held import untouched
from mopeq.verbs.bench import routings, shape_of, time_calls, whole_numbers
from mopeq.verbs.layers import Shape, bytes_touched, random_experts

F32, I32 = 0, 26  # ggml's numbers
# the K-quants, their numbers there, and mopeq's widths (each expert and projection one of these, in turn) of about
# their bytes
PEERS = {"Q3_K": (11, (2, 3, 4, 3, 4, 3)), "Q4_K": (12, (4, 4, 4, 3, 4, 6))}


class InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Plan(ctypes.Structure):
    """ggml_cplan, of which later versions may hold more."""

    _fields_ = (("work_size", c_size_t), ("work_data", c_void_p), ("rest", ctypes.c_byte * 120))


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (c_void_p, [InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_new_tensor_3d": (c_void_p, [c_void_p, c_int, c_int64, c_int64, c_int64]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_mul_mat_id": (c_void_p, [c_void_p] * 4),
    "ggml_silu": (c_void_p, [c_void_p] * 2),
    "ggml_mul": (c_void_p, [c_void_p] * 3),
    "ggml_add": (c_void_p, [c_void_p] * 3),
    "ggml_view_2d": (c_void_p, [c_void_p, c_void_p, c_int64, c_int64, c_size_t, c_size_t]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_graph_plan": (Plan, [c_void_p, c_int, c_void_p]),
    "ggml_graph_compute": (c_int, [c_void_p, POINTER(Plan)]),
}


def ggml_of(path: Path) -> Any:
    """The library, its functions typed; libraries beside it that it needs are loaded first."""
    for other in sorted(path.parent.glob("libggml-base.so*"))[:1]:
        ctypes.CDLL(str(other), ctypes.RTLD_GLOBAL)
    lib = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    for name, (answer, arguments) in SIGNATURES.items():
        found = getattr(lib, name)
        found.restype, found.argtypes = answer, arguments
    if hasattr(lib, "ggml_cpu_init"):
        lib.ggml_cpu_init()
    return lib


class GgmlLayer:
    """gate, up and down of every expert in one K-quant, and the graph of a call for T tokens."""

    def __init__(self, lib: Any, kind: int, shape: Shape, tokens: int, threads: int):
        self.lib, self.shape = lib, shape
        row = {n: lib.ggml_row_size(kind, n) for n in (shape.hidden, shape.inner)}
        matrix = shape.inner * row[shape.hidden], shape.hidden * row[shape.inner]
        self.expert_bytes = 2 * matrix[0] + matrix[1]
        room = (
            shape.experts * self.expert_bytes + (64 << 20) + 64 * tokens * shape.choices * (shape.hidden + shape.inner)
        )
        ctx = self.ctx = lib.ggml_init(InitParams(room, None, False))
        h, i, e, k = shape.hidden, shape.inner, shape.experts, shape.choices
        self.weights = {
            "gate": lib.ggml_new_tensor_3d(ctx, kind, h, i, e),
            "up": lib.ggml_new_tensor_3d(ctx, kind, h, i, e),
            "down": lib.ggml_new_tensor_3d(ctx, kind, i, h, e),
        }
        self.dense = {p: self.quantized(kind, t, seed) for seed, (p, t) in enumerate(self.weights.items())}
        self.x = lib.ggml_new_tensor_3d(ctx, F32, h, 1, tokens)
        self.ids = lib.ggml_new_tensor_2d(ctx, I32, k, tokens)
        self.share = lib.ggml_new_tensor_3d(ctx, F32, 1, k, tokens)
        sides = [lib.ggml_mul_mat_id(ctx, self.weights[p], self.x, self.ids) for p in ("gate", "up")]
        middle = lib.ggml_mul(ctx, lib.ggml_silu(ctx, sides[0]), sides[1])
        y = lib.ggml_mul(ctx, lib.ggml_mul_mat_id(ctx, self.weights["down"], middle, self.ids), self.share)
        views = [lib.ggml_view_2d(ctx, y, h, tokens, 4 * h * k, 4 * h * choice) for choice in range(k)]
        self.out = views[0]
        for view in views[1:]:
            self.out = lib.ggml_add(ctx, self.out, view)
        self.graph = lib.ggml_new_graph(ctx)
        lib.ggml_build_forward_expand(self.graph, self.out)
        self.plan = lib.ggml_graph_plan(self.graph, threads, None)
        self.work = ctypes.create_string_buffer(max(1, self.plan.work_size))
        self.plan.work_data = ctypes.cast(self.work, c_void_p)
        self.tokens = tokens

    def quantized(self, kind: int, tensor: int, seed: int) -> Tensor:
        """Fill a tensor with one expert's weights, quantized, over and over; the weights, as float32, are returned."""
        rows, columns = (self.shape.inner, self.shape.hidden) if seed < 2 else (self.shape.hidden, self.shape.inner)
        w = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02
        start, nbytes = self.lib.ggml_get_data(tensor), self.lib.ggml_nbytes(tensor) // self.shape.experts
        self.lib.ggml_quantize_chunk(kind, w.data_ptr(), start, 0, rows, columns, None)
        for e in range(1, self.shape.experts):
            ctypes.memmove(start + e * nbytes, start, nbytes)
        return w

    def __call__(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        lib = self.lib
        ids, share, x = index.int().contiguous(), weight.float().contiguous(), x.contiguous()
        for tensor, value in ((self.x, x), (self.ids, ids), (self.share, share)):
            ctypes.memmove(lib.ggml_get_data(tensor), value.data_ptr(), value.numel() * value.element_size())
        assert lib.ggml_graph_compute(self.graph, ctypes.byref(self.plan)) == 0
        out = torch.empty(self.tokens, self.shape.hidden)
        ctypes.memmove(out.data_ptr(), lib.ggml_get_data(self.out), out.numel() * 4)
        return out

    def free(self) -> None:
        self.lib.ggml_free(self.ctx)

    def error(self, x: Tensor, index: Tensor, weight: Tensor) -> float:
        """Against float64 on the weights before they were quantized: mostly the quantization's, so only a check."""
        w = {p: v.double() for p, v in self.dense.items()}
        y = (torch.nn.functional.silu(x.double() @ w["gate"].T) * (x.double() @ w["up"].T)) @ w["down"].T
        wanted = y * weight.double().sum(1, keepdim=True)
        return float((self(x, index, weight).double() - wanted).norm() / wanted.norm())


def as_loaded(layer: Any) -> Any:
    """The layer's tensors in memory as `fill` gets it."""
    for name in layer.tier_names():
        stored = layer._buffers[name]
        setattr(layer, name, untouched(stored.shape, stored.dtype).copy_(stored))
    return layer


def turn_about(calls: list[list[Any]], seconds: float, clock: Callable[[], float]) -> list[list[float]]:
    """Seconds by `clock` of each call of each list, one of every list in turn."""
    times: list[list[float]] = [[] for _ in calls]
    began, at = time.perf_counter(), 0
    while at < 2 * len(calls[0]) or time.perf_counter() - began < seconds:
        for kept, of in zip(times, calls, strict=True):
            start = clock()
            of[at % len(of)]()
            kept.append(clock() - start)
        at += 1
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--tokens", default="1,4,16")
    parser.add_argument("--shape", default="OLMoE-1B-7B")
    parser.add_argument("--seconds", type=float, default=4.0)
    args = parser.parse_args()
    lib, shape = ggml_of(args.library), shape_of(args.shape)
    heads = ("peer", "threads", "tokens", "MB", "peer's", "ms least", "median", "peer's", "median", "ratio", "median")
    print(*(f"{head:>9}" for head in heads), "read GB/s")
    for threads in whole_numbers(args.threads, "--threads"):
        torch.set_num_threads(threads)
        for peer in PEERS:
            for tokens in whole_numbers(args.tokens, "--tokens"):
                numbers = compare(lib, shape, peer, threads, tokens, args.seconds)
                print(f"{peer:>9} {threads:9} {tokens:9}", *(f"{n:9.2f}" for n in numbers), flush=True)


def compare(lib: Any, shape: Shape, peer: str, threads: int, tokens: int, seconds: float) -> list[float]:
    """MB of each, least and median milliseconds of each, ratios of both, GB/s of reading measured beside."""
    kind, bits = PEERS[peer]
    ours, theirs = as_loaded(random_experts(shape, bits)), GgmlLayer(lib, kind, shape, tokens, threads)
    routed = routings(shape, tokens, "cpu")
    x = torch.randn(tokens, shape.hidden, generator=torch.Generator().manual_seed(1))
    block = torch.ones(1 << 26, dtype=torch.int64)
    with torch.inference_mode():
        off = theirs.error(x, *routed[0])
        assert off < 0.25, f"{peer}: ggml's graph is wrong, error {off:.3f}"
        calls = [[partial(layer, x, index, weight) for index, weight in routed] for layer in (ours, theirs)]
        read = 8 * block.numel() / time_calls([block.sum], "cpu")
        times = turn_about(calls, seconds, time.thread_time if threads == 1 else time.perf_counter)
    theirs.free()
    mb = sum(bytes_touched(ours, index) for index, _ in routed) / len(routed) / 1e6
    theirs_mb = sum(len(index.unique()) for index, _ in routed) / len(routed) * theirs.expert_bytes / 1e6
    least, middle = ([1e3 * of(t) for t in times] for of in (min, statistics.median))
    ratios = [least[1] / least[0], middle[1] / middle[0]]
    return [mb, theirs_mb, least[0], middle[0], least[1], middle[1], *ratios, read / 1e9]


if __name__ == "__main__":
    main()

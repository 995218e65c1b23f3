"""`mopeq bench`: time, bytes and floor of MoE layers read packed, against bf16 in the same run; a model's tokens/s.

The floor of a layer is the larger of two times: its bytes over the memory bandwidth measured here, its operations over
the matrix rate measured here. Weights rotate (other tokens, other experts, other layers), so that caches do not help.
On a GPU calls are timed in CUDA graphs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from mopeq.errors import BadInput
from mopeq.models import pick_device
from mopeq.packed import write_atomic
from mopeq.progress import say
from mopeq.report.svg import number, svg
from mopeq.verbs.layers import SHAPES, Shape, bytes_touched, random_experts, random_routing

SECONDS = 0.3  # spent on each time, about
FEW = 64  # tokens up to which the GEMV is asked too
Call = Callable[[], Any]


def bench(
    out: str | Path | None = None,
    shapes: str = "",
    tokens: str = "1,16,64",
    bits: str = "2,3,4",
    group_size: int = 64,
    against: str | None = None,
    new_tokens: int = 64,
    device: str = "auto",
    plot: str | Path | None = None,
) -> dict[str, Any]:
    """Rows of layers (of a packed checkpoint, or random ones in the shapes named), and the checkpoint's generation."""
    names = [name for name in shapes.split(",") if name]
    if (out is None) == (not names):
        both = "takes a packed checkpoint or --shapes, not both" if names else "needs a packed checkpoint or --shapes"
        raise BadInput(f"bench {both}", f"shapes: {', '.join(SHAPES)}, or HxIxExK")
    if new_tokens < 1:
        raise BadInput(f"--new-tokens {new_tokens} is not positive", "try --new-tokens 64")
    if plot is not None and Path(plot).is_dir():
        raise BadInput(f"{plot} is a folder", "--plot names the picture to write, like speed.svg")
    chosen, counts = pick_device(device), whole_numbers(tokens, "--tokens")
    widths = tuple(whole_numbers(bits, "--bits"))
    ceilings = measure_ceilings(chosen)
    result: dict[str, Any] = {"device": device_name(chosen), "torch": torch.__version__, "threads": threads(chosen)}
    result |= ceilings | {"layers": [], "generation": []}
    if out is not None:
        from mopeq.verbs.generation import checkpoint_layer, generation

        for folder in [str(out)] + ([against] if against else []):
            say(f"generating with {folder}")
            result["generation"].append(generation(folder, new_tokens, chosen))
        layer, shape = checkpoint_layer(out, chosen)
        result["layers"] = measure_layer(Path(out).name, shape, layer, counts, ceilings, chosen)
    for name in names:
        shape = shape_of(name)
        layer = random_experts(shape, widths, chosen, group_size)
        result["layers"] += measure_layer(name, shape, layer, counts, ceilings, chosen)
    if plot is not None:
        write_atomic(Path(plot), picture(result["layers"]).encode())
        result["plot"] = str(plot)
    return result


def whole_numbers(text: str, flag: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise BadInput(f"{flag} {text!r} is no list of whole numbers from 1", f"write it like {flag} 1,16")
    return found


def shape_of(name: str) -> Shape:
    """A row of SHAPES, or `2048x768x128x8`: hidden, inner, experts, chosen."""
    if name in SHAPES:
        return SHAPES[name]
    parts = name.split("x")
    if len(parts) == 4 and all(part.isdigit() and int(part) > 0 for part in parts) and int(parts[3]) <= int(parts[2]):
        hidden, inner, experts, choices = (int(part) for part in parts)
        return Shape(hidden, inner, experts, choices)
    raise BadInput(f"no shape is called {name!r}", f"choose from: {', '.join(SHAPES)}; or write 2048x768x128x8")


# ------------------------------------------------------------------------------------------------ timing


def time_calls(calls: list[Call], device: str, seconds: float = SECONDS) -> float:
    """Median seconds of one of these calls, made in turn; on a GPU of a graph of them all, divided by their number."""
    for call in calls[:2] if device == "cpu" else calls:
        call()
    times: list[float] = []
    if device == "cpu":
        began = time.perf_counter()
        while len(times) < 2 * len(calls) or (time.perf_counter() - began < seconds and len(times) < 1000):
            at = time.perf_counter()
            calls[len(times) % len(calls)]()
            times.append(time.perf_counter() - at)
        return statistics.median(times)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    while len(times) < 8 or sum(times) < seconds:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[3:]) / len(calls)


def measure_ceilings(device: str) -> dict[str, float]:
    """Bytes/s of memory (a GPU's copy, read and written; a CPU's read) and bf16 (CPU: float32) FLOP/s of a product."""
    if device == "cpu":
        block = torch.ones(1 << 27, dtype=torch.int64)  # 1 GiB
        bandwidth = 8 * block.numel() / time_calls([block.sum], device)
        n, dtype = 2048, torch.float32
    else:
        block = torch.randint(0, 1 << 30, (1 << 28,), dtype=torch.int32, device=device)
        other = torch.empty_like(block)
        # in a graph `copy_` may go to a copy engine, which is slower than the processors
        ways = (lambda: other.copy_(block)), (lambda: torch.bitwise_not(block, out=other))
        bandwidth = max(8 * block.numel() / time_calls([way] * 4, device) for way in ways)
        n, dtype = 8192, torch.bfloat16
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    return {"bytes_per_s": bandwidth, "flop_per_s": 2 * n**3 / time_calls([lambda: a @ b] * 4, device)}


def device_name(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "cpu"


def threads(device: str) -> int | None:
    return torch.get_num_threads() if device == "cpu" else None


# ------------------------------------------------------------------------------------------------ layers


def routings(shape: Shape, tokens: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """Several (index, weight) [T, K]: for one token disjoint sets of experts, so that no weight is met again soon."""
    if tokens == 1:
        order = torch.randperm(shape.experts, generator=torch.Generator().manual_seed(5))
        sets = order[: shape.experts // shape.choices * shape.choices].view(-1, 1, shape.choices)
        return [(s.to(device), torch.full(s.shape, 1 / shape.choices, device=device)) for s in sets]
    return [random_routing(shape, tokens, seed, device) for seed in range(8 if tokens <= FEW else 2)]


def measure_layer(
    name: str, shape: Shape, layer: Any, tokens: list[int], ceilings: dict[str, float], device: str
) -> list[dict[str, Any]]:
    """A row for each number of tokens."""
    from mopeq.kernels.choice import choose

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    base = Bf16(shape, device)
    found = []
    for t in tokens:
        routed = routings(shape, t, device)
        x = torch.randn(t, shape.hidden, device=device, dtype=dtype)
        with torch.inference_mode():
            packed = time_calls([lambda i=i, w=w, x=x: layer(x, i, w) for i, w in routed], device)  # type: ignore[misc]
            bf16 = base.seconds(x, [i for i, _ in routed])
        matrix = 3 * shape.hidden * shape.inner
        flops = 2 * t * shape.choices * matrix
        nbytes = sum(bytes_touched(layer, i) for i, _ in routed) / len(routed)
        whole = sum(len(i.unique()) for i, _ in routed) / len(routed) * matrix * 2
        floor, floor_bf16 = (max(n / ceilings["bytes_per_s"], flops / ceilings["flop_per_s"]) for n in (nbytes, whole))
        best = min(bf16.values())
        found.append(
            {
                "name": name, "tokens": t, "kernel": choose(layer, x, routed[0][0]), "seconds": packed,
                "bytes": round(nbytes), "flop": flops, "floor_seconds": floor, "share_of_floor": floor / packed,
                "bf16_seconds": best, "bf16_kind": min(bf16, key=lambda kind: bf16[kind]), "bf16_bytes": round(whole),
                "bf16_share_of_floor": floor_bf16 / best, "ratio_to_bf16": best / packed,
                "peak_extra_bytes": extra_bytes(layer, x, *routed[0], device),
            }
        )  # fmt: skip
        say(f"{name}, {t} tokens: {packed * 1e6:.1f} µs, {100 * floor / packed:.0f} % of the floor")
    return found


def extra_bytes(layer: Any, x: Tensor, index: Tensor, weight: Tensor, device: str) -> int | None:
    """Memory a call takes beside the weights, at its highest; GPUs only."""
    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer(x, index, weight)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


class Bf16:
    """The same layer unpacked, in bf16: its products and SiLU gate, without routing and final sum, best of several."""

    def __init__(self, shape: Shape, device: str):
        self.shape, self.device = shape, device
        options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        self.top = torch.empty(shape.experts, 2 * shape.inner, shape.hidden, **options).normal_(0, 0.02)
        self.down = torch.empty(shape.experts, shape.hidden, shape.inner, **options).normal_(0, 0.02)

    def seconds(self, x: Tensor, indices: list[Tensor]) -> dict[str, float]:
        """{way: median seconds a call}."""
        x = x.to(torch.bfloat16)
        if self.device == "cpu":
            return {"a product for each expert": time_calls([self.one_by_one(x, i) for i in indices], "cpu")}
        found = {"grouped products": time_calls([self.grouped(x, i) for i in indices], self.device)}
        if len(x) <= FEW:
            found["gather-GEMV"] = time_calls([self.gemv(x, i) for i in indices], self.device)
        return found

    def one_by_one(self, x: Tensor, index: Tensor) -> Call:
        order = index.flatten().argsort(stable=True)
        spans = torch.unique_consecutive(index.flatten()[order], return_counts=True)
        rows = x[order // index.shape[1]]
        pieces = list(zip(spans[0].tolist(), rows.split(spans[1].tolist()), strict=True))

        def run() -> None:
            for e, part in pieces:
                gate, up = linear(part, self.top[e]).chunk(2, -1)
                linear(silu(gate) * up, self.down[e])

        return run

    def grouped(self, x: Tensor, index: Tensor) -> Call:
        """torch's two grouped products, tokens sorted beforehand."""
        order = index.flatten().argsort(stable=True)
        ends = torch.bincount(index.flatten(), minlength=self.shape.experts).cumsum(0).int()
        rows = x[order // index.shape[1]]

        def run() -> None:
            gate, up = torch._grouped_mm(rows, self.top.transpose(1, 2), offs=ends).chunk(2, -1)
            torch._grouped_mm(silu(gate) * up, self.down.transpose(1, 2), offs=ends)

        return run

    def gemv(self, x: Tensor, index: Tensor) -> Call:
        from mopeq.verbs.gemv import gemv

        s, pairs, ids = self.shape, index.numel(), index.flatten().contiguous()
        top, out = x.new_empty(pairs, 2 * s.inner), x.new_empty(pairs, s.hidden)

        def run() -> None:
            gemv[(-(-2 * s.inner // 8), pairs)](self.top, x, top, ids, s.hidden, 2 * s.inner, index.shape[1], 8, 512)
            h = silu(top[:, : s.inner]) * top[:, s.inner :]
            gemv[(-(-s.hidden // 8), pairs)](self.down, h, out, ids, s.inner, s.hidden, 1, 8, 256)

        return run


# -------------------------------------------------------------------------------------------- for people


def show(r: dict[str, Any]) -> None:
    from mopeq.show import out, table

    on = f", {r['threads']} threads" if r["threads"] else ""
    out(
        f"{r['device']}{on}, torch {r['torch']}: memory {r['bytes_per_s'] / 1e9:,.1f} GB/s,"
        f" products {r['flop_per_s'] / 1e12:.2f} TFLOP/s"
    )
    if r["layers"]:
        t = table("one layer", "tokens", "µs", "MB", "floor", "bf16 µs", "× bf16")
        t.columns[0].no_wrap = True
        for row in r["layers"]:
            t.add_row(
                row["name"], f"{row['tokens']:,}", f"{row['seconds'] * 1e6:,.1f}", f"{row['bytes'] / 1e6:,.1f}",
                f"{100 * row['share_of_floor']:.0f} %", f"{row['bf16_seconds'] * 1e6:,.1f}",
                f"{row['ratio_to_bf16']:.2f}",
            )  # fmt: skip
        out(t)
        out(f"by kernel {', '.join(sorted({row['kernel'] for row in r['layers']}))}")
        extra = [row["peak_extra_bytes"] for row in r["layers"] if row["peak_extra_bytes"] is not None]
        if extra:
            out(f"memory of a call beside the weights: at most {max(extra) / 1e6:.1f} MB")
    if r["generation"]:
        t = table("generating", "tokens/s", "weights GB", "peak GB")
        for g in r["generation"]:
            t.add_row(g["folder"], f"{g['tokens_per_s']:.1f}", f"{g['weight_bytes'] / 1e9:.3f}",
                      f"{g['peak_bytes'] / 1e9:.3f}")  # fmt: skip
        out(t)
    if "plot" in r:
        out(f"plot: {r['plot']}")


def picture(rows: list[dict[str, Any]]) -> str:
    """Bars: each row's share of the floor, and bf16's, as one SVG that stands alone."""
    height, left, wide = 34, 250, 500
    body = "<style>text{font:13px sans-serif}.a{fill:#2a6fb0}.b{fill:#b9c4cf}</style>"
    for i, row in enumerate(rows):
        y = 30 + i * height
        body += f'<text x="{left - 8}" y="{y + 16}" text-anchor="end">{row["name"]}, {row["tokens"]} tokens</text>'
        for kind, at, share, us in (
            ("a", y, row["share_of_floor"], row["seconds"] * 1e6),
            ("b", y + 13, row["bf16_share_of_floor"], row["bf16_seconds"] * 1e6),
        ):
            size = min(share, 1.1) * wide / 1.1
            body += f'<rect class="{kind}" x="{left}" y="{at}" width="{number(size)}" height="12"/>'
            words = f"{100 * share:.0f} %, {us:,.0f} µs"
            body += f'<text x="{number(left + size + 5)}" y="{at + 11}" font-size="11">{words}</text>'
    body += f'<text x="{left}" y="18">share of the floor: packed (blue), bf16 (grey)</text>'
    picture = svg(left + wide + 120, 40 + height * len(rows), body, "Share of the floor, by layer", "bench")
    return str(picture).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)

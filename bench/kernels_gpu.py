"""The compiled GPU kernels against float64, at every width, group and awkward shape, on memory filled with NaN.

    python bench/kernels_gpu.py --check              # or in parts side by side: --part 0/8 … --part 7/8

Timings are `mopeq bench`'s; the interpreter's checks, small and in fp16, tests/equivalence/test_kernels_triton.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from mopeq.kernels import grouped
from mopeq.kernels import triton as ours
from mopeq.verbs.layers import Shape, random_experts, random_routing

DEVICE = "cuda"


# ------------------------------------------------------------------------------------------------ check


def poison(nbytes: int = 1 << 30) -> None:
    """Fill free memory with NaN bit patterns, which the kernels' outputs and scratch are then carved from."""
    block = torch.full((nbytes // 4,), float("nan"), device=DEVICE)
    del block


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    norm = wanted.norm()
    return float((found.double() - wanted).norm() / norm) if norm > 0 else float(found.double().norm())


def check_cases() -> list[tuple[str, Shape, tuple[int, ...], int, str, str]]:
    """(name, shape, widths, group, dtype, routing)."""
    cases = []
    for bits in range(1, 9):
        for group in (32, 64, 128):
            cases.append((f"{bits} bits group {group}", Shape(256, 128, 8, 3), (bits,), group, "bf16", "random"))
    for inner, hidden in ((112, 100), (36, 100), (100, 36), (1408, 256), (900, 520)):
        cases.append((f"odd {hidden}x{inner}", Shape(hidden, inner, 9, 3), (2, 3, 4, 8), 64, "bf16", "random"))
    for routing in ("none", "one", "all on one", "unused", "duplicates", "out of range", "strided", "33", "600"):
        for dtype in ("bf16", "fp16"):
            cases.append((f"{routing} {dtype}", Shape(256, 192, 16, 4), (2, 3, 4), 64, dtype, routing))
            cases.append((f"clamped {routing} {dtype}", Shape(256, 192, 16, 4, True), (2, 4, 6), 32, dtype, routing))
    for inner in (768, 1024):  # cut in two ways
        cases.append((f"one token 2048x{inner}", Shape(2048, inner, 16, 8), (2, 3, 4), 64, "bf16", "one"))
    for tokens in ("5", "20", "40"):
        cases.append((f"few pairs an expert, {tokens}", Shape(256, 192, 64, 4), (2, 3, 4), 64, "bf16", tokens))
    cases.append(("one pair", Shape(128, 64, 4, 1), (3,), 64, "bf16", "one"))
    cases.append(("many tokens", Shape(512, 256, 8, 2), (2, 3, 4), 64, "bf16", "2000"))
    cases.append(("many tokens fp16 8 bits", Shape(512, 256, 8, 2), (3, 8), 128, "fp16", "2000"))
    cases.append(("many tokens odd", Shape(500, 236, 8, 2, True), (2, 3, 4, 8), 32, "bf16", "2000"))
    for bits, group in (((2,), 32), ((3,), 64), ((6, 8), 128)):
        cases.append((f"prompt {bits} group {group}", Shape(256, 128, 8, 3), bits, group, "bf16", "600"))
    cases.append(("prompt 1000x424", Shape(1000, 424, 8, 4), (3,), 32, "bf16", "500"))
    cases.append(("prompt 1280x896", Shape(1280, 896, 8, 6), (2, 3, 4), 64, "bf16", "333"))
    cases.append(("prompt 2048x768", Shape(2048, 768, 16, 8), (2, 3, 4), 64, "bf16", "300"))
    cases.append(("prompt clamped", Shape(496, 232, 8, 2, True), (2, 3, 4, 8), 32, "bf16", "2000"))
    for each in (15, 50, 120):  # pairs an expert, cut otherwise than those above
        small, odd, wide = Shape(256, 112, 8, 3), Shape(496, 232, 8, 2, True), Shape(512, 256, 8, 2)
        cases.append((f"{each} an expert", small, (2, 3, 4), 64, "bf16", str(each * 8 // 3)))
        cases.append((f"{each} an expert, 6 bits", small, (6,), 32, "bf16", str(each * 8 // 3)))
        cases.append((f"{each} an expert, odd", odd, (2, 3, 4, 8), 32, "bf16", str(each * 4)))
        cases.append((f"{each} an expert, fp16", wide, (3, 8), 128, "fp16", str(each * 4)))
    cases.append(("16 an expert, 2048x768", Shape(2048, 768, 16, 8), (2, 3, 4), 64, "bf16", "32"))
    return cases


def check(part: int, parts: int) -> int:
    """The number of cases that fail, of every `parts`-th from `part` on."""
    bad = 0
    for seed, (name, shape, bits, group, kind, routing) in enumerate(check_cases()):
        if seed % parts != part:
            continue
        dtype = torch.bfloat16 if kind == "bf16" else torch.float16
        layer = random_experts(shape, bits, DEVICE, group, seed)
        tokens = {"none": 0, "one": 1}.get(routing, int(routing) if routing.isdigit() else 13)
        index, weight = random_routing(shape, tokens, seed, DEVICE)
        x = torch.randn(tokens, shape.hidden, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed)).to(
            dtype
        )
        if routing == "all on one":
            index.fill_(3)
        elif routing == "unused":
            index.clamp_(max=shape.choices)
        elif routing == "duplicates":
            index[:, 1] = index[:, 0]
        elif routing == "out of range":
            index[::2, 0], index[1::3, 1], index[5] = -1, shape.experts, shape.experts + 3
            weight[(index < 0) | (index >= shape.experts)] = float("nan")
        elif routing == "strided":
            x = x.T.contiguous().T
            index, weight = index.T.contiguous().T, weight.T.contiguous().T
        wanted = grouped.experts_forward(layer, x.double(), index, weight.double())
        poison()
        found = ours.experts_forward(layer, x, index, weight)
        again = ours.experts_forward(layer, x, index, weight)
        off = error(found, wanted)
        bound = 1.2e-2 if kind == "bf16" else 2e-3
        ok = off < bound and torch.equal(found, again) and found.shape == x.shape and found.dtype == dtype
        bad += not ok
        print(f"{'ok ' if ok else 'BAD'} {off:.5f} {name}", flush=True)
    return bad


def linear_cases() -> list[tuple[int, int, int, int, str, int]]:
    """(bits, group, out, in, dtype, tokens) of matrices that stand alone."""
    cases = [(bits, group, 424, 1000, "bf16", 5) for bits in (2, 3, 4, 6, 8) for group in (32, 64, 128)]
    for tokens in (0, 1, 8, 9, 64, 65, 300, 700, 3300):
        cases += [(4, 64, 576, 2560, "bf16", tokens), (8, 64, 2048, 512, "fp16", tokens)]
        cases += [(4, 32, 40, 104, "bf16", tokens)]
    return cases


def random_linear(fmt: Any, out: int, inputs: int, g: torch.Generator) -> tuple[Any, dict[str, torch.Tensor]]:
    """A packed linear layer of random codes, and its stored tensors."""
    from mopeq.plugins.matrices import PackedLinear

    with torch.device("meta"):
        matrix = PackedLinear(fmt, nn.Linear(inputs, out, bias=False))
    stored = {}
    for suffix, (_, shape) in fmt.shapes(out, inputs).items():
        stored[suffix] = torch.randint(0, 256, shape, generator=g, device=DEVICE, dtype=torch.uint8)
        if suffix == "scales":
            stored[suffix] = ((torch.rand(shape, generator=g, device=DEVICE) + 0.5) * 0.1 / 2**fmt.bits).half()
        setattr(matrix, suffix, nn.Parameter(stored[suffix], requires_grad=False))
    matrix.seal()
    return matrix, stored


def check_linear(part: int, parts: int) -> int:
    """`check` for `kernels.linear`; every case also with weights that were packed again from the GPU's order."""
    from mopeq.kernels.choice import choose_linear
    from mopeq.nouns import Format

    bad = 0
    for seed, (bits, group, out, inputs, kind, tokens) in enumerate(linear_cases()):
        if seed % parts != part:
            continue
        dtype, fmt = (torch.bfloat16 if kind == "bf16" else torch.float16), Format(bits, group)
        g = torch.Generator(DEVICE).manual_seed(seed)
        matrix, stored = random_linear(fmt, out, inputs, g)
        x = torch.randn(tokens, inputs, device=DEVICE, generator=g).to(dtype)
        wanted = x.double() @ matrix.rows(slice(None), torch.float64).T
        if choose_linear(matrix, x) != "triton":
            raise SystemExit(f"{linear_cases()[seed]} is not for triton")
        poison()
        found, again = matrix(x), matrix(x)
        off, kept = error(found, wanted), matrix.state_dict()
        ok = off < (1.2e-2 if kind == "bf16" else 2e-3) and torch.equal(found, again)
        ok &= found.shape == wanted.shape and all(torch.equal(kept[name], stored[name]) for name in stored)
        bad += not ok
        print(f"{'ok ' if ok else 'BAD'} {off:.5f} linear {(bits, group, out, inputs, kind, tokens)}", flush=True)
    return bad


def joined_cases() -> list[tuple[int, int, tuple[int, ...], int, str, int]]:
    """(bits, group, outs, in, dtype, tokens) of matrices that are multiplied in one launch."""
    cases = []
    for tokens in (1, 7, 16, 40, 64):
        cases += [(4, 64, (6144, 576), 2560, "bf16", tokens), (8, 32, (520, 72, 72), 1000, "fp16", tokens)]
        cases += [(3, 64, (40, 48), 104, "bf16", tokens), (4, 128, (768, 768), 2048, "bf16", tokens)]
    return cases


def check_joined(part: int, parts: int) -> int:
    """`check` for linear layers that are joined; what each keeps stays its own."""
    from mopeq.nouns import Format
    from mopeq.plugins.matrices import Joined

    bad = 0
    for seed, (bits, group, outs, inputs, kind, tokens) in enumerate(joined_cases()):
        if seed % parts != part:
            continue
        dtype, g = (torch.bfloat16 if kind == "bf16" else torch.float16), torch.Generator(DEVICE).manual_seed(seed)
        made = [random_linear(Format(bits, group), out, inputs, g) for out in outs]
        x = torch.randn(tokens, inputs, device=DEVICE, generator=g).to(dtype)
        wanted = [x.double() @ matrix.rows(slice(None), torch.float64).T for matrix, _ in made]
        joint = Joined([matrix for matrix, _ in made])
        poison()
        found, again = ([matrix(x) for matrix, _ in made] for _ in range(2))
        off = max(error(y, want) for y, want in zip(found, wanted, strict=True))
        ok = off < (1.2e-2 if kind == "bf16" else 2e-3) and all(map(torch.equal, found, again))
        ok &= joint.on and "_triton_layer" in vars(joint) and not any("_triton_layer" in vars(m) for m, _ in made)
        for matrix, stored in made:
            kept = matrix.state_dict()
            ok &= all(torch.equal(kept[name], stored[name]) for name in stored)
        bad += not ok
        print(f"{'ok ' if ok else 'BAD'} {off:.5f} joined {(bits, group, outs, inputs, kind, tokens)}", flush=True)
    return bad


def router_cases() -> list[tuple[int, int, int, int, torch.dtype, bool, bool, bool]]:
    """(experts, hidden, choices, tokens, weights in, softmax, normalized, corrected) of routers."""
    cases = []
    for tokens in (0, 1, 5, 64):
        cases += [(72, 2560, 6, tokens, torch.bfloat16, True, False, False)]
        cases += [(128, 2048, 8, tokens, torch.bfloat16, True, True, False)]
        cases += [(256, 7168, 8, tokens, torch.float32, False, True, True)]
        cases += [
            (5, 100, 3, tokens, torch.float32, True, False, True),
            (1, 8, 1, tokens, torch.bfloat16, *[False] * 3),
        ]
    return cases


def check_routers(part: int, parts: int) -> int:
    """`check` for `kernels.routers`: the logits in float64, and what is chosen by them."""
    from mopeq.kernels import routers

    bad = 0
    for seed, case in enumerate(router_cases()):
        if seed % parts != part:
            continue
        experts, hidden, k, tokens, dtype, softmax, normalized, corrected = case
        g = torch.Generator(DEVICE).manual_seed(seed)
        x = torch.randn(tokens, hidden, device=DEVICE, generator=g).bfloat16()
        w = (torch.randn(experts, hidden, device=DEVICE, generator=g) * 2 / hidden**0.5).to(dtype)
        correction = torch.randn(experts, device=DEVICE, generator=g) * 0.1 if corrected else None
        rule: Any = (correction, k, softmax, normalized, 2.5, torch.float32, torch.float32)
        poison()
        found, again = (routers.route(x, w, *rule) for _ in range(2))
        off = error(found[0], x.double() @ w.double().T)
        weights, index = routers.formula(found[0], correction, k, softmax, normalized, 2.5)
        ok = off < 1e-5 and all(map(torch.equal, found, again)) and torch.equal(found[2], index)
        ok &= not tokens or error(found[1], weights.double()) < 1e-5
        bad += not ok
        print(f"{'ok ' if ok else 'BAD'} {off:.7f} router {case}", flush=True)
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--part", default="0/1", help="of the cases, for processes side by side: 3/8")
    args = parser.parse_args()
    if args.check:
        part, parts = (int(n) for n in args.part.split("/"))
        bad = sum(look(part, parts) for look in (check, check_linear, check_joined, check_routers))
        print(f"part {args.part}: {bad} bad")
        sys.exit(1 if bad else 0)
    parser.print_help()


if __name__ == "__main__":
    main()

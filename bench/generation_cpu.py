"""A whole model decoding on a CPU, in OLMoE-1B-7B's shape, of random weights: mopeq against llama.cpp at equal bytes.

    python bench/generation_cpu.py --library PATH --threads 1,2

PATH is llama.cpp's shared library: `libllama*.so`, with ggml's beside it, or the extension of a Python package that
holds them all. Ours is transformers' model with packed experts of several widths and every other matrix but routers
packed at 4 bits; theirs is a GGUF file of one K-quant for the experts and Q4_K for the rest, written here with the gguf
package and read by llama.cpp with its own defaults. Each makes 32 tokens, the likeliest always, from a prompt of 16,
turn about. Processor time is what other programs lengthen less, but says nothing of several threads. Beside it: where
our tokens' time goes, how fast the MoE layers read, and how fast this machine does.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
import time
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int32, c_void_p
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu_peers import PEERS, as_loaded
from generation_gpu import pack_the_rest
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from mopeq.plugins.experts import QuantizedExperts
from mopeq.plugins.held import untouched
from mopeq.plugins.matrices import PackedMatrix
from mopeq.verbs.bench import whole_numbers
from mopeq.verbs.layers import SHAPES, Shape, bytes_touched, random_experts

PROMPT, TOKENS = 16, 32
SIZES = dict(num_hidden_layers=16, vocab_size=50304, num_attention_heads=16)
SMALL = dict(num_hidden_layers=2, vocab_size=512, num_attention_heads=4)
# a K-quant's block of 256: its bytes, where its float16 scales lie, and values for weights of about 0.02 around 0
BLOCKS = {"Q3_K": (110, {108: 4e-4}), "Q4_K": (144, {0: 1e-4, 2: 7.5e-4})}
OTHERS = "Q4_K"


def clock() -> np.ndarray:
    """Seconds of the process's processor time, and by the clock."""
    return np.array((time.process_time(), time.perf_counter()))


def our_model(shape: Shape, sizes: dict[str, int], bits: tuple[int, ...], dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, OlmoeConfig

    config = OlmoeConfig(
        hidden_size=shape.hidden, intermediate_size=8, num_experts=1, num_experts_per_tok=shape.choices,
        num_key_value_heads=sizes["num_attention_heads"], **sizes,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    for seed, layer in enumerate(model.model.layers):
        moe = layer.mlp  # made with one tiny expert, for which packed ones are put in
        router = torch.randn(shape.experts, shape.hidden) * 0.02
        moe.gate.weight = nn.Parameter(router.to(dtype), requires_grad=False)
        moe.gate.num_experts = shape.experts
        moe.experts = as_loaded(random_experts(shape, bits, seed=seed))
    pack_the_rest(model, "cpu")
    return model


def our_bytes(model: Any) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def decode_ours(model: Any, ids: list[int]) -> list[np.ndarray]:
    """Times of TOKENS tokens after the prompt."""
    times = []
    with torch.inference_mode():
        step = model(input_ids=torch.tensor([ids]), use_cache=True)
        token = step.logits[:, -1:].argmax(-1)
        for _ in range(TOKENS):
            began = clock()
            step = model(input_ids=token, past_key_values=step.past_key_values, use_cache=True)
            token = step.logits[:, -1:].argmax(-1)
            times.append(clock() - began)
        assert bool(step.logits.isfinite().all())
    return times


def write_gguf(path: Path, shape: Shape, sizes: dict[str, int], kind: str) -> None:
    """A file of random blocks with finite scales: experts in `kind`, other matrices in OTHERS, the rest in float32."""
    import gguf

    depth, vocabulary, heads = sizes["num_hidden_layers"], sizes["vocab_size"], sizes["num_attention_heads"]
    h, i, e = shape.hidden, shape.inner, shape.experts
    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_block_count(depth)
    writer.add_context_length(4096)
    writer.add_embedding_length(h)
    writer.add_feed_forward_length(i)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocabulary)
    writer.add_expert_count(e)
    writer.add_expert_used_count(shape.choices)
    writer.add_tokenizer_model("none")
    parts: list[tuple[str, tuple[int, ...], str]] = [
        ("token_embd", (vocabulary, h), OTHERS), ("output_norm", (h,), "F32"), ("output", (vocabulary, h), OTHERS),
    ]  # fmt: skip
    for at in range(depth):
        parts += [(f"blk.{at}.{name}", (h,), "F32") for name in ("attn_norm", "attn_q_norm", "attn_k_norm", "ffn_norm")]
        parts += [(f"blk.{at}.{name}", (h, h), OTHERS) for name in ("attn_q", "attn_k", "attn_v", "attn_output")]
        parts += [(f"blk.{at}.ffn_gate_inp", (e, h), "F32"), (f"blk.{at}.ffn_down_exps", (e, h, i), kind)]
        parts += [(f"blk.{at}.ffn_{name}_exps", (e, i, h), kind) for name in ("gate", "up")]
    rng = np.random.default_rng(0)
    for name, size, kept in parts:
        number = gguf.GGMLQuantizationType[kept]
        stored = size if kept == "F32" else gguf.quant_shape_to_byte_shape(size, number)
        dtype = np.dtype(np.float32 if kept == "F32" else np.uint8)
        writer.add_tensor_info(f"{name}.weight", stored, dtype, int(np.prod(stored)) * dtype.itemsize, number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, size, kept in parts:
        writer.write_tensor_data(random_tensor(rng, size, kept))
    writer.close()


def random_tensor(rng: np.random.Generator, size: tuple[int, ...], kind: str) -> np.ndarray:
    if kind == "F32":
        return np.ones(size, np.float32) if len(size) == 1 else rng.standard_normal(size, np.float32) * np.float32(0.02)
    width, scales = BLOCKS[kind]
    blocks = np.frombuffer(rng.bytes(int(np.prod(size)) // 256 * width), np.uint8).reshape(-1, width).copy()
    for at, scale in scales.items():
        blocks[:, at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return blocks.reshape(*size[:-1], -1)


class Opaque(ctypes.Structure):
    """llama.cpp's parameters, as its own functions give and take them; versions differ in what they hold."""

    _fields_ = (("held", ctypes.c_byte * 1024),)


class Batch(ctypes.Structure):
    _fields_ = (("tokens", c_int32), ("held", c_void_p * 6))


SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [c_void_p, c_void_p]),
    "llama_print_system_info": (c_char_p, []),
    "llama_model_default_params": (Opaque, []),
    "llama_context_default_params": (Opaque, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, Opaque]),
    "llama_model_size": (ctypes.c_uint64, [c_void_p]),
    "llama_model_free": (None, [c_void_p]),
    "llama_init_from_model": (c_void_p, [c_void_p, Opaque]),
    "llama_free": (None, [c_void_p]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_batch_get_one": (Batch, [POINTER(c_int32), c_int32]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
}
SILENT = ctypes.CFUNCTYPE(None, c_int32, c_char_p, c_void_p)(lambda *_: None)


def llama_of(path: Path) -> Any:
    """The library, its functions typed; its backends beside it, where they are apart, are loaded: the best for this
    processor."""
    lib = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    for name, (answer, arguments) in SIGNATURES.items():
        found = getattr(lib, name)
        found.restype, found.argtypes = answer, arguments
    lib.llama_log_set(ctypes.cast(SILENT, c_void_p), None)
    lib.llama_backend_init()
    if lib.ggml_backend_reg_count() == 0:
        lib.ggml_backend_load_all_from_path(str(path.parent).encode())
    return lib


class Theirs:
    def __init__(self, lib: Any, path: Path, vocabulary: int):
        self.lib, self.vocabulary = lib, vocabulary
        self.model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        assert self.model, f"llama.cpp does not load {path}"
        self.context = lib.llama_init_from_model(self.model, lib.llama_context_default_params())
        self.nbytes = lib.llama_model_size(self.model)

    def step(self, ids: list[int]) -> int:
        """The likeliest token after these, which follow those before."""
        held = (c_int32 * len(ids))(*ids)
        assert self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(held, len(ids))) == 0
        logits = np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, -1), (self.vocabulary,))
        assert np.isfinite(logits[0])
        return int(logits.argmax())

    def decode(self, ids: list[int]) -> list[np.ndarray]:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        token, times = self.step(ids), []
        for _ in range(TOKENS):
            began = clock()
            token = self.step([token])
            times.append(clock() - began)
        return times

    def free(self) -> None:
        self.lib.llama_free(self.context)
        self.lib.llama_model_free(self.model)


def parts_of_tokens(decode: Callable[[], Any], rounds: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Seconds a token of our MoE layers (routers left out) and of our other matrices, in the round where each took
    least, and the former's bytes."""
    kinds = (QuantizedExperts, PackedMatrix)
    spent, read = {kind: np.zeros((rounds, 2)) for kind in kinds}, 0

    def timed(kind: Any, own: Any, at: int, self: Any, x: Any, *routing: Any) -> Any:
        nonlocal read
        began = clock()
        out = own(self, x, *routing)
        if x.numel() == x.shape[-1]:  # not of the prompt
            spent[kind][at] += clock() - began
            read += bytes_touched(self, *routing[:1]) if routing and at == 0 else 0
        return out

    owns = {kind: kind.compute for kind in kinds}
    try:
        for at in range(rounds):
            for kind, own in owns.items():
                kind.compute = partialmethod(partial(timed, kind, own, at))
            decode()
    finally:
        for kind, own in owns.items():
            kind.compute = own
    experts, others = (spent[kind].min(0) / TOKENS for kind in kinds)
    return experts, others, read // TOKENS


def read_rate(at: int) -> float:
    """Bytes a second of the fastest of torch's loops that do little but read, in large pages where there are any."""
    block = untouched((1 << 27,), torch.float32).fill_(1.0)
    ways: list[Callable[[], Any]] = [block.view(torch.int64).sum, block.sum, block.amax, partial(block.dot, block)]
    least = np.inf
    for way in ways * 5:
        began = clock()
        way()
        least = min(least, (clock() - began)[at])
    return 4 * block.numel() / least


def compare(ours: Any, theirs: Theirs, threads: int, rounds: int) -> None:
    torch.set_num_threads(threads)
    theirs.lib.llama_set_n_threads(theirs.context, threads, threads)
    ids = torch.randint(0, theirs.vocabulary, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    ways = [partial(decode_ours, ours, ids), partial(theirs.decode, ids)]
    times: list[list[np.ndarray]] = [[], []]
    for at in range(rounds + 1):
        for kept, way in zip(times, ways, strict=True):
            kept += way() if at else way()[:0]  # the first is for warming up
    for at, by in enumerate(("processor time", "the clock")):
        a, b = (1e3 * np.array(t)[:, at] for t in times)
        print(
            f"  threads {threads}, {by}: {a.min():.1f} ms a token (median {np.median(a):.1f}), llama.cpp {b.min():.1f}"
            f" ({np.median(b):.1f}): {b.min() / a.min():.2f} x ({np.median(b) / np.median(a):.2f});"
            f" {1e3 / np.median(a):.1f} and {1e3 / np.median(b):.1f} tokens/s"
        )
    at = int(threads > 1)
    before = read_rate(at)
    moe, others, read = parts_of_tokens(ways[0], rounds)
    rate, ceiling = read / moe[at] / 1e9, max(before, read_rate(at)) / 1e9
    print(
        f"  of it MoE layers {1e3 * moe[at]:.1f} ms, {read / 1e6:.1f} MB, so {rate:.1f} GB/s of {ceiling:.1f}"
        f" ({rate / ceiling:.0%}); other matrices {1e3 * others[at]:.1f} ms",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of our activations")
    parser.add_argument("--folder", type=Path, help="where GGUF files are kept for the next time")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try this file")
    args = parser.parse_args()
    shape, sizes = (Shape(256, 256, 8, 2), SMALL) if args.small else (SHAPES["OLMoE-1B-7B"], SIZES)
    lib = llama_of(args.library.resolve())
    print(lib.llama_print_system_info().decode())
    with tempfile.TemporaryDirectory() as made:
        for peer in args.peers:
            path = (args.folder or Path(made)) / f"{peer}{'-small' * args.small}.gguf"
            if not path.exists():
                write_gguf(path, shape, sizes, peer)
            ours = our_model(shape, sizes, PEERS[peer][1], getattr(torch, args.dtype))
            theirs = Theirs(lib, path, sizes["vocab_size"])
            print(
                f"{peer}: ours in {args.dtype} {our_bytes(ours) / 1e6:.1f} MB, llama.cpp's {theirs.nbytes / 1e6:.1f} MB"
            )
            for threads in whole_numbers(args.threads, "--threads"):
                compare(ours, theirs, threads, args.rounds)
            theirs.free()
            del ours
            if args.folder is None:
                path.unlink()


if __name__ == "__main__":
    main()

"""GGUF, llama.cpp's file: a layer's experts are one tensor of one type, so one width a layer and projection.

What is packed goes into the smallest type that holds its very codes and scales (see blocks.py), which is seldom as
small as mopeq's own; all else keeps its dtype (vectors and routers are float32, as llama.cpp wants them). Of a
vision-language model the language model is written. Afterwards the file is read by the gguf package and compared with
the packed folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mopeq.checkpoint import read_json
from mopeq.errors import BadInput, MopeqError
from mopeq.export.blocks import block_type, fill
from mopeq.export.folder import write_card
from mopeq.export.opened import Experts, Packed
from mopeq.nouns import LinearId, TensorInfo
from mopeq.progress import progress

FILE = "model.gguf"
CARD = (
    f"The weights of a mopeq checkpoint as one GGUF file, `{FILE}`, for llama.cpp. Of a vision-language model it holds"
    " the language model alone."
)


@dataclass(frozen=True)
class Family:
    """How llama.cpp knows a family: its architecture, the name of its splitting into words, and what it takes for
    granted."""

    arch: str
    words: str
    renormalizes: bool  # the chosen experts' weights add up to 1
    pairs: bool = False  # it turns neighbouring rows of queries and keys, where transformers turns the halves of a head
    latent: bool = False  # DeepSeek's attention, a number of dense layers first, shared experts


FAMILIES = {
    "olmoe": Family("OLMOE", "olmo", False),
    "qwen2_moe": Family("QWEN2MOE", "qwen2", False),
    "qwen3_moe": Family("QWEN3MOE", "qwen2", True),
    "qwen3_vl_moe": Family("QWEN3VLMOE", "qwen2", True),
    "mixtral": Family("LLAMA", "default", True, pairs=True),
    "deepseek_v2": Family("DEEPSEEK2", "deepseek-llm", False, latent=True),
}


@dataclass(frozen=True)
class Part:
    """One tensor of the file: its bytes' shape and type, and what gives them."""

    name: str
    kind: str
    shape: tuple[int, ...]
    give: Callable[[], np.ndarray]


def export(packed: Packed, directory: Path) -> dict[str, Any]:
    """Write DIRECTORY/model.gguf and compare it. BadInput for a map that mixes widths within a layer's projection, a
    format or shape that no type of GGUF holds, and a family whose layout in GGUF is not known here."""
    if find_spec("gguf") is None:
        raise BadInput("--to gguf needs the gguf package", "pip install gguf")
    import gguf

    family = known(packed)
    kinds = expert_kinds(packed)
    arch = gguf.MODEL_ARCH[family.arch]
    beside = directory / f".{FILE}.part"
    writer = gguf.GGUFWriter(beside, gguf.MODEL_ARCH_NAMES[arch])
    describe(writer, packed, family)
    notes = [*packed.left_out, *words(writer, packed, family)]
    depth = packed.model.config.get_text_config().num_hidden_layers
    parts = list(other_parts(packed, family, gguf.get_tensor_name_map(arch, depth), notes))
    parts += [
        expert_part(packed, experts, p, kinds[experts.layer, p]) for experts in packed.layers for p in experts.shapes
    ]
    for part in parts:
        kind = gguf.GGMLQuantizationType[part.kind]
        shape = gguf.quant_shape_to_byte_shape(part.shape, kind) if part.kind not in PLAIN else part.shape
        width: np.dtype[Any] = PLAIN.get(part.kind, np.dtype(np.uint8))
        size = int(np.prod(shape)) * width.itemsize
        writer.add_tensor_info(part.name, shape, width, size, kind)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress("export", len(parts), "tensors") as bar:
            for part in parts:
                writer.write_tensor_data(part.give())
                bar.step(1)
        writer.close()
        payload = check(packed, beside, kinds)
        beside.replace(directory / FILE)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    write_card(packed.folder, directory, CARD)
    used = sorted(
        {f"{packed.map[LinearId(x.layer, 0, p)].name} as {kinds[x.layer, p]}" for x in packed.layers for p in x.shapes}
    )
    notes.append(f"experts hold the same codes and scales: {', '.join(used)}")
    compared = sum(x.count * len(x.shapes) for x in packed.layers)
    return {"bytes_weights": payload, "compared": compared, "notes": notes}


PLAIN: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),
}


def known(packed: Packed) -> Family:
    """The family's row; BadInput where it has none, or computes what llama.cpp does not for its architecture."""
    config = packed.model.config
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise BadInput(
            f"--to gguf knows {', '.join(FAMILIES)}, not {config.model_type}",
            "try --to dense, then llama.cpp's own convert_hf_to_gguf.py",
        )
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    depth, dense = text.num_hidden_layers, text.first_k_dense_replace if family.latent else 0
    # transformers' DeepSeek-V2 leaves norm_topk_prob aside
    renormalizes = family.latent or getattr(text, "norm_topk_prob", family.renormalizes) == family.renormalizes
    scaled = rope.get("rope_type", "default")
    unlike = {
        f"experts in {len(packed.layers)} of {depth} layers": [x.layer for x in packed.layers]
        != list(range(dense, depth)),
        f"norm_topk_prob = {getattr(text, 'norm_topk_prob', None)}": not renormalizes,
        f"rope_type = {scaled}": scaled != "default" and not (scaled == "yarn" and family.latent),
        "a yarn whose mscale and mscale_all_dim are not there, or differ": scaled == "yarn"
        and (not rope.get("mscale") or rope["mscale"] != rope.get("mscale_all_dim")),
        f"topk_method = {getattr(text, 'topk_method', None)}": family.latent and text.topk_method != "greedy",
        f"sliding_window = {getattr(text, 'sliding_window', None)}": config.model_type == "mixtral"
        and text.sliding_window is not None,
        "fewer keys than queries": config.model_type == "olmoe"
        and text.num_key_value_heads != text.num_attention_heads,
        "clip_qkv": getattr(text, "clip_qkv", None) is not None,
        "experts with biases": any(packed.bias(packed.layers[0], 0, p) is not None for p in packed.layers[0].shapes),
        f"the activation {text.hidden_act}": text.hidden_act != "silu",
    }
    if found := next((what for what, wrong in unlike.items() if wrong), None):
        raise BadInput(f"llama.cpp's {config.model_type} does not compute {found}", "try --to dense")
    return family


def expert_kinds(packed: Packed) -> dict[tuple[int, str], str]:
    """{(layer, projection): the type that holds it}."""
    kinds = {}
    for experts in packed.layers:
        for p, (_, columns) in experts.shapes.items():
            formats = sorted({packed.map[LinearId(experts.layer, e, p)] for e in range(experts.count)})
            if len(formats) > 1:
                raise BadInput(
                    f"GGUF has one type for a layer's experts; {experts.prefix} {p} has"
                    f" {', '.join(fmt.name for fmt in formats)}",
                    "quantize with --per layer or --per layer-projection, or try --to dense",
                )
            kind = block_type(formats[0], columns)
            if kind is None:
                raise BadInput(
                    f"no type of GGUF holds {formats[0].name} in rows of {columns} exactly",
                    "rows and groups must be whole blocks of 32, and widths at most 7 bits; or try --to dense",
                )
            kinds[experts.layer, p] = kind
    return kinds


def expert_part(packed: Packed, experts: Experts, p: str, kind: str) -> Part:
    def give() -> np.ndarray:
        return np.stack([fill(packed.matrix(experts, e, p), kind) for e in range(experts.count)])

    return Part(expert_name(experts, p), kind, (experts.count, *experts.shapes[p]), give)


def expert_name(experts: Experts, p: str) -> str:
    return f"blk.{experts.layer}.ffn_{p}_exps.weight"


def other_parts(packed: Packed, family: Family, names: Any, notes: list[str]) -> Iterator[Part]:
    """All tensors outside the experts, by llama.cpp's names; what is of no language model is left out, and said."""
    left, rounded = 0, 0
    for info in packed.others():
        is_packed = packed.is_packed(info)
        name = info.name.replace(".qweight", ".weight") if is_packed else info.name
        if "visual." in name:
            left += 1
            continue
        found = names.get_name(name.replace("language_model.", ""), try_suffixes=(".weight", ".bias"))
        if found is None:
            raise BadInput(f"llama.cpp has no name for {name}", "try --to dense")
        shape = packed.other_shape(info) if is_packed else tuple(n for n in info.shape if n != 1) or (1,)
        kind = "F32" if len(shape) == 1 or found.endswith("ffn_gate_inp.weight") else info.dtype
        if is_packed:
            assert packed.other is not None
            kind = block_type(packed.other, shape[1]) or "F16"
            rounded += kind == "F16"
        order = in_pairs(packed, found, shape) if family.pairs else None
        yield Part(found, kind, shape, giver(packed, info, kind, shape, order))
    if left:
        notes.append(f"{left} tensors of the picture tower are left out: the file reads text alone")
    if rounded:
        notes.append(f"{rounded} matrices outside the experts are rounded to F16: no smaller type holds them exactly")


def in_pairs(packed: Packed, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """The rows of queries or keys so ordered that the two of a rotation are neighbours; None for other tensors."""
    text = packed.model.config.get_text_config()
    heads = {"attn_q": text.num_attention_heads, "attn_k": text.num_key_value_heads}.get(name.split(".")[-2])
    return None if heads is None else np.arange(shape[0]).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def giver(
    packed: Packed, info: TensorInfo, kind: str, shape: tuple[int, ...], order: np.ndarray | None
) -> Callable[[], np.ndarray]:
    def read() -> np.ndarray:
        if packed.is_packed(info):
            q = packed.other_matrix(info)
            return q.dequantize(torch.float16).numpy() if kind == "F16" else fill(q, kind)
        value = packed.reader.read(info.name).reshape(shape)
        if kind == "BF16":
            return value.view(torch.int16).numpy().view(np.uint16)
        return value.to(torch.float32 if kind == "F32" else torch.float16).numpy()

    return read if order is None else lambda: np.ascontiguousarray(read()[order])


def describe(writer: Any, packed: Packed, family: Family) -> None:
    """The numbers that llama.cpp builds the model from."""
    import gguf

    config, text = packed.model.config, packed.model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    writer.add_name(packed.folder.resolve().name)
    writer.add_file_type(gguf.LlamaFileType.GUESSED)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_vocab_size(text.vocab_size)
    writer.add_expert_count(packed.layers[0].count)
    writer.add_expert_used_count(text.num_experts_per_tok)
    if family.latent:
        describe_latent(writer, text, rope)
    elif getattr(text, "head_dim", None):
        writer.add_key_length(text.head_dim)
        writer.add_value_length(text.head_dim)
    if getattr(text, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(text.moe_intermediate_size)
    if getattr(text, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(text.shared_expert_intermediate_size)
    if sections := rope.get("mrope_section"):
        writer.add_rope_dimension_sections([*sections, 0][:4])
    if vision := getattr(config, "vision_config", None):
        writer.add_num_deepstack_layers(len(getattr(vision, "deepstack_visual_indexes", ())))


def describe_latent(writer: Any, text: Any, rope: dict[str, Any]) -> None:
    """DeepSeek-V2's own numbers. Keys and values are unfolded for every head: llama.cpp's other way, which keeps them
    folded, wants a matrix transposed, and blocks do not survive that."""
    import gguf

    writer.add_key_length(text.qk_nope_head_dim + text.qk_rope_head_dim)
    writer.add_value_length(text.v_head_dim)
    writer.add_rope_dimension_count(text.qk_rope_head_dim)
    writer.add_q_lora_rank(text.q_lora_rank or 0)
    writer.add_kv_lora_rank(text.kv_lora_rank)
    writer.add_leading_dense_block_count(text.first_k_dense_replace)
    writer.add_expert_shared_count(text.n_shared_experts)
    writer.add_expert_weights_scale(text.routed_scaling_factor)
    writer.add_expert_weights_norm(False)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))
        writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])  # llama.cpp takes the 0.1 out again


def words(writer: Any, packed: Packed, family: Family) -> list[str]:
    """The tokenizer, where it is byte-level or of sentencepiece's kind; else a note that the file has none."""
    import gguf
    from transformers import AutoTokenizer

    path = packed.folder / "tokenizer.json"
    stored = read_json(path) if path.exists() else {}
    bytewise, pieces = "'ByteLevel'" in str(stored), merges_by_number(stored)
    if not bytewise and not pieces:
        writer.add_tokenizer_model("none")
        return ["the packed folder has no tokenizer.json that GGUF can hold, so the file has no tokenizer"]
    tokenizer = AutoTokenizer.from_pretrained(packed.folder, local_files_only=True, trust_remote_code=False)
    size = packed.model.config.get_text_config().vocab_size
    by_id = {i: token for token, i in tokenizer.get_vocab().items() if i < size}
    added = tokenizer.added_tokens_decoder
    kinds = []
    for i in range(size):
        if i not in by_id:
            kinds.append(gguf.TokenType.UNUSED)
        elif i in added:
            kinds.append(gguf.TokenType.CONTROL if added[i].special else gguf.TokenType.USER_DEFINED)
        elif not bytewise and re.fullmatch("<0x[0-9A-F]{2}>", by_id[i]):
            kinds.append(gguf.TokenType.BYTE)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    if not bytewise and tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = gguf.TokenType.UNKNOWN
    writer.add_tokenizer_model("gpt2" if bytewise else "llama")
    writer.add_tokenizer_pre(family.words if bytewise else "default")
    writer.add_token_list([by_id.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types(kinds)
    if not bytewise:
        writer.add_token_scores([-float(i) for i in range(size)])  # of two pieces llama.cpp makes the first one first
        writer.add_add_space_prefix(any(word in str(stored) for word in ("'Prepend'", "'first'", "'always'")))
    gguf.SpecialVocab(packed.folder, load_merges=bytewise, n_vocab=size).add_to_gguf(writer, quiet=True)
    return []


def merges_by_number(stored: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json holds pieces as sentencepiece's do: joined in the order of their numbers, and what no
    piece has spelled in bytes."""
    model = stored.get("model", {})
    if not model.get("byte_fallback") or "merges" not in model:
        return False
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    numbers = [model["vocab"]["".join(pair)] for pair in pairs]
    return numbers == sorted(numbers)


def check(packed: Packed, path: Path, kinds: dict[tuple[int, str], str]) -> int:
    """Read the file by the gguf package; MopeqError where an expert's weights differ. Returns the bytes of tensors."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for experts in packed.layers:
        for p in experts.shapes:
            found = tensors[expert_name(experts, p)]
            for e in range(experts.count):
                values = gguf.dequantize(found.data[e], found.tensor_type)
                if not np.array_equal(values, packed.matrix(experts, e, p).dequantize().numpy()):
                    raise MopeqError(
                        f"{found.name}: expert {e} differs from the packed one",
                        "please report this; nothing was exported",
                    )
    return sum(int(tensor.n_bytes) for tensor in tensors.values())

"""GGUF, llama.cpp's file: a layer's experts are one tensor of one type, so one width a layer and projection.

What is packed goes into the smallest type that holds its very codes and scales (see blocks.py), which is seldom as
small as mopeq's own; all else keeps its dtype (vectors and routers are float32, as llama.cpp wants them). Of a
vision-language model the language model is written. Afterwards the file is read by the gguf package and compared with
the packed folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

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


FAMILIES = {
    "olmoe": Family("OLMOE", "olmo", False),
    "qwen2_moe": Family("QWEN2MOE", "qwen2", False),
    "qwen3_moe": Family("QWEN3MOE", "qwen2", True),
    "qwen3_vl_moe": Family("QWEN3VLMOE", "qwen2", True),
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
    parts = list(other_parts(packed, gguf.get_tensor_name_map(arch, len(packed.layers)), notes))
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
    unlike = {
        f"{len(packed.layers)} of {text.num_hidden_layers} layers with experts": len(packed.layers)
        != text.num_hidden_layers,
        f"norm_topk_prob = {getattr(text, 'norm_topk_prob', family.renormalizes)}": getattr(
            text, "norm_topk_prob", family.renormalizes
        )
        != family.renormalizes,
        f"rope_type = {rope.get('rope_type')}": rope.get("rope_type", "default") != "default",
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


def other_parts(packed: Packed, names: Any, notes: list[str]) -> Iterator[Part]:
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
        yield Part(found, kind, shape, giver(packed, info, kind, shape))
    if left:
        notes.append(f"{left} tensors of the picture tower are left out: the file reads text alone")
    if rounded:
        notes.append(f"{rounded} matrices outside the experts are rounded to F16: no smaller type holds them exactly")


def giver(packed: Packed, info: TensorInfo, kind: str, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    def give() -> np.ndarray:
        if packed.is_packed(info):
            q = packed.other_matrix(info)
            return q.dequantize(torch.float16).numpy() if kind == "F16" else fill(q, kind)
        value = packed.reader.read(info.name).reshape(shape)
        if kind == "BF16":
            return value.view(torch.int16).numpy().view(np.uint16)
        return value.to(torch.float32 if kind == "F32" else torch.float16).numpy()

    return give


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
    if getattr(text, "head_dim", None):
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


def words(writer: Any, packed: Packed, family: Family) -> list[str]:
    """The tokenizer, where the folder has a byte-level one; a note where it has none."""
    import gguf
    from transformers import AutoTokenizer

    if not (packed.folder / "tokenizer.json").exists():
        writer.add_tokenizer_model("none")
        return ["the packed folder has no tokenizer.json, so the file has no tokenizer"]
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
        else:
            kinds.append(gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(family.words)
    writer.add_token_list([by_id.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types(kinds)
    gguf.SpecialVocab(packed.folder, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)
    return []


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

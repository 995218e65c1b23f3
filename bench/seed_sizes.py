"""What `mopeq plan` says of the paper's four models, beside the paper's sizes: python bench/seed_sizes.py [file]

Checkpoints that are headers only are made from each model's sizes (the shapes follow from its config's numbers), with
holes where the weights would be, and planned by the same function as any folder. Writes docs/seed-models.md between
its marks, or prints.

The paper (arXiv 2509.02512) gives sizes in GB without saying what they count. `explain` tries the countings that come
to mind and says how far each is off; which one the authors used is a guess, and is called one.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill
from typing import Any

import mopeq

PAGE = Path(__file__).resolve().parents[1] / "docs" / "seed-models.md"
GB = 10**9
Shape = tuple[int, ...]

# ------------------------------------------------------------------------------------------ the four models

VL2: dict[str, dict[str, Any]] = {
    "DeepSeek-VL2-Tiny": dict(
        hidden=1280, dense=6848, inner=896, layers=12, heads=10, experts=64, vocab=129280, latent=False, bias=False
    ),
    "DeepSeek-VL2-Small": dict(
        hidden=2048, dense=10944, inner=1408, layers=27, heads=16, experts=64, vocab=102400, latent=True, bias=False
    ),
    "DeepSeek-VL2": dict(
        hidden=2560, dense=12288, inner=1536, layers=30, heads=32, experts=72, vocab=129280, latent=True, bias=True
    ),
}
SHARED, TOWER, TOWER_MLP, BLOCKS, PATCHES = 2, 1152, 4304, 27, 729  # shared experts; SigLIP-so400m/14 at 384 pixels
RANK, NOPE, ROPE, VALUE = 512, 128, 64, 128  # latent attention

PAPER = {  # GB: (uniform 4-bit, mixed)
    "MolmoE-1B": (4.08, 3.41),
    "DeepSeek-VL2-Tiny": (2.64, 2.35),
    "DeepSeek-VL2-Small": (None, None),
    "DeepSeek-VL2": (14.35, 10.49),
}


def layer(name: str, *shape: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def gated(name: str, hidden: int, inner: int) -> Iterator[tuple[str, Shape]]:
    for word, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
        yield f"{name}.{word}_proj.weight", shape


def siglip() -> Iterator[tuple[str, Shape]]:
    """The vision tower of every DeepSeek-VL2, with the pooling head that is in the file and used by none."""
    yield "vision.pos_embed", (1, PATCHES, TOWER)
    yield from layer("vision.patch_embed.proj", TOWER, 3, 14, 14)
    for at in (f"vision.blocks.{n}" for n in range(BLOCKS)):
        for name, shape in (("norm1", (TOWER,)), ("attn.qkv", (3 * TOWER, TOWER)), ("attn.proj", (TOWER, TOWER))):
            yield from layer(f"{at}.{name}", *shape)
        for name, shape in (("norm2", (TOWER,)), ("mlp.fc1", (TOWER_MLP, TOWER)), ("mlp.fc2", (TOWER, TOWER_MLP))):
            yield from layer(f"{at}.{name}", *shape)
    yield from layer("vision.norm", TOWER)
    yield "vision.attn_pool.latent", (1, 1, TOWER)
    for name, shape in (
        ("q", (TOWER, TOWER)),
        ("kv", (2 * TOWER, TOWER)),
        ("proj", (TOWER, TOWER)),
        ("norm", (TOWER,)),
    ):
        yield from layer(f"vision.attn_pool.{name}", *shape)
    yield from layer("vision.attn_pool.mlp.fc1", TOWER_MLP, TOWER)
    yield from layer("vision.attn_pool.mlp.fc2", TOWER, TOWER_MLP)


def vl2_shapes(m: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Every tensor of a DeepSeek-VL2, under its official name."""
    hidden, heads = m["hidden"], m["heads"]
    yield "image_newline", (hidden,)
    yield "view_seperator", (hidden,)
    yield from siglip()
    yield from layer("projector.layers.0", hidden, 4 * TOWER)
    yield from layer("projector.layers.2", hidden, hidden)
    yield "language.model.embed_tokens.weight", (m["vocab"], hidden)
    for n in range(m["layers"]):
        at = f"language.model.layers.{n}"
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
        if m["latent"]:
            yield f"{at}.self_attn.q_proj.weight", (heads * (NOPE + ROPE), hidden)
            yield f"{at}.self_attn.kv_a_proj_with_mqa.weight", (RANK + ROPE, hidden)
            yield f"{at}.self_attn.kv_a_layernorm.weight", (RANK,)
            yield f"{at}.self_attn.kv_b_proj.weight", (heads * (NOPE + VALUE), RANK)
            yield f"{at}.self_attn.o_proj.weight", (hidden, heads * VALUE)
        else:
            for x in "qkvo":
                yield f"{at}.self_attn.{x}_proj.weight", (hidden, hidden)
        if n == 0:
            yield from gated(f"{at}.mlp", hidden, m["dense"])
            continue
        yield f"{at}.mlp.gate.weight", (m["experts"], hidden)
        if m["bias"]:
            yield f"{at}.mlp.gate.e_score_correction_bias", (m["experts"],)
        yield from gated(f"{at}.mlp.shared_experts", hidden, SHARED * m["inner"])
        for e in range(m["experts"]):
            yield from gated(f"{at}.mlp.experts.{e}", hidden, m["inner"])
    yield "language.model.norm.weight", (hidden,)
    yield "language.lm_head.weight", (m["vocab"], hidden)


def vl2_config(m: dict[str, Any]) -> dict[str, Any]:
    """What `plan` reads of a DeepSeek-VL2's config."""
    language = {
        "model_type": "deepseek_v2", "hidden_size": m["hidden"], "num_hidden_layers": m["layers"],
        "num_attention_heads": m["heads"], "num_key_value_heads": m["heads"], "n_routed_experts": m["experts"],
        "vocab_size": m["vocab"],
    }  # fmt: skip
    latent = {"qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": VALUE, "kv_lora_rank": RANK}
    return {"model_type": "deepseek_vl_v2", "language_config": language | (latent if m["latent"] else {})}


def molmoe_shapes() -> Iterator[tuple[str, Shape]]:
    """Every tensor of MolmoE-1B-0924, under its official name."""
    hidden, inner, wide = 2048, 1024, 1024
    yield "model.transformer.wte.embedding", (50304, hidden)
    yield "model.transformer.wte.new_embedding", (128, hidden)
    yield "model.transformer.ln_f.weight", (hidden,)
    for at in (f"model.transformer.blocks.{n}" for n in range(16)):
        for norm in ("attn.q_norm", "attn.k_norm", "attn.attn_norm", "mlp.ff_norm"):
            yield f"{at}.{norm}.weight", (hidden,)
        yield f"{at}.attn.att_proj.weight", (3 * hidden, hidden)
        yield f"{at}.attn.attn_out.weight", (hidden, hidden)
        yield f"{at}.mlp.gate.weight", (64, hidden)
        for e in range(64):
            yield from gated(f"{at}.mlp.experts.{e}", hidden, inner)
    tower = "model.vision_backbone"
    yield f"{tower}.pad_embed", (2, 2 * wide)
    for x, columns in (("wq", 2 * wide), ("wk", 2 * wide), ("wv", 2 * wide), ("wo", wide)):
        yield from layer(f"{tower}.image_pooling_2d.{x}", wide, columns)
    for x, shape in (("w1", (inner, wide)), ("w2", (hidden, inner)), ("w3", (inner, wide))):
        yield f"{tower}.image_projector.{x}.weight", shape
    yield f"{tower}.image_vit.class_embedding", (wide,)
    yield f"{tower}.image_vit.positional_embedding", (577, wide)
    yield f"{tower}.image_vit.patch_embedding.weight", (wide, 588)
    yield from layer(f"{tower}.image_vit.pre_ln", wide)
    for at in (f"{tower}.image_vit.transformer.resblocks.{n}" for n in range(23)):
        for x in ("wq", "wk", "wv", "wo"):
            yield from layer(f"{at}.attention.{x}", wide, wide)
        yield from layer(f"{at}.feed_forward.w1", 4 * wide, wide)
        yield from layer(f"{at}.feed_forward.w2", wide, 4 * wide)
        yield from layer(f"{at}.attention_norm", wide)
        yield from layer(f"{at}.ffn_norm", wide)
    yield "lm_head.weight", (50304, hidden)


MOLMOE = {"model_type": "molmo", "block_type": "moe", "d_model": 2048, "n_layers": 16, "n_heads": 16}
MOLMOE |= {"moe_num_experts": 64, "vocab_size": 50280}


def models() -> dict[str, tuple[dict[str, Any], dict[str, Shape]]]:
    """{name: (config, shapes)} of the four, in bf16."""
    found = {name: (vl2_config(m), dict(vl2_shapes(m))) for name, m in VL2.items()}
    return {"MolmoE-1B": (MOLMOE, dict(molmoe_shapes()))} | found


def write_headers(folder: Path, config: dict[str, Any], shapes: dict[str, Shape], dtype: str = "BF16") -> Path:
    """A checkpoint folder whose one shard is a header and a hole as long as the weights would be."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, at, width = {}, 0, 4 if dtype == "F32" else 2
    for name, shape in shapes.items():
        size = width
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)
    return folder


# ------------------------------------------------------------------------------------------------ the table


def measure(name: str, folder: Path) -> dict[str, Any]:
    """All figures of one model, in bytes, from `mopeq plan` and the headers."""
    from mopeq.checkpoint import open_checkpoint
    from mopeq.families.standard import read_spec

    spec = read_spec(open_checkpoint(folder))
    whole, small = mopeq.plan(folder), mopeq.plan(folder, other_bits=4)
    found: dict[str, Any] = {key: whole[key] for key in ("params", "expert_params", "bytes_bf16")}
    found["roles"] = whole["bytes_by_role"]
    found |= {"uniform": {16: whole["bytes_by_bits"], 4: small["bytes_by_bits"]}}
    bounds = mopeq.plan(folder, allocate="kmeans")
    found["kmeans"] = bounds["minimum_bytes"], bounds["maximum_bytes"]
    experts_16 = whole["bytes_by_bits"]["4"] - whole["bytes_other"]
    counts = {"linears": 0, "rest": 0}  # values: the language model's other linear layers, and what is kept
    for tensor in spec.tensors.values():
        role = spec.roles[tensor.name]
        linear = len(tensor.shape) == 2 and role in ("attention", "shared expert", "other")
        if role != "routed expert":
            counts["linears" if linear else "rest"] += tensor.count
    found |= counts | {
        "fixed_16": whole["bytes_other"], "fixed_4": small["bytes_other"], "experts_4": experts_16,
        "paper_way": found["expert_params"] // 2 + counts["linears"] // 2 + 2 * counts["rest"],
    }  # fmt: skip
    uniform, mixed = PAPER[name]
    if uniform is not None:
        fixed = found["paper_way"] - found["expert_params"] / 2
        found["mix_bits"] = (mixed * 2**30 - fixed) * 8 / found["expert_params"]
        for other in (16, 4):
            ahead = mopeq.plan(folder, avg_bits=round(found["mix_bits"], 3), other_bits=other, per="projection")
            found[f"mix_{other}"] = ahead["predicted_bytes"]
    return found


def row(*cells: Any) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def head(*cells: str) -> list[str]:
    return [row(*cells), row("---", *("---:" for _ in cells[1:]))]


def size(nbytes: float) -> str:
    return f"{nbytes / GB:.3f}"


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """What plan says."""
    lines = head("", *found)
    lines.append(row("parameters", *(f"{m['params']:,}" for m in found.values())))
    lines.append(row("of them in routed experts", *(f"{m['expert_params']:,}" for m in found.values())))
    lines.append(row("bf16", *(size(m["bytes_bf16"]) for m in found.values())))
    for role in ("vision tower", "embedding", "shared expert", "attention", "router", "other"):
        label = {"vision tower": "vision tower and projector", "embedding": "embeddings and output head"}.get(
            role, role
        )
        lines.append(row(f"bf16, {label}", *(size(m["roles"].get(role, 0)) for m in found.values())))
    for other in (16, 4):
        for bits in "234":
            label = f"every expert at {bits} bits, `--other-bits {other}`"
            lines.append(row(label, *(size(m["uniform"][other][bits]) for m in found.values())))
    span = [" … ".join(size(b) for b in m["kmeans"]) for m in found.values()]
    lines.append(row("`--allocate kmeans`, least … most", *span))
    mixes = [f"{m['mix_bits']:.3f}" if "mix_bits" in m else "–" for m in found.values()]
    lines.append(row("code bits an expert weight in the paper's mix (inferred below)", *mixes))
    for other in (16, 4):
        cells = [size(m[f"mix_{other}"]) if f"mix_{other}" in m else "–" for m in found.values()]
        lines.append(row(f"such a mix, `--other-bits {other}`", *cells))
    return lines


def explain(found: dict[str, dict[str, Any]]) -> list[str]:
    """From the paper's figure to plan's, part by part; and the other countings that were tried."""
    known = {name: m for name, m in found.items() if PAPER[name][0] is not None}
    lines = [
        "### Which counting gives the paper's figures", "",
        "Uniform 4-bit, by the countings that come to mind. The number in brackets is how far each is from the paper's"
        " figure.", "",
        *head("counting", *known), row("the paper", *(f"{PAPER[name][0]} “GB”" for name in known)),
    ]  # fmt: skip

    def counting(label: str, nbytes: Any, unit: int) -> None:
        cells = [f"{nbytes(m) / unit:.3f} ({nbytes(m) / unit - PAPER[name][0]:+.3f})" for name, m in known.items()]
        lines.append(row(label, *cells))

    def all_codes(m: dict[str, Any]) -> float:
        return m["params"] / 2

    def experts_only(m: dict[str, Any]) -> float:
        return m["expert_params"] / 2 + 2 * (m["linears"] + m["rest"])

    for unit, word in ((GB, "10^9"), (2**30, "2^30")):
        counting(f"4 bits for every parameter, no scales ({word} bytes)", all_codes, unit)
        counting(f"4 bits for experts, 16 for all else, no scales ({word})", experts_only, unit)
        counting(f"the same with mopeq's scales and zeros ({word})", lambda m: m["uniform"][16]["4"], unit)
        counting(f"4 bits for all linear layers of the language model but routers, no scales ({word})",
                 lambda m: m["paper_way"], unit)  # fmt: skip
    worst = max(abs(m["paper_way"] / 2**30 - PAPER[name][0]) for name, m in known.items())
    lines += [
        "",
        f"One counting meets all three figures to within {worst:.3f}, the rounding of two decimals: **GiB, not GB; "
        "codes alone, no scales and zeros; 4 bits for the experts and for every other linear layer of the language"
        " model (attention, shared experts, the dense first layer); 16 bits for routers, norms, embeddings, head,"
        " projector and the whole vision tower.** That the authors counted so is inferred from the three figures,"
        " not read in the paper.",
        "", "### From there to what mopeq writes", "",
        "Every step is exact; in GB (10^9 bytes), uniform 4-bit. The last line of each part is `mopeq plan`'s.", "",
        *head("", *known),
        row("the paper's figure, its GB taken as GiB", *(size(PAPER[n][0] * 2**30) for n in known)),
        row("the counting above", *(size(m["paper_way"]) for m in known.values())),
        row("+ scales (fp16) and zeros (4 bits) of the experts, a pair for 64 weights",
            *(f"{(m['experts_4'] - m['expert_params'] / 2) / GB:+.3f}" for m in known.values())),
        row("+ the language model's other linear layers at 16 bits instead of 4",
            *(f"{1.5 * m['linears'] / GB:+.3f}" for m in known.values())),
        row("= `--other-bits 16`", *(f"**{size(m['uniform'][16]['4'])}**" for m in known.values())),
        row("the counting above", *(size(m["paper_way"]) for m in known.values())),
        row("+ scales and zeros of the experts",
            *(f"{(m['experts_4'] - m['expert_params'] / 2) / GB:+.3f}" for m in known.values())),
        row("+ all else: 4 bits with scales for vision tower, embeddings and head too, scales for linear layers",
            *(f"{(m['fixed_4'] - m['linears'] / 2 - 2 * m['rest']) / GB:+.3f}" for m in known.values())),
        row("= `--other-bits 4`", *(f"**{size(m['uniform'][4]['4'])}**" for m in known.values())),
    ]  # fmt: skip
    for m in known.values():
        experts = m["experts_4"] - m["expert_params"] / 2
        assert m["paper_way"] + experts + 1.5 * m["linears"] == m["uniform"][16]["4"]
        assert m["paper_way"] + experts + m["fixed_4"] - m["linears"] / 2 - 2 * m["rest"] == m["uniform"][4]["4"]
    half = 0.005 * 2**30 * 8
    lines += [
        "", "### The paper's mixes", "",
        "With that counting a mixed figure tells the average width of its experts, up to the figure's rounding. That"
        " the other linear layers stayed at 4 bits in the mixes is an assumption.", "",
        *head("", *known), row("mixed, the paper", *(f"{PAPER[name][1]} “GB”" for name in known)),
        row("code bits an expert weight", *(
            f"{m['mix_bits']:.3f} ± {half / m['expert_params']:.3f}" for m in known.values())),
        row("mopeq at that average, `--other-bits 16`, GB", *(size(m["mix_16"]) for m in known.values())),
        row("of it: experts' codes", *(size(m["mix_bits"] * m["expert_params"] / 8) for m in known.values())),
        row("experts' scales and zeros", *(
            size(m["mix_16"] - m["fixed_16"] - m["mix_bits"] * m["expert_params"] / 8) for m in known.values())),
        row("everything else", *(size(m["fixed_16"]) for m in known.values())),
    ]  # fmt: skip
    return lines


def page_part() -> str:
    found = {}
    with tempfile.TemporaryDirectory() as room:
        for name, (config, shapes) in models().items():
            found[name] = measure(name, write_headers(Path(room) / name, config, shapes))
    prose = [line if line.startswith(("|", "#")) else fill(line, 120) for line in explain(found)]
    return "\n".join([*table(found), "", *prose])


def between(page: str, mark: str, body: str) -> str:
    """The page with `body` between its marks."""
    start, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->"
    before, _, rest = page.partition(start)
    _, found, after = rest.partition(end)
    assert found, f"the page has no {mark} marks"
    return before + start + body + "\n" + end + after


def main() -> None:
    page = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    body = page_part()
    page.write_text(between(page.read_text(), "sizes", body))
    print(body)


if __name__ == "__main__":
    main()

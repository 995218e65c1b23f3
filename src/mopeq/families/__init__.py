"""How each kind of checkpoint lays out its experts: one row a family, read by model_type.

A new family is a row here; where its experts are stored oddly, `standard.py` learns the word that says how. Native
ports of models that transformers lacks live in folders beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """The on-disk layout of one family's routed experts.

    `per_expert`: every expert's projections are tensors of their own (`…experts.3.gate_proj.weight` or `w1/w3/w2`).
    Otherwise the experts of a layer are stacked in one tensor, whose last name is `gate_up` and `down` below `block`;
    `transposed` says it is stored [expert, in, out], `interleaved` that gate and up alternate along the outputs.
    `transposed=None`: both orders are found; whatever does not end in the module's own order is transposed.
    """

    per_expert: bool = True
    block: str = "experts"  # the stacked tensors are called …<block>.<gate_up> and …<block>.<down>
    gate_up: str = "gate_up_proj"
    down: str = "down_proj"
    transposed: bool | None = False
    interleaved: bool = False


EACH = Family()  # one tensor per expert and projection, the commonest layout
STACKED = Family(per_expert=False)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_ocr2", "deepseek_v2",
            "deepseek_v3", "deepseek_v32", "deepseek_v4", "deepseek_vl_v2", "dots1", "ernie4_5_moe", "exaone_moe",
            "flex_olmo", "flint", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm5_next", "glm_moe_dsa",
            "hunyuan_v1_moe", "hy_v3", "hy_v4", "jamba", "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "mellum",
            "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl", "mistral_large4", "mixtral", "molmo",
            "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next",
            "qwen3_omni_moe", "qwen4_exp", "solar_open", "unlimited_ocr",
        ),
        EACH,
    ),
    "gpt_oss": Family(per_expert=False, transposed=True, interleaved=True),
    "openai_privacy_filter": Family(per_expert=False, transposed=True),
    # released checkpoints are transposed; transformers 5 saves them as the module holds them, and reads both
    "qwen3_vl_moe": Family(per_expert=False, transposed=None),
    "diffusion_gemma": STACKED,
    "gemma4": STACKED,
    "mistral4": STACKED,
    "muse_spark": STACKED,
    "zaya": STACKED,
}  # fmt: skip

WHERE_TO_ADD = "src/mopeq/families/__init__.py, table FAMILIES"

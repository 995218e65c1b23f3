"""How each kind of checkpoint lays out its experts: one row a family, read by model_type.

A new family is a row here; where its experts are stored oddly, `standard.py` learns the word that says how. Where its
experts module lacks transformers' shared interface, a row of ADAPTERS gives it that (`adapters.py`). Native ports of
models that transformers lacks live in folders beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mopeq.tables import Row

# the last word of a projection's name, where every expert's projections are tensors of their own
NAMES = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


@dataclass(frozen=True)
class Family:
    """The on-disk layout of one family's routed experts.

    `per_expert`: every expert's projections are tensors of their own (`…experts.3.gate_proj.weight` or `w1/w3/w2`).
    Otherwise the experts of a layer are stacked in one tensor, whose last name is `gate_up` (or `gate` and `up` apart,
    or `up` alone) and `down` below `block`; `transposed` says it is stored [expert, in, out] (True, or which
    projections), `interleaved` that gate and up alternate along the outputs, `flat` that the experts follow one another
    along the first of two dimensions. `transposed=None`: both orders are found; whatever does not end in the module's
    own order is transposed.
    """

    per_expert: bool = True
    names: Mapping[str, str] = field(default_factory=lambda: NAMES)
    numbered: str = "{e}"  # how a tensor's name says which expert it belongs to
    block: str = "experts"  # the stacked tensors are called …<block>.<gate_up> and …<block>.<down>
    gate_up: str = "gate_up_proj"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    transposed: bool | tuple[str, ...] | None = False
    interleaved: bool = False
    flat: bool = False
    zero_experts: str = ""  # the config's count of experts that only hand their input on, and have no `down`
    modules: tuple[str, ...] = ()  # the modules that share one list of experts on disk, in that order
    adapted: bool = False  # whether a row of ADAPTERS gives its experts module the shared interface


EACH = Family()  # one tensor per expert and projection, the commonest layout
STACKED = Family(per_expert=False)
LINEAR = Family(per_expert=False, block="block_sparse_moe", gate_up="input_linear", down="output_linear")
W13 = Family(per_expert=False, gate_up="w13_weight", down="w2_weight", interleaved=True)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        (
            "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_ocr2", "deepseek_v2",
            "deepseek_v3", "deepseek_v32", "deepseek_v4", "deepseek_vl_v2", "dots1", "ernie4_5_moe", "exaone_moe",
            "flex_olmo", "flint", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm5_next", "glm_moe_dsa",
            "hunyuan_v1_moe", "hy_v3", "jamba", "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "mellum",
            "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl", "mistral_large4", "mixtral", "molmo",
            "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next",
            "qwen3_omni_moe", "qwen4_exp", "solar_open", "unlimited_ocr",
        ),
        EACH,
    ),
    "aria": Family(per_expert=False, gate_up="fc1", down="fc2", transposed=True),
    "dbrx": Family(
        per_expert=False, block="mlp", gate="w1", up="v1", down="w2", transposed=("down",), flat=True, adapted=True
    ),
    "diffusion_gemma": STACKED,
    "dots3_note": Family(names=NAMES | {"fc1": "gate", "fc3": "up", "fc2": "down"}),
    "ernie4_5_vl_moe": Family(modules=("text_moe", "vision_moe")),
    "gemma4": STACKED,
    "gpt_oss": Family(per_expert=False, transposed=True, interleaved=True),
    "granitemoe": LINEAR,
    "granitemoe_swa": STACKED,
    "granitemoehybrid": LINEAR,
    "granitemoeshared": LINEAR,
    "hy_v4": STACKED,
    "inkling_mm_model": W13,
    "inkling2": W13,
    # the attention's own experts are kept as they are: attention lies between their two matrices
    "jetmoe": Family(per_expert=False, block="mlp", gate_up="input_linear", down="output_linear", adapted=True),
    "llama4": Family(per_expert=False, transposed=True, adapted=True),
    "longcat_flash": Family(zero_experts="zero_expert_num", adapted=True),
    "mistral4": STACKED,
    "muse_spark": STACKED,
    "nllb-moe": Family(names={"fc1": "up", "fc2": "down"}, numbered="expert_{e}", adapted=True),
    "openai_privacy_filter": Family(per_expert=False, transposed=True),
    # released checkpoints are transposed; transformers 5 saves them as the module holds them, and reads both
    "qwen3_vl_moe": Family(per_expert=False, transposed=None),
    "step3p7": Family(per_expert=False, block="moe", adapted=True),
    "switch_transformers": Family(names={"wi": "up", "wo": "down"}, numbered="expert_{e}", adapted=True),
    "zaya": STACKED,
}  # fmt: skip

# the class that config.json names, of models whose published one names none: vLLM asks for it
UNNAMED = {"deepseek_vl_v2": "DeepseekVLV2ForCausalLM"}

WHERE_TO_ADD = "src/mopeq/families/__init__.py, table FAMILIES"

# Experts modules that transformers did not give the shared interface, by class
ADAPTERS: dict[str, Row] = {
    "DbrxExperts": Row("mopeq.families.adapters:Dbrx", "three flat matrices; down is stored the other way round"),
    "JetMoeMoE": Row("mopeq.families.adapters:JetMoe", "router and experts in one module, with a bias after the sum"),
    "Llama4TextExperts": Row("mopeq.families.adapters:Llama4", "the input is scaled, and every expert gets a copy"),
    "LongcatFlashExperts": Row("mopeq.families.adapters:Longcat", "some experts only hand their input on"),
    "NllbMoeExperts": Row("mopeq.families.adapters:Nllb", "a module per expert, outputs scaled by what dropout leaves"),
    "Step3p7Experts": Row("mopeq.families.adapters:Step3p7", "the shared interface in all but name"),
    "SwitchTransformersExperts": Row("mopeq.families.adapters:Switch", "a module per expert, chosen by a mask"),
}

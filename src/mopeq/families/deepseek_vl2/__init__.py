"""DeepSeek-VL2 Tiny, Small and Base for transformers 5: `register()` teaches the Auto classes.

    configuration_deepseek_vl2.py   config.json as published, with the original's defaults
    modeling_deepseek_vl2.py        SigLIP tower, projector, tile layout; transformers' DeepSeek decoders
    processing_deepseek_vl2.py      tiles, chat format, batches

Left out: training (dropout, auxiliary losses), the 1-D tile layout (dead code upstream), chunked prefill.
"""

from __future__ import annotations


def register() -> None:
    """Make AutoConfig, AutoProcessor and AutoModelForImageTextToText (and CausalLM) load official folders."""
    register_config()
    register_processor()
    register_model()


def register_config() -> None:
    """AutoConfig alone: imports no model code."""
    from transformers import AutoConfig

    from .configuration_deepseek_vl2 import DeepseekVLV2Config

    AutoConfig.register(DeepseekVLV2Config.model_type, DeepseekVLV2Config, exist_ok=True)


def register_processor() -> None:
    from transformers import AutoProcessor

    from .configuration_deepseek_vl2 import DeepseekVLV2Config
    from .processing_deepseek_vl2 import DeepseekVLV2Processor

    AutoProcessor.register(DeepseekVLV2Config, DeepseekVLV2Processor, exist_ok=True)


def register_model() -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from .configuration_deepseek_vl2 import DeepseekVLV2Config
    from .modeling_deepseek_vl2 import DeepseekVLV2ForCausalLM

    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        auto.register(DeepseekVLV2Config, DeepseekVLV2ForCausalLM, exist_ok=True)

"""MolmoE-1B for transformers 5: `register()` teaches the Auto classes.

    configuration_molmo.py      config.json as published, with the original's defaults; dense Molmo is refused
    modeling_molmo.py           CLIP tower, attention pooling, split embedding; transformers' OLMoE decoder
    image_processing_molmo.py   overlapping crops, their masks, and where their tokens stand
    processing_molmo.py         prompt format, batches

Left out: the dense Molmo models, training (dropout, sub-segments), tensorflow's resize (torch's differs by 1.5e-5).
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

    from .configuration_molmo import MolmoConfig

    AutoConfig.register(MolmoConfig.model_type, MolmoConfig, exist_ok=True)


def register_processor() -> None:
    from transformers import AutoProcessor

    from .configuration_molmo import MolmoConfig
    from .processing_molmo import MolmoProcessor

    AutoProcessor.register(MolmoConfig, MolmoProcessor, exist_ok=True)


def register_model() -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from .configuration_molmo import MolmoConfig
    from .modeling_molmo import MolmoForCausalLM, register_weight_names

    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        auto.register(MolmoConfig, MolmoForCausalLM, exist_ok=True)
    register_weight_names()

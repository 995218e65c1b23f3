"""transformers: a registered quantizer, so that plain `from_pretrained(OUT)` runs from packed weights.

Before weights are read, experts modules (and, with `--other-bits` 4 or 8, linears and embeddings) are replaced by
packed ones. Linears and embeddings hold parameters under the on-disk names, which transformers' own loader fills. The
experts, most of the bytes, are read from the shards straight into their tiers once that is done: transformers maps
the files, and whatever is copied out of a mapped file is resident twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mopeq.errors import BadInput, MopeqError
from mopeq.nouns import BASE36, PADDING, Format, TensorInfo
from mopeq.packed import check_experts, check_sizes, check_version, read_map
from mopeq.plugins.experts import QuantizedExperts
from mopeq.plugins.matrices import PackedEmbedding, PackedLinear, PackedMatrix, TiedLinear, join
from mopeq.plugins.quick import quicken
from mopeq.plugins.stored import remember, stored_tensors
from mopeq.seam import experts_modules, match_names, renamer, twins, weights
from mopeq.tensors import read_stored


def expert_formats(
    experts: Mapping[str, Mapping[str, str]], palette: list[Format]
) -> dict[str, dict[str, list[Format]]]:
    """config.json's digits -> {prefix: {projection: [Format of each expert]}}."""
    return {
        prefix: {p: [palette[BASE36.index(digit)] for digit in row] for p, row in rows.items()}
        for prefix, rows in experts.items()
    }


@register_quantization_config("mopeq")
class MopeqConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint; see packed.quantization_config for its fields."""

    def __init__(self, **fields: Any):
        check_version(fields)
        fields.pop("quant_method", None)
        self.quant_method = "mopeq"
        self.fields = fields

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": "mopeq", **self.fields}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        made = cls(**config_dict)
        return (made, kwargs) if return_unused_kwargs else made

    @property
    def formats(self) -> dict[str, dict[str, list[Format]]]:
        return expert_formats(self.fields["experts"], [Format.parse(name) for name in self.fields["formats"]])

    @property
    def other(self) -> Format | None:
        name = self.fields.get("other")
        return None if name is None else Format.parse(name)


@register_quantizer("mopeq")
class MopeqQuantizer(HfQuantizer):
    """Loads a mopeq checkpoint into packed modules. Making one is `mopeq quantize`'s work, not this class's."""

    requires_calibration = True
    quantization_config: MopeqConfig

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **_: Any) -> Any:
        self.folder, self.tensors = read_folder(checkpoint_files)
        model._keys_to_ignore_on_load_unexpected |= {f"^{re.escape(PADDING)}$"}
        formats = self.quantization_config.formats
        found = experts_modules(model)
        shared = twins(model)
        prefixes = self.prefixes = match_names(list(formats), [name for name, _ in found if name not in shared])
        model._keys_to_ignore_on_load_unexpected |= {
            rf"{re.escape(name)}\.(\d+\.\w+_proj\.|down_proj$)" for name in (*prefixes, *prefixes.values())
        }
        for name, module in found:
            if name in shared:
                continue
            rows = formats[prefixes[name]]
            if any(len(rows[p]) != len(rows["down"]) for p in rows):
                raise BadInput(
                    f"config.json gives {prefixes[name]} unequal numbers of experts", "the folder is damaged"
                )
            with torch.device("meta"):
                replace(model, name, QuantizedExperts(module, rows, projection_shapes(module)))
        for name, owner in shared.items():  # two parts of the model with one set of experts
            prefixes[name] = prefixes[owner]
            replace(model, name, model.get_submodule(owner))
            untie(model, f"{name}.")
        if self.quantization_config.other is not None:
            self.pack_others(model, set(self.tensors), self.quantization_config.other)
        self.float32 = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
        return model

    def pack_others(self, model: Any, names: set[str], fmt: Format) -> None:
        """Replace each linear and embedding whose matrix lies packed on disk."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        mapping = get_model_conversion_mapping(model, None, None)
        renamed = renamer(model, mapping)
        converters = [x for x in mapping if isinstance(x, WeightConverter)]
        experts = tuple(f"{prefix}." for prefix in self.quantization_config.formats)
        for stored in sorted(n for n in names if n.endswith(".qweight") and not n.startswith(experts)):
            key = stored.removesuffix(".qweight") + ".weight"
            target, pattern = renamed(key)
            targets = [target]
            if pattern is not None:  # a fused matrix that the model holds in parts
                parts = next(x for x in converters if pattern in x.source_patterns).target_patterns
                targets = [target.replace(parts[0], part) for part in parts]
            for name in (t.removesuffix(".weight") for t in targets):
                self.pack_other(model, stored, name, fmt)
        try:
            head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        except NotImplementedError:
            raise not_packed(type(model).__name__, "several models in one") from None
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        if isinstance(embedding, PackedEmbedding) and isinstance(head, nn.Linear) and tied:
            name = next(n for n, m in model.named_modules() if m is head)
            replace(model, name, TiedLinear(embedding))
            untie(model, f"{name}.weight")
        for key, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            owners = (model.get_submodule(name.rpartition(".")[0]) for name in (key, source))
            if any(isinstance(owner, PackedMatrix) for owner in owners):
                raise not_packed(key, f"tied to {source}")

    def pack_other(self, model: Any, stored: str, name: str, fmt: Format) -> None:
        """Replace the linear or embedding called `name`."""
        try:
            module = model.get_submodule(name)
        except AttributeError:
            return  # a tensor this model does not build, such as an unused pooling head
        if type(module).forward is nn.Linear.forward:
            replace(model, name, PackedLinear(fmt, module))
        elif type(module).forward is nn.Embedding.forward:
            replace(model, name, PackedEmbedding(fmt, module))
        else:  # a subclass may scale, clip or regroup
            raise not_packed(stored, type(module).__name__)

    def update_weight_conversions(self, weight_conversions: list[Any], *_: Any) -> list[Any]:
        """Leave out what would fuse experts: packed ones are stored and held under the same names."""
        ends = ("experts.gate_up_proj", "experts.up_proj", "experts.down_proj")
        kept = []
        for conversion in weight_conversions:
            targets = [t.removesuffix("$").removesuffix("_bias") for t in conversion.target_patterns]
            fuses = [t for t in targets if t.endswith(ends) and not t.endswith(tuple(f"shared_{e}" for e in ends))]
            if not fuses:
                kept += [conversion, *packed_splits(conversion)]
        return kept

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        self.complete(model)
        join(model)
        quicken(model)
        remember(model, self.folder, self.tensors, self.prefixes)
        return model

    def complete(self, model: Any, start: str = "") -> None:
        """Finish the modules whose names begin with `start` (all by default), once their parameters are loaded."""
        for name, parameter in model.named_parameters():
            if name.startswith(start) and name in self.float32 and parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()  # transformers 5.17 leaves renamed tensors as they are stored
        for name, module in model.named_modules():
            if name.startswith(start) and isinstance(module, QuantizedExperts):
                module.fill(self.reader(self.prefixes[name]))
            elif f"{name}.".startswith(start) and isinstance(module, PackedMatrix) and not module.sealed:
                module.seal()

    def let_go(self, model: Any, start: str) -> None:
        """Undo `complete`."""
        for name, module in model.named_modules():
            if f"{name}.".startswith(start) and isinstance(module, QuantizedExperts | PackedMatrix):
                module.let_go()

    def reader(self, prefix: str) -> Callable[[str], Tensor]:
        """What gives one experts module its tensors."""
        return lambda name: read_stored(self.folder, self.tensors[f"{prefix}.{name}"])

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top of the packed weights are; those themselves are not parameters."""
        return True


def packed_splits(conversion: Any) -> list[Any]:
    """For a conversion that splits a fused matrix's outputs, the same for its packed tensors: rows of codes and scales,
    columns of zero points (whose cuts must lie on bytes, which sealing checks)."""
    from transformers.core_model_loading import Chunk, WeightConverter

    if not isinstance(conversion, WeightConverter):
        return []
    (op, *more), sources, targets = conversion.operations, conversion.source_patterns, conversion.target_patterns
    if more or not isinstance(op, Chunk) or op.dim != 0 or not all(t.endswith(".weight") for t in (*sources, *targets)):
        return []

    def ending(names: list[str], suffix: str) -> list[str]:
        return [name.removesuffix("weight") + suffix for name in names]

    return [
        WeightConverter(ending(sources, suffix), ending(targets, suffix), operations=[Chunk(dim=dim)])
        for suffix, dim in (("qweight", 0), ("scales", 0), ("zeros", 1))
    ]


def read_folder(checkpoint_files: Any) -> tuple[Path, dict[str, TensorInfo]]:
    """The folder and its tensors; BadInput unless it is whole by its manifest."""
    if not checkpoint_files:
        raise BadInput("a mopeq checkpoint loads from its folder only", "give from_pretrained the folder's path")
    folder = Path(checkpoint_files[0]).parent
    check_sizes(folder)
    tensors = stored_tensors(checkpoint_files)
    check_experts(folder, read_map(folder), tensors)
    return folder, tensors


def not_packed(what: str, why: str) -> MopeqError:
    return MopeqError(f"{what} cannot be packed: {why}", "make the checkpoint with --other-bits 16")


def untie(model: Any, start: str) -> None:
    """Take the tensors whose names begin so out of the model's list of tied ones."""
    for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):  # the latter is the class's: not in place
        keys = getattr(model, attribute, None)
        if isinstance(keys, dict):
            setattr(model, attribute, {k: v for k, v in keys.items() if not k.startswith(start)})


def projection_shapes(module: Any) -> dict[str, tuple[int, int]]:
    """{projection: (out, in)} of an experts module, asked of the module itself."""
    return {p: (w.shape[1], w.shape[2]) for p, w in weights(module).items()}


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one called `name`."""
    parent, _, last = name.rpartition(".")
    owner: Any = model.get_submodule(parent)
    setattr(owner, last, module)
    owner._is_hf_initialized = True  # what would fill it at random may look for what was there

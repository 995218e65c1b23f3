"""What has to be put right in other packages before transformers can be used."""

from __future__ import annotations

import importlib
import importlib.util
import sys

import torch

_declared: list[torch.library.Library] = []  # a library's operators live as long as the object does


def mend_torchvision() -> bool:
    """If torchvision is installed but cannot be imported for want of its operators, declare them; True if mended.

    PyPI's torchvision is built for CUDA; beside a CPU-only torch its library does not load and its first line that
    describes an operator fails ("operator torchvision::nms does not exist"). Nothing here calls those operators.
    """
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
        return False
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # half imported
    importlib.import_module("torchvision")
    return True

"""Tables at the edges: each row names its function as text, so `--help` lists choices while torch sleeps.

A table is a plain dict `{name: Row("mopeq.quant.rtn:quantize", "what it is, in one line")}`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from mopeq.errors import BadInput


@dataclass(frozen=True)
class Row:
    where: str  # "module:function", imported only when chosen
    says: str  # one line for --help
    needs_data: bool = False  # whether it shows calibration data to the model
    by_method: bool = False  # whether its result depends on the quantizer
    needs_gradients: bool = False  # whether a walk goes back for the loss's gradients
    probes: int = 0  # directions in which each batch is shown for second derivatives; also on the way forward they move
    sensed_as: str = ""  # a quantizer's: the faster one that stands in for it in sensing


def pick(table: Mapping[str, Row], name: str, what: str) -> Any:
    """The function that `name` stands for in `table`; BadInput naming the choices if there is none."""
    module, function = row(table, name, what).where.split(":")
    return getattr(sys.modules.get(module) or import_module(module), function)  # it is asked for each layer of a token


def row(table: Mapping[str, Row], name: str, what: str) -> Row:
    """The row called `name`; BadInput naming the choices if there is none."""
    if name not in table:
        raise BadInput(f"no {what} is called {name!r}", f"choose from: {', '.join(table)}")
    return table[name]

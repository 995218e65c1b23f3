"""What the user asks for is checked before anything is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from headers import olmoe

from mopeq.errors import BadInput
from mopeq.nouns import Budget, Format
from mopeq.options import DEFAULT_AVG_BITS, Options, numbers


def test_defaults() -> None:
    """A default changes only with a line in the changelog."""
    o = Options()
    assert [f.name for f in o.formats] == ["2g64a", "3g64a", "4g64a"]
    assert (o.sensitivity, o.allocate, o.per, o.method) == ("fisher", "knapsack", "projection", "gptq")
    assert (o.scope, o.seed, o.calib_tokens, o.device, o.other) == ("model", 0, 65536, "auto", None)
    assert o.budget(olmoe()) == Budget(avg_bits=3.0) and DEFAULT_AVG_BITS == 3.0
    assert o.needs_data == ["--sensitivity fisher", "--method gptq"]


@pytest.mark.parametrize(
    ("kw", "said"),
    [
        ({"sensitivity": "guess"}, "guess"),
        ({"allocate": "greedy"}, "greedy"),
        ({"method": "magic"}, "magic"),
        ({"per": "weight"}, "--per weight"),
        ({"scope": "galaxy"}, "--scope galaxy"),
        ({"scope": "layer"}, "--scope layer is for"),
        ({"avg_bits": 3.0, "fit": "1GB"}, "two ways"),
        ({"allocate": "kmeans", "avg_bits": 3.0}, "no budget"),
        ({"allocate": "kmeans", "fit": "1GB"}, "no budget"),
        ({"allocate": "kmeans", "group_size": "32,64"}, "one group size"),
        ({"map": "m.json", "avg_bits": 3.0}, "--map"),
        ({"map": "m.json", "fit": "3GB"}, "--map"),
        ({"bits": ""}, "--bits"),
        ({"bits": "2,x"}, "--bits"),
        ({"bits": "2.5"}, "--bits"),
        ({"bits": (2.5, 3)}, "--bits"),
        ({"bits": ()}, "--bits"),
        ({"bits": "0,2"}, "0 bits"),
        ({"bits": "2,9"}, "9 bits"),
        ({"bits": "-2"}, "-2 bits"),
        ({"bits": None}, "--bits"),
        ({"bits": (1, 2, 3, 4, 5, 6, 7, 8), "group_size": (8, 16, 32, 64, 128)}, "40 formats"),
        ({"group_size": "0"}, "group size 0"),
        ({"group_size": "sixty"}, "--group-size"),
        ({"group_size": "-64"}, "group size -64"),
        ({"other_bits": 5}, "--other-bits 5"),
        ({"other_bits": 0}, "--other-bits 0"),
        ({"calib_tokens": 0}, "--calib-tokens"),
        ({"calib_tokens": -5}, "--calib-tokens"),
        ({"shard_size": "0"}, "--shard-size"),
        ({"shard_size": "big"}, "no size"),
        ({"max_memory": "lots"}, "no size"),
        ({"device": "tpu"}, "--device tpu"),
        ({"avg_bits": "3"}, "--avg-bits '3' is no number"),
        ({"other_bits": "8"}, "--other-bits '8' is no whole number"),
        ({"calib_tokens": 1.5}, "--calib-tokens 1.5 is no whole number"),
        ({"seed": None}, "--seed None"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**32}, "--seed"),
    ],
)
def test_refusals(kw: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput) as refused:
        Options(**kw)
    assert said in refused.value.line and refused.value.hint and "\n" not in refused.value.line


def test_one_path_stands_alone() -> None:
    assert Options(calib="a.txt").calib == ("a.txt",)  # type: ignore[arg-type]
    assert Options(calib=Path("a.txt")).calib == (Path("a.txt"),)  # type: ignore[arg-type]
    assert Options(calib=["a.txt", "b.txt"]).calib == ("a.txt", "b.txt")  # type: ignore[arg-type]


@pytest.mark.parametrize("sensitivity", ["fisher", "fisher-seq", "error"])
def test_costs_are_no_scores_to_cluster(sensitivity: str) -> None:
    """Found out before any data is shown, and not by `plan`, which senses nothing."""
    o = Options(allocate="kmeans", sensitivity=sensitivity)
    with pytest.raises(BadInput) as refused:
        o.check_scores()
    assert sensitivity in refused.value.line and "--sensitivity hessian" in refused.value.hint
    for fine in ({"allocate": "kmeans", "sensitivity": "hybrid"}, {"sensitivity": "fisher"}, {"map": "m.json"}):
        Options(**fine).check_scores()


@pytest.mark.parametrize("fit", ["", "x%", "%", "nan%", "inf%", "-5%", "0x5%", "12Gi", "-1", "1e400%"])
def test_sizes_that_are_none(fit: str) -> None:
    with pytest.raises(BadInput) as refused:
        Options(fit=fit).budget(olmoe())
    assert refused.value.hint


def test_three_ways_to_write_a_budget() -> None:
    spec = olmoe()
    params = sum(t.count for t in spec.tensors.values())
    assert Options(avg_bits=2.5).budget(spec) == Budget(avg_bits=2.5)
    assert Options(fit="12kB").budget(spec) == Options(fit=12000).budget(spec) == Budget(fit_bytes=12000)
    assert Options(fit="50%").budget(spec) == Budget(fit_bytes=params)
    assert Options(fit=" 25 %").budget(spec) == Budget(fit_bytes=params // 2)
    assert Options(allocate="kmeans").budget(spec) is None
    assert Options(map=Path("m.json")).budget(spec) is None


def test_formats_are_the_product_of_widths_and_groups_narrowest_first() -> None:
    o = Options(bits="4,2,2", group_size="128,32")
    assert o.formats == (Format(2, 32), Format(2, 128), Format(4, 32), Format(4, 128))
    assert Options(bits=3).formats == Options(bits="3").formats == Options(bits=(3,)).formats == (Format(3),)


def test_other_weights_take_the_first_group_size() -> None:
    assert Options(other_bits=8, group_size="128,32").other == Format(8, 32)
    assert Options(other_bits=4).other == Format(4, 64) and Options(other_bits=16).other is None


def test_numbers() -> None:
    assert numbers("3, 2,2", "--bits", "") == (2, 3) == numbers([3, 2], "--bits", "") == numbers((2, "3"), "--bits", "")


def test_which_flags_show_data_to_the_model() -> None:
    assert Options(sensitivity="hessian", method="rtn").needs_data == []
    assert Options(sensitivity="frequency", method="rtn").needs_data == ["--sensitivity frequency"]
    assert Options(sensitivity="frequency", method="signround").needs_data == [
        "--sensitivity frequency",
        "--method signround",
    ]
    assert Options(sensitivity="frequency", method="rtn", allocate="uniform").needs_data == []
    assert Options(sensitivity="frequency", method="rtn", map="m.json").needs_data == []

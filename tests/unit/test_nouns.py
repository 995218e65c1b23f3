"""The words: formats, sizes, budgets, precision maps in and out of JSON."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mopeq.errors import BadInput
from mopeq.nouns import (
    DTYPE_BITS,
    PROJECTIONS,
    Budget,
    Format,
    LinearId,
    MoELayer,
    MoESpec,
    OutputTensor,
    Place,
    PrecisionMap,
    TensorInfo,
    digest_of,
    make_map,
    parse_size,
    size_text,
    tensor_bytes,
)

FORMATS = st.builds(Format, st.integers(1, 8), st.integers(1, 300), st.sampled_from("as"))


def spec(layers: int = 2, experts: int = 3, gate: bool = True) -> MoESpec:
    shapes = {"gate": (5, 8), "up": (5, 8), "down": (8, 5)}
    if not gate:
        del shapes["gate"]
    places = {p: Place(f"model.layers.{{l}}.mlp.experts.{{e}}.{p}_proj.weight") for p in shapes}
    return MoESpec(
        "olmoe",
        tuple(MoELayer(n, f"model.layers.{n}.mlp.experts", experts, shapes, places) for n in range(layers)),
        {},
        {},
        {},
        "digest",
    )


# ------------------------------------------------------------------------------------------------- formats


@given(FORMATS)
def test_a_formats_name_reads_back(fmt: Format) -> None:
    assert Format.parse(fmt.name) == fmt


@pytest.mark.parametrize(
    "name", ["", "3", "3g64", "g64a", "3g64aa", "3g64z", "0g64a", "9g64a", "3g0a", "-3g64a", "3g-1a", " 3g64a", "3G64A"]
)
def test_what_is_no_format_is_refused(name: str) -> None:
    with pytest.raises(BadInput) as refused:
        Format.parse(name)
    assert refused.value.hint


@given(FORMATS, st.integers(1, 90), st.integers(1, 700))
def test_nbytes_by_hand(fmt: Format, out: int, n: int) -> None:
    groups = math.ceil(n / fmt.group_size)
    zeros = groups * math.ceil(out * fmt.bits / 8) if fmt.scheme == "a" else 0
    assert fmt.nbytes(out, n) == out * math.ceil(n * fmt.bits / 8) + 2 * out * groups + zeros
    assert fmt.max_code == 2**fmt.bits - 1


def test_formats_sort_by_width_first() -> None:
    names = ["4g32a", "2g128a", "3g64s", "2g64a", "3g64a"]
    assert [f.name for f in sorted(map(Format.parse, names))] == ["2g64a", "2g128a", "3g64a", "3g64s", "4g32a"]


def test_tensor_bytes() -> None:
    assert tensor_bytes("BF16", (3, 5)) == 30 and tensor_bytes("F32", ()) == 4 and tensor_bytes("I64", (0, 7)) == 0
    assert tensor_bytes("F4", (3,)) == 2  # half bytes, rounded up
    assert OutputTensor("x", "U8", (7, 2)).nbytes == 14
    assert TensorInfo("x", "F16", (2, 3), "f", 0, 12).count == 6 and TensorInfo("x", "F16", (), "f", 0, 2).count == 1
    assert set(DTYPE_BITS.values()) <= {4, 6, 8, 16, 32, 64}


# --------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0), ("1073741824", 2**30), (512, 512), ("12GiB", 12 * 2**30), ("12 gib", 12 * 2**30), ("1kB", 1000),
        ("1KiB", 1024), ("2MB", 2 * 10**6), ("2MiB", 2**21), ("5GB", 5 * 10**9), ("1TB", 10**12), ("1TiB", 2**40),
        ("0.5GiB", 2**29), ("1.5kB", 1500), (" 7B ", 7), ("3.2GB", 3_200_000_000), ("0.000001TB", 10**6),
        ("4.1GB", 4_100_000_000), ("8.2kB", 8200),
    ],
)  # fmt: skip
def test_sizes(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "-1", "-1GB", "1e9", "12 GiBs", "1,5GB", "0x10", "1PB", "nan", "inf", "1.GB", ".5GB", "twelve"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="is no size"):
        parse_size(text)


def test_an_endless_number_is_refused_like_any_other() -> None:
    with pytest.raises(BadInput, match="is no size"):
        parse_size("9" * 5000)


def test_sizes_for_people() -> None:
    assert [size_text(n) for n in (0, 3, 102, 103, 3000, 2**17)] == [
        "0 bytes", "3 bytes", "102 bytes", "0.10 KiB", "2.93 KiB", "0.12 MiB"
    ]  # fmt: skip
    assert size_text(2**30) == "1.00 GiB" and size_text(2**20) == "1.00 MiB" and size_text(12.5 * 2**30) == "12.50 GiB"


@pytest.mark.parametrize(
    "kw",
    [
        {},
        {"avg_bits": 3.0, "fit_bytes": 1},
        {"avg_bits": 0},
        {"avg_bits": -1},
        {"avg_bits": 8.5},
        {"avg_bits": math.nan},
        {"avg_bits": math.inf},
    ],
)
def test_what_is_no_budget_is_refused(kw: dict) -> None:
    with pytest.raises(BadInput):
        Budget(**kw)


# ---------------------------------------------------------------------------------------------------- maps


@given(st.data())
def test_a_map_reads_back(data: st.DataObject) -> None:
    made_for = spec(
        layers=data.draw(st.integers(1, 3)), experts=data.draw(st.integers(1, 4)), gate=data.draw(st.booleans())
    )
    palette = data.draw(st.lists(FORMATS, min_size=1, max_size=36, unique=True))
    chosen = [data.draw(st.sampled_from(palette)) for _ in made_for.linears]
    map_ = make_map(made_for, chosen)
    body = json.loads(json.dumps(map_.to_json()))
    again = PrecisionMap.from_json(body)
    assert again == map_ and again.digest == map_.digest == body["digest"]
    again.check_covers(made_for)
    assert sum(body["counts"].values()) == len(made_for.linears)
    assert [f.name for f in map_.palette] == body["formats"]
    by_hand = sum(f.nbytes(*shape) for f, (_, shape) in zip(chosen, made_for.linears, strict=True))
    assert map_.nbytes(made_for) == by_hand
    assert map_.code_bits(made_for) == sum(
        f.bits * o * n for f, (_, (o, n)) in zip(chosen, made_for.linears, strict=True)
    )


def test_digits_are_indices_into_the_palette() -> None:
    made_for = spec(layers=1)
    formats = [Format(b) for b in (4, 2, 3, 2, 2, 4, 3, 3, 3)]
    map_ = make_map(made_for, formats)
    assert [f.name for f in map_.palette] == ["2g64a", "3g64a", "4g64a"]
    assert map_.digits() == {"model.layers.0.mlp.experts": {"gate": "201", "up": "001", "down": "121"}}
    assert map_[LinearId(0, 1, "up")] == Format(2) and next(iter(map_)) == LinearId(0, 0, "gate")


def good() -> dict:
    return make_map(spec(), [Format(2 + i % 3) for i in range(18)]).to_json()


PREFIX = "model.layers.0.mlp.experts"
SPOILED = {
    "not an object": lambda b: [],
    "nothing": lambda b: None,
    "no version": lambda b: b | {"format_version": None},
    "newer": lambda b: b | {"format_version": 2},
    "no formats": lambda b: {k: v for k, v in b.items() if k != "formats"},
    "no experts": lambda b: {k: v for k, v in b.items() if k != "experts"},
    "no layers": lambda b: {k: v for k, v in b.items() if k != "layers"},
    "bad format": lambda b: b | {"formats": ["2g64a", "3x64a", "4g64a"]},
    "too wide": lambda b: b | {"formats": ["2g64a", "3g64a", "9g64a"]},
    "format no text": lambda b: b | {"formats": [2, 3, 4]},
    "digit beyond": lambda b: b | {"experts": {PREFIX: {"gate": "999", "up": "000", "down": "000"}}},
    "digit odd": lambda b: b | {"experts": {PREFIX: {"gate": "0?0", "up": "000", "down": "000"}}},
    "digits no text": lambda b: b | {"experts": {PREFIX: {"gate": 5}}},
    "unknown prefix": lambda b: b | {"experts": {"elsewhere": {"gate": "000"}}},
    "unknown projection": lambda b: b | {"experts": {PREFIX: {"gaet": "000"}}},
    "layer no number": lambda b: b | {"layers": {"zero": PREFIX}},
    "layers no object": lambda b: b | {"layers": [PREFIX]},
}

SAYS = {  # what a hand that edits a map is likeliest to do
    "digit beyond": "its digit '9' stands for none of its 3 formats",
    "digit odd": "its digit '?' stands for none of its 3 formats",
    "unknown prefix": "its experts of elsewhere stand under no layer",
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_damaged_map_is_refused(what: str) -> None:
    with pytest.raises(BadInput) as refused:
        PrecisionMap.from_json(SPOILED[what](good()), "the map")
    assert refused.value.hint and "\n" not in refused.value.line
    if what in SAYS:
        assert refused.value.line == f"the map: {SAYS[what]}"


@pytest.mark.parametrize("drop", ["expert", "layer", "projection"])
def test_a_map_for_another_model_is_refused(drop: str) -> None:
    other = {"expert": spec(experts=2), "layer": spec(layers=1), "projection": spec(gate=False)}[drop]
    map_ = PrecisionMap.from_json(good())
    with pytest.raises(BadInput, match="has, and the model has not"):
        map_.check_covers(other)
    with pytest.raises(BadInput, match="lacks"):
        make_map(other, [Format(2)] * len(other.linears)).check_covers(spec())


def test_linears_come_in_one_order() -> None:
    order = [(i.layer, i.expert, i.projection) for i, _ in spec().linears]
    assert order == [(layer, e, p) for layer in range(2) for e in range(3) for p in PROJECTIONS]


def test_digests_do_not_depend_on_key_order() -> None:
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1}) != digest_of({"a": 1, "b": [3]})
    assert digest_of("x") == "ba2df4903a2c14e8"  # the first half of sha256 of the three bytes "x"

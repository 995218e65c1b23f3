"""The whole line on tiny random models, by the commands a user types: plan, quantize, verify, map, run, eval.

What `plan` foretells from headers is what the finished file holds, to the byte, under every option that changes it.
"""

from __future__ import annotations

import errno
import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import tiny
from made import DTYPES, copy, digests, header_of, payload, quantize, room, source, stored
from warm import mopeq

from mopeq.errors import MopeqError
from mopeq.progress import silence
from mopeq.rundir import Kept
from mopeq.sense import moments

KINDS = tuple(tiny.MAKERS)
NO_BYTES = ("--seed", "--scope", "--shard-size")  # they leave a forecast as it is, and plan has them not


def result(*arguments: object) -> dict[str, Any]:
    """The JSON object a command prints."""
    ended = mopeq(*arguments, "--json")
    assert ended.code == 0, ended.err
    assert ended.out.count("\n") == 1
    return dict(json.loads(ended.out))


def forecast_and_truth(kind: str, dtype: str, out: Path, *options: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what plan says, what quantize says), once they agree with each other and with the file."""
    folder = source(kind, dtype)
    pairs = zip(options[::2], options[1::2], strict=True)
    ahead = result("plan", folder, *(x for pair in pairs if pair[0] not in NO_BYTES for x in pair))
    made = result("quantize", folder, "-o", out, *options)
    assert made["bytes_weights"] == made["predicted_bytes"] == payload(out)
    if ahead["predicted_bytes"] is None:
        assert ahead["minimum_bytes"] <= payload(out) <= ahead["maximum_bytes"]
    else:
        assert ahead["predicted_bytes"] == payload(out)
    assert ahead["bytes_source"] == made["bytes_source"] == payload(folder)
    checked = result("verify", out)
    assert checked["whole"] and checked["bytes_weights"] == payload(out) and checked["map"] == made["map"]
    return ahead, made


# ---------------------------------------------------------------------------------------- forecast and truth

CHOICES: list[tuple[str, ...]] = [
    ("--avg-bits", "3"),
    ("--avg-bits", "2.3", "--per", "projection"),
    ("--avg-bits", "3.61", "--per", "layer"),
    ("--fit", "75%", "--per", "projection"),
    ("--fit", "77%", "--per", "layer-projection", "--allocate", "random", "--seed", "3"),
    ("--fit", "40%", "--other-bits", "8"),
    ("--avg-bits", "3", "--other-bits", "4", "--group-size", "32"),
    ("--allocate", "kmeans"),
    ("--allocate", "kmeans", "--scope", "layer", "--bits", "2,4"),
    ("--allocate", "uniform", "--avg-bits", "4"),
    ("--allocate", "inverted", "--avg-bits", "2.5"),
    ("--bits", "1,2,3,4,5,6,7,8", "--avg-bits", "4.4", "--per", "projection"),
    ("--bits", "3,5", "--avg-bits", "3.7", "--group-size", "16,64", "--per", "projection"),
    ("--bits", "2,8", "--avg-bits", "5", "--group-size", "7", "--allocate", "random"),
]


@pytest.mark.parametrize("options", CHOICES, ids=lambda o: " ".join(o))
def test_planned_bytes_are_written_bytes(options: tuple[str, ...], tmp_path: Path) -> None:
    draw = random.Random(" ".join(options))
    kind, dtype = draw.choice(KINDS), draw.choice(list(DTYPES))
    ahead, made = forecast_and_truth(kind, dtype, tmp_path / "out", *options)
    parts = (".qweight", ".scales", ".zeros")
    headers = [header_of(path) for path in (tmp_path / "out").glob("*.safetensors")]
    spans = [e["data_offsets"] for h in headers for n, e in h.items() if ".experts." in n and n.endswith(parts)]
    held = sum(end - start for start, end in spans)  # and no padding
    assert made["avg_expert_bits_effective"] == pytest.approx(8 * held / ahead["expert_params"], rel=1e-9)
    if "--avg-bits" in options:
        assert made["avg_expert_bits"] <= float(options[options.index("--avg-bits") + 1]) + 1e-9
    if "--fit" in options:
        assert payload(tmp_path / "out") <= ahead["budget_bytes"]
        share = float(options[options.index("--fit") + 1].rstrip("%")) / 100
        assert ahead["budget_bytes"] == int(share * ahead["bytes_bf16"])


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_through_every_verb(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    folder = source(kind)
    _, made = forecast_and_truth(kind, "bf16", out, "--avg-bits", "2.5", "--allocate", "random", "--shard-size", "70kB")
    assert len(list(out.glob("model-*.safetensors"))) > 1 and (out / "model.safetensors.index.json").exists()
    for key in ("out", "bytes_weights", "avg_expert_bits", "avg_expert_bits_effective", "seconds", "peak_rss_bytes"):
        assert key in made
    assert made["avg_expert_bits"] == 2.5 < made["avg_expert_bits_effective"]
    assert made["read_back"] < 1e-4
    shown = result("map", out)
    assert shown["digest"] == made["map"] and shown["counts"] == made["counts"]
    answered = result("run", out, "--prompt", "the quick brown", "--max-new-tokens", "6")
    assert isinstance(answered["answer"], str) and 0 < answered["new_tokens"] <= 6
    measured = result("eval", out, "--against", folder, "--data", text(), "--window", "64", "--limit", "4")
    for key in ("kl", "ppl", "ppl_against", "top1_agreement", "tokens", "tasks"):
        assert key in measured
    assert measured["kl"] > 1e-4 and 0 <= measured["top1_agreement"] <= 1 and measured["tokens"] > 100
    assert result("verify", out)["whole"]  # having been measured, the folder is still what it was


def test_measured_against_another_model(tmp_path: Path) -> None:
    """It is done, and said; a copy of the original, with other times of change, is the original."""
    out, other = tmp_path / "out", tiny.write(tmp_path / "other", "olmoe", seed=1)
    result("quantize", source("olmoe"), "-o", out)
    narrow = tiny.write(tmp_path / "narrow", "mixtral", hidden_size=32)
    for against, notes in ((other, 1), (narrow, 1), (copy(source("olmoe"), tmp_path / "copy"), 0)):
        ended = mopeq("eval", out, "--against", against, "--data", text(), "--window", "64", "--limit", "1", "--json")
        assert ended.code == 0 and json.loads(ended.out)["kl"] > 0
        assert ended.err.count("was not made from") == notes, ended.err


def text() -> Path:
    return tiny.write_text(room() / "text.txt", lines=3)


def test_widths_that_torch_s_grouped_product_does_not_take(tmp_path: Path) -> None:
    """It wants rows of whole 16 bytes; the original is then computed expert by expert."""
    folder = tiny.write(tmp_path / "source", "olmoe", intermediate_size=17)
    text = tiny.write_text(tmp_path / "text.txt", lines=1)
    options = ("--method", "rtn", "--sensitivity", "hessian", "--tune", "scales", "--calib-tokens", "256")
    result("quantize", folder, "-o", tmp_path / "out", "--calib", text, *options)
    found = result("eval", tmp_path / "out", "--against", folder, "--data", text, "--limit", "1")
    assert found["kl"] > 0


def test_wider_is_nearer_to_the_original(tmp_path: Path) -> None:
    """KL falls with the width, and a model is at no distance from itself."""
    folder, found = source("olmoe"), []
    for bits in (2, 4, 8):
        out = tmp_path / str(bits)
        result("quantize", folder, "-o", out, "--bits", bits, "--avg-bits", bits)
        found.append(result("eval", out, "--against", folder, "--data", text(), "--window", "64", "--limit", "4")["kl"])
    assert found[0] > 5 * found[1] > 50 * found[2] > 0
    same = result("eval", folder, "--against", folder, "--data", text(), "--window", "64", "--limit", "4")
    assert abs(same["kl"]) < 1e-7 and same["top1_agreement"] == 1 and same["ppl"] == pytest.approx(same["ppl_against"])


# ------------------------------------------------------------------------------------------------------- maps


def test_a_map_for_another_budget_serves_as_a_map(tmp_path: Path) -> None:
    """Solved again from the saved sensitivity, fed to --map, planned and packed: one size throughout, and the same
    bytes as asking for that budget outright."""
    folder = source("olmoe")
    first = tmp_path / "first"
    result("quantize", folder, "-o", first, "--per", "projection")
    again = result("map", first, "--avg-bits", "2.4", "--against", first)
    assert again["against"]["differ"] > 0 and again["avg_expert_bits"] <= 2.4
    assert again["padding"] > 0  # a bit in down costs other bytes than one in gate, see decisions/exact-totals.md
    path = tmp_path / "map.json"
    path.write_text(json.dumps(again))
    ahead, made = forecast_and_truth("olmoe", "bf16", tmp_path / "second", "--map", path)
    assert made["bytes_weights"] == again["bytes_weights"] and made["map"] == again["digest"]
    result("quantize", folder, "-o", tmp_path / "third", "--per", "projection", "--avg-bits", "2.4")
    assert stored(tmp_path / "second") == stored(tmp_path / "third")
    assert ahead["predicted_bytes"] == again["bytes_weights"]


def test_a_hand_made_map(tmp_path: Path) -> None:
    """Any format for any matrix, symmetric ones and odd groups among them."""
    from mopeq.checkpoint import open_checkpoint
    from mopeq.families.standard import read_spec
    from mopeq.nouns import Format, make_map

    spec = read_spec(open_checkpoint(source("gpt_oss")))
    draw = random.Random(0)
    formats = [Format(draw.randint(1, 8), draw.choice((5, 64, 300)), draw.choice("as")) for _ in spec.linears]
    path = tmp_path / "map.json"
    path.write_text(json.dumps(make_map(spec, formats).to_json()["counts"]))
    mopeq("quantize", source("gpt_oss"), "-o", tmp_path / "out", "--map", path).refused()
    palette = sorted(set(formats))[:20]  # a palette holds 36 formats at most: a digit each
    map_ = make_map(spec, [f if f in palette else palette[0] for f in formats])
    path.write_text(json.dumps(map_.to_json()))
    _, made = forecast_and_truth("gpt_oss", "bf16", tmp_path / "out", "--map", path)
    assert made["counts"] == map_.counts() and len(made["counts"]) == len(set(map_.formats.values())) > 10


# ------------------------------------------------------------------------------------------------ the folder


def test_the_folder_is_an_ordinary_one(tmp_path: Path) -> None:
    folder, out = source("olmoe"), tmp_path / "out"
    made = result("quantize", folder, "-o", out)
    assert {p.name for p in out.iterdir() if not p.name.startswith(".")} == {
        "config.json", "precision_map.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json", "LICENSE", "README.md", "mopeq_run.json", "mopeq_manifest.json",
    }  # fmt: skip
    for name in ("tokenizer.json", "LICENSE"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    assert "auto_map" not in config and config["model_type"] == "olmoe"
    q = config["quantization_config"]
    assert (q["quant_method"], q["format_version"], q["bytes_weights"]) == ("mopeq", 1, payload(out))
    map_ = json.loads((out / "precision_map.json").read_text())
    assert (q["formats"], q["experts"]) == (map_["formats"], map_["experts"])
    card = (out / "README.md").read_text()
    assert "import mopeq" in card and f"{payload(out):,}" in card and "base_model:" in card
    assert made["counts"] == map_["counts"]
    names = header_of(out / "model.safetensors")
    assert names["model.layers.0.mlp.experts.3.up_proj.qweight"]["shape"] == [40, -(-64 * 3 // 8)]
    assert names["model.layers.0.mlp.experts.3.up_proj.scales"] | {"data_offsets": 0} == {
        "dtype": "F16", "shape": [40, 1], "data_offsets": 0,
    }  # fmt: skip
    assert names["model.layers.0.mlp.experts.3.up_proj.zeros"]["shape"] == [1, -(-40 * 3 // 8)]


def test_what_was_not_asked_for_is_kept_as_it_was(tmp_path: Path) -> None:
    """Every tensor that is no routed expert's (and no padding) is byte for byte the source's."""
    for kind in ("deepseek_v2", "qwen3_vl_moe"):
        out = tmp_path / kind
        result("quantize", source(kind), "-o", out)
        before, after = stored(source(kind)), stored(out)
        kept = [name for name in before if ".experts." not in name]
        assert len(kept) > 20 and all(before[name] == after[name] for name in kept)
        assert all(".experts." in name for name in set(after) - set(kept) - {"mopeq.padding"})


def test_python_does_what_the_commands_do(tmp_path: Path) -> None:
    import mopeq as package
    from mopeq.progress import silence

    folder = source("mixtral")
    assert package.plan(folder, avg_bits=2.7, per="projection") == result(
        "plan", folder, "--avg-bits", "2.7", "--per", "projection"
    )
    with silence():
        made = quantize(folder, tmp_path / "a", avg_bits=2.7, per="projection")
        measured = package.evaluate(tmp_path / "a", against=folder, data=[text()], window=64, limit=2)
        assert package.evaluate(tmp_path / "a", against=folder, data=text(), window=64, limit=2) == measured
    typed = result("quantize", folder, "-o", tmp_path / "b", "--avg-bits", "2.7", "--per", "projection")
    differ = {"out", "seconds", "peak_rss_bytes", "read_back"}  # the last: logits' rounding, which threads decide
    assert {k: v for k, v in made.items() if k not in differ} == {k: v for k, v in typed.items() if k not in differ}
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    again = result("eval", tmp_path / "b", "--against", folder, "--data", text(), "--window", "64", "--limit", "2")
    assert measured["kl"] == pytest.approx(again["kl"], rel=1e-4) and measured["tokens"] == again["tokens"]


def test_progress_stays_on_stderr(tmp_path: Path) -> None:
    ended = mopeq("quantize", source("olmoe"), "-o", tmp_path / "out", "--json")
    assert json.loads(ended.out)["out"] == str(tmp_path / "out")
    for word in ("sense: hessian", "quantize: rtn", "write", "read back"):
        assert word in ended.err
    assert "\r" not in ended.err and "\x1b" not in ended.err  # plain lines in a log
    people = mopeq("verify", tmp_path / "out")
    assert people.code == 0 and "is whole" in people.out


@pytest.mark.parametrize("walked", [False, True])
@pytest.mark.parametrize(("sensor", "method"), [("fisher", "gptq"), ("error", "signround")])
def test_what_sensing_quantized_is_taken_over(
    sensor: str, method: str, walked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made once, in sensing, unless the disk has no room for it; the bytes and the notes are the same. A walk needs the
    room: what it makes on the way forward is wanted on the way back."""
    passes: list[int] = []
    monkeypatch.setattr("mopeq.sense.moments.gather", counting(moments.gather, passes))
    if walked:
        monkeypatch.setattr("mopeq.job.Job.runs_whole", False)
    text = tiny.write_text(tmp_path / "calib.txt")
    asked = {"avg_bits": 2.6, "sensitivity": sensor, "method": method, "calib": (text,), "calib_tokens": 16}
    with silence():
        taken = quantize(source("olmoe"), tmp_path / "taken", **asked)
        assert not passes and not list((tmp_path / "taken" / ".mopeq" / "sensitivity").glob("*.parts"))
        if walked:
            monkeypatch.setattr("mopeq.checks.free_bytes", lambda path: 10**9 if path.name == "again" else 10**5)
            with pytest.raises(
                MopeqError, match=r"has [\d.]+ KiB free; layer by layer --sens.* --method .* takes? [\d.]+ MiB"
            ):
                quantize(source("olmoe"), tmp_path / "again", **asked)
            return
        monkeypatch.setattr(Kept, "room", 0)
        again = quantize(source("olmoe"), tmp_path / "again", **asked)
    assert passes and digests(tmp_path / "taken") == digests(tmp_path / "again")
    assert taken["notes"] == again["notes"] and "no calibration token reached" in "".join(taken["notes"])


@pytest.mark.parametrize("after", [0, 3, 11, 20])
def test_a_disk_that_fills_up_while_tokens_wait(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits between layers is on disk: when one of these files has no room the run ends, its other waiting batches
    with it and their files too, and the same command makes the same bytes."""
    monkeypatch.setattr("mopeq.job.Job.runs_whole", False)
    monkeypatch.setattr("mopeq.job.Job.work_memory", 0)
    text = tiny.write_text(tmp_path / "calib.txt")
    asked = {"avg_bits": 2.6, "sensitivity": "fisher", "method": "gptq", "calib": (text,), "calib_tokens": 4096}
    written: list[int] = []
    original = Path.write_bytes

    def fills_up(path: Path, data: Any) -> int:
        if path.suffix == ".border":
            written.append(1)
            if len(written) == after + 1:
                raise OSError(errno.ENOSPC, "No space left on device")
        return original(path, data)

    monkeypatch.setattr(Path, "write_bytes", fills_up)
    with silence():
        with pytest.raises(OSError, match=r"No space left on device: '.*\.border'"):
            quantize(source("olmoe"), tmp_path / "out", **asked)
        assert not list(tmp_path.rglob("*.border")) and not list(tmp_path.rglob("*.part"))
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("batch ")]
        quantize(source("olmoe"), tmp_path / "out", **asked)
        assert len(written) > after + 20
        quantize(source("olmoe"), tmp_path / "other", **asked)
    assert digests(tmp_path / "out") == digests(tmp_path / "other")


def counting(function: Any, calls: list[int]) -> Any:
    def counted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        return function(*args, **options)

    return counted

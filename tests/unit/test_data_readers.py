"""Every form a data file may take, and every way one may be wrong: each wrong one names its line and gives a hint."""

from __future__ import annotations

import base64
import csv
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_data import picture

from mopeq.data import DATASETS
from mopeq.data.benchmarks import kind_of, prompt
from mopeq.data.readers import MAX_PIXELS, Item, accepted, read
from mopeq.data.readers import picture as decoded
from mopeq.errors import BadInput

RED, BLUE = picture((255, 0, 0)), picture((0, 0, 255))
RED64, BLUE64 = base64.b64encode(RED).decode(), base64.b64encode(BLUE).decode()


def write(folder: Path, name: str, *rows: object) -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def write_tsv(folder: Path, name: str, rows: list[dict]) -> Path:
    path = folder / name
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        out.writeheader()
        out.writerows(rows)
    return path


def refused(path: Path, *words: str) -> None:
    with pytest.raises(BadInput) as caught:
        read(path)
    for word in words:
        assert word in caught.value.line, caught.value.line
    assert caught.value.hint and "\n" not in caught.value.line


def test_reading_wakes_no_torch() -> None:
    code = "import sys, mopeq.data.readers, mopeq.data, mopeq.evaluate.tasks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_row_of_the_table_names_a_function() -> None:
    from mopeq.tables import pick

    for suffix in DATASETS:
        assert callable(pick(DATASETS, suffix, "kind of data file"))


# ------------------------------------------------------------------------------------------------------- the forms


def test_text_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", {"text": "one", "from": "x"}, "", {"text": "  "}, {"text": "two\u2028three"})
    items = read(path)
    assert [item.text for item in items] == ["one", "two\u2028three"]
    assert items[0].meta == {"from": "x", "dataset": "a", "source": "a.jsonl:1"} and items[1].source == "a.jsonl:4"


def test_a_separator_inside_a_json_string_ends_no_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two\x0cthree"}\n', "utf-8")
    with pytest.raises(BadInput):  # a raw form feed is no JSON; the line separator alone is
        read(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two"}\n', "utf-8")
    assert [item.text for item in read(tmp_path / "a.jsonl")] == ["one\u2028two"]


def test_plain_text_is_one_document_without_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\n\ntwo".encode())
    (item,) = read(tmp_path / "a.txt")
    assert item.text == "one\n\ntwo" and item.messages is None


def test_a_conversation_with_pictures(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "red.png").write_bytes(RED)
    content = [{"type": "text", "text": "See "}, {"type": "image"}, {"type": "text", "text": " and say."}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    (item,) = read(write(tmp_path, "a.jsonl", {"messages": messages, "images": ["sub/red.png"]}))
    assert item.messages == [{"role": "user", "content": content}]
    assert item.images == (tmp_path / "sub" / "red.png",) and item.answer == "red"
    assert decoded(item.images[0]).getpixel((0, 0)) == (255, 0, 0)


def test_pictures_without_a_place_come_first_and_inline_ones_stay(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    plain = {"messages": [{"role": "user", "content": "What?"}], "images": ["red.png", BLUE64]}
    inline = {"messages": [{"role": "user", "content": [{"type": "image", "image": "red.png"}]}]}
    first, second = read(write(tmp_path, "a.jsonl", plain, inline))
    assert first.messages == [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]}
    ]
    assert first.images == (tmp_path / "red.png", BLUE) and first.answer is None
    assert second.messages == [{"role": "user", "content": [{"type": "image"}]}]
    assert second.images == (tmp_path / "red.png",)


def test_questions_with_a_path_base64_several_and_no_picture(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    rows = [
        {"image": "red.png", "question": "Colour?", "answer": "red"},
        {"image": "data:image/png;base64," + BLUE64, "question": "Colour?", "answer": ["blue", "navy", "navy"]},
        {"image": ["red.png", BLUE64], "question": "Same?", "options": ["yes", "no"], "answer": "B"},
        {"question": "1 + 1?", "answer": 2, "image": None},
    ]
    one, two, three, four = read(write(tmp_path, "a.jsonl", *rows))
    assert one.images == (tmp_path / "red.png",) and one.answer == "red" and one.meta["question"] == "Colour?"
    assert two.images == (BLUE,) and two.answer == "navy" and two.meta["answer"] == ["blue", "navy", "navy"]
    assert len(three.images) == 2 and three.meta["options"] == {"A": "yes", "B": "no"}
    assert three.messages is not None
    assert three.messages[0]["content"][2]["text"].startswith("Question: Same?\nOptions:\nA. yes")
    assert four.images == () and four.answer == "2"
    assert one.messages == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Colour?"}]}]


def test_an_absolute_path_is_taken(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "data").mkdir()
    (item,) = read(write(tmp_path / "data", "a.jsonl", {"image": str(tmp_path / "red.png"), "question": "?"}))
    assert item.images == (tmp_path / "red.png",)


def test_tsv_base64_lists_and_references(tmp_path: Path) -> None:
    rows = [
        {"index": "1", "image": RED64, "question": 'a "b"\nc', "answer": "x", "category": "k", "split": "dev"},
        {"index": "2", "image": "1", "question": "again", "answer": "['y', 'z', 'z']", "category": "k", "split": ""},
        {"index": "3", "image": str([RED64, BLUE64]), "question": "two", "answer": "", "category": "", "split": ""},
        {"index": "4", "image": "", "question": "none", "answer": "", "category": "", "split": ""},
    ]
    one, two, three = read(write_tsv(tmp_path, "own.tsv", rows))
    assert one.images == two.images == (RED,) and three.images == (RED, BLUE)
    assert one.meta["question"] == 'a "b"\nc' and one.source == "own.tsv:2" and two.source == "own.tsv:4"
    assert two.answer == "z" and two.meta["answer"] == "['y', 'z', 'z']" and three.answer is None
    assert one.meta["dataset"] == "own" and one.meta["index"] == "1" and "image" not in one.meta


def test_tsv_cells_beyond_csvs_default_limit(tmp_path: Path) -> None:
    noise = picture(size=(64, 64))
    padded = base64.b64encode(noise + b"\0" * 200_000).decode()
    (item,) = read(write_tsv(tmp_path, "a.tsv", [{"index": "0", "image": padded, "question": "?", "answer": "x"}]))
    assert len(item.images[0]) > 200_000  # type: ignore[arg-type]


def test_tsv_may_name_picture_files(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    row = {"index": "0", "image_path": "red.png", "question": "?", "answer": "x"}
    (item,) = read(write_tsv(tmp_path, "a.tsv", [row]))
    assert item.images == (tmp_path / "red.png",)


def test_mmmu_pictures_follow_the_words(tmp_path: Path) -> None:
    row = {"index": "0", "image": str([RED64, BLUE64]), "image_path": "['a', 'b']", "answer": "A"}
    row |= {"A": "x", "B": "", "question": "after <image 2> comes <image 1>, then <image 2>"}
    (item,) = read(write_tsv(tmp_path, "MMMU_DEV_VAL.tsv", [row]))
    assert item.images == (BLUE, RED, BLUE)
    assert item.messages is not None
    assert [part["type"] for part in item.messages[0]["content"]] == ["text", "image"] * 3 + ["text"]
    assert all(set(part) <= {"type", "text"} for part in item.messages[0]["content"])


def test_options_already_in_the_question_are_not_repeated() -> None:
    options = {"A": "up", "B": "down"}
    assert prompt(None, "up or down?", options)[-1]["text"] == "up or down?"
    text = prompt(None, "which way?", options)[-1]["text"]
    assert text.startswith("Question: which way?\nOptions:\nA. up\nB. down\n")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ChartQA_TEST", "relaxed"), ("ChartQA_TEST_100", "relaxed"), ("ChartQAPro", None), ("MMMU_Pro_10c", None)]
    + [("MMMU_DEV_VAL", "mmmu"), ("MME", "mme"), ("MME-RealWorld", None), ("MMBench_DEV_EN_V11", "circular")]
    + [("MMBench-Video", None), ("OCRBench", "ocrbench"), ("OCRBench_v2", None), ("AI2D_TEST_NO_MASK", "mcq")],
)
def test_names_of_benchmarks(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


@given(st.lists(st.text(min_size=1), min_size=1, max_size=4))
def test_accepted_answers_come_back_from_their_literal(answers: list[str]) -> None:
    assert accepted(str(answers)) == answers == accepted(answers)


@settings(max_examples=50)
@given(st.lists(st.text(), min_size=1, max_size=5))
def test_any_text_survives_jsonl(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    rows = [{"text": "x" + text} for text in texts]
    for ascii_only in (True, False):
        lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
        path.write_bytes("\n".join(lines).encode("utf-8"))
        assert [item.text for item in read(path)] == [row["text"] for row in rows]


def test_builtin_texts_and_pictures() -> None:
    from importlib import resources

    from mopeq.data.readers import builtin

    if not (resources.files("mopeq.data") / "builtin" / "text.jsonl").is_file():
        pytest.skip("builtin/text.jsonl is not made yet")
    texts = builtin()
    assert texts and all(item.text for item in texts)
    drawn = builtin(pictures=12, seed=0)[len(texts) :]
    assert len(drawn) == 12 and all(item.answer and len(item.images) == 1 for item in drawn)
    assert drawn == builtin(pictures=12, seed=0)[len(texts) :] and drawn != builtin(pictures=12, seed=1)[len(texts) :]
    assert decoded(drawn[0].images[0]).mode == "RGB"


# ------------------------------------------------------------------------------------------------------- the faults


def test_files_that_are_none(tmp_path: Path) -> None:
    refused(tmp_path / "absent.jsonl", "no file")
    refused(tmp_path, "folder")
    refused(write(tmp_path, "a.parquet", "x"), "a.parquet ends in .parquet")
    refused(write(tmp_path, "data", "x"), "data has no ending")
    for name in ("a.jsonl", "a.txt", "a.tsv"):
        refused(write(tmp_path, name), name, "nothing to read")
    refused(write(tmp_path, "b.jsonl", {"text": "  "}), "nothing to read")
    (tmp_path / "c.txt").write_bytes(b"caf\xe9")
    refused(tmp_path / "c.txt", "byte 3", "UTF-8")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"text": "a"', ["a.jsonl:2", "JSON"]),
        ("[" * 100_000, ["a.jsonl:2", "JSON"]),
        ('["text"]', ["list"]),
        ('{"txet": "a"}', ["txet"]),
        ("{}", ["none"]),
        ('{"text": 3}', ["its text is of type int"]),
        ('{"text": "\\ud800"}', ["half a character"]),
        ('{"question": ["a"]}', ["question"]),
        ('{"question": "a", "image": 7}', ["int"]),
        ('{"question": "a", "image": "no.png"}', ["no picture", "no.png"]),
        ('{"question": "a", "image": "data:image/png;base64,!!"}', ["base64"]),
        (json.dumps({"question": "a", "image": base64.b64encode(b"x" * 99).decode()}), ["not a picture"]),
        ('{"question": "a", "image": "https://example.org/a.png"}', ["address"]),
        ('{"question": "a", "image": "../../../../etc/passwd"}', ["outside"]),
        ('{"question": "a", "image": "sub/../../x.png"}', ["outside"]),
        ('{"question": "a", "image": "/etc/passwd"}', ["not a picture"]),
        ('{"question": "a", "image": "a\\u0000b"}', ["no picture"]),
        ('{"messages": []}', ["messages"]),
        ('{"messages": [{"role": "user"}]}', ["content"]),
        ('{"messages": [{"role": "user", "content": 3}]}', ["content"]),
        ('{"messages": [{"role": "user", "content": [{"type": "audio"}]}]}', ["audio"]),
        ('{"messages": [{"role": "user", "content": [{"type": "image", "url": "http://x"}]}]}', ["url"]),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', ["1 image parts", "0 pictures"]),
        ('{"messages": [{"role": "assistant", "content": "hello"}]}', ["answer"]),
    ],
)
def test_lines_that_are_wrong(tmp_path: Path, row: str, words: list[str]) -> None:
    refused(write(tmp_path, "a.jsonl", {"text": "fine"}, row), "a.jsonl:2", *words)


def tsv_of(tmp_path: Path, **cells: str) -> Path:
    good = {"index": "0", "image": RED64, "question": "?", "answer": "x"}
    return write_tsv(tmp_path, "a.tsv", [good, good | {"index": "1"} | cells])


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        ({"image": "7"}, ["'7'", "no row"]),
        ({"image": "1"}, ["'1'", "no row"]),
        ({"image": RED64[:-32]}, []),
        ({"image": "['" + RED64 + "'"}, ["list"]),
        ({"image": "[1, 2]" + " " * 60}, ["list"]),
        ({"image": "A" * 80}, ["not a picture"]),
    ],
)
def test_tsv_cells_that_are_wrong(tmp_path: Path, cells: dict, words: list[str]) -> None:
    path = tsv_of(tmp_path, **cells)
    if cells["image"] == RED64[:-32]:  # the header is whole, so it is found when the picture is decoded
        item = read(path)[1]
        with pytest.raises(BadInput) as caught:
            decoded(item.images[0], item.source)
        assert "a.tsv:3" in caught.value.line and caught.value.hint
    else:
        refused(path, "a.tsv:3", *words)


def test_tsv_files_that_are_wrong(tmp_path: Path) -> None:
    refused(write(tmp_path, "a.tsv", "index\tpicture\tquestion", f"0\t{RED64}\t?"), "a.tsv", "picture")
    refused(write(tmp_path, "b.tsv", "index\timage\tanswer", f"0\t{RED64}\tx"), "b.tsv", "index")
    refused(write(tmp_path, "c.tsv", "image\timage\tquestion", f"0\t{RED64}\t?"), "c.tsv:1", "twice")
    refused(write(tmp_path, "d.tsv", "index\timage\tquestion", f"0\t{RED64}"), "d.tsv:2", "2 cells", "3")
    refused(write(tmp_path, "e.tsv", "index\timage\tquestion", f"0\t{RED64}\t<image 3>?"[:5]), "e.tsv:2")
    rows = [{"index": "0", "image": RED64, "question": "see <image 2>", "answer": "A", "A": "x"}]
    refused(write_tsv(tmp_path, "MMMU_DEV_VAL.tsv", rows), "MMMU_DEV_VAL.tsv:2", "<image 2>")


def test_a_picture_larger_than_memory_should_hold_is_refused(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    side = 100_000  # 10^10 pixels, in 70 bytes
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    refused(write(tmp_path, "a.jsonl", {"image": "bomb.png", "question": "?"}), "a.jsonl:1")
    side = int(MAX_PIXELS**0.5) + 1  # past our limit, within Pillow's
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    (tmp_path / "bomb.png").write_bytes(bomb)
    refused(tmp_path / "a.jsonl", "a.jsonl:1", f"{side} x {side}")


def test_a_picture_that_vanishes_is_told(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(RED)
    (item,) = read(write(tmp_path, "a.jsonl", {"image": "red.png", "question": "?"}))
    (tmp_path / "red.png").unlink()
    with pytest.raises(BadInput, match="a.jsonl:1"):
        decoded(item.images[0], item.source)


def test_postscript_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    refused(write(tmp_path, "a.jsonl", {"image": "a.eps", "question": "?"}), "a.jsonl:1", "not a picture")


def test_an_item_is_a_value() -> None:
    assert Item(text="a") == Item(text="a") and Item().source == "item"

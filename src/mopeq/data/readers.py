"""A data file becomes a list of `Item`s: `.jsonl`, VLMEvalKit's `.tsv`, plain `.txt`. No torch here.

Whatever is wrong with a line is told as BadInput with `file:line` and a hint, before any model is loaded. Pictures
are opened (format and size) when they are read and decoded when they are used; a `Path` stays on disk till then.

Where a picture may lie: a relative path is taken from the data file's own folder and must not climb out of it
(`../../etc` is refused, since data files are passed around); an absolute path is taken as the user's own word, and
must be a picture. Addresses are refused: mopeq opens no connection for data. A picture has at most MAX_PIXELS.
"""

from __future__ import annotations

import ast
import base64
import binascii
import contextlib
import csv
import io
import json
import logging
import os
import struct
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from PIL import Image, ImageOps

from mopeq.data import DATASETS
from mopeq.data.benchmarks import kind_of, prompt
from mopeq.errors import BadInput
from mopeq.tables import pick

MAX_PIXELS = 64 * 2**20  # 8192 x 8192: 192 MiB as RGB; a small file can claim far more than memory holds
MAX_FIELD = 2**31 - 1  # csv's default of 128 KiB is smaller than a base64 picture; this is the most a C long takes
PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no EPS or PDF: Pillow would start another program
NOT_A_PICTURE = (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError)
log = logging.getLogger("mopeq")


@dataclass(frozen=True)
class Item:
    """One thing to show a model: either `text` (a document) or `messages` (a conversation, and its `answer` if known).

    messages: [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": …}]}, …], transformers' form
    images: encoded bytes or paths, one for each image part, in order
    answer: what the model should say next; of several accepted answers the commonest, then the first
    meta: the rest of the row as it stood, and `dataset` (file name without suffix), `source` ("file:line"),
      `options` {"A": …} where the question has them, `pictures` of a benchmark's row
    """

    text: str | None = None
    messages: list[dict] | None = None
    images: tuple[bytes | Path, ...] = ()
    answer: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return self.meta.get("source", "item")


def read(path: str | Path) -> list[Item]:
    """The items of a data file, by its suffix (DATASETS). BadInput if it is missing, unknown, empty or malformed."""
    path = Path(path)
    if path.is_dir():
        raise BadInput(f"{path} is a folder, not a data file", "name one .jsonl, .tsv or .txt file")
    if not path.exists():
        raise BadInput(f"there is no file {path}", "check the path given to --calib or --data")
    if path.suffix.lower() not in DATASETS:
        ends = f"ends in {path.suffix}" if path.suffix else "has no ending"
        raise BadInput(f"{path.name} {ends}, which tells of no kind of data", f"choose from: {', '.join(DATASETS)}")
    reader = pick(DATASETS, path.suffix.lower(), "kind of data file")
    items = reader(path)
    if not items:
        raise BadInput(f"{path.name} holds nothing to read", "give a file with at least one line of data")
    return items


def builtin(pictures: int = 0, seed: int = 0) -> list[Item]:
    """mopeq's own small set: its texts, then `pictures` drawn questions (for vision-language models)."""
    with resources.as_file(resources.files("mopeq.data") / "builtin" / "text.jsonl") as path:
        items = read(path)
    if not pictures:
        return items
    from mopeq.embedded.world import CALIBRATION_SEED, calibration  # drawing is a room of its own: only when asked

    drawn = calibration(pictures, CALIBRATION_SEED + 3 * seed)  # never the streams of training and evaluation
    return items + [_drawn(one, number) for number, one in enumerate(drawn)]


def _drawn(drawn: Any, number: int) -> Item:
    """An item of `mopeq.embedded.world` as ours."""
    asked = drawn.question
    row = {"question": asked.text, "answer": asked.answer, "category": asked.task, "options": list(asked.choices)}
    row |= {"dataset": "builtin", "source": f"builtin picture {number}", "options": _options(row)}
    return _asked(row, (drawn.png(),), row)


# ---------------------------------------------------------------------------------------------------- .txt and .jsonl


def read_txt(path: Path) -> list[Item]:
    """The whole file is one document. A blank file gives none."""
    text = _decoded(path)
    return [Item(text=text, meta={"dataset": path.stem, "source": path.name})] if text.strip() else []


def read_jsonl(path: Path) -> list[Item]:
    """One JSON object a line; blank lines are skipped, and lines whose `text` is blank are counted in the log."""
    items, blank = [], 0
    # split, not splitlines: a JSON string may hold U+2028 or a form feed
    for number, line in enumerate(_decoded(path).split("\n"), 1):
        if not line.strip():
            continue
        item = _jsonl_item(line, path, f"{path.name}:{number}")
        blank += item.text is not None and not item.text.strip()
        if item.text is None or item.text.strip():
            items.append(item)
    if blank:
        log.warning("%s: %d lines have no text in them and were left out", path.name, blank)
    return items


def _jsonl_item(line: str, path: Path, where: str) -> Item:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not a line of JSON ({error})", "write one JSON object on each line") from None
    if not isinstance(row, dict):
        raise BadInput(f"{where}: a {type(row).__name__}, not an object", 'write {"text": …} on each line')
    _must_be_unicode(line, row, where)
    meta: dict[str, Any] = {k: v for k, v in row.items() if k not in ("text", "messages", "images", "image")}
    meta |= {"dataset": path.stem, "source": where}
    if "messages" in row:
        return _conversation(row, meta, path.parent, where)
    if "question" in row:
        return _question(row, meta, path.parent, where)
    if isinstance(row.get("text"), str):
        return Item(text=row["text"], meta=meta)
    if "text" in row:
        raise BadInput(f"{where}: its text is of type {type(row['text']).__name__}", 'write {"text": "…"}, in quotes')
    raise BadInput(
        f"{where}: the keys are {', '.join(row) or 'none'}",
        'a line is {"text"}, {"messages", "images"} or {"image", "question", "answer"}',
    )


def _question(row: dict, meta: dict, folder: Path, where: str) -> Item:
    """{"question", and where known "image" (or a list of them), "answer" (or a list), "options", "hint"}."""
    if not isinstance(row["question"], str):
        raise BadInput(f"{where}: the question is not a string", 'write {"image": …, "question": "…", "answer": "…"}')
    images = tuple(_image(ref, folder, where) for ref in _listed(row.get("image", row.get("images"))))
    meta["options"] = _options(row)
    return _asked(row, images, meta)


def _conversation(row: dict, meta: dict, folder: Path, where: str) -> Item:
    """{"messages": chat form, "images": [path or base64]}. A last message by the assistant becomes the answer."""
    messages, refs = _checked(row["messages"], where), _listed(row.get("images"))
    inline = [p for m in messages for p in m["content"] if p["type"] == "image"]
    own = [p.pop(key) for p in inline for key in ("image", "path") if key in p]
    if own and refs:
        raise BadInput(f"{where}: pictures both inside the messages and in `images`", "name each picture once")
    images = tuple(_image(ref, folder, where) for ref in own or refs)
    if images and not inline:
        first = next((m for m in messages if m["role"] == "user"), messages[0])
        first["content"] = [*({"type": "image"} for _ in images), *first["content"]]
    elif len(images) != len(inline):
        raise BadInput(f"{where}: {len(inline)} image parts, {len(images)} pictures", "give one picture for each part")
    answer = None
    if messages[-1]["role"] == "assistant":
        last = messages.pop()
        if any(p["type"] == "image" for p in last["content"]) or not messages:
            raise BadInput(f"{where}: an answer to nothing, or with a picture in it", "start with a user message")
        answer = "".join(p["text"] for p in last["content"])
    return Item(None, messages, images, answer, meta)


def _checked(messages: Any, where: str) -> list[dict]:
    """The messages with every content as a list of parts. BadInput names what is not chat form."""
    hint = 'chat form is [{"role": "user", "content": "…" or [{"type": "image"}, {"type": "text", "text": "…"}]}]'
    if not isinstance(messages, list) or not messages:
        raise BadInput(f"{where}: messages is not a list of messages", hint)
    out = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise BadInput(f"{where}: a message needs a role and a content", hint)
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
            raise BadInput(f"{where}: a content is neither a string nor a list of parts", hint)
        for part in parts:
            if part.get("type") == "text" and isinstance(part.get("text"), str):
                continue
            if part.get("type") == "image" and not {"url", "base64"} & set(part):
                continue
            raise BadInput(f"{where}: a part of type {part.get('type')!r} with {', '.join(part)} is not read", hint)
        out.append({"role": message["role"], "content": [dict(part) for part in parts]})
    return out


# --------------------------------------------------------------------------------------------------------------- .tsv


def read_tsv(path: Path) -> list[Item]:
    """VLMEvalKit's layout: tab separated, a header, one question a row. Cells are kept as text, never guessed at.

    image: base64; or "['…', '…']", several; or the index of a row whose picture is shown again. Without an `image`
    column `image_path` is read instead, relative to the file. Rows without a picture are left out, as the kit does.
    """
    rows = list(_rows(path))
    header = set(rows[0][1]) if rows else {"image", "question"}
    if not header & {"image", "image_path"} or not ("question" in header or kind_of(path.stem) == "coco"):
        raise BadInput(f"{path.name}: the columns are {', '.join(rows[0][1])}", "it needs image (base64) and question")
    cells = {row.get("index", str(number)): row.get("image", "") for number, (_, row) in enumerate(rows)}
    items = [_tsv_item(row, cells, path, f"{path.name}:{line}") for line, row in rows if row.get("image", "-")]
    if len(items) < len(rows):
        log.warning("%s: %d rows have no picture and were left out", path.name, len(rows) - len(items))
    return items


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line of the file, {column: cell}) of each row."""
    csv.field_size_limit(MAX_FIELD)
    lines = csv.reader(io.StringIO(_decoded(path), newline=""), delimiter="\t")
    header: list[str] = []
    start = 1
    try:
        for cells in lines:
            if not header:
                header = cells
                if len(set(header)) < len(header):
                    raise BadInput(f"{path.name}:1: a column is there twice: {', '.join(header)}", "rename one of them")
            elif cells and len(cells) != len(header):
                line = f"{path.name}:{start}: {len(cells)} cells where the header has {len(header)}"
                raise BadInput(line, "is the file cut short, or a tab or quote inside a cell not quoted?")
            elif cells:
                yield start, dict(zip(header, cells, strict=True))
            start = lines.line_num + 1
    except csv.Error as error:
        raise BadInput(f"{path.name}:{start}: {error}", "it must be tab separated text") from None


def _tsv_item(row: dict[str, str], cells: dict[str, str], path: Path, where: str) -> Item:
    return row_item(row, tuple(_tsv_images(row, cells, path.parent, where)), path.stem, where)


def row_item(row: dict[str, str], images: tuple[bytes | Path, ...], dataset: str, where: str) -> Item:
    """A table's row and its pictures as an item of that dataset."""
    meta: dict[str, Any] = {k: v for k, v in row.items() if k != "image"}
    meta |= {"dataset": dataset, "source": where, "options": _options(row)}
    return _asked(row, images, meta)


def _tsv_images(row: dict[str, str], cells: dict[str, str], folder: Path, where: str) -> list[bytes | Path]:
    cell = row.get("image")
    if cell is None:
        return [_image(ref, folder, where) for ref in _python_list(row["image_path"], where)]
    if len(cell) <= 64:  # the kit's own rule: too short to be a picture, so the index of a row
        if len(cells.get(cell, "")) <= 64:
            raise BadInput(f"{where}: the image cell says {cell!r}, which is no row with a picture", "give base64")
        cell = cells[cell]
    return [_base64(text, where) for text in _python_list(cell, where)]


def _python_list(cell: str, where: str) -> list[str]:
    """ "['a', 'b']" -> ["a", "b"]; anything that does not start with a bracket is a list of one."""
    if not cell.startswith("["):
        return [cell]
    try:
        values = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise BadInput(f"{where}: a cell begins like a list and is none", "write ['…', '…']") from None
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise BadInput(f"{where}: a list of pictures holds something else", "write ['…', '…']")
    return values


# ------------------------------------------------------------------------------------------------ questions, answers


def _asked(row: dict, images: tuple[bytes | Path, ...], meta: dict) -> Item:
    """A question as its dataset words it (benchmarks.prompt), its pictures in the order the words show them."""
    question, hint, where = row.get("question"), row.get("hint") or "", meta["source"]
    if (kind := kind_of(meta["dataset"])) is not None:
        meta |= {"pictures": images}  # as the row has them: some families are asked in other words (wordings.py)
    parts = prompt(kind, question, meta["options"], hint, len(images), where)
    shown = [part.pop("picture", number) for number, part in enumerate(p for p in parts if p["type"] == "image")]
    answers = accepted(row.get("answer"))
    best = Counter(answers).most_common(1)[0][0] if answers else None
    return Item(None, [{"role": "user", "content": parts}], tuple(images[number] for number in shown), best, meta)


def _options(row: dict) -> dict[str, str]:
    """{"A": "a cat", …} from columns A..Z, or from `options` (an object, or a list lettered from A), without blanks."""
    given = row.get("options") or {letter: row[letter] for letter in ascii_uppercase if letter in row}
    if isinstance(given, list):
        given = dict(zip(ascii_uppercase, given, strict=False))
    if not isinstance(given, dict):
        return {}
    return {str(key): str(value) for key, value in given.items() if value not in (None, "")}


def accepted(answer: Any) -> list[str]:
    """Every accepted answer of a row: a list, or a string that is the Python literal of one, or the answer alone."""
    if answer is None or answer == "":
        return []
    if isinstance(answer, str) and answer.lstrip().startswith("["):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            answer = ast.literal_eval(answer.strip())
    return [str(one) for one in answer] if isinstance(answer, list) else [str(answer)]


# ---------------------------------------------------------------------------------------------------------- pictures


def picture(image: bytes | Path, where: str = "picture") -> Image.Image:
    """The decoded picture, upright (EXIF) and RGB. BadInput if it is cut short, broken or larger than MAX_PIXELS."""
    _measure(image, where)
    try:
        with quiet_pillow(), _opened(image) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except NOT_A_PICTURE as error:
        raise BadInput(f"{where}: the picture cannot be decoded ({error})", "is the file cut short?") from None


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Without Pillow's warnings of odd metadata; of large pictures ours is stricter, and an error."""
    before = logging.getLogger("PIL").level
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("PIL").setLevel(before)


def _opened(image: bytes | Path) -> Image.Image:
    return Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=PICTURES)


def _measure(image: bytes | Path, where: str) -> None:
    """Read the picture's header: its format must be known and its size bearable."""
    try:
        with quiet_pillow(), _opened(image) as opened:
            width, height = opened.size
    except NOT_A_PICTURE:
        name = "the picture" if isinstance(image, bytes) else str(image)
        raise BadInput(f"{where}: {name} is not a picture", f"give one of {', '.join(PICTURES)}") from None
    if width * height > MAX_PIXELS:
        line = f"{where}: a picture of {width} x {height} pixels; at most {MAX_PIXELS:,} are read"
        raise BadInput(line, "make it smaller")


def _image(ref: Any, folder: Path, where: str) -> bytes | Path:
    """A picture named in a data file: a path, a data: address, or bare base64."""
    if not isinstance(ref, str) or not ref:
        raise BadInput(f"{where}: a picture is of type {type(ref).__name__}", "give a path or base64 text")
    if ref.startswith("data:"):
        return _base64(ref.partition("base64,")[2], where)
    if "://" in ref:
        raise BadInput(f"{where}: {ref[:60]} is an address", "mopeq opens no connection: download the picture first")
    relative = Path(os.path.normpath(ref))
    if relative.parts[:1] == ("..",):
        raise BadInput(f"{where}: {ref[:80]} is outside the data file's folder", "keep pictures beside the data file")
    path = folder / relative  # an absolute path stays itself
    if len(ref) < 4096 and _is_file(path):
        _measure(path, where)
        return path
    if len(ref) > 64 and "." not in ref:  # base64 has no dot, a picture's name has
        return _base64(ref, where)
    raise BadInput(f"{where}: there is no picture {ref[:80]}", f"paths are relative to {folder}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long for the file system, or with a NUL in it
        return False


def _base64(text: str, where: str) -> bytes:
    try:
        image = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadInput(f"{where}: the picture is not base64 ({error})", "give base64 of a PNG or JPEG file") from None
    _measure(image, where)
    return image


# -------------------------------------------------------------------------------------------------------------- text


def _decoded(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # a byte order mark is no part of the text
    except UnicodeDecodeError as error:
        raise BadInput(f"{path.name}: byte {error.start} is not UTF-8", "save the file as UTF-8") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror})", "check the file and its permissions") from None


def _listed(value: Any) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]


def _must_be_unicode(line: str, row: dict, where: str) -> None:
    """JSON can spell half a character (\\ud800); a tokenizer would die on it later, without a line number."""
    if "\\u" not in line.lower():
        return
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise BadInput(f"{where}: half a character (a lone \\ud8…)", "write the text as UTF-8") from None

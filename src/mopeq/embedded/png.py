"""A PNG writer whose bytes never change: 16 colours, stored blocks, no compressor whose version could matter."""

from __future__ import annotations

import struct
import zlib

import numpy as np

MAX_STORED = 65535  # bytes of one stored deflate block


def encode(pixels_HW: np.ndarray, palette_C3: np.ndarray) -> bytes:
    """PNG bytes of palette indices below 16 [height, even width] and their colours [≤ 16, 3]."""
    height, width = pixels_HW.shape
    assert width % 2 == 0
    assert pixels_HW.max() < len(palette_C3) <= 16
    packed = (pixels_HW[:, 0::2] << 4 | pixels_HW[:, 1::2]).astype(np.uint8)
    rows = np.concatenate([np.zeros((height, 1), np.uint8), packed], axis=1).tobytes()  # filter 0 before each row
    head = struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)  # 4 bits a pixel, palette
    colours = palette_C3.astype(np.uint8).tobytes()
    chunks = [(b"IHDR", head), (b"PLTE", colours), (b"IDAT", _stored(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks)


def _stored(data: bytes) -> bytes:
    """A zlib stream of one stored block (RFC 1950, RFC 1951 section 3.2.4)."""
    assert len(data) <= MAX_STORED
    block = struct.pack("<BHH", 1, len(data), len(data) ^ 0xFFFF) + data
    return b"\x78\x01" + block + struct.pack(">I", zlib.adler32(data))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

"""Molmo's pictures: one crop of the whole, then overlapping crops of a tiling, and where each crop's tokens stand.

Neighbouring crops share `overlap_margins` patches (left/top, right/bottom), so that every patch the model keeps has
seen some surroundings. Tokens are pooled 2x2 from patches; a crop keeps those outside its shared margins, and the
kept ones of all crops, read row by row over the whole picture, are the picture's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from mopeq.errors import BadInput

Array = NDArray[np.float32]
NOWHERE = -100  # a pooled patch that is no token
POOL = 2


def select_tiling(height: int, width: int, window: int, most: int) -> tuple[int, int]:
    """(rows, columns) of windows for a picture: the least enlargement, or the least shrinking if all must shrink.

    At most `most` windows; a tie goes to the fewest, then to the fewest rows. Both sizes are without the margins, so
    they may be 0 or negative.
    """
    tilings = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most]
    tilings.sort(key=lambda tiling: (tiling[0] * tiling[1], tiling[0]))
    with np.errstate(divide="ignore"):  # float32, as the model was trained
        scale = np.float32(window * np.array(tilings)) / np.array([height, width], np.float32)
    scale = scale.min(-1)
    return tilings[int(scale.argmax() if (scale < 1).all() else np.where(scale < 1, 1e10, scale).argmin())]


def resize_and_pad(picture: NDArray[np.uint8], height: int, width: int) -> tuple[Array, NDArray[np.bool_]]:
    """A picture [h, w, 3] scaled into [height, width, 3] in 0..1, zeros around it, and the mask of what is picture."""
    size = picture.shape[:2]
    scale = min(np.float32(height) / np.float32(size[0]), np.float32(width) / np.float32(size[1]))
    h, w = (max(1, int(np.float32(side) * scale)) for side in size)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    if (h, w) != size:
        pixels = F.interpolate(pixels, size=(h, w), mode="bilinear", align_corners=False, antialias=True)
    top, left = (height - h) // 2, (width - w) // 2
    out, mask = np.zeros((height, width, 3), np.float32), np.zeros((height, width), bool)
    out[top : top + h, left : left + w] = pixels[0].clamp(0, 1).permute(1, 2, 0).numpy()
    mask[top : top + h, left : left + w] = True
    return out, mask


def patches(image: NDArray, patch: int) -> NDArray:
    """[grid * patch, grid * patch, …] -> [grid * grid, patch * patch * …], each patch by rows, then channels."""
    grid = image.shape[0] // patch
    cut = image.reshape(grid, patch, grid, patch, -1).swapaxes(1, 2)
    return cut.reshape(grid * grid, -1)


@dataclass(frozen=True)
class ImageTokens:
    """A picture as the model takes it: crops [N, P, pixels], masks [N, P], ids [T] and where tokens go [N, tokens].

    `index` counts from the first of `ids`; NOWHERE marks pooled patches that are no token.
    """

    crops: Array
    masks: Array
    ids: list[int]
    index: NDArray[np.int64]


@dataclass(frozen=True)
class MolmoImageProcessor:
    """See the top of the file. `side`: pixels of a crop; `tokens`: pooled patches along its side."""

    side: int
    patch: int
    tokens: int
    max_crops: int
    margins: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    do_normalize: bool = True

    def normalize(self, image: Array) -> Array:
        if not self.do_normalize:
            return image
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return ((image - mean) / std).astype(np.float32, copy=False)

    def kept(self, number: int, of: int) -> tuple[int, int]:
        """(first, count) of the tokens along one axis that crop `number` of `of` keeps."""
        grid, (before, after) = self.side // self.patch, self.margins
        patches_kept = grid - (0 if number == 0 else before) - (0 if number == of - 1 else after)
        return (0 if number == 0 else before // POOL), -(-patches_kept // POOL)

    def __call__(self, picture: NDArray[np.uint8], start: int, end: int, token: int, column: int) -> ImageTokens:
        """A picture [h, w, 3]; the four are ids: picture starts, picture ends, a token, and the end of a row."""
        grid, both = self.side // self.patch, sum(self.margins)
        window = (grid - both) * self.patch
        if window <= 0 or -(-grid // POOL) != self.tokens or self.margins[0] % POOL:
            raise BadInput(
                f"crops of {grid} patches, margins {self.margins} and {self.tokens} tokens a side do not fit together",
                "compare base_image_input_size, overlap_margins and image_token_length_h in preprocessor_config.json",
            )
        edge = both * self.patch
        height, width = picture.shape[:2]
        rows, columns = select_tiling(height - edge, width - edge, window, self.max_crops)
        image, mask = resize_and_pad(picture, rows * window + edge, columns * window + edge)
        image = self.normalize(image)
        whole = self.normalize(resize_and_pad(picture, self.side, self.side)[0])
        crops, masks = [patches(whole, self.patch)], []
        spans = [[self.kept(i, rows) for i in range(rows)], [self.kept(j, columns) for j in range(columns)]]
        high, wide = (sum(count for _, count in axis) for axis in spans)
        first_local = 1 + self.tokens * (self.tokens + 1) + 2  # after the whole view, its end, and the next start
        index = [self.places(1, self.tokens, self.tokens)]
        y = 0
        for i, (top, tall) in enumerate(spans[0]):
            x = 0
            for j, (left, broad) in enumerate(spans[1]):
                view = np.s_[i * window : i * window + self.side, j * window : j * window + self.side]
                crops.append(patches(image[view], self.patch))
                masks.append(patches(mask[view].astype(np.float32), self.patch).mean(-1))
                places = np.full((self.tokens, self.tokens), NOWHERE)
                local = self.places(first_local, high, wide)
                places[top : top + tall, left : left + broad] = local[y : y + tall, x : x + broad]
                index.append(places)
                x += broad
            y += tall
        # upstream appends the whole view's mask (-1) last though its crop comes first; trained so, kept so
        masks.append(np.full(grid * grid, -1, np.float32))
        ids = []
        for h, w in ((self.tokens, self.tokens), (high, wide)):
            ids += [start, *([token] * w + [column]) * h, end]
        return ImageTokens(np.stack(crops), np.stack(masks), ids, np.stack(index).reshape(len(crops), -1))

    @staticmethod
    def places(first: int, high: int, wide: int) -> NDArray[np.int64]:
        """Positions [high, wide] of a block's tokens, rows ending in one more id."""
        return first + np.arange(high)[:, None] * (wide + 1) + np.arange(wide)

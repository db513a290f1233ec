"""An image's mean colours in 8 x 8 tiles: the colour jitter's contrast is relative to the whole image (`jitter.py`).

`shards make resize=` writes them into the JPEG as a comment, `PREFIX` and 3 bytes a tile in hexadecimal, so that only a
crop's rows have to be decoded. Without the comment all rows are.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE = 8  # tiles a side
PIXELS = 4  # a side of a tile that are looked at
PREFIX = b"beit_pretrain: RGB of 8 x 8 tiles "
LENGTH = len(PREFIX) + SIDE * SIDE * 3 * 2
MARK = b"\xff\xfe" + (LENGTH + 2).to_bytes(2) + PREFIX  # a JPEG's comment segment (ITU T.81, section B.2.4.5)
SEARCHED = 4096  # first bytes of a file: Pillow writes comments before the tables


def comment(image: Image.Image) -> bytes:
    """The comment to write into the file of an RGB or grey image."""
    tiles = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return PREFIX + tiles.tobytes().hex().encode()


def of_image(image: Image.Image | np.ndarray) -> np.ndarray:
    """The colours of a decoded image, or of an array (H, W, C), from a regular grid of its pixels: uint8 (64, C)."""
    side = SIDE * PIXELS
    if isinstance(image, np.ndarray):
        height, width = image.shape[:2]
        centres = np.arange(side) + 0.5
        rows, columns = (centres * height / side).astype(np.int64), (centres * width / side).astype(np.int64)
        grid = image[rows[:, None], columns]
    else:
        grid = np.asarray(image.resize((side, side), Image.Resampling.NEAREST))  # the same pixels
    sums = grid.reshape(SIDE, PIXELS, SIDE, PIXELS, -1).sum((1, 3), dtype=np.uint16)
    return ((sums + PIXELS**2 // 2) // PIXELS**2).astype(np.uint8).reshape(SIDE * SIDE, -1)


def in_jpeg(data: bytes) -> np.ndarray | None:
    """The colours in a JPEG's bytes, uint8 (64, 3); None if it has none."""
    at = data.find(MARK, 0, SEARCHED)
    return None if at < 0 else in_comment(data[at + 4 : at + 4 + LENGTH])


def in_comment(text: bytes | str | None, channels: int = 3) -> np.ndarray | None:
    """The colours in a file's comment as uint8 (64, 3), or (64, 1) for one channel; None if it has none."""
    if not isinstance(text, bytes) or len(text) != LENGTH or not text.startswith(PREFIX):
        return None
    try:
        tiles = np.frombuffer(bytes.fromhex(text[len(PREFIX) :].decode()), np.uint8).reshape(1, -1, 3)
    except ValueError:
        return None
    return tiles[0] if channels != 1 else np.asarray(Image.fromarray(tiles).convert("L")).reshape(-1, 1)

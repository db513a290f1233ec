"""The colours of a whole image, written into its file: mean colours of 8 x 8 tiles, as a comment of the JPEG.

Contrast is relative to the whole image's grey (views.py), also where only a crop's rows are decoded. `shards make
resize=` writes the comment; the text is `PREFIX` and 3 bytes a tile in hexadecimal. Without one, all rows are decoded.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE = 8  # tiles a side
PREFIX = b"beit_pretrain: RGB of 8 x 8 tiles "
LENGTH = len(PREFIX) + SIDE * SIDE * 3 * 2
MARK = b"\xff\xfe" + (LENGTH + 2).to_bytes(2) + PREFIX  # a JPEG's comment segment (ITU T.81, section B.2.4.5)
SEARCHED = 4096  # first bytes of a file: Pillow writes comments before the tables


def comment(image: Image.Image) -> bytes:
    """The comment to write into the file of an RGB or grey image."""
    tiles = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return PREFIX + tiles.tobytes().hex().encode()


def in_jpeg(data: bytes) -> np.ndarray | None:
    """The colours in a JPEG's bytes, uint8 (64, 3); None if it tells none."""
    at = data.find(MARK, 0, SEARCHED)
    return None if at < 0 else in_comment(data[at + 4 : at + 4 + LENGTH])


def in_comment(text: bytes | str | None, channels: int = 3) -> np.ndarray | None:
    """The colours in a file's comment as uint8 (64, 3), or (64, 1) for one channel; None if it tells none."""
    if not isinstance(text, bytes) or len(text) != LENGTH or not text.startswith(PREFIX):
        return None
    try:
        tiles = np.frombuffer(bytes.fromhex(text[len(PREFIX) :].decode()), np.uint8).reshape(1, -1, 3)
    except ValueError:
        return None
    return tiles[0] if channels != 1 else np.asarray(Image.fromarray(tiles).convert("L")).reshape(-1, 1)

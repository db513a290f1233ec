"""The letters of all pictures. Imports no torch, so that sheets of shards are drawn at once."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from PIL import ImageFont

SMALL = 9  # of legends, and of sheets of shards
TEXT = 11  # size of letters; the spaces of smaller ones can hardly be seen


@cache
def font(size: int = TEXT) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, of matplotlib: Latin, Greek, Cyrillic and more; Pillow's own has no accents."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)

"""Contact sheet of a source: a look at the images and classes before training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from beit_pretrain.data.order import Sample
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.errors import UserError, stop_if_memory_was_short
from beit_pretrain.fileio import expand_home
from beit_pretrain.transforms.image_io import MAX_PIXELS, open_image, to_rgb
from beit_pretrain.visualization.fonts import SMALL
from beit_pretrain.visualization.fonts import font as font_of


def contact_sheet(
    source: str | Path | ShardReader, path: str | Path, columns: int = 8, rows: int = 6, cell: int = 96
) -> None:
    """Write a PNG of `columns` x `rows` first samples of evenly spaced shards, `cell` pixels a side, classes below.

    An image that does not decode is a cell that says so.
    Raises UserError if there are no images, a shard cannot be read, or the PNG cannot be written.
    """
    if min(columns, rows, cell) < 1:
        raise UserError(f"columns, rows and cell must be 1 or more, got {columns}, {rows} and {cell}")
    reader = source if isinstance(source, ShardReader) else ShardReader(source)
    path, text = expand_home(path), 14
    sheet = Image.new("RGB", (columns * cell, rows * (cell + text)), "white")
    draw, font = ImageDraw.Draw(sheet), font_of(SMALL)
    wanted = np.arange(columns * rows) * len(reader.shards) // (columns * rows)  # the shard of every cell
    place = 0
    try:
        for number in np.unique(wanted).tolist():
            for row in range(min(int(np.sum(wanted == number)), reader.sizes[number])):
                small, label = _small(reader, Sample(number, row), cell)
                x, y = place % columns * cell, place // columns * (cell + text)
                sheet.paste(small, (x + (cell - small.width) // 2, y + (cell - small.height) // 2))
                name = " ".join(reader.classes[label].split()) if label >= 0 else ""
                while draw.textlength(name, font) > cell - 4:
                    name = name[:-1]
                draw.text((x + 2, y + cell), name, "black", font)
                place += 1
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, "PNG")
    except (OSError, ValueError, SyntaxError, MemoryError) as error:  # SyntaxError is Pillow's for a broken PNG
        raise UserError(f"cannot draw {path}: {error}") from None


def _small(reader: ShardReader, sample: Sample, cell: int) -> tuple[Image.Image, int]:
    """An image within a square of `cell` pixels, or a note that it cannot be decoded; and its label."""
    label = -1
    try:
        data, label = reader.read(sample)
        with open_image(data, reader.manifest["settings"].get("max_pixels", MAX_PIXELS)) as image:
            return ImageOps.contain(to_rgb(image), (cell, cell)), label
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly everything on broken files
        stop_if_memory_was_short(error, "a sample")
        note = Image.new("RGB", (cell, cell), "lightgrey")
        ImageDraw.Draw(note).text((4, cell // 2 - 6), "not decoded", "black", font_of(SMALL))
        return note, label

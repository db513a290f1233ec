"""The view of an image that a Hugging Face processor makes.

Resize (to a size, or the shorter side to a length), then optionally a central crop, with zeros outside of the image.
"""

from __future__ import annotations

from typing import Annotated

from PIL import Image
from pydantic import BaseModel, Field

from beit_pretrain.transforms.image_io import to_channels

Pixels = Annotated[int, Field(ge=1, lt=2**16)]
Size = Annotated[list[Pixels], Field(min_length=2, max_length=2)]


class ProcessorView(BaseModel, strict=True, frozen=True):
    """How a processor resizes and crops.

    Attributes:
        resize: (height, width), or the length of the shorter side, in pixels; None = as the image is.
        crop: (height, width) of the central crop; None = no crop.
        resample: number of the filter, as in `PIL.Image.Resampling`.
    """

    resize: Size | Pixels | None = None
    crop: Size | None = None
    resample: Annotated[int, Field(ge=0, le=5)] = int(Image.Resampling.BICUBIC)

    def size(self) -> list[int] | None:
        """(height, width) of the view; None if the image decides."""
        return self.crop or (self.resize if isinstance(self.resize, list) else None)

    def scaled(self, side: int) -> ProcessorView:
        """The same for a network of another image size: all sizes multiplied."""
        if (own := self.size()) is None or own == [side, side]:
            return self
        height, width = side / own[0], side / own[1]

        def times(size: list[int] | int | None) -> list[int] | int | None:
            if isinstance(size, list):
                return [max(1, round(size[0] * height)), max(1, round(size[1] * width))]
            return None if size is None else max(1, round(size * min(height, width)))

        return ProcessorView.model_validate(
            {"resize": times(self.resize), "crop": times(self.crop), "resample": self.resample}
        )

    def __call__(self, image: Image.Image, side: int, channels: int) -> Image.Image:
        """The view, (side, side) pixels; what comes out in another size is resized to it.

        Only the part of the image that is kept is resized: the whole of a thin image could take gigabytes.
        """
        image, view = to_channels(image, channels), self.scaled(side)
        (width, height), kept = image.size, view.crop
        if isinstance(view.resize, int) and kept is not None:
            short = min(width, height)
            rows, columns = int(view.resize * height / short), int(view.resize * width / short)
        elif isinstance(view.resize, list):
            rows, columns = view.resize
        else:  # without a crop transformers takes only images that come out in the network's size
            rows, columns = (height, width) if kept is not None and view.resize is None else (side, side)
        crop_rows, crop_columns = kept or (rows, columns)
        seen_rows, seen_columns = min(rows, crop_rows), min(columns, crop_columns)
        top, left = (rows - seen_rows) // 2, (columns - seen_columns) // 2
        down, across = height / rows, width / columns
        box = (
            left * across,
            top * down,
            min(width, (left + seen_columns) * across),
            min(height, (top + seen_rows) * down),
        )
        part = image.resize((seen_columns, seen_rows), Image.Resampling(view.resample), box)
        if (seen_rows, seen_columns) != (crop_rows, crop_columns):
            whole = Image.new(part.mode, (crop_columns, crop_rows))
            whole.paste(part, ((crop_columns - seen_columns) // 2, (crop_rows - seen_rows) // 2))
            part = whole
        return part if part.size == (side, side) else part.resize((side, side), Image.Resampling.BICUBIC)

"""The view of an image that a Hugging Face processor makes.

Resize (to a size, or the shorter side to a length), then optionally a central crop, with zeros outside of the image.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

from PIL import Image
from pydantic import BaseModel, Field

from beit_pretrain.transforms.image_io import to_channels

Pixels = Annotated[int, Field(ge=1, lt=2**16)]
Size = Annotated[list[Pixels], Field(min_length=2, max_length=2)]
LARGEST_WHOLE = 2**24  # pixels; of a thin image only the part that is kept is resized beyond that


class Layout(NamedTuple):
    """Where a view lies in the resized image, in pixels; each is (vertical, horizontal).

    Beyond the image, where `start` is negative or `size` too large, a view is 0.
    """

    whole: tuple[int, int]  # size of the resized image
    start: tuple[int, int]  # upper left corner of the view in it
    size: tuple[int, int]  # of the view


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

    def layout(self, height: int, width: int) -> Layout:
        """Where the view of an image of this size lies. The longer side and halves of pixels are rounded towards 0."""
        if isinstance(self.resize, int):
            short = min(height, width)
            rows, columns = int(self.resize * height / short), int(self.resize * width / short)
        else:
            rows, columns = self.resize or (height, width)
        size_rows, size_columns = self.crop or (rows, columns)
        start = int((rows - size_rows) / 2), int((columns - size_columns) / 2)
        return Layout((rows, columns), start, (size_rows, size_columns))

    def applied(self, image: Image.Image) -> Image.Image:
        """The view of a decoded image, in its mode. As transformers does, the whole image is resized, then cropped.

        Not so where the whole would have more than LARGEST_WHOLE pixels, of a thin image gigabytes.
        """
        (rows, columns), (top, left), (height, width) = self.layout(image.height, image.width)
        resample = Image.Resampling(self.resample)
        if rows * columns > max(LARGEST_WHOLE, image.height * image.width):
            down, across = image.height / rows, image.width / columns
            upper, first = max(0, top), max(0, left)
            lower, last = min(rows, top + height), min(columns, left + width)
            box = first * across, upper * down, min(image.width, last * across), min(image.height, lower * down)
            image = image.resize((last - first, lower - upper), resample, box)
            top, left = min(0, top), min(0, left)
        elif (rows, columns) != (image.height, image.width):
            image = image.resize((columns, rows), resample)
        return image if image.size == (width, height) else image.crop((left, top, left + width, top + height))

    def __call__(self, image: Image.Image, side: int, channels: int) -> Image.Image:
        """The view, (side, side) pixels; what comes out in another size is resized to it."""
        image, view = to_channels(image, channels), self.scaled(side)
        if view.crop is None and not isinstance(view.resize, list):
            # transformers takes only images that come out in the network's size
            view = ProcessorView(resize=[side, side], resample=view.resample)
        seen = view.applied(image)
        return seen if seen.size == (side, side) else seen.resize((side, side), Image.Resampling.BICUBIC)

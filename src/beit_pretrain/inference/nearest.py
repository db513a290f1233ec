"""The nearest images of a query among stored vectors, by cosine, as a table and a contact sheet.

As in the kNN of `probe` the mean of the stored vectors is subtracted first: this common part would dominate the cosine.
Shapes: Q queries, M stored vectors, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from beit_pretrain.errors import UserError
from beit_pretrain.inference.image_stream import ImageDataset, Source
from beit_pretrain.inference.vector_formats import StoredVectors

MISSING = Image.new("RGB", (96, 96), "lightgrey")  # stands on the sheet for an image that cannot be read


class Neighbour(NamedTuple):
    """A stored image: its row, its name, and the cosine with the query."""

    row: int
    name: str
    similarity: float


def nearest(stored: StoredVectors, queries_QD: Tensor, count: int) -> list[list[Neighbour]]:
    """The `count` nearest rows of every query (Q, D), the nearest first; two passes over the stored vectors.

    Raises UserError if these are of another width.
    """
    total, rows = torch.zeros(queries_QD.shape[1], dtype=torch.float64), 0
    for piece in stored.pieces():
        if piece.ndim != 2 or piece.shape[1] != len(total):
            raise UserError(f"the stored vectors have the shape {piece.shape[1:]}, the query's ({len(total)},)")
        total, rows = total + torch.from_numpy(piece.sum(0, dtype=np.float64)), rows + len(piece)
    if rows != len(stored.names):
        raise UserError(f"{rows} vectors, but {len(stored.names)} names: the files are not of one another")
    centre = (total / rows).float()
    queries = F.normalize(queries_QD - centre, dim=1)
    best, where, first = queries.new_zeros(len(queries), 0), torch.zeros(len(queries), 0, dtype=torch.int64), 0
    for piece in stored.pieces():
        cosine_QM = queries @ F.normalize(torch.from_numpy(piece) - centre, dim=1).T
        index = torch.arange(first, first + len(piece)).expand(len(queries), -1)
        both, places = torch.cat([best, cosine_QM], 1), torch.cat([where, index], 1)
        best, order = both.topk(min(count, both.shape[1]), dim=1)
        where, first = places.gather(1, order), first + len(piece)
    return [
        [Neighbour(row, stored.names[row], value) for row, value in zip(rows, values, strict=True)]
        for rows, values in zip(where.tolist(), best.tolist(), strict=True)
    ]


def views_of(dataset: ImageDataset, found: Sequence[Neighbour]) -> list[Image.Image | None]:
    """The views of neighbours, from the source of their vectors; None where it does not have a readable one."""
    pictures: list[Image.Image | None] = []
    for neighbour in found:
        number = place_of(dataset.source, neighbour)
        item = None if number is None else dataset[number]
        pictures.append(picture(item.views[0]) if item is not None and item.problem is None else None)
    return pictures


def place_of(source: Source, neighbour: Neighbour) -> int | None:
    """The number of a neighbour's image: that of its row, or, behind unreadable images, a little more."""
    start = min(neighbour.row, len(source))
    for number in chain(range(start, len(source)), range(start)):
        name = source[number][0]
        if neighbour.name in (name, name.encode(errors="backslashreplace").decode()):  # as .csv and .parquet have it
            return number
    return None


def picture(view_CHW: Tensor) -> Image.Image:
    """A view (uint8) as a picture."""
    array = view_CHW.numpy()
    return Image.fromarray(array[0] if len(array) == 1 else array[:3].transpose(1, 2, 0))

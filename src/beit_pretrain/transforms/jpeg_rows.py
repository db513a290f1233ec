"""Cuts the rows that a crop needs out of a JPEG, as a new JPEG, without decoding.

`shards make resize=` ends every row of blocks with a restart marker (ITU T.81, section E.1.4), after which decoding
can begin anew. So a band of rows is cut out by bytes: a header with another height, and the band's segments.
"""

from __future__ import annotations

import re
from typing import NamedTuple

RESTART = re.compile(rb"\xff[\xd0-\xd7]")  # inside a scan 0xff is always followed by 0x00 or such a marker
CONTEXT = 2  # rows above and below: chroma of half the size is interpolated between its rows
OTHER_FRAMES = {0xC0 + n for n in range(1, 16)} - {0xC4, 0xC8, 0xCC}  # not baseline: progressive and rarer kinds


class _Layout(NamedTuple):
    """A baseline JPEG with one restart interval a row of blocks."""

    height: int
    height_at: int  # offset of the header's two bytes
    block: int  # rows of pixels in a row of blocks
    scan: int  # offset of the first segment


def cut_rows(data: bytes, top: int, bottom: int) -> tuple[bytes, int] | None:
    """A JPEG that decodes to rows of `data`, at least `top` to `bottom`, and the number of its first row.

    The pixels of `top` to `bottom` are those of the whole image, bit for bit. None if it cannot be cut, or need not.
    """
    if (layout := _layout(data)) is None:
        return None
    rows = -(-layout.height // layout.block)
    first, last = max(0, top - CONTEXT) // layout.block, min(rows - 1, (bottom - 1 + CONTEXT) // layout.block)
    if last - first + 1 == rows:
        return None
    marks = [found.start() for found in RESTART.finditer(data, layout.scan)]
    if len(marks) != rows - 1:
        return None
    begin = layout.scan if first == 0 else marks[first - 1] + 2
    end = len(data) if last == rows - 1 else marks[last]
    band = bytearray(data[begin:end])
    for number, mark in enumerate(marks[first:last]):
        band[mark - begin + 1] = 0xD0 + number % 8  # they are counted from the scan's beginning
    height = min(layout.height, (last + 1) * layout.block) - first * layout.block
    head = data[: layout.height_at] + height.to_bytes(2) + data[layout.height_at + 2 : layout.scan]
    return head + bytes(band) + b"\xff\xd9", first * layout.block


def _layout(data: bytes) -> _Layout | None:
    at, interval, frame = 2, 0, 0
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker in OTHER_FRAMES:
            return None
        if marker == 0xC0:
            frame = at
        elif marker == 0xDD:
            interval = int.from_bytes(data[at + 4 : at + 6])
        elif marker == 0xDA:
            break
        at += 2 + length
    else:
        return None
    if (
        not interval
        or not frame
        or len(data) < frame + 18
        or data[frame + 9 : frame + 10] != b"\x03"
        or data[at + 4 : at + 5] != b"\x03"
    ):
        return None
    across, down = data[frame + 11] >> 4, data[frame + 11] & 15
    if data[frame + 14] != 0x11 or data[frame + 17] != 0x11 or across not in (1, 2) or down not in (1, 2):
        return None
    height, width = int.from_bytes(data[frame + 5 : frame + 7]), int.from_bytes(data[frame + 7 : frame + 9])
    if interval != -(-width // (8 * across)) or not height:
        return None
    return _Layout(height, frame + 5, 8 * down, at + 2 + length)

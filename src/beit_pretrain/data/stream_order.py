"""Which tar of a stream each loader process reads next, and where a stream stands, so that a run can resume exactly.

A set of T tars gives an endless sequence of entries: its tars in the order of epoch 0, then in that of epoch 1, and so
on; entry e belongs to epoch e // T. The L lanes (a lane is a loader process of a rank) deal the entries among
themselves in turn. So every tar is read equally often whatever the lengths, no lane ever ends or waits for another one,
and of the samples of an epoch each comes exactly once.

The place of a whole stream is what is left of entries that have been opened or jumped over (`backlog`), and the first
entry after them (`next`). On resume the lanes, however many there are then, deal first the backlog, then the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from beit_pretrain.data.order import SHUFFLE_SHARDS, MethodCache, permutation
from beit_pretrain.errors import UserError

END = 2**62  # a row after all rows


class Part(NamedTuple):
    """Samples of an entry that are still to be given: the rows listed, and all from `start` on (END: none)."""

    entry: int
    start: int = 0
    rows: tuple[int, ...] = ()

    def after(self, read: int, waiting: list[int]) -> Part:
        """What is left when the first `read` rows have been read, of which `waiting` were not given yet."""
        left = [row for row in self.rows if row >= read]
        return Part(self.entry, max(self.start, read), tuple(sorted([*waiting, *left])))


class LaneState(NamedTuple):
    """Where a lane stands: parts opened, rows read of the last one, (part, row) int64 pairs read but not given."""

    opened: int = 0
    read: int = 0
    waiting: bytes = b""


class Place(NamedTuple):
    """The place of a whole stream."""

    next: int = 0
    backlog: tuple[Part, ...] = ()

    def part(self, number: int) -> Part:
        """The part of this number in the sequence that begins here."""
        behind = number - len(self.backlog)
        return self.backlog[number] if behind < 0 else Part(self.next + behind)

    def advanced(self, lanes: int, states: Mapping[int, LaneState]) -> Place:
        """The place that `lanes` lanes, which began here, have reached; `states` by lane, where they have begun."""
        found = {lane: state for lane, state in states.items() if state.opened}
        touched = max((lane + (state.opened - 1) * lanes + 1 for lane, state in found.items()), default=0)
        waiting: dict[int, list[int]] = {}
        for state in found.values():
            for number, row in np.frombuffer(state.waiting, np.int64).reshape(-1, 2).tolist():
                waiting.setdefault(number, []).append(row)
        # Not every part that has been opened, of which a long run has millions, but those that may have rows left.
        left = {*range(len(self.backlog)), *waiting}
        for lane in range(min(lanes, touched)):
            opened = found[lane].opened if lane in found else 0
            left.update(range(lane + max(0, opened - 1) * lanes, touched, lanes))
        backlog = []
        for number in sorted(left):
            part, (turn, lane) = self.part(number), divmod(number, lanes)
            state = found.get(lane, LaneState())
            if turn < state.opened:
                part = part.after(state.read if turn == state.opened - 1 else END, waiting.get(number, []))
            if part.start < END or part.rows:
                backlog.append(part)
        return Place(max(self.next, self.next + touched - len(self.backlog)), tuple(backlog))

    def packed(self) -> dict[str, Any]:
        """Plain tensors for a checkpoint."""
        rows = [(number, row) for number, part in enumerate(self.backlog) for row in part.rows]
        return {
            "next": self.next,
            "backlog": torch.tensor([part[:2] for part in self.backlog], dtype=torch.int64).reshape(-1, 2),
            "rows": torch.tensor(rows, dtype=torch.int64).reshape(-1, 2),
        }

    @classmethod
    def unpacked(cls, content: Mapping[str, Any]) -> Place:
        rows: dict[int, list[int]] = {}
        for number, row in content["rows"].tolist():
            rows.setdefault(number, []).append(row)
        parts = [
            Part(entry, start, tuple(rows.get(n, ()))) for n, (entry, start) in enumerate(content["backlog"].tolist())
        ]
        return cls(int(content["next"]), tuple(parts))


class Lane:
    """One lane's walk through the sequence that begins at a place."""

    def __init__(self, place: Place, lane: int, lanes: int):
        self.place, self.lane, self.lanes = place, lane, lanes
        self.opened = self.read = self.without_image = 0
        self._waiting: dict[tuple[int, int], None] = {}  # an ordered set

    def open(self) -> tuple[int, Part]:
        """The number of the lane's next part, and the part."""
        number = self.lane + self.opened * self.lanes
        self.opened, self.read = self.opened + 1, 0
        return number, self.place.part(number)

    def skip(self, row: int) -> None:
        """Note that a row was read that is not to be given."""
        self.read = row + 1

    def add(self, number: int, row: int) -> None:
        """Note that a row was read, which waits in the buffer now."""
        self.read = row + 1
        self._waiting[number, row] = None

    def give(self, number: int, row: int) -> None:
        """Note that a row left the buffer."""
        del self._waiting[number, row]

    def state(self) -> LaneState:
        return LaneState(self.opened, self.read, np.array([*self._waiting], np.int64).tobytes())


class TarOrder:
    """Tar and epoch of every entry."""

    def __init__(self, tars: int, seed: int):
        if not tars:
            raise UserError("data.train names no tar")
        self.tars, self.seed = tars, seed
        self._of_epoch = MethodCache(permutation, 4)

    def at(self, entry: int) -> tuple[int, int]:
        """Number of the tar of an entry, and the epoch."""
        epoch, place = divmod(entry, self.tars)
        return int(self._of_epoch(self.tars, self.seed, epoch, SHUFFLE_SHARDS)[place]), epoch


class StreamPlaces:
    """Where the streams of a run stand, by the batches that it has used."""

    def __init__(self, sets: int):
        self.places = [Place()] * sets
        self.lanes = 0
        self.resumed = False
        self.without_image: dict[int, int] = {}  # lane -> groups skipped since the start, of this process
        self.used: dict[int, list[LaneState]] = {}  # lane -> state of each data set, of this process

    def begin(self, lanes: int) -> list[Place]:
        """Deal what is left to `lanes` lanes."""
        self.lanes, self.used = lanes, {}
        return self.places

    def note(self, state: Mapping[str, Any]) -> None:
        """Note that a batch with this state has been used."""
        self.without_image[int(state["lane"])] = int(state["without_image"])
        self.used[int(state["lane"])] = [LaneState(*fields) for fields in state["sets"]]

    def now(self, used: Mapping[int, list[LaneState]]) -> list[Place]:
        """The places by the states of all lanes of all processes."""
        if not used:
            return self.places
        return [
            place.advanced(self.lanes, {lane: states[number] for lane, states in used.items()})
            for number, place in enumerate(self.places)
        ]

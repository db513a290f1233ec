"""What is left out of a source: counted by reason, listed in a file, and said in a warning where images may be lost."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from beit_pretrain.data import layout
from beit_pretrain.fileio import atomic_write

LEFT_OUT = "left_out.jsonl"
# Reasons that call for no warning: what they name is no image of the set, or was not asked for.
EXPECTED = frozenset((layout.BY_PRODUCT, layout.NO_IMAGE, layout.OTHER_PART))


class LeftOut:
    """Files left out, by folder (or tar) and reason, each with an example. Folders that are not entered count as 1."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], tuple[str, int]] = {}
        self.notes: dict[str, tuple[str, int]] = {}  # of what is read, but deserves a look

    def add(self, key: str, reason: str, files: int = 1, folder: str | None = None) -> None:
        """Count `files` files. `key`: path of the first; `folder`: what they are counted under.

        None = the folder of a file; a folder (it ends with a slash) by itself.
        """
        place = ((key if key.endswith("/") else key.rpartition("/")[0]) if folder is None else folder), reason
        example, count = self.found.get(place, (key, 0))
        self.found[place] = example, count + files

    def note(self, key: str, text: str, files: int = 1) -> None:
        """Count something that is read, and that `warn` mentions with the first `key`."""
        example, count = self.notes.get(text, (key, 0))
        self.notes[text] = example, count + files

    def update(self, other: LeftOut) -> None:
        for (folder, reason), (example, count) in other.found.items():
            self.add(example, reason, count, folder)
        for text, (example, count) in other.notes.items():
            self.note(example, text, count)

    def examples(self) -> list[tuple[str, str]]:
        """(first key, reason) of every folder and reason."""
        return [(example, reason) for (_, reason), (example, _) in self.found.items()]

    def counts(self) -> dict[str, int]:
        """Files by reason, the most frequent first."""
        counts = Counter[str]()
        for (_, reason), (_, files) in self.found.items():
            counts[reason] += files
        return dict(counts.most_common())

    def write(self, path: Path) -> None:
        """Write the list as JSON lines; removes an earlier one if nothing was left out."""
        lines = [
            json.dumps({"key": example, "reason": reason, "files": files}) + "\n"
            for example, reason, files in sorted((key, why, n) for (_, why), (key, n) in self.found.items())
        ]
        if lines:
            atomic_write(path, "".join(lines))
        else:
            path.unlink(missing_ok=True)

    @classmethod
    def read(cls, path: Path) -> LeftOut:
        """The list in a file that `write` made; empty if there is none."""
        listed = cls()
        for number, line in enumerate(path.read_text("utf-8").splitlines() if path.is_file() else ()):
            entry = json.loads(line)
            listed.add(entry["key"], entry["reason"], entry["files"], str(number))
        return listed

    def warn(self, listed_in: str = "") -> None:
        """Print a warning for each reason by which images may be lost, with an example."""
        for reason, files in self.counts().items():
            if reason not in EXPECTED:
                first = min(example for (_, why), (example, _) in self.found.items() if why == reason)
                more = f" and {files - 1:,} more" if files > 1 else ""
                where = f" ({listed_in})" if listed_in else ""
                print(f"warning: left out {first}{more}: {reason}{where}", file=sys.stderr)
        for text, (example, count) in self.notes.items():
            print(f"warning: {example}{f' and {count - 1:,} more' if count > 1 else ''}: {text}", file=sys.stderr)


def summary(counts: dict[str, int]) -> str:
    """The counts of a manifest in one line."""
    return "left out: " + "; ".join(f"{files:,} ({reason})" for reason, files in counts.items())

"""One shard: its candidates one by one (members.py), the tar, its index and a report on what came of it.

A sample is the run of members that share a key, its position in the permuted split: `000000017.jpg` (or another image
extension), `.cls` (class index as text, if labelled), `.json` ({"source": original path, ...}) and `.seg.png` (label
map, if there is one). Everything is written under temporary names; the report comes last and says that the shard is
finished. The bytes depend on the listing and the settings alone: a file that is no usable image is rejected, one that
cannot be read ends the work, since another time it could be.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from beit_pretrain.data.manifest import INDEX_DTYPE, index_path
from beit_pretrain.data.sources import Candidate
from beit_pretrain.data.write.file_index import opened_listing
from beit_pretrain.data.write.sample_encoder import Settings, sample_members
from beit_pretrain.errors import UserError, stop_if_memory_was_short
from beit_pretrain.fileio import atomic_path, atomic_write
from beit_pretrain.transforms.image_io import reason


class Job(NamedTuple):
    """One shard to write: number `shard` of the split `name` in the work folder."""

    work: Path
    name: str
    shard: int
    settings: Settings


def shard_path(work: Path, name: str, shard: int) -> Path:
    """Where a shard lies until the split is published."""
    return work / name / f"shard-{shard:06d}.tar"


def report_path(work: Path, name: str, shard: int) -> Path:
    """Where the report on a shard lies."""
    return work / f"reports-{name}" / f"{shard:06d}.json"


def order_path(work: Path, name: str) -> Path:
    """Rows of the listing in the order of the split, uint32."""
    return work / "listing" / f"order-{name}.npy"


def labels_path(work: Path) -> Path:
    """Class index of every row of the listing, int32."""
    return work / "listing" / "labels.npy"


def read_report(job: Job) -> dict[str, Any] | None:
    """The report on a finished shard: `entry` of the manifest (null = no sample), `rejected`, `segmentation`, and how
    many of its images have `deep_colours`.

    None if the shard is not finished.
    """
    try:
        report = json.loads(report_path(job.work, job.name, job.shard).read_bytes())
        path, entry = shard_path(job.work, job.name, job.shard), report["entry"]
        if entry is not None and (path.stat().st_size != entry["bytes"] or not index_path(path).is_file()):
            return None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return report


def write_shard(job: Job) -> int:
    """Write one shard and its report, and return how many files were taken up, rejected ones included.

    Raises OSError if the target cannot be written, UserError if a source cannot be read or memory is short; then
    nothing is left under a final name.
    """
    order = np.load(order_path(job.work, job.name), mmap_mode="r")
    first = job.shard * job.settings.samples_per_shard
    listed = order[first : first + job.settings.samples_per_shard]
    report = _write_tar(listed, first, job)
    # Unique names here and below: a killed run's orphan may still be writing.
    atomic_write(report_path(job.work, job.name, job.shard), json.dumps(report), durable=True, unique=True)
    return len(listed)


def _write_tar(listed: np.ndarray, first: int, job: Job) -> dict[str, Any]:
    """Write the tar, if it has samples, and its index; the report."""
    listing, labels = opened_listing(job.work / "listing"), np.load(labels_path(job.work), mmap_mode="r")
    candidates = [listing.candidate(int(row)) for row in listed]
    _read_ahead(candidates)
    rejected: list[dict[str, str]] = []
    rows: list[tuple[int, ...]] = []
    deep_colours = 0
    path, entry = shard_path(job.work, job.name, job.shard), None
    with atomic_path(path, durable=True, unique=True) as temporary:
        with temporary.open("wb") as file:
            out = _Hashed(file)
            # By tarfile, as WebDataset's own writer imports torch (seconds in every process); the layout is the same.
            with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
                for position, (row, candidate) in enumerate(zip(listed, candidates, strict=True), first):
                    label = int(labels[row])
                    try:
                        members = sample_members(candidate, label, job.settings)
                    except UserError:
                        raise  # no fault of the image
                    except Exception as error:  # Pillow's decoders raise nearly everything on broken files
                        stop_if_memory_was_short(error, f"{candidate.key} of {candidate.path}")
                        rejected.append({"key": candidate.key, "reason": reason(error)})
                        continue
                    deep_colours += "bits" in json.loads(members["json"])
                    rows.append(_add_sample(tar, f"{position:09d}", members, label))
        if rows:
            entry = {"name": path.name, "samples": len(rows), "bytes": out.size, "sha256": out.digest.hexdigest()}
            write_index(path, np.array(rows, INDEX_DTYPE))
    if not rows:
        path.unlink()
    found = {"segmentation": any(row[4] for row in rows), "deep_colours": deep_colours}
    return {"entry": entry, "rejected": rejected, **found}


def write_index(shard: Path, rows: np.ndarray) -> None:
    """Write the index of a shard: INDEX_DTYPE rows."""
    buffer = io.BytesIO()
    np.save(buffer, rows)
    atomic_write(index_path(shard), buffer.getvalue(), durable=True, unique=True)


class _Hashed:
    """A file for writing from front to back that knows its SHA-256 at the end."""

    def __init__(self, file: io.BufferedWriter):
        self.file, self.size, self.digest = file, 0, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.size


def _add_sample(tar: tarfile.TarFile, key: str, members: dict[str, bytes], label: int) -> tuple[int, ...]:
    """Append the members of a sample in the order of their extensions; its INDEX_DTYPE row."""
    image = mask = (0, 0)
    for extension in sorted(members):
        info = tarfile.TarInfo(f"{key}.{extension}")  # owner, mode and time are constants
        info.size = len(members[extension])
        place = tar.offset + tarfile.BLOCKSIZE, info.size
        tar.addfile(info, io.BytesIO(members[extension]))
        if extension == "seg.png":
            mask = place
        elif extension not in ("cls", "json"):
            image = place
    return (*image, label, *mask)


def _read_ahead(candidates: list[Candidate]) -> None:
    """Ask the system to read what a shard needs, in the order of the disk: the permutation scatters it everywhere."""
    if not hasattr(os, "posix_fadvise"):
        return
    for candidate in sorted(candidates, key=lambda c: (c.path, c.offset)):
        if candidate.path and candidate.size > 0 and candidate.kind == "file":
            with suppress(OSError):
                handle = os.open(candidate.path, os.O_RDONLY | os.O_NONBLOCK)
                try:
                    os.posix_fadvise(handle, candidate.offset, candidate.size, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(handle)

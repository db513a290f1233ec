"""Writes one shard: the samples of its candidates (sample_encoder.py) as a tar, the tar's index, and a report.

A sample is the run of members that share a key, its position in the permuted split: `000000017.jpg` (or another image
extension), `.cls` (class index as text, if labelled), `.json` ({"source": original path, ...}) and `.seg.png` (label
map, if there is one). Everything is written under temporary names; the report comes last and marks the shard as
finished. The bytes depend on the listing and the settings alone: a file that is no usable image is rejected, one that
cannot be read stops the run: the next time it may be readable.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from beit_pretrain.data.listing.file_index import UNLISTED, opened_listing
from beit_pretrain.data.manifest import index_path, shard_entry, write_index
from beit_pretrain.data.shard_index import INDEX_DTYPE
from beit_pretrain.data.sources import Candidate
from beit_pretrain.data.write.sample_encoder import sample_members
from beit_pretrain.data.write.settings import EncodeSettings
from beit_pretrain.errors import UserError, stop_if_memory_was_short
from beit_pretrain.fileio import atomic_path, atomic_write
from beit_pretrain.transforms.image_io import reason


class Job(NamedTuple):
    """One shard to write."""

    tar: Path
    report: Path
    first: int  # number of its first sample
    listing: Path  # folder of the listing
    rows: np.ndarray  # of the listing, in the order of the samples
    labels: np.ndarray  # class index of each, -1 = none, or UNLISTED
    settings: EncodeSettings


def read_report(tar: Path, report: Path) -> dict[str, Any] | None:
    """The report on a shard, None if it is not finished: `entry` of the manifest (None = no sample), `rejected`,
    whether it has masks (`segmentation`), how many images have `deep_colours`."""
    try:
        found = json.loads(report.read_bytes())
        entry = found["entry"]
        whole = entry is None or (tar.stat().st_size == entry["bytes"] and index_path(tar).is_file())
        return found if whole else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def write_shard(job: Job) -> int:
    """Write one shard and its report; returns the number of its files, rejected ones included.

    Raises OSError if the target cannot be written, UserError if a source cannot be read or memory is short; then
    nothing is left under a final name.
    """
    listing = opened_listing(job.listing)
    candidates = [listing.candidate(row) for row in job.rows.tolist()]
    _read_ahead(candidates)
    rejected: list[dict[str, str]] = []
    rows: list[tuple[int, ...]] = []
    entry, deep_colours = None, 0
    # Unique names here and below: a killed run's orphan may still be writing.
    with atomic_path(job.tar, durable=True, unique=True) as temporary:
        # By tarfile, as WebDataset's own writer imports torch (seconds in every process); the layout is the same.
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for position, (candidate, label) in enumerate(zip(candidates, job.labels.tolist(), strict=True), job.first):
                if label == UNLISTED:
                    rejected.append({"key": candidate.key, "reason": "labels= does not name it"})
                    continue
                try:
                    members = sample_members(candidate, label, job.settings)
                except UserError:
                    raise  # no fault of the image
                except Exception as error:  # Pillow's decoders raise nearly everything on broken files
                    stop_if_memory_was_short(error, f"{candidate.key} of {candidate.path}")
                    rejected.append({"key": candidate.key, "reason": reason(error)})
                else:
                    deep_colours += "bits" in json.loads(members["json"])
                    rows.append(_add_sample(tar, f"{position:09d}", members, label))
        if rows:
            entry = shard_entry(temporary, len(rows)) | {"name": job.tar.name}
            write_index(job.tar, np.array(rows, INDEX_DTYPE))
    if not rows:
        job.tar.unlink()
    masks = any(row[4] for row in rows)
    report = {"entry": entry, "rejected": rejected, "segmentation": masks, "deep_colours": deep_colours}
    atomic_write(job.report, json.dumps(report), durable=True, unique=True)
    return len(candidates)


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
    """Ask the system to read the files of a shard, in the order of the disk: the permutation scatters them."""
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

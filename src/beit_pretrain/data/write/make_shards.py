"""`shards make`: images of any source -> WebDataset tars with an index for random access (layout: manifest.py).

Everything is listed first (file_index.py). The order is a seeded permutation of the whole split, so every shard is a
fair mix of the classes, and each shard is written on its own (shard_writer.py). The same command resumes a killed make
(staging.py) and ends with the same bytes, whatever the number of workers.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from tqdm import tqdm

from beit_pretrain.data.left_out import LEFT_OUT, LeftOut
from beit_pretrain.data.listing import synthetic
from beit_pretrain.data.listing.file_index import Listing, build_listing, opened_listing, shuffled_rows
from beit_pretrain.data.listing.labels import segmentation_names
from beit_pretrain.data.listing.metadata_file import with_metadata
from beit_pretrain.data.listing.settings import ClassSettings, LabelSettings
from beit_pretrain.data.manifest import MANIFEST, REJECTED, index_path, read_manifest, write_manifest
from beit_pretrain.data.sources import Choice
from beit_pretrain.data.write import argument_checks as checks
from beit_pretrain.data.write import staging
from beit_pretrain.data.write.settings import EncodeSettings
from beit_pretrain.data.write.shard_writer import Job, read_report, write_shard
from beit_pretrain.errors import UserError
from beit_pretrain.fileio import atomic_write, expand_home
from beit_pretrain.processes import cores, in_order

FORMAT = 3  # of the work folder
MUCH = 0.01  # share of rejected files above which a warning is printed


def make_shards(
    src: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    split: str = "train",
    labels: str | Path | Mapping[str, Any] | LabelSettings | None = None,
    num_workers: int | None = None,
    **settings: Any,
) -> list[Path]:
    """Write `out/split/`, or with `val` > 0 `out/train/` and `out/val/`, and return the folders.

    `src`: "synthetic", a folder (of class folders, tars, or images), a tar, or a list of folders and tars; the class is
    the name of the folder (or inner tar, or tar of a list of tars) that holds the image. `split`: name of the folder,
    and the part of a source that has parts. `labels`: a file (labels.py), or the settings of
    `LabelSettings`. `num_workers`: None = all cores. `settings`: those of
    `EncodeSettings`.

    A half-done run of the same call in `out` is resumed; a finished one is left as it is.
    Raises UserError for a bad argument, source or target, a source that cannot be read or changes meanwhile, too little
    memory, or if no image can be decoded.
    """
    chosen = EncodeSettings.validated(settings)
    listed = ClassSettings.validated({"labels": labels}).labels
    # Absolute paths, so that a run can be resumed from another folder.
    given = [src] if isinstance(src, str | Path) else list(src)
    checks.check_local(given)
    sources = [str(g) if g == "synthetic" else str(expand_home(g).absolute()) for g in given]
    out, names = expand_home(out), ["train", "val"] if chosen.val > 0 else [split]
    choice = Choice(split, tuple(chosen.image_key or ()), chosen.label_key)
    checks.check_arguments(sources, split, num_workers, chosen)
    checks.check_sources(sources, out)
    listed = with_metadata(sources, split, listed)
    checks.check_labels(listed)
    num_workers = num_workers or cores()
    opened_listing.cache_clear()  # this process may have made others in the same folder
    with staging.work_folder(out) as work:
        now = _plan(sources, split, listed, chosen)
        if before := staging.read_plan(work):
            staging.check_same(work, before["settings"], now)
        # A split that was published already is the half-done run's own.
        missing = [n for n in names if not before or (work / n).exists() or not (out / n / MANIFEST).is_file()]
        finished = checks.check_targets(out, missing, chosen, sources, half_done=before is not None)
        if missing:
            if before:
                checks.check_unchanged(work, sources, choice, chosen.images)
                about = before["about"]
            else:
                (work / "listing").mkdir()
                build_listing(work / "listing", sources, choice, chosen.images, listed, num_workers)
            listing = Listing(work / "listing")
            if not before:
                classes = _class_names(listing, sources, out, split)
                about = {"classes": classes, "listing_sha256": listing.digest()}
            made = checks.provenance(sources, chosen)
            if listed.path is not None:
                made["settings"]["labels"] = _labels_file(listed)
            if finished:
                checks.check_same_listing(out, names, about)
                return [out / name for name in names]
            class_index = listing.labels(about["classes"])
            rows = _split_rows(class_index, names, chosen.val, chosen.seed)
            # From now on the run can be resumed.
            atomic_write(work / "plan.json", json.dumps({"settings": now, "about": about}), durable=True)
            for name in missing:
                _write_split(work, name, rows[name], class_index, chosen, num_workers)
                _describe(work, name, len(rows[name]), sources, chosen, made | about)
            # Files of a source that disappeared meanwhile must not count as broken images.
            checks.check_unchanged(work, sources, choice, chosen.images)
            for name in missing:
                staging.publish(work, name, out)
        staging.close(work)
    return [out / name for name in names]


def _plan(sources: list[str], split: str, labels: LabelSettings, settings: EncodeSettings) -> dict[str, Any]:
    """Everything in which a run must agree with a half-done one to resume it. Raises OSError for unreadable labels."""
    plan: dict[str, Any] = {"src": sources, "split": split, "labels": None, "format": FORMAT, "Pillow": PIL.__version__}
    if labels.path is not None:
        file = expand_home(labels.path)
        plan["labels"] = f"{file.absolute()}"
        if file.is_file():
            plan["labels"] += f" (SHA-256 {_checksum(file)})"
    # Only what differs from the defaults: runs of earlier versions can be resumed.
    usual = LabelSettings()
    plan |= {f"labels.{name}": v for name, v in labels if name != "path" and v != getattr(usual, name)}
    return {**plan, **settings.model_dump()}


def _labels_file(labels: LabelSettings) -> dict[str, Any]:
    """The settings of the labels for the manifest: the file's name alone, as paths differ between machines."""
    assert labels.path is not None
    file = expand_home(labels.path)
    checksum = {"sha256": _checksum(file)} if file.is_file() else {}
    return {**labels.model_dump(), "path": file.name, **checksum}


def _checksum(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def _class_names(listing: Listing, sources: list[str], out: Path, split: str) -> list[str]:
    """Sorted names; for a split beside an existing `train`, its names, so that labels agree. Raises UserError."""
    if sources == ["synthetic"]:
        return list(synthetic.TEXTURES)  # all, however few the images: the masks' values rest on them
    names = sorted(listing.classes)
    if split == "train" or not names or not (out / "train" / MANIFEST).exists():
        return names
    known: list[str] = read_manifest(out / "train")["classes"]
    if unknown := sorted(set(names).difference(known)):
        raise UserError(f"class {unknown[0]!r} of {split} is not among the {len(known)} classes of {out / 'train'}")
    return known


def _validation_part(labels: np.ndarray, val: float) -> np.ndarray:
    """Mark the first share `val` of each class: at least one image, never all. Raises UserError if none can be.

    Images without a class (-1) or alone in theirs are pooled as one class, of which none need be marked if others are.
    """
    chosen = np.zeros(len(labels), bool)
    if val == 0:
        return chosen
    _, inverse, count = np.unique(labels, return_inverse=True, return_counts=True)
    labels = np.where(count[inverse] > 1, labels, -1)
    by_class = np.argsort(labels, kind="stable")
    names, start, count = np.unique(labels[by_class], return_index=True, return_counts=True)
    least = (names >= 0) | (len(names) == 1)
    quota = np.minimum(np.maximum(np.rint(count * val), least), count - 1)
    chosen[by_class] = np.arange(len(labels)) - np.repeat(start, count) < np.repeat(quota, count)
    if not chosen.any():
        raise UserError(f"val={val} leaves nothing to validate on: there is only one image")
    return chosen


def _split_rows(labels: np.ndarray, names: list[str], val: float, seed: int) -> dict[str, np.ndarray]:
    """Rows of the listing, whose class indices are `labels`, in the order of each split. Raises UserError."""
    order = shuffled_rows(len(labels), seed)
    in_val = _validation_part(labels[order], val)
    return {name: order[in_val == (val > 0 and name == "val")] for name in names}


def _shard(work: Path, name: str, number: int) -> tuple[Path, Path]:
    """The tar of a shard, until its split is published, and the report on it."""
    return work / name / f"shard-{number:06d}.tar", work / f"reports-{name}" / f"{number:06d}.json"


def _write_split(
    work: Path, name: str, rows: np.ndarray, class_index: np.ndarray, settings: EncodeSettings, num_workers: int
) -> None:
    """Write the shards of a split that are not finished. Raises UserError or OSError."""
    for folder in (name, f"reports-{name}"):
        (work / folder).mkdir(exist_ok=True)
    step, total = settings.samples_per_shard, len(rows)
    firsts = range(0, total, step)
    missing = [first for first in firsts if read_report(*_shard(work, name, first // step)) is None]

    def job(first: int) -> Job:
        some = rows[first : first + step]
        return Job(*_shard(work, name, first // step), first, work / "listing", some, class_index[some], settings)

    done = min(total, (len(firsts) - len(missing)) * step)
    with (
        tqdm(total=total, initial=done, unit=" images", desc=name) as bar,
        in_order(min(num_workers, len(missing))) as run,
    ):
        for count in run(write_shard, map(job, missing)):
            bar.update(min(count, total - bar.n))


def _describe(
    work: Path, name: str, files: int, sources: list[str], settings: EncodeSettings, about: dict[str, Any]
) -> None:
    """Write rejected.jsonl and the manifest of a finished split. Raises UserError if none of its files is an image."""
    reports = []
    for number in range(-(-files // settings.samples_per_shard)):
        found = read_report(*_shard(work, name, number))
        assert found is not None
        reports.append(found)
    rejected = [refused for report in reports for refused in report["rejected"]]
    entries = [report["entry"] for report in reports if report["entry"] is not None]
    if not entries:
        (work / "plan.json").unlink(missing_ok=True)  # there is nothing to resume
        said = f"({rejected[0]['key']!r}: {rejected[0]['reason']})"
        raise UserError(f"none of the {len(rejected)} files for {name} is a usable image {said}")
    if len(rejected) > MUCH * files:  # usually a mistake
        most, times = Counter(refused["reason"] for refused in rejected).most_common(1)[0]
        why = most + ", and others" * (times < len(rejected))
        said = f"{len(rejected):,} of {files:,} files for {name} are no usable images ({why}); see its {REJECTED}"
        print(f"warning: {said}", file=sys.stderr)
    folder, segmentation = work / name, any(report["segmentation"] for report in reports)
    (folder / REJECTED).write_text("".join(json.dumps(refused) + "\n" for refused in rejected), "utf-8")
    left_out = LeftOut.read(work / "listing" / LEFT_OUT)
    left_out.write(folder / LEFT_OUT)
    write_manifest(
        folder,
        entries,
        np.concatenate([np.load(index_path(folder / entry["name"]))["label"] for entry in entries]),
        segmentation=segmentation,
        segmentation_classes=_segmentation_classes(sources) if segmentation else [],
        deep_colours=sum(report["deep_colours"] for report in reports),
        left_out=left_out.counts(),
        **about,
    )


def _segmentation_classes(sources: list[str]) -> list[str]:
    """Names of the values 1, 2, ... of the label maps, as far as they are known."""
    if sources == ["synthetic"]:
        return list(synthetic.TEXTURES)
    return next((names for source in sources if (names := segmentation_names(Path(source)))), [])

"""Make shards: images of any source -> WebDataset tars with an index for random access (manifest.py has the layout).

Everything is listed first (listing.py); the order is a seeded permutation of the whole split, so every shard is a fair
mix of the classes; each shard is then written by itself (packing.py). Killed at any moment and started again, a make
goes on (workfolder.py) and ends with the same bytes, whatever the number of workers.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from tqdm import tqdm

from beit_pretrain import fileio
from beit_pretrain.data.manifest import REJECTED, index_path, write_manifest
from beit_pretrain.data.write import synthetic
from beit_pretrain.data.write.argument_checks import (
    check_arguments,
    check_same_listing,
    check_sources,
    check_targets,
    check_unchanged,
    chosen,
    source_name,
)
from beit_pretrain.data.write.file_index import Listing, build_listing, opened_listing
from beit_pretrain.data.write.labels import segmentation_names
from beit_pretrain.data.write.sample_encoder import Settings
from beit_pretrain.data.write.shard_writer import (
    Job,
    labels_path,
    order_path,
    read_report,
    shard_path,
    write_shard,
)
from beit_pretrain.data.write.splitting import class_names, permutation, validation_part
from beit_pretrain.data.write.staging import (
    check_same,
    close,
    is_published,
    publish,
    read_plan,
    work_folder,
    write_plan,
)
from beit_pretrain.errors import UserError
from beit_pretrain.processes import cores, in_order
from beit_pretrain.transforms.image_io import MAX_PIXELS

FORMAT = 1  # of plan.json
MUCH = 0.01  # share of files that are no usable images of which a warning tells


def make_shards(
    src: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    val: float = 0.0,
    split: str = "train",
    labels: str | Path | None = None,
    samples_per_shard: int = 1000,
    seed: int = 0,
    resize: int | None = None,
    quality: int = 92,
    window: Sequence[float] | None = None,
    percentiles: Sequence[float] = (0.5, 99.5),
    num_workers: int | None = None,
    images: int = 10000,
    size: int = 96,
    max_pixels: int = MAX_PIXELS,
) -> list[Path]:
    """Write `out/split/`, or with `val` > 0 `out/train/` and `out/val/`, and return the folders.

    `src`: "synthetic" (`images` images, `size` pixels a side), a folder (of class folders, tars, or images), a tar, or
    a list of folders and tars; the class is the name of the folder (or inner tar, or tar of a list of tars) that holds
    the image. `split`: name of the folder, and the part of a source that has parts. `val`: the fraction of every class
    set apart, counted before decoding; images without a class, or alone in theirs, count as one class. `labels`: see
    labels.py. `resize`: images whose shorter side has more pixels are shrunk to it and stored as JPEG of `quality`,
    without EXIF, or as PNG if they are not opaque or too long for a JPEG; others keep their bytes. `window`,
    `percentiles`: grey values that become 0 and 255; percentiles are for images of more than 8 bits, a window is for
    every grey image, of grey palettes and with alpha too. `workers`: None = all cores.

    A half-done run of the same call in `out` is gone on with; a finished one is left as it is.
    Raises UserError for a bad argument, source or target, a source that cannot be read or changes meanwhile, too little
    memory, or if no image can be decoded.
    """
    low_high = None if window is None else [float(v) for v in window]
    grey = ([float(v) for v in percentiles], max_pixels, images, size)
    settings = Settings(samples_per_shard, seed, val, resize, quality, low_high, *grey)
    sources = _resolved(src)
    out, names = Path(out).expanduser(), ["train", "val"] if val > 0 else [split]
    check_arguments(sources, split, num_workers, settings)
    check_sources(sources, out)
    num_workers = num_workers or cores()
    opened_listing.cache_clear()  # this process may have made others in the same folder
    with work_folder(out) as work:
        plan = _settings_plan(sources, split, labels, settings)
        if before := read_plan(work):
            check_same(work, before["settings"], plan)
        missing = [name for name in names if not (before and is_published(work, name, out))]
        finished = check_targets(out, missing, settings, sources, half_done=before is not None)
        if before is None:
            _prepare(work, out, names, sources, None if labels is None else str(labels), settings, num_workers)
            if finished:
                check_same_listing(out, names, _about(work))
                return [out / name for name in names]
            write_plan(work, {"settings": plan})
        elif missing:
            check_unchanged(work, sources, split, images)
        for name in missing:
            _write_split(work, name, settings, num_workers)
            _describe(work, name, sources, settings)
        if missing:  # a source that went away meanwhile must not pass for one of broken images
            check_unchanged(work, sources, split, images)
        for name in missing:
            publish(work, name, out)
        close(work)
    return [out / name for name in names]


def _resolved(src: str | Path | Sequence[str | Path]) -> list[str]:
    """The sources as absolute paths, so that a run may be gone on with from another folder."""
    given = [src] if isinstance(src, str | Path) else list(src)
    return [str(s) if s == "synthetic" else str(Path(s).expanduser().absolute()) for s in given]


def _settings_plan(sources: list[str], split: str, labels: str | Path | None, settings: Settings) -> dict[str, Any]:
    """What a half-done run must agree in to be gone on with. Raises UserError for labels that cannot be read."""
    plan: dict[str, Any] = {"src": sources, "split": split, "labels": None, "format": FORMAT, "Pillow": PIL.__version__}
    if labels is not None:
        file = Path(labels).expanduser()
        plan["labels"] = f"{file.absolute()}"
        if file.is_file():
            with open(file, "rb") as opened:
                plan["labels"] += f" (SHA-256 {hashlib.file_digest(opened, 'sha256').hexdigest()[:16]})"
    return {**plan, **settings._asdict()}


def _prepare(
    work: Path,
    out: Path,
    names: list[str],
    sources: list[str],
    labels: str | None,
    settings: Settings,
    num_workers: int,
) -> None:
    """List the sources, number the classes and draw the order of every split. Raises UserError."""
    for folder in ("listing", *names, *(f"reports-{name}" for name in names)):
        (work / folder).mkdir()
    build_listing(work / "listing", sources, names[0], settings.images, labels, num_workers)
    listing = Listing(work / "listing")
    classes = class_names(listing, sources, out, names[0])
    label = listing.labels(classes)
    np.save(labels_path(work), label)
    order = permutation(len(listing), settings.seed)
    in_val = validation_part(label[order], settings.val)
    for name in names:
        np.save(order_path(work, name), order[in_val == (settings.val > 0 and name == "val")].astype(np.uint32))
    about = {"classes": classes, "listing_sha256": listing.digest()}
    (work / "listing" / "about.json").write_text(json.dumps(about), "utf-8")


def _jobs(work: Path, name: str, settings: Settings) -> list[Job]:
    samples = len(np.load(order_path(work, name), mmap_mode="r"))
    return [Job(work, name, shard, settings) for shard in range(-(-samples // settings.samples_per_shard))]


def _write_split(work: Path, name: str, settings: Settings, num_workers: int) -> None:
    """Write the shards of a split that are not finished. Raises UserError or OSError."""
    jobs = _jobs(work, name, settings)
    missing = [job for job in jobs if read_report(job) is None]
    total = len(np.load(order_path(work, name), mmap_mode="r"))
    done = min(total, (len(jobs) - len(missing)) * settings.samples_per_shard)
    with (
        tqdm(total=total, initial=done, unit=" images", desc=name) as bar,
        in_order(min(num_workers, len(missing))) as run,
    ):
        for count in run(write_shard, missing):
            bar.update(min(count, total - bar.n))


def _about(work: Path) -> dict[str, Any]:
    about: dict[str, Any] = json.loads((work / "listing" / "about.json").read_text("utf-8"))
    return about


def _describe(work: Path, name: str, sources: list[str], settings: Settings) -> None:
    """Write rejected.jsonl and the manifest of a finished split. Raises UserError if it holds no image."""
    folder, entries, labels = work / name, [], [np.zeros(0, np.int64)]
    reasons: Counter[str] = Counter()
    first, segmentation, deep_colours = None, False, 0
    jobs = _jobs(work, name, settings)
    with open(folder / REJECTED, "w", encoding="utf-8") as rejected:
        for job in jobs:
            report = read_report(job)
            assert report is not None
            reasons.update(refused["reason"] for refused in report["rejected"])
            first = first or next(iter(report["rejected"]), None)
            rejected.writelines(json.dumps(refused) + "\n" for refused in report["rejected"])
            if report["entry"] is not None:
                entries.append(report["entry"])
                labels.append(np.load(index_path(shard_path(work, name, job.shard)))["label"])
                segmentation |= report["segmentation"]
                deep_colours += report.get("deep_colours", 0)
    if not entries:
        fileio.discard(work / "plan.json")  # there is nothing to go on with
        assert first is not None
        raise UserError(
            f"none of the {reasons.total()} files for {name} is a usable image ({first['key']!r}: {first['reason']})"
        )
    _warn_of_many(reasons, len(np.load(order_path(work, name), mmap_mode="r")), name)
    about = _about(work)
    write_manifest(
        folder,
        entries,
        np.concatenate(labels),
        about["classes"],
        segmentation=segmentation,
        seed=settings.seed,
        source=source_name(sources),
        settings=chosen(sources, settings),
        segmentation_classes=_segmentation_classes(sources) if segmentation else [],
        listing_sha256=about["listing_sha256"],
        deep_colours=deep_colours,
    )


def _warn_of_many(reasons: Counter[str], files: int, name: str) -> None:
    """Say so if much is rejected: as a rule that is not what was meant."""
    if reasons.total() > MUCH * files:
        most, times = reasons.most_common(1)[0]
        others = ", and others" if times < reasons.total() else ""
        said = f"{reasons.total():,} of {files:,} files for {name} are no usable images ({most}{others})"
        print(f"warning: {said}; see its {REJECTED}", file=sys.stderr)


def _segmentation_classes(sources: list[str]) -> list[str]:
    """Names of the values 1, 2, ... of the label maps, as far as they are known."""
    if sources == ["synthetic"]:
        return list(synthetic.TEXTURES)
    return next((names for source in sources if (names := segmentation_names(Path(source)))), [])

"""Write image collections as WebDataset shards with an index for random access (manifest.py has the layout).

A sample is the run of members that share a key, its position in the permuted split: `000000017.jpg` (or another image
extension), `.cls` (class index as text, if labelled), `.json` ({"source": original path, ...}) and `.seg.png` (the
synthetic set only). The order is a seeded permutation of the whole split, so every shard is a fair mix of the classes.
The same source and seed give the same bytes whatever the number of workers.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from beit_pretrain import synthetic
from beit_pretrain.errors import UserError
from beit_pretrain.images import EXTENSIONS, MAX_PIXELS, opened, reason, to_rgb
from beit_pretrain.manifest import (
    MANIFEST,
    REJECTED,
    index_path,
    index_shard,
    read_manifest,
    shard_entry,
    write_manifest,
)
from beit_pretrain.sources import Candidate, list_candidates, read_candidate


@dataclass(frozen=True)
class _Settings:
    """What determines the bytes of the shards, apart from the source."""

    samples_per_shard: int
    seed: int
    val: float
    resize: int | None
    quality: int
    max_pixels: int
    images: int
    size: int


class _Job(NamedTuple):
    """One shard to write: candidates and their class indices, the first at position `first` of the split."""

    path: Path
    first: int
    samples: list[tuple[Candidate, int]]
    settings: _Settings


class _Report(NamedTuple):
    """What came of a job: the manifest's entry, one label per sample, whether there are masks, and what was refused."""

    entry: dict[str, Any]
    labels: np.ndarray
    segmentation: bool
    rejected: list[dict[str, str]]


def make_shards(
    src: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    val: float = 0.0,
    split: str = "train",
    samples_per_shard: int = 1000,
    seed: int = 0,
    resize: int | None = None,
    quality: int = 92,
    workers: int | None = None,
    images: int = 10000,
    size: int = 96,
    max_pixels: int = MAX_PIXELS,
) -> list[Path]:
    """Write `out/split/`, or with `val` > 0 `out/train/` and `out/val/`, and return the folders written.

    `src`: "synthetic" (`images` images, `size` pixels a side), a folder (of class folders, tars, or images), a tar, or
    a list of folders and tars; the class is the name of the folder (or inner tar) that holds the image. `val`: the
    fraction of every class set apart, counted before decoding; images without a class, or alone in theirs, count as one
    class. `resize`: images whose shorter side has more pixels are shrunk to it and stored as JPEG of `quality`, without
    EXIF; others keep their bytes. `workers`: None = all cores.

    Raises UserError, and leaves nothing behind, for a bad argument, source or target, or if no image can be decoded.
    """
    settings = _Settings(samples_per_shard, seed, val, resize, quality, max_pixels, images, size)
    sources = [src] if isinstance(src, str | Path) else list(src)
    out, names = Path(out).expanduser(), ["train", "val"] if val > 0 else [split]
    _check_arguments(sources, split, workers, settings)
    _check_target(sources, out, names)
    candidates = list_candidates(sources, images)
    classes = _class_names(candidates, sources, out, split)
    number = {None: -1} | {name: index for index, name in enumerate(classes)}
    labels = np.array([number[c.class_name] for c in candidates])
    order = _permutation(len(candidates), seed)
    in_val = _validation_part(labels[order], val)
    with _published(out, names) as folders:
        for name, folder in zip(names, folders, strict=True):
            samples = [(candidates[i], int(labels[i])) for i in order[in_val == (val > 0 and name == "val")]]
            _describe(folder, _write_split(samples, folder, settings, workers, name), classes, sources, settings)
    return [out / name for name in names]


def _check_arguments(sources: list[str | Path], split: str, workers: int | None, settings: _Settings) -> None:
    """Raise UserError for a value that cannot be right."""
    s = settings
    drawn = "synthetic" in sources
    wrong = {
        f"val must be at least 0 and below 1, got {s.val}": not 0 <= s.val < 1,
        "val above 0 writes train and val; leave split= out": s.val > 0 and split != "train",
        f"split must be a plain folder name, got {split!r}": Path(split).name != split or split.startswith("."),
        f"samples_per_shard must be 1 or more, got {s.samples_per_shard}": s.samples_per_shard < 1,
        f"seed must be at least 0 and below 2^63, got {s.seed}": not 0 <= s.seed < 2**63,
        f"resize must be 1 pixel or more, or null, got {s.resize}": s.resize is not None and s.resize < 1,
        f"quality must be 1 to 100, got {s.quality}": not 1 <= s.quality <= 100,
        f"max_pixels must be 1 or more, got {s.max_pixels}": s.max_pixels < 1,
        f"workers must be 1 or more, got {workers}": workers is not None and workers < 1,
        f"images must be 1 or more, got {s.images}": drawn and s.images < 1,
        f"size must be 16 pixels or more, got {s.size}": drawn and s.size < 16,
        "src is empty; give a folder, a tar, a list of these, or synthetic": not sources,
        "the synthetic set cannot be mixed with other sources": drawn and len(sources) > 1,
        "the synthetic set is drawn at size=; leave resize= out": drawn and s.resize is not None,
    }
    for message, holds in wrong.items():
        if holds:
            raise UserError(message)


def _check_target(sources: list[str | Path], out: Path, names: list[str]) -> None:
    """Raise UserError for a target that holds something, and for sources that would be read twice."""
    for target in (out / name for name in names):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target} exists and is not empty; choose another out=, or delete it first")
    folders = [Path(source).expanduser().resolve() for source in sources if source != "synthetic"]
    if len(set(folders)) < len(folders):
        raise UserError("src names a source twice; its images would count twice")
    for folder in folders:
        if folder.is_dir() and out.resolve().is_relative_to(folder):  # the next run would take the shards for sources
            raise UserError(f"out={out} lies inside src={folder}; choose an out= elsewhere")


def _class_names(candidates: list[Candidate], sources: list[str | Path], out: Path, split: str) -> list[str]:
    """Sorted names; for a split added beside `train`, those of `train`, so that labels agree. Raises UserError."""
    names = {c.class_name for c in candidates if c.class_name is not None}
    if sources == ["synthetic"]:
        return list(synthetic.TEXTURES)  # all of them, however few the images: the masks' values rest on them
    if split == "train" or not names or not (out / "train" / MANIFEST).exists():
        return sorted(names)
    known: list[str] = read_manifest(out / "train")["classes"]
    if unknown := sorted(names.difference(known)):
        raise UserError(f"class {unknown[0]!r} of {split} is not among the {len(known)} classes of {out / 'train'}")
    return known


def _permutation(count: int, seed: int) -> np.ndarray:
    """A seeded order of 0 ... count - 1."""
    # By sorting raw draws: numpy promises these for ever, but not what Generator.permutation makes of them.
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def _validation_part(labels: np.ndarray, val: float) -> np.ndarray:
    """Mark the first `val` of each class, one image or more, but never a class's last. Raises UserError if none is.

    Images without a class (-1) or alone in theirs are pooled as if of one class, which need not give any if others do.
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


@contextmanager
def _published(out: Path, names: list[str]) -> Iterator[list[Path]]:
    """Lend a hidden folder per name and rename all when the block ends; if it fails, remove every trace."""
    partial = [out / f".{name}.partial" for name in names]
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        for folder in partial:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        yield partial
        for folder, name in zip(partial, names, strict=True):
            with suppress(FileNotFoundError):
                (out / name).rmdir()  # an empty one
            folder.rename(out / name)
    except OSError as error:
        raise UserError(f"cannot write shards to {out}: {error.strerror or error}") from None
    finally:
        for folder in partial:
            shutil.rmtree(folder, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # not empty, as all went well
                folder.rmdir()


def _write_split(
    samples: list[tuple[Candidate, int]], folder: Path, settings: _Settings, workers: int | None, name: str
) -> list[_Report]:
    """Write a split's shards and rejected.jsonl, and report on the shards in order. Raises UserError."""
    step = settings.samples_per_shard
    jobs = [
        _Job(folder / f"shard-{first // step:06d}.tar", first, samples[first : first + step], settings)
        for first in range(0, len(samples), step)
    ]
    reports: list[_Report] = []
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(samples), unit=" images", desc=name))
        run: Callable[..., Iterator[_Report]] = map
        if (workers := min(workers or os.cpu_count() or 1, len(jobs))) > 1:
            spawn = multiprocessing.get_context("spawn")
            run = stack.enter_context(ProcessPoolExecutor(workers, mp_context=spawn)).map
        try:
            for job, report in zip(jobs, run(_write_shard, jobs), strict=True):
                reports.append(report)
                bar.update(len(job.samples))
        except BrokenProcessPool:
            raise UserError("a worker process died, as a rule for want of memory; set fewer workers=") from None
    rejected = [refused for report in reports for refused in report.rejected]
    if len(rejected) == len(samples):
        why = f"{rejected[0]['key']!r}: {rejected[0]['reason']}"
        raise UserError(f"none of the {len(samples)} files for {name} is a usable image ({why})")
    (folder / REJECTED).write_text("".join(json.dumps(refused) + "\n" for refused in rejected), "utf-8")
    return [report for report in reports if report.labels.size]


def _write_shard(job: _Job) -> _Report:
    """Write one tar and its index, or neither if it holds no sample. Raises OSError if the target cannot be written."""
    rejected: list[dict[str, str]] = []
    # By tarfile, as WebDataset's own writer imports torch (seconds in every process); the layout is the same.
    with tarfile.open(job.path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for position, (candidate, label) in enumerate(job.samples, job.first):
            try:
                members = _members(candidate, label, job.settings)
            except Exception as error:  # Pillow's decoders raise nearly everything on broken files
                rejected.append({"key": candidate.key, "reason": reason(error)})
                continue
            for extension in sorted(members):
                info = tarfile.TarInfo(f"{position:09d}.{extension}")  # owner, mode and time are constants
                info.size = len(members[extension])
                tar.addfile(info, io.BytesIO(members[extension]))
    if len(rejected) == len(job.samples):
        job.path.unlink()
        return _Report({}, np.zeros(0, np.int64), False, rejected)
    index = index_shard(job.path)
    np.save(index_path(job.path), index)
    entry = shard_entry(job.path, len(index))
    return _Report(entry, index["label"].copy(), bool(index["segmentation_size"].any()), rejected)


def _members(candidate: Candidate, label: int, settings: _Settings) -> dict[str, bytes]:
    """The members of a sample by extension. Raises whatever Pillow raises for a file that is not a usable image."""
    about = {"source": candidate.key}
    if candidate.path:
        extension, data = _image(candidate, settings)
        members = {extension: data}
    else:
        drawn = synthetic.draw(candidate.offset, settings.seed, settings.size)
        members = {"jpg": drawn.jpeg(settings.quality), "seg.png": drawn.segmentation_png()}
        about |= {"shape": drawn.shape, "background": drawn.background}
    if label >= 0:
        members["cls"] = str(label).encode()
    return members | {"json": json.dumps(about).encode()}


def _image(candidate: Candidate, settings: _Settings) -> tuple[str, bytes]:
    """Extension and bytes to store for a file, once it has been decoded in full."""
    data = read_candidate(candidate, settings.max_pixels)
    with opened(data, settings.max_pixels) as image:
        rgb = to_rgb(image)  # needed even if the bytes are kept: the reader will do the same
        shorter = min(image.size)
        if settings.resize is None or shorter <= settings.resize:
            return EXTENSIONS[image.format or ""], data
    width, height = (round(side * settings.resize / shorter) for side in rgb.size)
    buffer = io.BytesIO()
    smaller = rgb.resize((width, height), Image.Resampling.LANCZOS)
    smaller.save(buffer, "JPEG", quality=settings.quality, restart_marker_rows=1)  # jpeg_rows.py cuts there
    return "jpg", buffer.getvalue()


def _describe(
    folder: Path, reports: list[_Report], classes: list[str], sources: list[str | Path], settings: _Settings
) -> None:
    """Write the manifest. Of the sources only the names are told: paths would differ from machine to machine."""
    chosen = asdict(settings)
    del chosen["seed"]
    if sources != ["synthetic"]:
        del chosen["images"], chosen["size"]
    write_manifest(
        folder,
        [report.entry for report in reports],
        np.concatenate([report.labels for report in reports]),
        classes,
        segmentation=any(report.segmentation for report in reports),
        seed=settings.seed,
        source=", ".join(Path(source).expanduser().resolve().name for source in sources),
        settings=chosen,
    )

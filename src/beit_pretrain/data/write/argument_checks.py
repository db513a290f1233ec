"""What `shards make` refuses: settings that do not go together, a source named twice or changed, targets in use."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from beit_pretrain.data.listing.file_index import Listing, source_units
from beit_pretrain.data.listing.settings import LabelSettings
from beit_pretrain.data.manifest import MANIFEST, read_manifest
from beit_pretrain.data.sources import Choice, distinct_names
from beit_pretrain.data.storage import is_remote, without_secrets
from beit_pretrain.data.write.settings import EncodeSettings
from beit_pretrain.data.write.staging import difference, show
from beit_pretrain.errors import UserError

OTHER_OUT = "choose another out=, or delete it first"


def check_arguments(sources: list[str], split: str, num_workers: int | None, settings: EncodeSettings) -> None:
    drawn = "synthetic" in sources
    named = split and Path(split).name == split and not split.startswith(".")
    wrong = {
        "val above 0 writes train and val; leave split= out": settings.val > 0 and split != "train",
        f"split must be a plain folder name, got {show(split)}": not named,
        f"num_workers must be 1 or more, got {num_workers}": num_workers is not None and num_workers < 1,
        "src is empty; give a folder, a tar, a list of these, or synthetic": not sources,
        "the synthetic set cannot be mixed with other sources": drawn and len(sources) > 1,
        "the synthetic set is drawn at size=; leave resize= out": drawn and settings.resize is not None,
    }
    for message, holds in wrong.items():
        if holds:
            raise UserError(message)


def check_local(sources: Sequence[str | Path]) -> None:
    """Raise UserError for a source on another machine."""
    if remote := [source for source in sources if isinstance(source, str) and is_remote(source)]:
        said = "shards make reads files of this machine; fit reads such a source itself (data.train=)"
        raise UserError(f"src={without_secrets(remote[0])}: {said}")


def check_labels(labels: LabelSettings) -> None:
    """Raise UserError for settings of a list of labels without the list, and for one of folders with it."""
    chosen = {"file_column": labels.file_column, "class_column": labels.class_column}
    chosen |= {"unlisted": "skip" if labels.unlisted == "skip" else None}
    if labels.path is None and (names := [name for name, value in chosen.items() if value is not None]):
        raise UserError(f"labels.{names[0]} is for a list of labels; give it with labels=FILE")
    if labels.path is not None and labels.folder != "innermost":
        raise UserError(
            f"labels.folder={labels.folder} takes folders for classes; leave it out where labels= gives them"
        )


def check_sources(sources: list[str], out: Path) -> None:
    """Raise UserError for sources that would be read twice, and for a target inside a source."""
    folders = [Path(source).resolve() for source in sources if source != "synthetic"]
    known = set(folders)
    if len(known) < len(folders):
        raise UserError("src names a source twice; its images would count twice")
    for folder in folders:
        if outer := known.intersection(folder.parents):
            raise UserError(f"src={folder} lies inside src={min(outer)}; its images would count twice")
        if folder.is_dir() and out.resolve().is_relative_to(folder):  # the next run would take the shards for sources
            raise UserError(f"out={out} lies inside src={folder}; choose an out= elsewhere")


def check_unchanged(work: Path, sources: list[str], choice: Choice, images: int) -> None:
    """Raise UserError for a source that has changed since the half-done run listed it."""
    advice = f"since the half-done run in {work} began; delete that folder to start again"
    for before, unit in zip_longest(Listing(work / "listing").units, source_units(sources, choice, images)):
        if unit is None or (before and before.path not in ("", unit.path) and not os.path.exists(before.path)):
            raise UserError(f"{before.path} is missing {advice}")
        if before is None or (before.path, before.top, before.prefix) != (unit.path, unit.top, unit.prefix):
            raise UserError(f"the files of src have changed, by {unit.path}, {advice}")
        if before.stamp != unit.stamp:
            raise UserError(f"{unit.path} has changed {advice}")


def check_targets(out: Path, names: list[str], settings: EncodeSettings, sources: list[str], half_done: bool) -> bool:
    """Whether the targets hold finished shards of the same settings. Raises UserError if they hold anything else."""
    finished = []
    now = provenance(sources, settings)
    now |= now.pop("settings")
    for target in (out / name for name in names):
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            continue
        if half_done or not (target / MANIFEST).is_file():
            raise UserError(f"{target} exists and is not empty; {OTHER_OUT}")
        made = read_manifest(target)
        before = {"seed": made["seed"], "source": made["source"], **made["settings"]}
        if differs := difference({key: before.get(key) for key in now}, now):
            raise UserError(f"{target} holds shards with {differs}; {OTHER_OUT}")
        finished.append(target)
    if 0 < len(finished) < len(names):
        raise UserError(f"{finished[0]} exists and is not empty; {OTHER_OUT}")
    return bool(finished)


def check_same_listing(out: Path, names: list[str], about: dict[str, Any]) -> None:
    """Raise UserError if the finished targets were made from other files."""
    for target in (out / name for name in names):
        if not about.items() <= read_manifest(target).items():
            raise UserError(f"{target} holds shards of other files or classes; {OTHER_OUT}")


def provenance(sources: list[str], settings: EncodeSettings) -> dict[str, Any]:
    """Seed, source and settings for the manifest: the sources' names alone, as paths differ between machines."""
    unused = {"seed"} if sources == ["synthetic"] else {"seed", "images", "size"}
    chosen = {name: value for name, value in settings.model_dump().items() if name not in unused}
    names = distinct_names([Path(source).resolve() for source in sources])
    return {"seed": settings.seed, "source": ", ".join(names), "settings": chosen}

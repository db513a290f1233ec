"""The verb `embed`: writes vectors of images, finds the nearest images of a query, draws patch features in colours."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from PIL import Image

from beit_pretrain.data.left_out import LeftOut
from beit_pretrain.data.notes import read_note
from beit_pretrain.data.write.staging import show
from beit_pretrain.errors import UserError
from beit_pretrain.evaluation.patch_pca import pca_colours
from beit_pretrain.fileio import size
from beit_pretrain.inference.embedder import Embedder
from beit_pretrain.inference.image_stream import (
    BAD_SHOWN,
    ImageDataset,
    Item,
    Source,
    nothing,
    report,
    source_of,
    stream,
)
from beit_pretrain.inference.nearest import MISSING, nearest, picture, views_of
from beit_pretrain.inference.settings import EmbedSettings
from beit_pretrain.inference.vector_formats import ABOUT, NAMES, VectorFormat, beside, format_of, read_vectors
from beit_pretrain.inference.vector_writer import growing
from beit_pretrain.models.checkpoints.formats import Checkpoint, digest, read_checkpoint
from beit_pretrain.tables import write_csv
from beit_pretrain.visualization import grids
from beit_pretrain.visualization.feature_maps import feature_sheet

FORMAT = "beit_pretrain-vectors/1"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
MOST_QUERIES = 64  # of a contact sheet
MADE_WITH = ("what", "layer", "normalise", "image_size")  # settings that a query must share with stored vectors
NEEDS = {"sheet": "query", "neighbours": "query", "images": "picture", "layers": "picture"}  # of no use without
KINDS = {"cls": "[CLS]", "mean": "mean of the patches", "patches": "patches"}


def embed(cfg: EmbedSettings) -> None:
    """Write the vectors of all images; draw the picture and the neighbours that are asked for.

    Raises UserError, before anything is computed, for settings that do not fit the checkpoint or each other.
    """
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    asked = cfg
    cfg, known = settled(cfg)
    assert cfg.init_from is not None
    assert cfg.src is not None
    sides = None if cfg.image_size is None else [cfg.image_size] * 2
    checkpoint = read_checkpoint(cfg.init_from, sides)
    embedder = Embedder(checkpoint, cfg.image_size)
    layer = embedder.layer(cfg.layer)
    layers = [embedder.layer(chosen, "layers") for chosen in cfg.layers or thirds(embedder.depth)]
    left_out = LeftOut()
    dataset = ImageDataset(source_of(cfg.src, left_out), embedder.apply)
    queries = None if cfg.query is None else readable(cfg.query, embedder)
    if known and known["checkpoint"] != digest(checkpoint.state):
        raise UserError(f"vectors={cfg.vectors} are not of init_from={cfg.init_from}: its weights are others")
    if known:
        check_agrees(asked, known, embedder)
    if cfg.picture is not None:
        draw_features(cfg, embedder, dataset, layers)
    out = output_files(cfg)[0]
    if cfg.vectors is None and (cfg.picture is None or cfg.out is not None or queries):
        write_vectors(cfg, out, embedder, dataset, checkpoint, layer, left_out)
    if queries:
        draw_nearest(cfg, out, embedder, dataset, queries, layer)


def settled(cfg: EmbedSettings) -> tuple[EmbedSettings, dict[str, Any]]:
    """The settings, and what is known of finished `vectors`: how these were made replaces settings, whatever is given.

    `init_from` and `src` may be given, for files that have moved.

    Raises UserError for settings that do not go together.
    """
    known: dict[str, Any] = {}
    if cfg.vectors is not None:
        if cfg.query is None or cfg.out is not None:
            raise UserError("vectors= is searched for the nearest images of query=, which is needed, without out=")
        if not Path(cfg.vectors).is_file():
            raise UserError(f"vectors={cfg.vectors}: there is no such file")
        file = beside(Path(cfg.vectors), ABOUT)
        known = read_note(file) or {}
        if missing := {"checkpoint", "init_from", "src", *MADE_WITH} - known.keys():
            why = f"is missing or damaged (without {min(missing)})"
            raise UserError(f"{file}, which says how vectors={cfg.vectors} were made, {why}")
        try:
            said = EmbedSettings.validated({name: known[name] for name in ("init_from", "src", *MADE_WITH)})
        except UserError:
            said = EmbedSettings()
        if said.src is None or not isinstance(known["init_from"], str):
            raise UserError(f"{file}, which says how vectors={cfg.vectors} were made, is damaged")
        given = {name: getattr(cfg, name) or known[name] for name in ("init_from", "src")}
        cfg = cfg.model_copy(update={**given, **{name: known[name] for name in MADE_WITH}})
    elif cfg.init_from is None:
        raise UserError("init_from is missing: a checkpoint, such as runs/small_own/checkpoints/last.ckpt")
    elif cfg.src is None:
        raise UserError("src is missing: an image, a folder of images, a tar, a shard folder, or a list of these")
    defaults = EmbedSettings()
    for name, needed in NEEDS.items():
        if getattr(cfg, needed) is None and getattr(cfg, name) != getattr(defaults, name):
            raise UserError(f"{name}= needs {needed}=")
    if cfg.query is not None and cfg.what == "patches":
        raise UserError("query= compares one vector an image: what=cls or what=mean")
    for name, path in (("picture", cfg.picture), ("sheet", cfg.sheet)):
        if path is not None and Path(path).suffix.lower() not in PICTURES:
            raise UserError(f"{name}={path} must end with .png, .jpg or .webp")
    format_of(Path(cfg.out or "vectors.npy"))
    check_places(cfg)
    return cfg, known


def check_agrees(asked: EmbedSettings, known: dict[str, Any], embedder: Embedder) -> None:
    """Raise UserError for a setting, other than its default, that contradicts how stored vectors were made."""
    defaults = EmbedSettings()
    for name in MADE_WITH:
        given = getattr(asked, name)
        number = embedder.layer(given) if name == "layer" else given
        if given != getattr(defaults, name) and number != known[name]:
            made = f"{name}={show(known[name])}, not {show(given)}"
            raise UserError(f"vectors={asked.vectors} were made with {made}; leave {name}= out")


def check_places(cfg: EmbedSettings) -> None:
    """Raise UserError if a file that is written is one that is read or another one that is written."""
    out, sheet, table = output_files(cfg)
    written = [("vectors" if cfg.vectors else "out", out)]
    if cfg.query is not None:
        written += [("sheet", sheet), ("the table of sheet", table)]
    if cfg.picture is not None:
        written.append(("picture", Path(cfg.picture)))
    src, query = ([value] if isinstance(value, str) else value or [] for value in (cfg.src, cfg.query))
    read = [("init_from", cfg.init_from or ""), *(("src", path) for path in src), *(("query", path) for path in query)]
    taken = {os.path.realpath(path): f"{name}={path}" for name, path in read}
    if cfg.vectors:
        taken.pop(os.path.realpath(out), None)  # it is only read
    for name, path in written:
        place = os.path.realpath(path)
        if os.path.isdir(place):
            raise UserError(f"{name}={path} is a folder")
        if place in taken:
            raise UserError(f"{name}={path} is the same file as {taken[place]}; choose another name")
        taken[place] = f"{name}={path}"
    for name, path in written:
        if name in ("picture", "sheet"):
            folders = [str(folder) for folder in Path(os.path.realpath(path)).parents]
            if inside := [source for source in (*src, *query) if os.path.realpath(source) in folders]:
                raise UserError(
                    f"{name}={path} would become one of the images of {inside[0]}; {name}= must lie outside of it"
                )


def output_files(cfg: EmbedSettings) -> tuple[Path, Path, Path]:
    """The files of the vectors, of the contact sheet and of its table."""
    out = Path(cfg.vectors or cfg.out or "vectors.npy")
    sheet = Path(cfg.sheet) if cfg.sheet else beside(out, ".nearest.png")
    return out, sheet, beside(sheet, ".csv")


def thirds(depth: int) -> list[int]:
    """The layers at a third, two thirds and the end of the depth."""
    return sorted({max(1, round(depth * share)) for share in (1 / 3, 2 / 3, 1)})


def write_vectors(
    cfg: EmbedSettings,
    out: Path,
    embedder: Embedder,
    dataset: ImageDataset,
    checkpoint: Checkpoint,
    layer: int,
    left_out: LeftOut,
) -> None:
    """Write the vectors of all images to `out`, or those that are missing; nothing if it is finished."""
    width, grid = embedder.model.embed_dim, embedder.model.grid
    shape = (width,) if cfg.what != "patches" else (grid[0] * grid[1], width)
    form = format_of(out)(cfg.dtype, shape)
    plan = plan_of(cfg, out, embedder, dataset.source, checkpoint, layer)
    labels = dataset.source.labels()
    with growing(out, form, plan, cfg.resume) as vectors:
        if vectors is None:
            print(f"{out} is finished: this command has written it (resume=never computes it again)")
            return
        if vectors.start:
            print(f"resuming at image {vectors.start:,} of {len(dataset):,}", flush=True)
        named = labels if any(label is not None for label in labels) else None
        for items in stream(dataset, cfg.batch_size, cfg.num_workers, "embedding", vectors.bad, vectors.start):
            vectors.append(items, rows_of(cfg, embedder, items, layer), named)
        if not vectors.images:
            raise nothing(cfg.src, vectors.bad)
        about = {
            **plan,
            "init_from": anywhere(cfg.init_from or ""),
            "src": [anywhere(path) for path in ([cfg.src] if isinstance(cfg.src, str) else cfg.src or ())],
            "shape": [vectors.images, *shape],
            "grid": list(grid),
            "unreadable": len(vectors.bad),
        }
        vectors.publish(out, about)
    report(out, done(cfg, form, vectors.images, layer, embedder, out), vectors.bad, beside(out, ".bad.jsonl"), left_out)
    if cfg.what != "patches" and cfg.query is None:
        print(f"nearest images: python -m beit_pretrain embed vectors={out} query=PHOTO")


def rows_of(cfg: EmbedSettings, embedder: Embedder, items: list[Item], layer: int) -> np.ndarray:
    """The vectors (n, *shape) of a batch, in the stored precision. Raises UserError if they do not fit into it."""
    views = torch.stack([item.views[0] for item in items])
    with np.errstate(over="ignore"):
        rows = embedder.vectors(views, cfg.what, layer, cfg.normalise).numpy().astype(cfg.dtype)
    if not np.isfinite(rows).all():
        raise UserError(
            "vectors that are not finite, or beyond the range of float16 (dtype=float32): is this a trained BEiT?"
        )
    return rows


def plan_of(
    cfg: EmbedSettings, out: Path, embedder: Embedder, source: Source, checkpoint: Checkpoint, layer: int
) -> dict[str, Any]:
    """What the bytes of the file depend on; threads and workers are left out, which change it by rounding at most."""
    about = embedder.model.about
    plan = {
        "format": FORMAT,
        "file": out.suffix.lower(),
        "checkpoint": digest(checkpoint.state),
        "images": len(source),
        "source": source.digest(),
        "what": cfg.what,
        "layer": layer,
        "normalise": cfg.normalise,
        "dtype": cfg.dtype,
        "image_size": embedder.model.config["image_size"],
        "num_heads": embedder.model.config["num_heads"],
        "norm_eps": embedder.model.config["norm_eps"],
        "view": about.get("view"),
        "crop_ratio": about.get("crop_ratio"),
        "mean": list(embedder.mean),
        "std": list(embedder.std),
        "batch_size": cfg.batch_size,
        "device": embedder.device.type,
        "Pillow": PIL.__version__,
    }
    plain: dict[str, Any] = json.loads(json.dumps(plan))
    return plain


def anywhere(path: str) -> str:
    """A local path as it is known from any folder; others as they are."""
    return str(Path(path).absolute()) if Path(path).exists() else path


def done(cfg: EmbedSettings, form: VectorFormat, images: int, layer: int, embedder: Embedder, out: Path) -> str:
    """What was written, and where its names are."""
    shape = " x ".join(f"{side:,}" for side in (images, *form.shape))
    names = f", names in {beside(out, NAMES)}" if form.names_beside else ""
    kind = f"{cfg.dtype}, {KINDS[cfg.what]} of layer {layer} of {embedder.depth}"
    return f"{shape} {kind}, {size(out.stat().st_size)}{names}"


def draw_features(cfg: EmbedSettings, embedder: Embedder, dataset: ImageDataset, layers: list[int]) -> None:
    """Draw the patch features of evenly spaced images."""
    assert cfg.picture is not None
    count = min(cfg.images, len(dataset))
    items = [dataset[number * len(dataset) // count] for number in range(count)]
    bad = [(item.name, item.problem) for item in items if item.problem is not None]
    items = [item for item in items if item.problem is None]
    if not items:
        raise nothing(cfg.src, bad)
    found: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    for first in range(0, len(items), cfg.batch_size):
        views = torch.stack([item.views[0] for item in items[first : first + cfg.batch_size]])
        for layer, state_BND in zip(layers, embedder.states(views, layers), strict=True):
            found[layer].append(state_BND[:, 1:].cpu())
    maps = {layer: pca_colours(torch.cat(parts), embedder.model.grid) for layer, parts in found.items()}
    grids.save(feature_sheet([picture(item.views[0]) for item in items], maps), Path(cfg.picture))
    unread = f"; {len(bad)} could not be read:" if bad else ""
    print(f"wrote {cfg.picture}: patch features of {len(items)} images, layers {', '.join(map(str, maps))}{unread}")
    for name, why in bad[:BAD_SHOWN]:
        print(f"{name}: {why}")


def readable(src: str | list[str], embedder: Embedder) -> list[Item]:
    """The images of the query. Raises UserError if one cannot be read, or if there are too many."""
    dataset = ImageDataset(source_of(src), embedder.apply)
    if len(dataset) > MOST_QUERIES:
        raise UserError(f"query={src} has {len(dataset):,} images; at most {MOST_QUERIES} fit on a sheet")
    items = [dataset[number] for number in range(len(dataset))]
    if bad := [item for item in items if item.problem is not None]:
        raise UserError(f"query={src}: {bad[0].name}: {bad[0].problem}")
    return items


def draw_nearest(
    cfg: EmbedSettings, out: Path, embedder: Embedder, dataset: ImageDataset, queries: list[Item], layer: int
) -> None:
    """Draw the nearest images of every query, and write them as a table.

    Raises UserError if the source has none of them.
    """
    vectors = [torch.from_numpy(rows_of(cfg, embedder, [item], layer)).float() for item in queries]
    found = nearest(read_vectors(out), torch.cat(vectors), cfg.neighbours)
    _, sheet, written = output_files(cfg)
    rows: list[list[tuple[Image.Image, str]]] = []
    count = missing = 0
    for item, neighbours in zip(queries, found, strict=True):
        captions = [f"{neighbour.similarity:.3f}\n{neighbour.name}" for neighbour in neighbours]
        views = views_of(dataset, neighbours)
        count, missing = count + len(views), missing + sum(view is None for view in views)
        pictures = zip([view or MISSING for view in views], captions, strict=True)
        rows.append([(picture(item.views[0]), f"query\n{item.name}"), *pictures])
    if missing == count:
        raise UserError(f"src={cfg.src} has none of the {count} neighbours: are these the images of {out}?")
    if missing:
        print(f"warning: {missing} of the {count} neighbours cannot be read from src={cfg.src}: grey", file=sys.stderr)
    grids.save(grids.captioned(rows, cell=128), sheet)
    table = [
        (item.name, rank, neighbour.name, f"{neighbour.similarity:.6f}")
        for item, neighbours in zip(queries, found, strict=True)
        for rank, neighbour in enumerate(neighbours, start=1)
    ]
    write_csv(written, ("query", "rank", "file", "similarity"), table)
    print(f"wrote {sheet} and {written.name}: the {len(rows[0]) - 1} nearest of {len(queries)} images")

"""`predict` with a segmenter: for every image a label map (PNG with a palette) and a coloured overlay with a legend.

Ids in the label maps are those of the annotations that the model was trained on: with `reduce_labels` 1, 2, ... as in
ADE20K, else 0, 1, .... `classes.csv` says which id and colour is which class.
"""

from __future__ import annotations

import csv
import errno
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from tqdm import tqdm

from beit_pretrain.errors import UserError, first_line
from beit_pretrain.fileio import atomic_path
from beit_pretrain.inference.image_stream import Item, Views, nothing, source_of, stream, summary, write_bad
from beit_pretrain.inference.segmenter import ImageSegmenter
from beit_pretrain.inference.settings import PredictSettings
from beit_pretrain.models.checkpoints.formats import Checkpoint
from beit_pretrain.transforms.image_io import to_channels, to_rgb
from beit_pretrain.transforms.segmentation import SegmentationEvalTransform
from beit_pretrain.transforms.views import to_array
from beit_pretrain.visualization.overlays import comparison, palette

LONGEST = 200  # bytes of a part of a path; file systems take 255, and temporary names are longer
# What is wrong with one file's name or place; anything else, such as a full disk, would end all others too.
OF_ONE_FILE = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EILSEQ, errno.EINVAL)


def predict_maps(cfg: PredictSettings, source: Checkpoint) -> None:
    """Write `labels/NAME.png` and `overlays/NAME.png` for every image under `cfg.out`. Bad files are listed."""
    out = Path(cfg.out or "predictions")
    if out.is_file() or out.suffix in (".csv", ".json", ".jsonl"):
        raise UserError(f"out={out}: a segmentation model writes a folder of label maps, such as out=predictions")
    segmenter = ImageSegmenter(source, cfg.test)
    images = source_of(cfg.src)
    bad: list[tuple[str, str]] = []
    taken, written = set[Path](), 0
    views = Views(images, partial(apply, views=segmenter.views, channels=segmenter.channels), cfg.map_batch_size)
    with tqdm(total=len(images), desc="segmenting", unit=" images") as bar:
        for items in stream(views, cfg.num_workers):
            good = [item for item in items if item.problem is None]
            found = segmenter.segment_views([i.views[:-1] for i in good], [i.size for i in good]) if good else []
            for item, labels in zip(good, found, strict=True):
                name = free_name(item.name, taken)
                try:
                    write_maps(out, name, labels.numpy().astype(np.uint8), item, segmenter)
                except OSError as error:
                    if error.errno not in OF_ONE_FILE:
                        raise
                    bad.append((item.name, f"{name} cannot be written: {first_line(error)}"))
                else:
                    written += 1
            bad += [(item.name, item.problem) for item in items if item.problem is not None]
            bar.update(len(items))
    if not written:
        raise nothing(cfg.src, bad)
    write_classes(out / "classes.csv", segmenter)
    print(summary(out, f"{written} label maps", bad, write_bad(out / "bad.jsonl", bad)))


def apply(image: Image.Image, views: SegmentationEvalTransform, channels: int) -> list[np.ndarray]:
    """The image at all scales, and last as the picture under the overlay, (C, h, w) uint8 each."""
    return [*views.scaled(to_channels(image, channels)).values(), to_array(to_rgb(image))]


def write_maps(out: Path, name: Path, labels_HW: np.ndarray, item: Item, segmenter: ImageSegmenter) -> None:
    """The label map of one image, and its overlay."""
    write(out / "labels" / name, label_image(labels_HW, segmenter))
    picture = Image.fromarray(item.views[-1].numpy().transpose(1, 2, 0))
    cell = max(320, min(1024, max(picture.size)))
    write(out / "overlays" / name, comparison(picture, [("found", labels_HW)], segmenter.classes, cell=cell))


def free_name(key: str, taken: set[Path]) -> Path:
    """A relative path for an image's key, inside the folder whatever the key is, and another for every key."""
    *folders, last = [part for part in PurePosixPath(key).parts if part not in ("/", ".", "..")] or ["image"]
    # No folder ends as the label maps do: dir.jpg beside dir.png/in.jpg becomes dir.png.
    folders = [f"{part}_" if part.lower().endswith(".png") else part for part in map(shortened, folders)]
    folder, stem, whole = Path(*folders), shortened(PurePosixPath(last).stem), shortened(last)
    name = folder / f"{stem}.png"
    if name in taken:  # a.jpg and a.png of one folder
        name = folder / f"{whole}.png"
    number = 2
    while name in taken:
        name, number = folder / f"{whole}-{number}.png", number + 1
    taken.add(name)
    return name


def shortened(part: str) -> str:
    """A part of a path, cut off where it is longer than file systems take."""
    data = part.encode("utf-8", "surrogateescape")
    return part if len(data) <= LONGEST else data[:LONGEST].decode("utf-8", "ignore")


def label_image(found_HW: np.ndarray, segmenter: ImageSegmenter) -> Image.Image:
    """The label map as a PNG of ids shows it: every id in its class's colour."""
    shift = int(segmenter.reduce_labels)
    table = np.zeros((256, 3), np.uint8)
    colours = palette(len(segmenter.classes))[: 256 - shift]
    table[shift : shift + len(colours)] = colours
    image = Image.fromarray(found_HW + np.uint8(shift), "P")
    image.putpalette(table.tobytes())
    return image


def write(path: Path, image: Image.Image) -> None:
    """Write a PNG atomically, and its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")


def write_classes(path: Path, segmenter: ImageSegmenter) -> None:
    """Id in the label maps, name and colour of every class."""
    colours, shift = palette(len(segmenter.classes)), int(segmenter.reduce_labels)
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("id", "class", "red", "green", "blue"))
        rows.writerows(
            (i + shift, name, *map(int, colour))
            for i, (name, colour) in enumerate(zip(segmenter.classes, colours, strict=True))
        )

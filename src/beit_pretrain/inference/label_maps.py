"""`predict` with a segmenter: writes a label map (PNG with a palette) and an overlay with a legend for every image.

Label maps use the ids of the training annotations: 1, 2, ... with `reduce_labels`, as in ADE20K, else 0, 1, ....
`classes.csv` lists id, name and colour of the classes.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Callable
from functools import partial
from itertools import chain, count
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from beit_pretrain.data.layout import stem_of
from beit_pretrain.data.left_out import LeftOut
from beit_pretrain.errors import UserError, first_line
from beit_pretrain.fileio import atomic_path
from beit_pretrain.inference.image_stream import ImageDataset, Item, nothing, report, source_of, stream
from beit_pretrain.inference.predictor import ImageSegmenter
from beit_pretrain.inference.settings import PredictSettings
from beit_pretrain.tables import write_csv
from beit_pretrain.transforms.image_io import IMAGE_EXTENSIONS, to_rgb
from beit_pretrain.transforms.views import to_array
from beit_pretrain.visualization.overlays import comparison, palette

LONGEST = 200  # bytes of a part of a path; file systems allow 255, and temporary names are longer
# Errors that concern only one file's path. Any other, such as a full disk, ends the prediction.
OF_ONE_FILE = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EILSEQ, errno.EINVAL)


def predict_maps(cfg: PredictSettings, segmenter: ImageSegmenter) -> None:
    """Write `labels/NAME.png` and `overlays/NAME.png` under `cfg.out` for every image; list unreadable files."""
    out = Path(cfg.out or "predictions")
    if out.is_file() or out.suffix in (".csv", ".json", ".jsonl"):
        raise UserError(f"out={out}: a segmentation model writes a folder of label maps, such as out=predictions")
    left_out = LeftOut()
    dataset = ImageDataset(source_of(cfg.src, left_out), partial(with_picture, segmenter.apply))
    bad: list[tuple[str, str]] = []
    taken, written = set[Path](), 0
    for items in stream(dataset, cfg.map_batch_size, cfg.num_workers, "segmenting", bad):
        found = segmenter.segment([item.views[:-1] for item in items], [item.size for item in items])
        for item, labels in zip(items, found, strict=True):
            name = free_name(item.name, taken)
            try:
                write_maps(out, name, labels.numpy().astype(np.uint8), item, segmenter)
                written += 1
            except OSError as error:
                if error.errno not in OF_ONE_FILE:
                    raise
                bad.append((item.name, f"{name} cannot be written: {first_line(error)}"))
    if not written:
        raise nothing(cfg.src, bad)
    write_classes(out / "classes.csv", segmenter)
    report(out, f"{written} label maps", bad, out / "bad.jsonl", left_out)


def with_picture(apply: Callable[[Image.Image], list[np.ndarray]], image: Image.Image) -> list[np.ndarray]:
    """The views of the network, then the RGB image for the overlay, each (C, h, w) uint8."""
    return [*apply(image), to_array(to_rgb(image))]


def write_maps(out: Path, name: Path, labels_HW: np.ndarray, item: Item, segmenter: ImageSegmenter) -> None:
    """Write the label map and the overlay of one image."""
    write(out / "labels" / name, label_image(labels_HW, segmenter))
    picture = Image.fromarray(item.views[-1].numpy().transpose(1, 2, 0))
    cell = max(320, min(1024, max(picture.size)))
    write(out / "overlays" / name, comparison(picture, [("found", labels_HW)], segmenter.classes, cell=cell))


def free_name(key: str, taken: set[Path]) -> Path:
    """A relative PNG path for an image's key, unique per key, and inside the folder for any key."""
    *folders, last = [part for part in PurePosixPath(key).parts if part not in ("/", ".", "..")] or ["image"]
    # No folder may end with .png: the label map of dir.jpg, beside the folder dir.png, is dir.png.
    folder = Path(*(f"{part}_" if part.lower().endswith(".png") else part for part in map(shortened, folders)))
    whole = shortened(last)
    # The second name is for a.jpg and a.png of one folder.
    stem, extension = stem_of(last)
    names = chain(
        (shortened(stem if extension in IMAGE_EXTENSIONS else last), whole), (f"{whole}-{n}" for n in count(2))
    )
    name = next(path for stem in names if (path := folder / f"{stem}.png") not in taken)
    taken.add(name)
    return name


def shortened(part: str) -> str:
    """A part of a path, cut to the length that file systems allow, and then marked so that no two are the same."""
    data = part.encode("utf-8", "surrogateescape")
    if len(data) <= LONGEST:
        return part
    return f"{data[:LONGEST].decode('utf-8', 'ignore')}-{hashlib.sha256(data).hexdigest()[:8]}"


def label_image(found_HW: np.ndarray, segmenter: ImageSegmenter) -> Image.Image:
    """The label map as a palette image of ids, each in the colour of its class."""
    shift = int(segmenter.reduce_labels)
    table = np.zeros((256, 3), np.uint8)
    colours = palette(len(segmenter.classes))[: 256 - shift]
    table[shift : shift + len(colours)] = colours
    image = Image.fromarray(found_HW + np.uint8(shift), "P")
    image.putpalette(table.tobytes())
    return image


def write(path: Path, image: Image.Image) -> None:
    """Write a PNG atomically; create its folder if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")


def write_classes(path: Path, segmenter: ImageSegmenter) -> None:
    """Write id, name and colour of every class."""
    named = zip(segmenter.classes, palette(len(segmenter.classes)).tolist(), strict=True)
    rows = [(number, name, *colour) for number, (name, colour) in enumerate(named, int(segmenter.reduce_labels))]
    write_csv(path, ("id", "class", "red", "green", "blue"), rows)

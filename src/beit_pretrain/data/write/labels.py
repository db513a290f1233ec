"""Classes that are not folder names: the ground truth of a validation set, names of segmentation classes.

`labels=` takes ImageNet's devkit (`ILSVRC2012_devkit_t12.tar.gz`, or unpacked), or a text or CSV file with a line
`filename class` or `filename,class` per image (Kaggle's LOC_val_solution.csv, ADE20K's sceneCategories.txt).
"""

from __future__ import annotations

import csv
import io
from pathlib import Path, PurePosixPath

import numpy as np

from beit_pretrain.data.tars import read_named
from beit_pretrain.errors import UserError, first_line

GROUND_TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
LARGEST = 2**28  # bytes of a file of labels


def read_labels(path: str | Path) -> dict[str, str]:
    """Name of an image without folder and extension -> its class. Raises UserError for any other file."""
    path = Path(path).expanduser()
    try:
        if path.is_dir() or path.name.endswith((".tar.gz", ".tgz", ".tar")):
            return _devkit_labels(read_named(path, {GROUND_TRUTH, META}, LARGEST))
        if path.exists() and not path.is_file():  # reading it would never end
            raise ValueError("it is a pipe or a device")
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        return _text_labels(path.read_text("utf-8-sig"))
    except OSError as error:
        raise UserError(f"labels={path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # scipy raises nearly anything on a file that is no .mat
        said = f"is neither ImageNet's devkit nor a list of names: {first_line(error)}"
        raise UserError(f"labels={path} {said}") from None


def stem(key: str) -> str:
    """The name by which labels know an image: without folder and extension."""
    return PurePosixPath(key).stem


def _text_labels(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line.strip()]
    kaggle = bool(lines) and lines[0].replace(" ", "") == "ImageId,PredictionString"
    found: dict[str, str] = {}
    commas = any("," in line for line in lines)
    for fields in csv.reader(lines[kaggle:]) if commas else (line.split(None, 1) for line in lines):
        if len(fields) < 2 or not fields[0].strip() or not fields[1].strip():
            raise ValueError(f"the line {' '.join(fields)[:60]!r} has no class")
        name, class_name = stem(fields[0].strip()), fields[1].strip()
        class_name = class_name.split()[0] if kaggle else class_name  # boxes follow
        if found.setdefault(name, class_name) != class_name:
            raise ValueError(f"{name!r} has two classes, {found[name]!r} and {class_name!r}")
    if not found:
        raise ValueError("it is empty")
    return found


def _devkit_labels(files: dict[str, bytes]) -> dict[str, str]:
    """ILSVRC2012_val_00000001, ... -> WordNet ids: line n of the ground truth is the ILSVRC2012_ID of image n."""
    from scipy.io import loadmat  # for this one file

    synsets = loadmat(io.BytesIO(files[META]), squeeze_me=True, variable_names=["synsets"])["synsets"]
    wnid = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in np.ravel(synsets)}
    return {f"ILSVRC2012_val_{i:08d}": wnid[int(line)] for i, line in enumerate(files[GROUND_TRUTH].split(), 1)}


def segmentation_names(source: Path) -> list[str]:
    """Names of ADE20K's classes 1, 2, ... from objectInfo150.txt in the source or beside it; none if there is none."""
    for file in (source / "objectInfo150.txt", source.parent / "objectInfo150.txt"):
        if file.is_file() and file.stat().st_size < LARGEST:
            lines = file.read_text("utf-8", "replace").splitlines()[1:]
            return [line.split("\t")[-1].strip() for line in lines if line.strip()]
    return []

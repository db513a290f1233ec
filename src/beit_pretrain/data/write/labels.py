"""Classes that do not stand in folder names: the ground truth of a validation set, names of segmentation classes.

`labels=` takes ImageNet's devkit (`ILSVRC2012_devkit_t12.tar.gz`, or unpacked), or a text or CSV file with a line
`filename class` or `filename,class` per image (Kaggle's LOC_val_solution.csv, ADE20K's sceneCategories.txt).
"""

from __future__ import annotations

import csv
import io
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np

from beit_pretrain.errors import UserError, first_line

GROUND_TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
LARGEST = 2**28  # bytes of a file of labels


def read_labels(path: str | Path) -> dict[str, str]:
    """Name of an image without folder and extension -> its class. Raises UserError for what is no such file."""
    path = Path(path).expanduser()
    try:
        if path.is_dir() or path.name.endswith((".tar.gz", ".tgz", ".tar")):
            return _devkit_labels(*_devkit_files(path))
        if path.exists() and not path.is_file():  # it would be waited for without end
            raise ValueError("it is a pipe or a device")
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST} bytes")
        return _text_labels(path.read_text("utf-8-sig"))
    except OSError as error:
        raise UserError(f"labels={path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # scipy raises nearly anything on what is no .mat file
        raise UserError(
            f"labels={path} is neither ImageNet's devkit nor a list of names: {first_line(error)}"
        ) from None


def stem(key: str) -> str:
    """What labels know an image by: its name without folder and extension."""
    return PurePosixPath(key).stem


def _text_labels(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if line.strip()]
    kaggle = bool(lines) and lines[0].replace(" ", "") == "ImageId,PredictionString"
    found: dict[str, str] = {}
    for fields in (
        csv.reader(lines[kaggle:]) if any("," in line for line in lines) else (s.split(None, 1) for s in lines)
    ):
        if len(fields) < 2 or not fields[0].strip() or not fields[1].strip():
            raise ValueError(f"the line {' '.join(fields)[:60]!r} has no class")
        name, class_name = stem(fields[0].strip()), fields[1].strip()
        class_name = class_name.split()[0] if kaggle else class_name  # boxes follow
        if found.setdefault(name, class_name) != class_name:
            raise ValueError(f"{name!r} has two classes, {found[name]!r} and {class_name!r}")
    if not found:
        raise ValueError("it is empty")
    return found


def _devkit_files(path: Path) -> tuple[bytes, bytes]:
    """Ground truth and meta.mat of the devkit."""
    found: dict[str, bytes] = {}
    if path.is_dir():
        for name in (GROUND_TRUTH, META):
            file = next((f for f in (path / name, path / "data" / name) if f.is_file()), None)
            if file is not None:
                found[name] = file.read_bytes()
    else:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                base = PurePosixPath(member.name).name
                if member.isreg() and base in (GROUND_TRUTH, META) and (opened := tar.extractfile(member)):
                    if member.size > LARGEST:
                        raise ValueError(f"{base} has more than {LARGEST} bytes")
                    found[base] = opened.read()
    if missing := {GROUND_TRUTH, META} - found.keys():
        raise ValueError(f"{min(missing)} is missing")
    return found[GROUND_TRUTH], found[META]


def _devkit_labels(truth: bytes, meta: bytes) -> dict[str, str]:
    """ILSVRC2012_val_00000001, ... -> WordNet ids: line n of the ground truth is the ILSVRC2012_ID of image n."""
    from scipy.io import loadmat  # for this one file

    synsets = np.ravel(loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"])
    wnid = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    return {f"ILSVRC2012_val_{i:08d}": wnid[int(line)] for i, line in enumerate(truth.split(), 1)}


def segmentation_names(source: Path) -> list[str]:
    """Names of ADE20K's classes 1, 2, ... from objectInfo150.txt in the source or beside it; none if there is none."""
    for folder in (source, source.parent):
        file = folder / "objectInfo150.txt"
        if file.is_file() and file.stat().st_size < LARGEST:
            lines = file.read_text("utf-8", "replace").splitlines()[1:]
            return [line.split("\t")[-1].strip() for line in lines if line.strip()]
    return []

"""What the names of files and folders say: by-products, archives, parts such as train/; why files are left out.

The rules see names alone, so that they are the same for folders and for tars. Words are compared without regard to
case, and are separated by anything but letters, and where a capital follows a small letter (`SegmentationClass`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

from beit_pretrain.errors import UserError

# --- files that are no images ------------------------------------------------------------------------------------

BY_PRODUCT = "a by-product of a system or program: hidden, a thumbnail, a recycle bin"
NO_IMAGE = "no image, by its extension"
ARCHIVE = "an archive or data file, which may hold images; unpack it"
DEVICE = "a pipe or a device"
CLASS_NUMBER = "a class number of WebDataset; for these classes give the folder of the tars itself"
COMPRESSED = "compressed, which allows no random access; decompress it first"
MAP = "a label map, mask, depth map or thumbnail of a photo, by its name"
FURTHER = "a further image of the same name in a tar; image_key= chooses"
REPLACED = "comes again later in its tar; the last one is read, as in unpacking"
MAYBE_MAPS = "has a name of label maps, but not of photos beside it; it is read"
BOTH_READ = "has the name of another image but for its extension; both are read (image_key= chooses one)"
_FOLDERS = frozenset(
    "__macosx @eadir #recycle @recycle $recycle.bin recycler #snapshot @tmp @sharebin @recently-snapshot "
    "lost+found".split()
) | {"system volume information"}
_FILES = re.compile(
    r"thumbs\.db.*|ehthumbs.*\.db|desktop\.ini|synophoto_.*|.*:zone\.identifier|.*\.thm|~\$.*|.*~", re.IGNORECASE
)
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
ARCHIVES = tuple(
    ".zip .7z .rar .gz .bz2 .xz .zst .lz4 .iso .parquet .arrow .feather .tfrecord .tfrecords .h5 .hdf5 .lmdb .mdb "
    ".npy .npz .rec .beton".split()
)
NOT_IMAGES = tuple(
    ".txt .json .jsonl .csv .tsv .xml .yaml .yml .toml .ini .md .rst .htm .html .pdf .log .db .py .sh .lst .idx "
    ".caption .md5 .sha1 .sha256 .mat .pkl .pickle .pt .pth .safetensors .cache .xmp .aae .pp3 .dop .ipynb "
    ".doc .docx .xls .xlsx .ppt .pptx .url .lnk .srt .tfw .jgw .pgw .prj .shp .shx .dbf .geojson .kml .ply .obj .off "
    ".pcd .crdownload .mp3 .mp4 .m4v .wav .avi .mov .mkv .mpg .webm .3gp".split()
)


def is_by_product(key: str) -> bool:
    """Whether a path's last part was made by a system or program and not by the user, as far as its name says."""
    return (key[:1] == "." and key not in (".", "..")) or key.lower() in _FOLDERS or bool(_FILES.fullmatch(key))


def why_no_image(name: str) -> str | None:
    """The reason why a file is left out by its name alone; None if it may be an image."""
    if is_by_product(name):
        return BY_PRODUCT
    lower = name.lower()
    if lower.endswith(COMPRESSED_TARS):
        return COMPRESSED
    if lower.endswith(ARCHIVES) or re.search(r"\.tfrecords?-\d", lower):
        return ARCHIVE
    if lower.endswith(".cls"):
        return CLASS_NUMBER
    return NO_IMAGE if lower.endswith(NOT_IMAGES) else None


def split_key(name: str) -> tuple[str, str]:
    """The key of a member in WebDataset (its path up to the first dot of the file name), the rest in small letters."""
    start = name.rfind("/") + 1
    stem, _, extension = name[start:].partition(".")
    return name[:start] + stem, extension.lower()


def stem_of(name: str) -> tuple[str, str]:
    """A file name without its extension, and the extension in small letters."""
    stem, dot, extension = name.rpartition(".")
    return (stem, extension.lower()) if dot else (name, "")


# --- words -------------------------------------------------------------------------------------------------------

# Folders that hold the photos of what their parent folder names.
PHOTOS = frozenset(
    "images image imgs img photos photo pictures pics jpegimages jpg jpeg jpegs png pngs rgb data".split()
)
COLOUR = PHOTOS | frozenset("input inputs leftimg original originals color colors colour colours sat".split())
MAPS = frozenset(
    "mask masks label labels seg segs segmentation segmentations semantic instance instances annotation annotations "
    "annot annots anno annos trimap trimaps gt gts groundtruth gtfine gtcoarse manual depth depths disparity normals "
    "matte mattes alpha heatmap heatmaps saliency labelids instanceids trainids target targets panoptic "
    "superpixels".split()
)
THUMBS = frozenset("thumb thumbs thumbnail thumbnails preview previews".split())
# Of these: words that are as often names of classes.
CLASSES_TOO = frozenset("label instance manual alpha target targets thumb thumbnail preview".split())
_ROLES = {
    **dict.fromkeys(("train", "training", "trn", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "devel", "eval", "evaluation", "holdout"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
ROLE_AT_END = re.compile(rf"[._ -](?:{'|'.join(_ROLES)})$", re.IGNORECASE)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+")


@lru_cache(2**12)
def split_words(name: str) -> tuple[str, ...]:
    """The words of a name, in small letters."""
    if name.isupper():
        name = name.lower()
    name = re.sub(r"ground[\W_]*truth", "groundtruth", name, flags=re.IGNORECASE)
    words = [word.casefold() for word in _WORD.findall(name)]
    joined = "".join(words)
    return (joined,) if joined in PHOTOS | MAPS else tuple(words)


def says_photos(name: str) -> bool:
    """Whether a folder's name says only that it holds photos."""
    words = {*split_words(name)}
    return bool(words) and words <= PHOTOS


def says_maps(name: str) -> bool:
    """Whether a folder's name says only that it holds label maps or thumbnails."""
    words = {*split_words(name)}
    return bool(words) and words <= MAPS | THUMBS


# --- parts of a set ----------------------------------------------------------------------------------------------

BESIDE = "beside folders of parts, which alone are read; give it by itself"
BESIDE_MAPS = "beside images/ and annotations/, which alone are read; give it by itself"
OTHER_PART = "of another part; split= picks the part"


def role_of(name: str) -> tuple[str, tuple[str, ...]] | None:
    """The part that a folder's name says ("train", "val", "test"), and its other words; None if not exactly one."""
    words = split_words(name)
    roles = [word for word in words if word in _ROLES]
    roles = roles[:1] if [_ROLES[word] for word in roles] == ["train", "val"] else roles  # train_val_images
    return (_ROLES[roles[0]], tuple(word for word in words if word not in _ROLES)) if len(roles) == 1 else None


def is_part(name: str) -> bool:
    """Whether a folder's name says that it is a part of a set, such as `train2017`."""
    return role_of(name) is not None


def parts_of(names: Iterable[str]) -> dict[str, str]:
    """The folders among `names` that are parts, with what they are: "train", "val" or "test".

    Folders are parts if one says train and one, with the same other words (`seg_train`, `seg_test`), says val or test;
    or all names say a part, and one nothing else (`train`, `valid_no_label`; not the classes `toy_train`, `test_tube`).
    """
    names = [*names]
    roles = {name: found[0] for name in names if (found := role_of(name))}
    all_say = len(roles) == len(names) and any(role_of(name) == (role, ()) for name, role in roles.items())
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        if found := role_of(name):
            groups.setdefault(found[1], {})[name] = found[0]
    whole = {
        words: parts for words, parts in groups.items() if "train" in parts.values() and len({*parts.values()}) > 1
    }
    if not whole and all_say and "train" in roles.values() and len({*roles.values()}) > 1:
        return roles
    photos = [parts for words, parts in whole.items() if not {*words} & MAPS]  # not train_masks, test_masks
    return {name: role for parts in photos or whole.values() for name, role in parts.items()}


def of_split(parts: dict[str, str], split: str) -> list[str]:
    """The folders of a split: of this name, else of this part; val and test stand for each other.

    Raises UserError if there are none.
    """
    if exact := [name for name in parts if name.casefold() == split.casefold()]:
        return exact
    role = (role_of(split) or ("", ()))[0]
    for wanted in {"train": ("train",), "val": ("val", "test"), "test": ("test", "val")}.get(role, ()):
        if found := [name for name, part in parts.items() if part == wanted]:
            return found
    raise UserError(f"has the parts {', '.join(sorted(parts))}; split={split} is none of them")

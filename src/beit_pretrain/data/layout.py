"""What the names of files and folders say: by-products, parts such as train/, label maps beside photos.

The rules see names alone, so that they are the same for folders and for tars. Words are compared without regard to
case, and are separated by anything but letters, and where a capital follows a small letter (`SegmentationClass`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from beit_pretrain.errors import UserError
from beit_pretrain.transforms.image_io import IMAGE_EXTENSIONS

# --- files that are no images ------------------------------------------------------------------------------------

BY_PRODUCT = "a by-product of a system or program: hidden, a thumbnail, a recycle bin"
NO_IMAGE = "no image, by its extension"
ARCHIVE = "an archive or data file, which may hold images; unpack it"
DEVICE = "a pipe or a device"
CLASS_NUMBER = "a class number of WebDataset, which shards index reads; here classes are names of folders"
COMPRESSED = "compressed, which allows no random access; decompress it first"
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


# --- words -------------------------------------------------------------------------------------------------------

# Folders that hold the photos of what their parent folder names.
PHOTOS = frozenset(
    "images image imgs img photos photo pictures pics jpegimages jpg jpeg jpegs png pngs rgb data".split()
)
_COLOUR = PHOTOS | frozenset("input inputs leftimg original originals color colors colour colours sat".split())
_MAPS = frozenset(
    "mask masks label labels seg segs segmentation segmentations semantic instance instances annotation annotations "
    "annot annots anno annos trimap trimaps gt gts groundtruth gtfine gtcoarse manual depth depths disparity normals "
    "matte mattes alpha heatmap heatmaps saliency labelids instanceids trainids target targets panoptic "
    "superpixels".split()
)
_THUMBS = frozenset("thumb thumbs thumbnail thumbnails preview previews".split())
# Of these: words that are as often names of classes.
CLASSES_TOO = frozenset("label instance manual alpha target targets thumb thumbnail preview".split())
_LOSSY = frozenset("jpg jpeg jpe jfif webp avif jp2 j2k".split())
_ROLES = {
    **dict.fromkeys(("train", "training", "trn", "trainval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "devel", "eval", "evaluation", "holdout"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
_ROLE_AT_END = re.compile(rf"[._ -](?:{'|'.join(_ROLES)})$", re.IGNORECASE)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[^\W\d_A-Z]+")


@lru_cache(2**12)
def _words(name: str) -> tuple[str, ...]:
    if name.isupper():
        name = name.lower()
    name = re.sub(r"ground[\W_]*truth", "groundtruth", name, flags=re.IGNORECASE)
    words = [word.casefold() for word in _WORD.findall(name)]
    joined = "".join(words)
    return (joined,) if joined in PHOTOS | _MAPS else tuple(words)


def says_photos(name: str) -> bool:
    """Whether a folder's name says only that it holds photos."""
    words = {*_words(name)}
    return bool(words) and words <= PHOTOS


def says_maps(name: str) -> bool:
    """Whether a folder's name says only that it holds label maps or thumbnails."""
    words = {*_words(name)}
    return bool(words) and words <= _MAPS | _THUMBS


# --- parts of a set ----------------------------------------------------------------------------------------------

BESIDE = "beside folders of parts, which alone are read; give it as src= by itself"
BESIDE_MAPS = "beside images/ and annotations/, which alone are read; give it as src= by itself"
OTHER_PART = "of another part; split= picks the part"


def _role(name: str) -> tuple[str, tuple[str, ...]] | None:
    """The part that a folder's name says ("train", "val", "test"), and its other words; None if not exactly one."""
    words = _words(name)
    roles = [word for word in words if word in _ROLES]
    roles = roles[:1] if [_ROLES[word] for word in roles] == ["train", "val"] else roles  # train_val_images
    return (_ROLES[roles[0]], tuple(word for word in words if word not in _ROLES)) if len(roles) == 1 else None


def is_part(name: str) -> bool:
    """Whether a folder's name says that it is a part of a set, such as `train2017`."""
    return _role(name) is not None


def parts_of(names: Iterable[str]) -> dict[str, str]:
    """The folders among `names` that are parts, with what they are: "train", "val" or "test".

    Folders are parts if one says train and one, with the same other words (`seg_train`, `seg_test`), says val or test.
    """
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        if found := _role(name):
            groups.setdefault(found[1], {})[name] = found[0]
    whole = {
        words: parts for words, parts in groups.items() if "train" in parts.values() and len({*parts.values()}) > 1
    }
    photos = [parts for words, parts in whole.items() if not {*words} & _MAPS]  # not train_masks, test_masks
    return {name: role for parts in photos or whole.values() for name, role in parts.items()}


def of_split(parts: dict[str, str], split: str) -> list[str]:
    """The folders of a split: of this name, else of this part; val and test stand for each other.

    Raises UserError if there are none.
    """
    if exact := [name for name in parts if name.casefold() == split.casefold()]:
        return exact
    role = (_role(split) or ("", ()))[0]
    for wanted in {"train": ("train",), "val": ("val", "test"), "test": ("test", "val")}.get(role, ()):
        if found := [name for name, part in parts.items() if part == wanted]:
            return found
    raise UserError(f"has the parts {', '.join(sorted(parts))}; split={split} is none of them")


# --- label maps beside photos ------------------------------------------------------------------------------------

MAP = "a label map, mask, depth map or thumbnail of a photo, by its name"
FURTHER = "a further image of the same name in a tar; image_key= chooses"
REPLACED = "comes again later in its tar; the last one is read, as in unpacking"
MAYBE_MAPS = "has a name of label maps, but not of photos beside it; it is read"
MOST_PARTNERS = 64  # folders that are compared with one of label maps
BOTH_READ = "has the name of another image but for its extension; both are read (image_key= chooses one)"


class Subject(NamedTuple):
    """What an image shows, and which kind of picture of it the words at the end of the name say."""

    name: str
    kind: str  # "photo" (x, x_rgb), "map" (x_mask, x.depth, x_gtFine_labelIds) or "thumbnail"


def subject(stem: str) -> Subject:
    """The subject of an image by its name without extension."""
    kind, rest = "photo", stem.replace("leftImg8bit", "rgb")  # Cityscapes
    while found := re.fullmatch(r"(.+?)[._ -]+([^\W\d_]+)(?:[._ -]?\d{1,2})?", rest):
        words = set(_words(found[2]))
        said = "map" if words <= _MAPS else "thumbnail" if words <= _THUMBS else "photo" if words <= _COLOUR else ""
        if not said:
            break
        kind, rest = said if kind == "photo" else kind, found[1]
    return Subject(rest, kind)


def split_key(name: str) -> tuple[str, str]:
    """The key of a member in WebDataset (its path up to the first dot of the file name), the rest in small letters."""
    start = name.rfind("/") + 1
    stem, _, extension = name[start:].partition(".")
    return name[:start] + stem, extension.lower()


def stem_of(name: str) -> tuple[str, str]:
    """A file name without its extension, and the extension in small letters."""
    stem, dot, extension = name.rpartition(".")
    return (stem, extension.lower()) if dot else (name, "")


class Maps(NamedTuple):
    """Files or folders that are label maps or thumbnails of photos by their names."""

    found: list[str]  # the photos are beside them
    doubtful: list[str]  # the names alone say so


def map_folders(
    path: str, names: Sequence[str], images_in: Callable[[str], tuple[str, Sequence[str]]], beside: Sequence[str] = ()
) -> Maps:
    """The folders `names` of a folder `path` that hold label maps or thumbnails of the photos beside them or above.

    Such a folder's name says so (`masks`, `SegmentationClass`, `train_masks`, `thumbs`), the name of a partner says
    photos (`images`), a part (`train`) or the same without the word (`x_masks` of `x`), and both hold files of one
    subject. Where no further folder holds images, plain names (`images`, `masks`) are enough, and only there words that
    may be classes (`label`) count.

    Args:
        path: ends with a slash, or is empty.
        images_in: path and file names of the first folder with images, from a path on; of `path` itself only its own.
        beside: further partners, paths of folders of photos.
    """
    words_of = {name: _words(name) for name in names}
    marked = [name for name, words in words_of.items() if _of_maps(words)]
    if not marked:
        return Maps([], [])

    @lru_cache(4 * MOST_PARTNERS)
    def subjects_in(place: str) -> tuple[str, set[str]]:
        where, files = images_in(place)
        # Without the part that some names end with (`21_training`).
        return where, {_ROLE_AT_END.sub("", subject(stem_of(file)[0]).name) for file in files}

    photos = [name for name, words in words_of.items() if {*words} & _COLOUR][:MOST_PARTNERS]
    parts = [name for name in names if _role(name)][:MOST_PARTNERS]
    plain = [*beside, *(path + name for name in photos if says_photos(name))]
    further = [name for name in names if not _of_maps(words_of[name]) and name not in (*photos, *parts)]
    alone = not any(subjects_in(path + name)[1] for name in further[:MOST_PARTNERS])
    by_words = {words: name for name, words in words_of.items()}
    result = Maps([], [])
    for name in marked:
        where, shown = subjects_in(path + name)
        if not shown:
            continue
        maps = _of_maps(words_of[name])
        rest = tuple(word for word in _split_ends(words_of[name]) if word not in maps | {"class", "object"})
        same = [by_words[rest]] if rest in by_words and rest else []
        partners = [*(path + s for s in [*same, *photos, *parts] if s != name), *beside]
        inner = where.removeprefix(path + name)
        shares = any(
            shown & subjects_in(place)[1]
            for place in dict.fromkeys([path, *(place for s in partners for place in (s + inner, s))])
        )
        certain = bool(rest) or not maps <= CLASSES_TOO
        if (shares and (certain or alone)) or (alone and certain and not rest and {*plain} - {path + name}):
            result.found.append(name)
        elif shares or {*partners} & {*beside, *(path + s for s in photos)}:
            result.doubtful.append(name)
    return result


def _split_ends(words: tuple[str, ...]) -> tuple[str, ...]:
    """The words of a folder's name, the last in two if it ends like `trainannot`."""
    tail = next((tail for tail in ("annot", "masks", "mask") if words and words[-1].endswith(tail)), "")
    return tuple(word for word in (*words[:-1], words[-1].removesuffix(tail), tail) if word) if tail else words


def _of_maps(words: tuple[str, ...]) -> set[str]:
    """Those of a folder's words that say label maps or thumbnails."""
    return {*_split_ends(words)} & (_MAPS | _THUMBS)


def maps_among(names: Iterable[str]) -> Maps:
    """The files of one folder that are label maps or thumbnails of others in it, by the words at their ends.

    Doubtful are files in formats of label maps that lie among photos, but have none of their own.
    """
    of: dict[str, list[tuple[str, str]]] = {}
    kinds = set[str]()
    for name in names:
        found = subject(stem_of(name)[0])
        kinds.add(found.kind)
        of.setdefault(found.name, []).append((found.kind, name))
    result = Maps([], [])
    if kinds <= {"photo"}:
        return result
    for group in of.values():
        if any(kind == "photo" for kind, _ in group):
            result.found.extend(name for kind, name in group if kind != "photo")
        elif "photo" in kinds:
            result.doubtful.extend(name for kind, name in group if kind == "map" and not is_lossy(name))
    return result


def image_rank(extension: str, image_key: Sequence[str] = ()) -> tuple[int, ...] | None:
    """The order in which members of one sample count as its image, the smallest first; None: it is no image.

    `extension`: all that follows the key, such as `jpg` or `mask.png`. With `image_key` (extensions) only these count,
    in this order. Else photos come before label maps and thumbnails (`mask.png`, `depth.png`, `thumb.jpg`), plain
    extensions before dotted ones, and lossy formats before lossless ones, in which label maps are stored.
    """
    if image_key:
        return (image_key.index(extension),) if extension in image_key else None
    *words, last = extension.split(".")
    kind = subject(".".join(["x", *words])).kind
    return (kind != "photo", bool(words), last not in _LOSSY)


def twins(names: Iterable[str], image_key: Sequence[str] = ()) -> dict[str, list[str]]:
    """Files of one folder that differ by their image extensions alone: the one that is the image -> the others."""
    of: dict[str, list[str]] = {}
    for name in names:
        stem, extension = stem_of(name)
        if extension in IMAGE_EXTENSIONS:
            of.setdefault(stem, []).append(name)
    found: dict[str, list[str]] = {}
    for group in of.values():
        if len(group) > 1:
            first, *others = sorted(group, key=lambda name: (image_rank(stem_of(name)[1], image_key) or (9,), name))
            found[first] = others
    return found


def is_lossy(name: str) -> bool:
    """Whether a file's format is one of photos, in which no label map is stored."""
    return stem_of(name)[1] in _LOSSY


def is_grey_png(head: bytes) -> bool:
    """Whether a file that begins so is a PNG of grey values or a palette, of at most 8 bits, as label maps are."""
    return head[:16] == b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" and head[24] <= 8 and head[25] in (0, 3)

"""Models of the Hugging Face Hub, hf://OWNER/NAME[@REVISION][/FILE] or OWNER/NAME, as local files in its own cache."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

from beit_pretrain.errors import UserError, first_line
from beit_pretrain.fileio import expanded

SETTINGS_FILES = ("config.json", "preprocessor_config.json")
MODEL_FILES = (*SETTINGS_FILES, "model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
# Fetched only where a repository has no safetensors: they are pickles, and as large again.
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin")
FILE_ENDINGS = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".json", ".onnx", ".msgpack", ".h5", ".npz")

NAME = r"[\w-][\w.-]*"
PLAIN = re.compile(rf"{NAME}/{NAME}")
ADDRESS = re.compile(rf"(?P<repository>{NAME}/{NAME})(?:@(?P<revision>refs/[\w-]+/[^/]+|[^/]+))?(?:/(?P<file>.+))?")
OTHER_KINDS = ("datasets", "spaces", "buckets", "kernels")
OWN_COPY = "download it where there is a network (`hf download {0}`), and give the folder"


class Place(NamedTuple):
    """Where something is on the Hub."""

    repository: str  # OWNER/NAME
    revision: str | None  # None = the newest of the main branch
    file: str | None  # None = the model as a whole


def local_copy(source: str | Path, revision: str | None = None, names: Sequence[str] = MODEL_FILES) -> Path:
    """A local path for `source`: a file or folder that exists, as it is, or what is fetched from the Hub.

    Args:
        source: a path (also with ~), `hf://OWNER/NAME[@REVISION][/FILE]`, or `OWNER/NAME`.
        revision: branch, tag or commit on the Hub; of no meaning for a path.
        names: file names, or patterns of them, that are fetched of a repository; of an address with a FILE, that file
            and the settings beside it are.

    The cache, HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are those of huggingface_hub. Raises UserError, in one
    line, for what is neither here nor there, or cannot be fetched.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise UserError(f"a path, or OWNER/NAME on the Hub, is needed; got {source!r:.60}")
    text = os.fspath(source)
    if not is_address(text) and os.path.exists(path := expanded(text)):
        return Path(path)
    place = parse(text, revision)
    if place.file is None:
        folder = snapshot(text, place, names)
        wanted = [name for name in names if name.endswith(".safetensors")]
        if wanted and not any(folder.glob("*.safetensors")):
            folder, wanted = snapshot(text, place, PICKLES), [*wanted, *PICKLES]
        wanted = wanted or list(names)
        if not any(any(folder.glob(name)) for name in wanted):
            raise UserError(f"{text}: the repository {place.repository} has none of {', '.join(wanted)}")
        return folder
    beside = os.path.dirname(place.file)
    found = snapshot(text, place, [place.file, *(os.path.join(beside, name) for name in SETTINGS_FILES)]) / place.file
    if not found.is_file():
        raise UserError(f"{text}: the repository {place.repository} has no file {place.file}")
    return found


def is_address(source: str | Path) -> bool:
    """Whether it is written as an address of the Hub; a Path has lost one of its slashes."""
    return os.fspath(source).startswith("hf:")


def parse(text: str, revision: str | None) -> Place:
    """The parts of an address or id. Raises UserError if it is none."""
    if not is_address(text):
        if not PLAIN.fullmatch(text) or text.lower().endswith(FILE_ENDINGS):
            raise UserError(
                f"{text or repr(text)} does not exist here, and is no id of a model on the Hub (OWNER/NAME)"
            )
        return Place(text, revision, None)
    body = text.removeprefix("hf:").strip("/")
    found = ADDRESS.fullmatch(body)
    if body.split("/")[0] in OTHER_KINDS or not found or ".." in body.split("/"):
        raise UserError(f"{text} is no address of a model on the Hub: hf://OWNER/NAME[@REVISION][/FILE]")
    own = unquote(found["revision"]) if found["revision"] else None
    if own and revision and own != revision:
        raise UserError(f"{text} names the revision {own}, but revision={revision} is asked for")
    return Place(found["repository"], own or revision, found["file"])


def snapshot(text: str, place: Place, names: Sequence[str]) -> Path:
    """The folder with the files of `names` of a repository, fetched or from the cache. Raises UserError."""
    from huggingface_hub import constants, errors, snapshot_download

    said = f"{text} cannot be fetched" if is_address(text) else f"{text} is no path here, and cannot be fetched"
    at = f" at revision {place.revision}" if place.revision else ""
    try:
        return Path(snapshot_download(place.repository, revision=place.revision, allow_patterns=list(names)))
    except errors.GatedRepoError:
        page = f"{constants.ENDPOINT}/{place.repository}"
        why = f"it is gated: accept its terms at {page}, and set HF_TOKEN (or `hf auth login`)"
    except errors.RepositoryNotFoundError:
        why = "there is no such repository, or a private one: check the name, or set HF_TOKEN (or `hf auth login`)"
    except errors.RevisionNotFoundError:
        why = "there is no such revision"
    except Exception as error:  # the classes of HTTP libraries differ between versions of huggingface_hub
        cause = error.__cause__ or error
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set, and its cache does not have it; unset it, or "
        else:
            reason = first_line(cause)
            why = f"{constants.ENDPOINT} gave nothing, and the cache does not have it ({reason[:200]}); "
        why += OWN_COPY.format(place.repository)
    raise UserError(f"{said} from the Hub{at}: {why}") from None

"""The table files of a data set on the Hugging Face Hub: hf://datasets/OWNER/NAME[@REVISION][/FOLDER][?split=NAME].

One call lists the repository. Of `configs:` in the header of its README.md the files of the part are taken; else their
names say the part (table_files.py). Endpoint and token are those of `huggingface_hub`: HF_ENDPOINT, HF_TOKEN.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qs

import yaml

from beit_pretrain.data.remote_listing import tried
from beit_pretrain.data.settings import RemoteOptions
from beit_pretrain.data.storage import Remote, without_secrets
from beit_pretrain.data.table_files import are_tables, choose, parts_of_split
from beit_pretrain.data.transports import file_system
from beit_pretrain.errors import UserError

README_LIMIT = 1 << 24  # bytes


class HubFile(NamedTuple):
    """A file of a repository."""

    name: str  # its path in the repository
    size: int  # bytes
    identity: str  # changes when the content does
    sha256: str  # of the content; "" = not known


def address_and_split(source: str, split: str | None) -> tuple[str, str | None]:
    """A source without its query, and the part that it names there, which goes before `split`."""
    address, _, query = source.partition("?")
    named = parse_qs(query).get("split")
    return address.rstrip("/"), named[0] if named else split


def hub_tables(source: str, split: str | None, retries: int, timeout: float) -> tuple[str, list[HubFile]] | None:
    """The repository's address, and the parquet files of a part in the order of their names; None if there are none.

    `source`: without a query. Raises UserError if there is no such repository, folder or part, if there are several
    subsets, or the Hub does not answer.
    """
    where = without_secrets(source)
    listed, root, folder = _listing(source, where, RemoteOptions(retries=retries, timeout=timeout))
    inside = {file.name: file for file in listed}
    if folder in inside:
        return root, listed
    if not (tables := are_tables(sorted(inside))):
        return None
    chosen = None
    if "README.md" in inside:
        chosen = _declared(_readme(Remote(root, retries, timeout)), tables, split, where)
    if chosen is None:
        start = f"{folder}/" if folder else ""
        chosen = [start + name for name in choose([name.removeprefix(start) for name in tables], split, where)]
    return root, [inside[name] for name in chosen]


def _listing(source: str, where: str, access: RemoteOptions) -> tuple[list[HubFile], str, str]:
    """The files at an address, the address of its repository, and the path in that."""
    from huggingface_hub.hf_api import RepoFile

    def listed() -> tuple[list[HubFile], str]:
        system = file_system("hf")
        place = system.resolve_path(source)
        folder = place.path_in_repo
        if place.repo_type != "dataset":
            return [], folder
        about = {"repo_type": "dataset", "revision": place.revision}
        one = folder.endswith(".parquet")
        below = os.path.dirname(folder) if one else folder
        found = system._api.list_repo_tree(place.repo_id, below or None, recursive=not one, **about)
        files = [entry for entry in found if isinstance(entry, RepoFile) and (not one or entry.path == folder)]
        return [_file(entry) for entry in files], folder

    files, folder = tried(f"{where} cannot be listed", listed, access)
    root = source.removesuffix(f"/{folder}") if folder else source
    return files, root, folder


def _file(entry: Any) -> HubFile:
    return HubFile(entry.path, entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else "")


def _readme(remote: Remote) -> str:
    return remote.read("README.md", README_LIMIT).decode("utf-8", "replace")


def _declared(readme: str, tables: Sequence[str], split: str | None, where: str) -> list[str] | None:
    """The files of a part as the README's header declares them; None if it does not, in a way known here."""
    try:
        head = readme.split("---\n", 2)
        configs = yaml.safe_load(head[1])["configs"] if len(head) == 3 and not head[0].strip() else []
        found = {
            str(config["config_name"]): (_parts(config["data_files"]), config.get("default")) for config in configs
        }
    except (yaml.YAMLError, KeyError, TypeError, ValueError, AttributeError):
        return None
    if not found:
        return None
    own = [name for name, (_, default) in found.items() if default or name == "default"]
    if len(found) > 1 and len(own) != 1:
        shown = ", ".join([*found][:20])
        raise UserError(f"{where} has the subsets {shown}; add the folder of one to the address")
    patterns = found[own[0] if own else next(iter(found))][0]
    parts = {part: [name for name in tables if any(_matches(name, p) for p in of)] for part, of in patterns.items()}
    return parts_of_split(parts, split, where) if all(parts.values()) else None


def _parts(data_files: Any) -> dict[str, list[str]]:
    """Patterns of files by part; "train" for those that declare none."""
    if isinstance(data_files, str):
        return {"train": [data_files]}
    if isinstance(data_files, dict):
        return {str(part): [of] if isinstance(of, str) else list(of) for part, of in data_files.items()}
    if all(isinstance(entry, str) for entry in data_files):
        return {"train": list(data_files)}
    return {str(e["split"]): [e["path"]] if isinstance(e["path"], str) else list(e["path"]) for e in data_files}


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern.removeprefix("./"))

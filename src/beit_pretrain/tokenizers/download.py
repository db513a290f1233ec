"""The verb `download`: downloads OpenAI's dVAE into a folder, checks it and converts it to safetensors.

The files are pickles. Each is read once, without executing its content; afterwards only the safetensors are used. Size
and SHA-256 of both are recorded at first use (`weights.json`) and checked from then on.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from beit_pretrain import fileio
from beit_pretrain.data import storage
from beit_pretrain.data.storage import DownloadError, without_secrets
from beit_pretrain.errors import UserError
from beit_pretrain.tokenizers.settings import DownloadSettings
from beit_pretrain.tokenizers.tokenizer import RECORD, build, pickled_tensors, read_verified, recorded, safe_tensors

KINDS = ("encoder", "decoder")


def download(cfg: DownloadSettings) -> None:
    """Download the encoder and the decoder if missing, and convert them if not yet converted."""
    out = Path(cfg.out)
    addresses = _addresses(cfg)
    ready = [_is_ready(out, kind) for kind in KINDS]  # check both, even if the first is not ready
    if not all(ready):
        out.mkdir(parents=True, exist_ok=True)
        message = f"{out}: waiting for another process that writes there"
        with fileio.exclusive_lock(out / ".fetch.lock", message, wait=True, remove=True):
            for kind in KINDS:
                if not _is_ready(out, kind):  # another process may have come first
                    _obtain(out, kind, addresses, cfg)
                    _convert(out, kind)
    sizes = {name: entry["bytes"] for name, entry in recorded(out).items() if name.endswith(".safetensors")}
    print("\n".join(f"{out / name}: {size:,} bytes, as recorded in {RECORD}" for name, size in sorted(sizes.items())))
    print(f"use them with tokenizer.path={out}")


def _addresses(cfg: DownloadSettings) -> dict[str, str]:
    """The address of each kind's pickle, from `src` or from the settings `encoder` and `decoder`."""
    if cfg.src == "openai":
        return {kind: getattr(cfg, kind) for kind in KINDS}
    if re.match(r"[a-z0-9]+://", cfg.src):
        return {kind: f"{cfg.src.rstrip('/')}/{kind}.pkl" for kind in KINDS}
    folder = Path(cfg.src)
    lacking = [f"{kind}.pkl" for kind in KINDS if not (folder / f"{kind}.pkl").is_file()]
    if lacking:
        raise UserError(f"src={cfg.src} holds no {' and no '.join(lacking)}")
    return {kind: (folder / f"{kind}.pkl").resolve().as_uri() for kind in KINDS}


def _is_ready(folder: Path, kind: str) -> bool:
    """Whether the safetensors are there, recorded and unchanged. Raises UserError if a recorded file has changed."""
    known = recorded(folder)
    there = [name for name in (f"{kind}.pkl", f"{kind}.safetensors") if name in known and (folder / name).exists()]
    for name in there:
        read_verified(folder / name)
    return f"{kind}.safetensors" in there


def _obtain(out: Path, kind: str, addresses: dict[str, str], cfg: DownloadSettings) -> None:
    """Download the pickle if it is missing, and record it."""
    file, url = out / f"{kind}.pkl", addresses[kind]
    shown = without_secrets(url)
    known = recorded(out).get(file.name)

    def check(partial: Path) -> None:
        data = partial.read_bytes()
        build(pickled_tensors(data, kind, shown), kind, shown)
        if known and hashlib.sha256(data).hexdigest() != known["sha256"]:
            raise UserError(f"{shown} is not the {file.name} recorded in {out / RECORD}; delete that file to accept it")

    there = file.exists()
    try:
        storage.download(url, file, check=check, timeout=cfg.timeout, attempts=cfg.attempts)
    except DownloadError as error:
        wanted = " and ".join(without_secrets(addresses[k]) for k in KINDS if not (out / f"{k}.pkl").exists())
        raise UserError(
            f"{error}; without a network: download {wanted} on another machine, put what you got into {out} here, "
            f"and run the same command again"
        ) from error
    if not there:
        _record(out, file.name, file.read_bytes(), shown)


def _convert(folder: Path, kind: str) -> None:
    """Write the pickle's tensors as safetensors; read them back and compare before the file gets its name."""
    source, file = folder / f"{kind}.pkl", folder / f"{kind}.safetensors"
    data = read_verified(source)
    tensors = {name: tensor.contiguous() for name, tensor in pickled_tensors(data, kind, source).items()}
    build(tensors, kind, source)  # raises UserError for another network's
    if source.name not in recorded(folder):
        _record(folder, source.name, data, "put there by hand")
    with fileio.atomic_path(file, durable=True) as temporary:
        packed = safetensors.torch.save(tensors, metadata={"format": "pt"})
        temporary.write_bytes(packed)
        if not _same(tensors, safe_tensors(temporary.read_bytes(), kind, file)):
            raise UserError(f"{file}: what was written is not what {source} holds; nothing was kept")
    _record(folder, file.name, packed, source.name)


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether names, types, shapes and every bit agree."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and torch.equal(a[name].flatten().view(torch.uint8), b[name].flatten().view(torch.uint8))
        for name in a
    )


def _record(folder: Path, name: str, data: bytes, source: str) -> None:
    """Add a file's size and SHA-256 to the folder's record."""
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "source": source}
    record = recorded(folder) | {name: entry}
    fileio.atomic_write(folder / RECORD, json.dumps(record, indent=2) + "\n", durable=True)

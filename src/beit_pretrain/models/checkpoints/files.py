"""Reads files of tensors strictly, without unrestricted unpickling; writes checkpoints atomically."""

from __future__ import annotations

import argparse
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from safetensors import safe_open
from torch import Tensor, nn

from beit_pretrain import fileio
from beit_pretrain.errors import UserError, first_line
from beit_pretrain.models.checkpoints.hub import is_address, local_copy

Module = TypeVar("Module", bound=nn.Module)
KINDS = {
    "mim": "a pre-trained backbone with its token head",
    "classifier": "a fine-tuned classifier",
    "segmenter": "a segmentation model",
    "probe": "linear probes",
    "tokenizer": "a tokenizer (dVAE)",
}


def read(path: str | Path) -> dict:
    """The dictionary in a torch file, read with `weights_only=True`. Raises UserError for anything else."""
    path = existing(path)
    try:
        # Training checkpoints of the authors' scripts hold their arguments: a Namespace is data and runs nothing.
        # Without warnings about pickle protocols, when a file is refused anyway.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged, foreign and hostile files raise many things
        raise UserError(f"{path} cannot be read as a checkpoint: {_why(path, error)}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def read_tensors(path: str | Path) -> tuple[dict, dict]:
    """(content, our entry in a safetensors header) of a torch or safetensors file, told apart by their first bytes.

    Raises UserError for anything else.
    """
    path = existing(path)
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:9] != b"{":
        return read(path), {}
    try:
        with safe_open(path, framework="pt") as file:
            said = (file.metadata() or {}).get("beit_pretrain", "{}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        known = json.loads(said)
    except Exception as error:  # safetensors' own, and broken JSON
        raise UserError(f"{path} cannot be read as safetensors: {first_line(error)[:160]}") from error
    return tensors, known if isinstance(known, dict) else {}


def existing(path: str | Path) -> Path:
    """The path of an existing file, or of one on the Hub. Raises UserError, with a guess of what was meant."""
    path = local_copy(path) if is_address(path) else Path(path)
    if path.is_dir():
        found = sorted(
            [*path.glob("*.ckpt"), *path.glob("checkpoints/*.ckpt")], key=lambda file: file.name != "last.ckpt"
        )
        hint = f"; did you mean {found[0]}?" if found else ""
        raise UserError(f"{path} is a folder, a checkpoint file is needed{hint}")
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    return path


def _why(path: Path, error: Exception) -> str:
    """Why a file is refused, without torch's own message, which advises to unpickle freely."""
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is the pointer that git-lfs leaves in place of a file"
    if start.lstrip()[:1] == b"<":
        return "it is a web page"
    if found := re.search(r"(?:GLOBAL|global:?) ([\w.]+\.[\w.]+)", str(error)):
        return f"it holds code or objects ({found[1]}), not only tensors; nothing of it was executed"
    if path.suffix == ".onnx":
        return "an ONNX graph is for running elsewhere; give the checkpoint that it was exported from"
    if start[:2] == b"PK" or "PytorchStreamReader" in str(error):
        return "it is damaged or incomplete"
    return "it is no file of torch or safetensors, or damaged"


def read_own(path: str | Path, kind: str) -> tuple[dict, dict[str, Tensor], dict]:
    """(arguments of the network, its state dict, our whole entry) of a checkpoint written by `fit`.

    Raises UserError if `fit` did not write the file, or if it holds something else than `kind`.
    """
    content = read(path)
    about = content.get("beit_pretrain")
    if not isinstance(about, dict) or "state_dict" not in content:
        entry = next((name for name in ("model", "module", "state_dict") if isinstance(content.get(name), dict)), None)
        what = f"a torch checkpoint with the entry '{entry}'" if entry else listed_keys(content)
        raise UserError(f"{path} was not written by beit_pretrain fit ({what})")
    if about.get("kind") != kind:
        raise UserError(f"{path} holds {_described(about.get('kind'))}; {_described(kind)} is needed here")
    if not isinstance(about.get("model"), dict):
        raise UserError(f"{path} does not say how its network is built (beit_pretrain.model is missing)")
    state = {name.removeprefix("model."): tensor for name, tensor in content["state_dict"].items()}
    return dict(about["model"]), state, about


def _described(kind: Any) -> str:
    return KINDS.get(kind, f"a checkpoint of kind '{kind}'")


def rebuild(
    build: Callable[..., Module], path: str | Path, kind: str, computed: Iterable[str] = ()
) -> tuple[Module, dict]:
    """The frozen network of a checkpoint, in eval mode, and our entry. Raises UserError as `read_own`.

    `computed` names tensors that `build` computes, for example for another image size: the file's are not loaded.
    """
    config, state, about = read_own(path, kind)
    try:
        model = build(**config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} describes a network that this version cannot build: {error}") from error
    state |= {name: model.state_dict()[name] for name in computed}
    load_exactly(model, state, path)
    return model.eval().requires_grad_(False), about


def listed_keys(content: dict) -> str:
    """The first keys of a dictionary, for messages."""
    keys = sorted(map(str, content))
    return f"its keys are {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}" if keys else "it is empty"


def load_exactly(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """`load_state_dict` that raises UserError, in one line with every name, if a name or a shape differs."""
    check_fit(model.state_dict(), state, source)
    model.load_state_dict(state)


def check_fit(expected: dict[str, Tensor], state: dict[str, Tensor], source: str | Path) -> None:
    """Raise UserError with the sorted names that are missing, left over, or of another shape."""
    parts = {
        "missing": compact(expected.keys() - state.keys()),
        "unexpected": compact(state.keys() - expected.keys()),
        "of another shape": ", ".join(
            f"{name} {tuple(state[name].shape)} for {tuple(expected[name].shape)}"
            for name in sorted(expected.keys() & state.keys())
            if expected[name].shape != state[name].shape
        ),
    }
    if any(parts.values()):
        named = "; ".join(f"{what}: {names}" for what, names in parts.items() if names)
        raise UserError(f"{source} does not fit this network ({named})")


def compact(names: Iterable[str]) -> str:
    """Sorted names in one line, those of consecutive blocks as one: blocks.0-11.attn.q_bias."""
    blocks: dict[tuple[str, str], set[int]] = {}
    for name in names:
        found = re.fullmatch(r"(.*?\bblocks\.)(\d+)(\..*)", name)
        head, number, tail = found.groups() if found else (name, "", "")
        blocks.setdefault((head, tail), set()).update([int(number)] if number else [])
    lines = []
    for (head, tail), numbers in sorted(blocks.items()):
        firsts = sorted(n for n in numbers if n - 1 not in numbers)
        lasts = sorted(n for n in numbers if n + 1 not in numbers)
        spans = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(firsts, lasts, strict=True))
        lines.append(f"{head}{spans}{tail}")
    return ", ".join(lines)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file, flushes it to disk and renames it, so that no file is incomplete."""

    @contextmanager
    def target(self, file: BinaryIO) -> Iterator[Any]:
        """What `torch.save` writes to, for as long as the file is open."""
        yield file

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with fileio.atomic_path(path) as temporary:
                with temporary.open("wb") as file, self.target(file) as target:
                    torch.save(checkpoint, target)
                    fileio.flush(file)
                if path.name == "last.ckpt" and path.exists():
                    fileio.link(path, path.with_name("previous.ckpt"))
            fileio.flush_folder(path.parent)
        except BaseException as error:
            # torch.save turns the OSError of a full disk into a RuntimeError about its own position.
            cause = error if isinstance(error, OSError) else error.__context__
            if isinstance(cause, OSError):
                before = "; the one before is intact" if path.exists() else ""
                raise UserError(f"checkpoint {path} cannot be written: {cause.strerror or cause}{before}") from error
            raise

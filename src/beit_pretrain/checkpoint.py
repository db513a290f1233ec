"""Read checkpoints: strict, never unpickling freely, and with an error that says what the file seems to be."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from beit_pretrain.errors import UserError, first_line

Module = TypeVar("Module", bound=nn.Module)
KINDS = {
    "mim": "a pre-trained backbone with its token head",
    "classifier": "a fine-tuned classifier",
    "tokenizer": "a tokenizer (dVAE)",
}
# What fine-tuning leaves behind: the token head, and the final norm, whose place the new one over the mean takes.
LEFT_BEHIND = ("mask_token", "lm_head.weight", "lm_head.bias", "norm.weight", "norm.bias")
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"


def read(path: str | Path) -> dict:
    """The dictionary in a torch file, read with `weights_only=True`. Raises UserError for anything else."""
    path = Path(path)
    if path.is_dir():
        found = sorted(path.rglob("*.ckpt"))
        hint = f"; did you mean {found[-1]}?" if found else ""
        raise UserError(f"{path} is a folder, a checkpoint file is needed{hint}")
    if not path.is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged, foreign and hostile files raise many things
        raise UserError(f"{path} cannot be read as a checkpoint: {first_line(error)[:160]}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def read_own(path: str | Path, kind: str) -> tuple[dict, dict[str, Tensor], dict]:
    """(arguments of the network, its state dict, what else the file says) of a checkpoint written by `fit`.

    Raises UserError if the file is none of ours, or holds something else than `kind`.
    """
    content = read(path)
    about = content.get("beit_pretrain")
    if not isinstance(about, dict) or "state_dict" not in content:
        raise UserError(f"{path} was not written by beit_pretrain fit ({_looks_like(content)})")
    if about.get("kind") != kind:
        raise UserError(
            f"{path} holds {KINDS.get(str(about.get('kind')), 'something else')}; {KINDS[kind]} is needed here"
        )
    if not isinstance(about.get("model"), dict):
        raise UserError(f"{path} does not say how its network is built (beit_pretrain.model is missing)")
    state = {name.removeprefix("model."): tensor for name, tensor in content["state_dict"].items()}
    return dict(about["model"]), state, about


def rebuild(build: Callable[..., Module], path: str | Path, kind: str) -> tuple[Module, dict]:
    """The frozen network of a checkpoint, in eval mode, and what else the file says. Raises UserError as `read_own`."""
    config, state, about = read_own(path, kind)
    try:
        model = build(**config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} describes a network that this version cannot build: {error}") from error
    load_exactly(model, state, path)
    return model.eval().requires_grad_(False), about


def _looks_like(content: dict) -> str:
    keys = [str(key) for key in content]
    for name in ("model", "module", "state_dict"):
        if isinstance(content.get(name), dict):
            return f"a torch checkpoint with the entry '{name}'"
    return f"its keys are {', '.join(sorted(keys)[:4])}{', ...' if len(keys) > 4 else ''}" if keys else "it is empty"


def load_backbone(classifier: nn.Module, state: dict[str, Tensor], depth: int, source: str | Path) -> None:
    """Put pre-trained weights under a new classification head (RECIPE section 5).

    The shared bias table starts every block's own. Raises UserError with the sorted names if anything but the new
    head is missing, anything but the old one is left over, or a shape differs.
    """
    state = {name: tensor for name, tensor in state.items() if name not in LEFT_BEHIND}
    table = state.pop(SHARED_TABLE, None)
    if table is not None:
        state |= {f"blocks.{i}.attn.relative_position_bias_table": table.clone() for i in range(depth)}
    own = classifier.state_dict()
    expected = {name for name in own if not name.startswith(("head.", "fc_norm."))}
    missing, unexpected = sorted(expected - state.keys()), sorted(state.keys() - expected)
    other = sorted(
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in expected & state.keys()
        if state[name].shape != own[name].shape
    )
    if missing or unexpected or other:
        parts = {"missing": missing, "unexpected": unexpected, "other shape": other}
        raise UserError(
            f"init_from={source} does not fit this network ("
            + "; ".join(
                f"{what}: {', '.join(names[:3])}, {len(names)} in all" for what, names in parts.items() if names
            )
            + "); image_size, patch_size and model must be those of its pre-training"
        )
    classifier.load_state_dict(state, strict=False)


def load_exactly(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """`load_state_dict` whose error is one line. Raises UserError if a name or a shape differs."""
    own = model.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) + sorted(
        n for n in own.keys() & state.keys() if own[n].shape != state[n].shape
    )
    if wrong:
        raise UserError(f"{source} does not fit this network: {', '.join(wrong[:3])} ({len(wrong)} tensors differ)")
    model.load_state_dict(state)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, flushes it to the disk and renames it: a name never holds half a file."""

    def save_checkpoint(self, checkpoint, path, storage_options=None) -> None:
        path = Path(path)
        temporary = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException as error:
            with suppress(OSError):
                temporary.unlink()
            # torch.save turns the OSError of a full disk into a RuntimeError about its own position.
            cause = error if isinstance(error, OSError) else error.__context__
            if isinstance(cause, OSError):
                raise UserError(f"checkpoint {path} cannot be written: {cause.strerror or cause}") from error
            raise

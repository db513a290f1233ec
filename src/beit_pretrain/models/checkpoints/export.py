"""Checkpoints in other formats: the authors' .pth, timm, Hugging Face, ONNX.

Each export is written under a temporary name, opened again by the software it is for, and succeeds only if that
software computes our numbers. The authors' format is read back by our own readers, tensor by tensor.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.models.beit import gen_relative_position_index
from torch import Tensor, nn

from beit_pretrain.errors import UserError, first_line
from beit_pretrain.fileio import atomic_path
from beit_pretrain.models.backbone import SIZES, MaskedImageModel
from beit_pretrain.models.checkpoints import hf
from beit_pretrain.models.checkpoints.formats import read_checkpoint
from beit_pretrain.models.checkpoints.hf_writer import Model, set_permissions, write_folder
from beit_pretrain.models.checkpoints.infer_architecture import TABLE
from beit_pretrain.models.checkpoints.model_card import MARK, card
from beit_pretrain.models.checkpoints.pretrained import classifier, encoder, mim, segmenter
from beit_pretrain.models.settings import ExportSettings
from beit_pretrain.models.upernet import Segmenter

SUFFIXES = {"unilm": ".pth", "timm": ".safetensors", "onnx": ".onnx", "hf": ""}
TOLERANCE = 1e-4  # of the largest output: other software sums in another order
BUILDERS: dict[str, Callable[..., Model]] = {
    "backbone": encoder,
    "mim": mim,
    "classifier": classifier,
    "segmenter": segmenter,
}


def export(cfg: ExportSettings) -> Path:
    """Write `cfg.init_from` as `cfg.out` in the format `cfg.to`. Raises UserError for what cannot be, or differs."""
    out = Path(cfg.out).absolute()
    suffix = SUFFIXES[cfg.to]
    if suffix and out.suffix != suffix:
        raise UserError(f"out={out} must end with {suffix} for to={cfg.to}")
    if not suffix and out.is_file():
        raise UserError(f"out={out} is a file; to=hf writes a folder")
    if suffix and out.is_dir():
        raise UserError(f"out={out} is a folder; to={cfg.to} writes a file")
    if out.resolve() in (Path(cfg.init_from).resolve(), Path(cfg.init_from).resolve().parent):
        raise UserError(f"out={cfg.out} is where init_from={cfg.init_from} is read from; choose another place")
    foreign = [name for name in ("config.json", "README.md") if (out / name).exists()]
    if foreign and not ((out / "README.md").exists() and MARK in (out / "README.md").read_text(errors="replace")):
        raise UserError(f"out={cfg.out} has a {foreign[0]} that no export wrote; choose another folder")
    source = read_checkpoint(cfg.init_from)
    if source.kind in ("backbone", "segmenter") and cfg.to != "hf":
        what = "a segmentation model" if source.kind == "segmenter" else "a backbone without a head"
        raise UserError(f"{cfg.init_from} is {what}; it can be written with to=hf alone")
    drop = source.architecture.get("drop_path_rate", 0.0)  # idle here, but part of what the files say
    model = BUILDERS[source.kind](source, cfg.image_size, drop_path_rate=drop)
    write: Callable[[Model, Path], str] = {"unilm": to_unilm, "timm": to_timm, "onnx": to_onnx, "hf": to_hf}[cfg.to]
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_path(out, suffix=suffix, last="config.json") as temporary:  # which makes a folder a model
            # Without the warnings, banners and progress bars of other libraries.
            with warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                how_to_open = write(model, temporary)
                if cfg.to == "hf":
                    (temporary / "README.md").write_text(card(model, source), "utf-8", "backslashreplace")
            set_permissions(temporary)
    except (RuntimeError, ValueError, SafetensorError) as error:  # a full disk, in the words of torch and safetensors
        if isinstance(error, UserError):
            raise
        raise UserError(f"{out} cannot be written: {first_line(error)}") from error
    print(f"wrote {cfg.out}; opened again and compared: the same numbers\n{how_to_open.format(out=cfg.out)}")
    return out


def label(model: Model) -> dict[str, Any]:
    """The metadata entry of our own files."""
    return {"kind": model.kind, "model": dict(model.config), **model.about}


def to_unilm(model: Model, path: Path) -> str:
    """The authors' format: tensors under "model", an index buffer for every table, and our metadata."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    index = gen_relative_position_index(model.grid)
    state |= {n.replace(TABLE, "relative_position_index"): index for n in list(state) if n.endswith(TABLE)}
    torch.save({"model": state, "beit_pretrain": label(model)}, path)
    same_network(model, path)
    return "load it with the authors' scripts (finetune={out}), or beit_pretrain.load_pretrained('{out}')"


def to_timm(model: Model, path: Path) -> str:
    """A safetensors file for `timm.create_model(..., checkpoint_path=)`; of a mim, only the backbone."""
    import timm

    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if isinstance(model, MaskedImageModel):
        state = {n: t for n, t in state.items() if not n.startswith(("lm_head.", "mask_token"))}
    save_file(state, path, metadata={"format": "pt", "beit_pretrain": json.dumps({**label(model), "kind": "timm"})})
    name, settings = timm_arguments(model)
    try:
        theirs: Any = timm.create_model(name, checkpoint_path=str(path), **settings).eval()
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"timm does not open the export: {first_line(error)}") from error
    image, _ = sample_inputs(model)
    with torch.no_grad():
        if isinstance(model, MaskedImageModel):
            check_same_output(model.encode(image), theirs.forward_features(image), "timm")
        else:
            check_same_output(model(image), theirs(image), "timm")
    words = "".join(f", {key}={value!r}" for key, value in settings.items())
    return f"timm.create_model('{name}', checkpoint_path='{{out}}'{words})"


def timm_arguments(model: Model) -> tuple[str, dict[str, Any]]:
    """(name of timm's model, the arguments in which ours differs from it)."""
    size = "large" if model.config["embed_dim"] == 1024 else "base"
    defaults = {"img_size": 224, "patch_size": 16, "in_chans": 3, "num_classes": 1000, "mlp_ratio": 4.0, **SIZES[size]}
    defaults |= {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "use_shared_rel_pos_bias": False}
    defaults["global_pool"] = "avg"
    ours = {name: model.config[name] for name in defaults if name in model.config}
    ours |= {"img_size": model.config["image_size"], "use_abs_pos_emb": model.config["abs_pos_emb"]}
    ours["use_rel_pos_bias"] = model.config["rel_pos_bias"] == "per_layer"
    ours["use_shared_rel_pos_bias"] = model.config["rel_pos_bias"] == "shared"
    ours |= {"num_classes": model.config.get("num_classes", 0), "global_pool": model.config.get("pool", "")}
    # The value only starts a training, the file has the real ones; create_model drops arguments that are None.
    ours["init_values"] = 0 if ours["init_values"] is None else defaults["init_values"]
    return f"beit_{size}_patch16_224", {name: value for name, value in ours.items() if value != defaults[name]}


def to_hf(model: Model, path: Path) -> str:
    """A folder for `from_pretrained`: config.json, model.safetensors, preprocessor_config.json."""
    transformers = needed("transformers")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would warn that a BeitModel does not use the head
    if model.grid[0] != model.grid[1]:
        raise UserError(
            "to=hf: transformers swaps height and width on grids that are not square; to=timm or unilm keeps them"
        )
    architecture = hf.ARCHITECTURES[model.kind]
    write_folder(model, path)
    same_network(model, path)
    theirs = getattr(transformers, architecture).from_pretrained(path).eval()
    transformers.BeitModel.from_pretrained(path)
    transformers.logging.set_verbosity(verbosity)
    image, mask = sample_inputs(model)
    with torch.no_grad():
        if isinstance(model, MaskedImageModel):
            check_same_output(model(image, mask), theirs(image, bool_masked_pos=mask).logits[mask], "transformers")
        elif model.kind == "backbone":
            check_same_output(model.forward_features(image), theirs(image).last_hidden_state, "transformers")
        else:
            ours = model(image).main if isinstance(model, Segmenter) else model(image)
            check_same_output(ours, theirs(image).logits, "transformers")
    return f"transformers.{architecture}.from_pretrained('{{out}}')"


class AllTokens(nn.Module):
    """Logits (B, N, V) of every patch: a graph's outputs have a fixed number of dimensions."""

    def __init__(self, model: MaskedImageModel):
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        return self.model.lm_head(self.model.encode(image, mask)[:, 1:])


def to_onnx(model: Model, path: Path) -> str:
    """A graph with a free batch size: image -> logits (B, classes), or image, mask -> logits (B, N, V)."""
    onnxruntime = needed("onnxruntime")
    needed("onnxscript")
    image, mask = sample_inputs(model)
    network: nn.Module = AllTokens(model).eval() if isinstance(model, MaskedImageModel) else model
    inputs = {"image": image, "mask": mask} if isinstance(model, MaskedImageModel) else {"image": image}
    torch.onnx.export(
        network,
        tuple(inputs.values()),
        str(path),
        input_names=list(inputs),
        output_names=["logits"],
        dynamic_shapes=tuple({0: torch.export.Dim("batch")} for _ in inputs),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, len(image)):  # the batch must really be free
        few = {name: tensor[:count] for name, tensor in inputs.items()}
        with torch.no_grad():
            expected = network(*few.values())
        found = session.run(None, {name: tensor.numpy() for name, tensor in few.items()})[0]
        check_same_output(expected, torch.from_numpy(found), "onnxruntime")
    return f"onnxruntime.InferenceSession('{{out}}').run(None, {{{{{', '.join(repr(n) + ': ...' for n in inputs)}}}}})"


def needed(name: str) -> Any:
    """A module that only an export needs. Raises UserError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"this export needs {name}: pip install 'beit_pretrain[export]'") from error


def sample_inputs(model: Model) -> tuple[Tensor, Tensor]:
    """Three random images and masks, the same every time."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = model.grid
    sides = (rows * model.config["patch_size"], columns * model.config["patch_size"])
    image = torch.randn(3, model.config["in_chans"], *sides, generator=generator)
    return image, torch.rand(3, rows * columns, generator=generator) < 0.4


def same_network(model: Model, path: Path) -> None:
    """Raise UserError unless we read every tensor back, bit by bit."""
    theirs = BUILDERS[model.kind](read_checkpoint(path)).state_dict()
    for name, tensor in model.state_dict().items():
        if name not in theirs or not torch.equal(theirs[name], tensor):
            raise UserError(f"the export does not read back: {name} differs")


def check_same_output(ours: Tensor, theirs: Tensor, who: str) -> None:
    """Raise UserError unless two outputs agree."""
    error = (ours - theirs).abs().max().item() / max(1.0, ours.abs().max().item())
    if not error <= TOLERANCE:
        raise UserError(f"{who} opens the export, but its outputs differ from ours by {error:.2g} of their size")

"""BEiT: self-supervised pre-training of vision transformers by masked image modelling, on PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from beit_pretrain.engine.training import Training, compose, fit
    from beit_pretrain.inference.predictor import Predictor
    from beit_pretrain.models.checkpoints.pretrained import load_pretrained

__version__ = "0.1.0"
__all__ = ["Predictor", "Training", "compose", "fit", "load_pretrained"]


def __getattr__(name: str):
    """Import the public names on first use: they need torch, which would make --help slow."""
    modules = {
        "load_pretrained": "models.checkpoints.pretrained",
        "Predictor": "inference.predictor",
        **dict.fromkeys(("Training", "compose", "fit"), "engine.training"),
    }
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{modules[name]}"), name)

"""BEiT: self-supervised pre-training of vision transformers by masked image modelling, on PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from beit_pretrain.inference.predictor import Predictor
    from beit_pretrain.library.image_processor import BeitFeatureExtractor, BeitImageProcessor
    from beit_pretrain.models.checkpoints.pretrained import load_pretrained

__version__ = "0.1.0"
__all__ = ["BeitFeatureExtractor", "BeitImageProcessor", "Predictor", "load_pretrained"]


def __getattr__(name: str):
    """Import the public names on first use: they need torch, which would make --help slow."""
    modules = {
        "BeitFeatureExtractor": "library.image_processor",
        "BeitImageProcessor": "library.image_processor",
        "Predictor": "inference.predictor",
        "load_pretrained": "models.checkpoints.pretrained",
    }
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{modules[name]}"), name)

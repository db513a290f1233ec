"""BEiT: self-supervised pre-training of vision transformers by masked image modelling, on PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from beit_pretrain.inference.predictor import Predictor
    from beit_pretrain.library.config import BeitConfig
    from beit_pretrain.library.models import (
        BeitForImageClassification,
        BeitForMaskedImageModeling,
        BeitForSemanticSegmentation,
        BeitModel,
    )
    from beit_pretrain.library.outputs import BeitModelOutputWithPooling
    from beit_pretrain.models.checkpoints.pretrained import load_pretrained

__version__ = "0.1.0"
__all__ = [
    "BeitConfig",
    "BeitForImageClassification",
    "BeitForMaskedImageModeling",
    "BeitForSemanticSegmentation",
    "BeitModel",
    "BeitModelOutputWithPooling",
    "Predictor",
    "load_pretrained",
]

_PLACES = {
    "BeitConfig": "library.config",
    "BeitForImageClassification": "library.models",
    "BeitForMaskedImageModeling": "library.models",
    "BeitForSemanticSegmentation": "library.models",
    "BeitModel": "library.models",
    "BeitModelOutputWithPooling": "library.outputs",
    "Predictor": "inference.predictor",
    "load_pretrained": "models.checkpoints.pretrained",
}


def __getattr__(name: str):
    """Import the public names on first use: they need torch, which would make --help slow."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)

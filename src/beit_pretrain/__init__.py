"""BEiT: self-supervised pre-training of vision transformers by masked image modelling, on PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from beit_pretrain.engine.training import Training, compose, fit
    from beit_pretrain.inference.predictor import Predictor
    from beit_pretrain.library.config import BeitConfig
    from beit_pretrain.library.image_processor import BeitFeatureExtractor, BeitImageProcessor
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
    "BeitFeatureExtractor",
    "BeitForImageClassification",
    "BeitForMaskedImageModeling",
    "BeitForSemanticSegmentation",
    "BeitImageProcessor",
    "BeitModel",
    "BeitModelOutputWithPooling",
    "Predictor",
    "Training",
    "compose",
    "fit",
    "load_pretrained",
]

_NAMES = {
    "engine.training": ("Training", "compose", "fit"),
    "inference.predictor": ("Predictor",),
    "library.config": ("BeitConfig",),
    "library.image_processor": ("BeitFeatureExtractor", "BeitImageProcessor"),
    "library.models": (
        "BeitForImageClassification",
        "BeitForMaskedImageModeling",
        "BeitForSemanticSegmentation",
        "BeitModel",
    ),
    "library.outputs": ("BeitModelOutputWithPooling",),
    "models.checkpoints.pretrained": ("load_pretrained",),
}


def __getattr__(name: str):
    """Import the public names on first use: they need torch, which would make --help slow."""
    module = next((module for module, names in _NAMES.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{module}"), name)

"""BEiT in Flax (nnx): reads every checkpoint that torch's networks read; needs `pip install 'beit_pretrain[flax]'`."""

from importlib import import_module

from beit_pretrain.errors import UserError

try:
    import_module("flax.nnx")
except ImportError:
    raise UserError("beit_pretrain.flax needs JAX and Flax: pip install 'beit_pretrain[flax]'") from None

from beit_pretrain.flax.networks import FlaxBeitForImageClassification, FlaxBeitForMaskedImageModeling, FlaxBeitModel
from beit_pretrain.flax.objective import masked_positions, masked_token_loss
from beit_pretrain.flax.outputs import FlaxBeitModelOutputWithPooling, FlaxMaskedLMOutput, FlaxSequenceClassifierOutput

__all__ = [
    "FlaxBeitForImageClassification",
    "FlaxBeitForMaskedImageModeling",
    "FlaxBeitModel",
    "FlaxBeitModelOutputWithPooling",
    "FlaxMaskedLMOutput",
    "FlaxSequenceClassifierOutput",
    "masked_positions",
    "masked_token_loss",
]

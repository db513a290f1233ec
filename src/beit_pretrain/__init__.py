"""Self-supervised pre-training of image transformers the BEiT way, on PyTorch Lightning."""

__version__ = "0.1.0"

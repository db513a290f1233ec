"""Reads and exports checkpoints of this project, the authors, timm and Hugging Face."""

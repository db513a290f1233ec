"""Checkpoints of everyone: read, told apart, resized, written."""

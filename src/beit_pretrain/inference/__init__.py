"""Predicts classes or label maps for images."""

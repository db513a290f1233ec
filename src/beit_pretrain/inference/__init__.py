"""Predicts classes or label maps for images, and computes their vectors."""

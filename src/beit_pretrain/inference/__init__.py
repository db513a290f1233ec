"""Predictions for images: classes and label maps."""

"""Evaluation of frozen features: linear probes and kNN of every layer."""

"""Tokenizers that exist, and tokens that are computed once."""

"""The backbone and what is put on it."""

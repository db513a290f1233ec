"""Shards, and the order in which a run reads their samples."""

"""What a run's folder says of the run: finished or not, and whether its settings are those of another call."""

from __future__ import annotations

import json
from pathlib import Path

FINISHED = "finished.json"  # of a run: written when it has done all its steps
REPLACED = "replaced.jsonl"  # of a run: images that could not be decoded

# What may differ when a run is continued: how it is executed and watched, not what it computes.
FREE_TO_CHANGE = (
    *("activation_checkpointing", "compile", "ahead", "profile", "resume", "preflight", "trainer", "logger"),
    *("batch_size", "threads", "run_dir", "timeout_minutes", "pictures", "knn", "test", "max_skipped"),
    *("log_every", "val_every", "save_every", "save_minutes", "keep_every"),
    *("data.workers", "data.val_batch", "data.cache_dir", "data.cache_gb", "data.retries", "data.timeout"),
    *("data.max_bad",),
)


def differences(old, new, path: str = "") -> list[str]:
    """Settings that differ, as "key: old -> new", less those that are free to change."""
    if path in FREE_TO_CHANGE:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for k in keys for d in differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    return [] if old == new else [f"{path}: {old} -> {new}"]


def mark_finished(folder: Path, step: int) -> None:
    """Say in a run's folder that it has done all its steps."""
    temporary = folder / f".{FINISHED}.partial"
    temporary.write_text(json.dumps({"step": step}) + "\n")
    temporary.replace(folder / FINISHED)

"""A model card (README.md) for an exported model: what it is, how it was trained, what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from beit_pretrain.engine.metrics import read_rows
from beit_pretrain.models.backbone import Classifier, MaskedImageModel
from beit_pretrain.models.checkpoints.formats import Checkpoint, sizes
from beit_pretrain.models.upernet import Segmenter

MARK = "<!-- written by beit_pretrain export -->"  # an export overwrites no other README
RECIPE = ("task", "epochs", "steps", "global_batch_size", "image_size", "optim", "mask", "regularisation", "seed")


# Class of a network -> what hubs call its task, and transformers' class.
TAGS = {
    "MaskedImageModel": ("image-feature-extraction", "BeitForMaskedImageModeling"),
    "Classifier": ("image-classification", "BeitForImageClassification"),
    "Segmenter": ("image-segmentation", "BeitForSemanticSegmentation"),
}


def card(model: MaskedImageModel | Classifier | Segmenter, source: Checkpoint) -> str:
    """Markdown with the front matter that model hubs read.

    Recipe and metrics come from the run's folder, where the checkpoint lies in one; otherwise the card says that it
    has none. Metrics are those of the checkpoint's own step.
    """
    masked = isinstance(model, MaskedImageModel)
    run = source.path.parent.parent
    settings = recipe(run / "config.yaml")
    metrics = measured(run / "metrics.csv", source.about.get("step"))
    if metrics:
        metrics += f" Images of {source.architecture['image_size']} pixels."
    head = (
        f"a token head of {model.config['vocab_size']} visual tokens"
        if masked
        else f"a classifier of {model.config['num_classes']} classes"
    )
    if isinstance(model, Segmenter):
        head = f"UPerNet for {model.config['num_classes']} classes of pixels"
    tag, opens = TAGS[type(model).__name__]
    normalised = f"mean {model.about.get('mean', [0.5] * 3)}, std {model.about.get('std', [0.5] * 3)}"
    lines = [
        "---",
        *("library_name: transformers", f"pipeline_tag: {tag}", "tags: [beit, vision]"),
        "---",
        *("", MARK, "", "# BEiT with " + head, ""),
        f"{sizes(model.config)}. Trained with beit_pretrain, after BEiT (Bao et al. 2021, arXiv 2106.08254).",
        *("", "```python", f"from transformers import BeitImageProcessor, {opens}", ""),
        *('processor = BeitImageProcessor.from_pretrained("FOLDER")', f'model = {opens}.from_pretrained("FOLDER")'),
        *("```", "", f"Images are normalised by {normalised}.", ""),
        *("## Recipe", "", settings or "Not known: the checkpoint did not lie in the folder of a run.", ""),
        *("## Measured on held-out images", "", metrics or "Nothing is on record.", ""),
        *("## Licence and data", "", "Whoever publishes this model says here what it was trained on, and its licence."),
    ]
    return "\n".join(lines) + "\n"


def recipe(config: Path) -> str:
    """The settings that matter, as YAML in a code block; empty without a config."""
    if not config.is_file():
        return ""
    try:
        said: Any = yaml.safe_load(config.read_text())
    except (yaml.YAMLError, ValueError, OSError):
        said = None
    if not isinstance(said, dict) or "task" not in said:
        return ""
    chosen = {name: said[name] for name in RECIPE if said.get(name) is not None}
    return f"```yaml\n{yaml.safe_dump(chosen, sort_keys=False, default_flow_style=None)}```"


def measured(metrics: Path, step: int | None) -> str:
    """The validation of a run after optimiser step `step` as a table; empty without one."""
    if not metrics.is_file() or step is None:
        return ""
    _, rows = read_rows(metrics)
    values = sorted((name, value) for name, value in rows.get(step, {}).items() if name.startswith("val/"))
    if not values:
        return ""
    table = [f"| {name.removeprefix('val/')} | {value:.4g} |" for name, value in values]
    return "\n".join(["| metric | value |", "|---|---|", *table, "", f"After {step} optimiser steps."])

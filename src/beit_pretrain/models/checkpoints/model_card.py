"""A model card (README.md) for an exported model: what it is, how it was trained, what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from beit_pretrain.models.backbone import Backbone
from beit_pretrain.models.checkpoints.formats import Checkpoint, sizes
from beit_pretrain.models.checkpoints.hf import ARCHITECTURES
from beit_pretrain.settings import renamed
from beit_pretrain.tables import read_rows

MARK = "<!-- written by beit_pretrain export -->"  # an export overwrites no other README
RECIPE = ("task", "epochs", "steps", "global_batch_size", "image_size", "optim", "mask", "regularisation", "seed")
# Kind of a network -> what model hubs call its task, and what is on the backbone.
KINDS = {
    "backbone": ("image-feature-extraction", "no head: features of images"),
    "mim": ("image-feature-extraction", "a token head of {vocab_size} visual tokens"),
    "classifier": ("image-classification", "a classifier of {num_classes} classes"),
    "segmenter": ("image-segmentation", "UPerNet for {num_classes} classes of pixels"),
}
CARD = """---
library_name: transformers
pipeline_tag: {tag}
tags: [beit, vision]
---

{MARK}

# BEiT with {head}

{sizes}. Trained with beit_pretrain, after BEiT (Bao et al. 2021, arXiv 2106.08254).

```python
from transformers import BeitImageProcessor, {opens}

processor = BeitImageProcessor.from_pretrained("FOLDER")
model = {opens}.from_pretrained("FOLDER")
```

Images are normalised by mean {mean}, std {std}.

## Recipe

{recipe}

## Measured on held-out images

{metrics}

## Licence and data

Whoever publishes this model says here what it was trained on, and its licence.
"""


def card(model: Backbone, source: Checkpoint) -> str:
    """Markdown with the front matter that model hubs read.

    Recipe and metrics, those of the checkpoint's own step, come from the run's folder if the checkpoint is in one.
    """
    run, half = source.path.parent.parent, [0.5] * 3
    tag, head = KINDS[model.kind]
    metrics = measured(run / "metrics.csv", source.about.get("step"))
    if metrics:
        metrics += f" Images of {source.architecture['image_size']} pixels."
    return CARD.format(
        MARK=MARK,
        tag=tag,
        head=head.format(**model.config),
        opens=ARCHITECTURES[model.kind],
        sizes=sizes(model.config),
        mean=model.about.get("mean", half),
        std=model.about.get("std", half),
        recipe=recipe(run / "config.yaml") or "Not known: the checkpoint was not in the folder of a run.",
        metrics=metrics or "Nothing is on record.",
    )


def recipe(config: Path) -> str:
    """The settings that matter, as YAML in a code block; empty without a config."""
    try:
        said: Any = yaml.safe_load(config.read_text())
    except (yaml.YAMLError, ValueError, OSError):
        said = None
    if not isinstance(said, dict) or "task" not in said:
        return ""
    said = renamed(said)
    chosen = {name: said[name] for name in RECIPE if said.get(name) is not None}
    return f"```yaml\n{yaml.safe_dump(chosen, sort_keys=False, default_flow_style=None)}```"


def measured(metrics: Path, step: int | None) -> str:
    """The validation of a run after optimiser step `step` as a table; empty without one."""
    if not metrics.is_file() or step is None:
        return ""
    values = sorted(read_rows(metrics)[1].get(step, {}).items())
    table = [f"| {name.removeprefix('val/')} | {value:.4g} |" for name, value in values if name.startswith("val/")]
    if not table:
        return ""
    return "\n".join(["| metric | value |", "|---|---|", *table, "", f"After {step} optimiser steps."])

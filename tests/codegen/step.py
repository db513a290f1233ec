"""The code of the pre-training step: backbone, loss and their gradients.

usage: sh run.sh PYTHON step.py DEPTH BIAS [BATCH] [--checkpoint] [--attention triton]
       [--deterministic] [--per-layer] [--save FOLDER]
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import report
import torch
from h100 import Program, empty, generate, to_device

from beit_pretrain.engine.settings import OptimSettings
from beit_pretrain.engine.speed import make_deterministic
from beit_pretrain.models.backbone import BIASES, MaskedImageModel
from beit_pretrain.models.blocks import attentions
from beit_pretrain.tasks.pretrain import Pretraining

WIDTH, HEADS, SIDE, PATCHES, MASKED, VOCABULARY = 768, 12, 224, 196, 75, 8192  # of the paper's base model
STEPS = 3  # a step that recompiles does so by then


class Tokenizer:
    """Only says how many tokens there are: they are an argument of the objective."""

    vocab_size, downsample, in_chans = VOCABULARY, 8, 3


def programs(depth: int, bias: str, batch: int, checkpoint: bool, attention: str) -> list[Program]:
    network = MaskedImageModel(VOCABULARY, embed_dim=WIDTH, depth=depth, num_heads=HEADS, rel_pos_bias=bias)
    network.set_grad_checkpointing(checkpoint)
    for layer in attentions(network):
        layer.kernel = attention
    module: Any = Pretraining(to_device(network), Tokenizer(), OptimSettings(lr=1e-3), (0.5,) * 3, (0.5,) * 3)
    module.compile_mode = "default"
    objective = module.maybe_compile(module.objective)
    # Images, masks, masked positions, tokens, drop path's numbers.
    arguments = (
        empty(batch, 3, SIDE, SIDE),
        empty(batch, PATCHES, dtype=torch.bool),
        empty(batch, MASKED, dtype=torch.long),
        empty(batch, PATCHES, dtype=torch.long),
        empty(batch, network.branches),
    )
    return generate(objective, *arguments, calls=STEPS)


def difference(more: dict[str, Any], fewer: dict[str, Any]) -> dict[str, Any]:
    """What the last layer added."""
    layer: dict[str, Any] = {}
    for name in ("kernels", "atomics", "forward_GB", "backward_GB", "saved_GB"):
        layer[name] = round(more[name] - fewer[name], 3)
    layer["extern"] = dict(Counter(more["extern"]) - Counter(fewer["extern"]))
    return layer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("depth", type=int, help="layers; the first and the last are special, so at least 2")
    parser.add_argument("bias", choices=BIASES)
    parser.add_argument("batch", type=int, nargs="?", default=256)
    parser.add_argument("--checkpoint", action="store_true", help="with activation checkpointing")
    parser.add_argument("--attention", choices=("sdpa", "triton"), default="sdpa")
    parser.add_argument("--deterministic", action="store_true", help="as with deterministic=true")
    parser.add_argument("--per-layer", action="store_true", help="also what one layer more costs (twice the time)")
    parser.add_argument("--save", metavar="FOLDER", help="keep the generated programs there")
    ask = parser.parse_args()
    if ask.deterministic:
        make_deterministic(on_gpu=True)
    fewer = None
    if ask.per_layer:
        fewer = report.figures(programs(ask.depth - 1, ask.bias, ask.batch, ask.checkpoint, ask.attention))
    found = programs(ask.depth, ask.bias, ask.batch, ask.checkpoint, ask.attention)
    report.show(found)
    numbers = report.figures(found)
    if fewer is not None:
        numbers["layer"] = difference(numbers, fewer)
    report.finish(found, numbers, ask.save)


if __name__ == "__main__":
    main()

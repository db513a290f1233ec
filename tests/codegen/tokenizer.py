"""The code that makes the views and the visual tokens of a batch: colour jitter and the encoder of OpenAI's dVAE.

usage: sh run.sh PYTHON tokenizer.py [BATCH] [--save FOLDER]
"""

from __future__ import annotations

import argparse
from typing import Any

import report
import torch
from dall_e.encoder import Encoder
from h100 import DEVICE, Program, empty, generate, mode

from beit_pretrain.engine.settings import OptimSettings
from beit_pretrain.models.backbone import MaskedImageModel
from beit_pretrain.tasks.pretrain import Pretraining
from beit_pretrain.tokenizers.tokenizer import OpenAITokenizer

SIDE, TOKEN_SIDE, TILES = 224, 112, 64
STEPS = 3  # a step that recompiles does so by then


def programs(batch: int) -> list[Program]:
    tokenizer = OpenAITokenizer.of(Encoder().eval().requires_grad_(False))
    with mode:
        tokenizer.to(DEVICE)  # which prepares its weights
    network = MaskedImageModel(tokenizer.vocab_size, embed_dim=64, depth=1, num_heads=1)
    module: Any = Pretraining(network, tokenizer, OptimSettings(lr=1e-3), (0.5,) * 3, (0.5,) * 3)
    module.compile_mode = "default"
    views_and_tokens = module.maybe_compile(module.image_and_tokens)
    # A batch as workers send it: bytes, channels innermost.
    byte, whole = torch.uint8, torch.long
    arguments = {
        "image": empty(batch, SIDE, SIDE, 3, dtype=byte).permute(0, 3, 1, 2),
        "token_image": empty(batch, TOKEN_SIDE, TOKEN_SIDE, 3, dtype=byte).permute(0, 3, 1, 2),
        "jitter_factors": empty(batch, 3),
        "jitter_order": empty(batch, 3, dtype=whole),
        "jitter_tiles": empty(batch, TILES, 3, dtype=byte),
        "position": empty(batch, dtype=whole),
    }
    return generate(views_and_tokens, arguments, calls=STEPS)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("batch", type=int, nargs="?", default=256)
    parser.add_argument("--save", metavar="FOLDER", help="keep the generated programs there")
    ask = parser.parse_args()
    found = programs(ask.batch)
    report.show(found)
    report.finish(found, report.figures(found), ask.save)


if __name__ == "__main__":
    main()

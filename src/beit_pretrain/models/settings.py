"""Settings of the verb `export`."""

from __future__ import annotations

from typing import Literal

from beit_pretrain.settings import PathStr, Settings, Side, about


class ExportSettings(Settings):
    """Settings of `export`."""

    defaults = "export.yaml"

    init_from: PathStr = about(
        "a checkpoint, such as runs/base_22k/checkpoints/last.ckpt, of fit or of others, or hf://OWNER/NAME"
    )
    to: Literal["unilm", "timm", "onnx", "hf"] = about(
        "unilm: the authors' .pth | timm: .safetensors | hf: a folder for from_pretrained | onnx: .onnx"
    )
    out: PathStr = about("the file to write, for hf the folder")
    image_size: Side | None = about("resize the position tables for images of this side, pixels; null = as it is")

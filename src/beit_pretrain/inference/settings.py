"""Settings of the verbs `predict` and `embed`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict

from beit_pretrain.settings import Count, Paths, PathStr, Rule, Settings, ShareAboveZero, Side, Switch, Whole, about

Layer = Annotated[Annotated[int, Strict()] | Literal["last"], Rule("a whole number, from the end if negative, or last")]
ImageScale = Annotated[float, Strict(), Field(gt=0, le=16)]


class SlidingWindow(Settings):
    """How whole images are tested."""

    defaults = "tasks/segment.yaml:test"
    positional = ("stride", "flip", "scales")

    stride: ShareAboveZero = about("step of the sliding window, as a share of its side")
    scales: Annotated[list[ImageScale], Field(min_length=1)] = about("scales of the image, whose results are averaged")
    flip: Switch = about("also average the mirrored image")


class PredictSettings(Settings):
    """Settings of `predict`."""

    defaults = "predict.yaml"

    init_from: PathStr = about("checkpoint of a fine-tuned classifier or of a segmentation model, or hf://OWNER/NAME")
    src: Paths = about("an image, a folder of images (any depth), a tar, a shard folder, or a list of these")
    out: PathStr | None = about(
        "predictions.csv (null) or predictions.jsonl; for segmentation a folder (null = predictions)"
    )
    top: Count = about("classes per image")
    batch_size: Count = about("images at once")
    map_batch_size: Count = about("the same for segmentation: 150 classes at 512 x 683 pixels take 210 MB an image")
    num_workers: Whole | None = about("processes that read and decode; null = one per 64 images, at most 8")
    threads: Count | None = about("torch threads on a CPU; null = torch's default")
    test: SlidingWindow = about("sliding windows of a segmentation model")


class EmbedSettings(Settings):
    """Settings of `embed`."""

    defaults = "embed.yaml"

    init_from: PathStr | None = about("any BEiT checkpoint: of fit, the authors' .pth, timm, a Hugging Face folder")
    src: Paths | None = about("an image, a folder of images (any depth), a tar, a shard folder, or a list of these")
    out: PathStr | None = about(
        "file of the vectors: .npy, .safetensors, .parquet or .csv; null = vectors.npy, with picture= none"
    )
    what: Literal["cls", "mean", "patches"] = about(
        "cls: [CLS] | mean: the mean of the patches | patches: every patch, (patches, width) per image"
    )
    layer: Layer = about(
        "block whose raw output is taken, without the final LayerNorm as in probe: 1 is the first, last or -1 the last"
    )
    normalise: Switch = about("scale every vector to length 1")
    dtype: Literal["float32", "float16"] = about("of the stored numbers")
    image_size: Side | None = about("side of the view, pixels; position tables are resized; null = the checkpoint's")
    batch_size: Count = about("images at once")
    num_workers: Whole | None = about("processes that read and decode; null = one per 64 images, at most 8")
    threads: Count | None = about("torch threads on a CPU; null = torch's default")
    resume: Literal["auto", "never"] = about(
        "auto: go on where the same command was stopped | never: start anew, and replace an existing file"
    )
    query: Paths | None = about("images whose nearest neighbours among the vectors are looked up")
    vectors: PathStr | None = about(
        "finished file that query= searches, instead of computing one; knows init_from, src"
    )
    neighbours: Count = about("nearest images per query")
    sheet: PathStr | None = about(
        "picture of the neighbours, with its table SHEET.csv beside it; null = FILE.nearest.png"
    )
    picture: PathStr | None = about("picture to draw of the patch features' first three principal components")
    images: Count = about("images on that picture, evenly spaced in src")
    layers: Annotated[list[Layer], Field(min_length=1)] | None = about(
        "layers on that picture; null = those at a third, two thirds and the end of the depth"
    )

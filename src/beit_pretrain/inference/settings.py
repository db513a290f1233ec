"""Settings of the verb `predict`."""

from __future__ import annotations

from beit_pretrain.inference.sliding_window import SlidingWindow
from beit_pretrain.settings import Count, Paths, PathStr, Settings, Whole, about


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

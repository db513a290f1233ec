"""Settings of the verb `predict`."""

from __future__ import annotations

from beit_pretrain.inference.sliding_window import SlidingWindow
from beit_pretrain.settings import Count, Name, Paths, Settings, Whole, about


class PredictSettings(Settings):
    """Settings of `predict`."""

    defaults = "predict.yaml"

    init_from: Name = about("checkpoint of a fine-tuned classifier or of a segmentation model")
    src: Paths = about("an image, a folder of images (any depth), a tar, a shard folder, or a list of these")
    out: Name | None = about(
        "predictions.csv (null) or predictions.jsonl; of segmentation a folder (null = predictions)"
    )
    top: Count = about("classes an image")
    batch_size: Count = about("images at once")
    map_batch_size: Count = about("the same of segmentation: 150 classes at 512 x 683 pixels take 210 MB an image")
    num_workers: Whole | None = about("processes that read and decode; null = as many as are worth it, at most 8")
    threads: Count | None = about("of torch on a CPU; null = torch's choice")
    test: SlidingWindow = about("of a segmentation model")

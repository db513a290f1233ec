"""Semantic segmentation (BEiT, section 3.2; release: `semantic_segmentation/`).

Trains on crops; tests whole images with sliding windows at several scales.

Shapes: B batch, C channels, H W pixels, K classes, S the side of the network's images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field, Strict
from torch import Tensor

from beit_pretrain.data.datamodule import SegmentationData
from beit_pretrain.data.reader import ShardReader
from beit_pretrain.data.settings import DataSettings
from beit_pretrain.engine.callbacks import ValidationPictures
from beit_pretrain.engine.settings import OptimSettings
from beit_pretrain.engine.task import Task, check_split
from beit_pretrain.errors import UserError
from beit_pretrain.evaluation.confusion import confusion, scores
from beit_pretrain.inference.settings import SlidingWindow
from beit_pretrain.inference.sliding_window import segmented, upsampled
from beit_pretrain.models.build import network
from beit_pretrain.models.checkpoints.init_from import normalisation, origin, read_source
from beit_pretrain.models.checkpoints.pretrained import segmenter
from beit_pretrain.models.drop_path import uniforms
from beit_pretrain.models.upernet import DROPOUT, Segmenter
from beit_pretrain.settings import Range, Settings, Share, ShareAboveZero, Side, Switch, Whole, about, to_dict
from beit_pretrain.tasks.common import BackboneModule, BackboneSettings, NetworkSettings, data_settings
from beit_pretrain.transforms.jitter import normalise
from beit_pretrain.transforms.segmentation import IGNORE, SegmentationEvalTransform, SegmentationTrainTransform
from beit_pretrain.visualization import grids
from beit_pretrain.visualization.overlays import comparison

AUX_WEIGHT = 0.4
PoolScale = Annotated[int, Strict(), Field(ge=1, le=2**10 - 1)]
ClassCount = Annotated[int, Strict(), Field(ge=2, le=255)]
KEEP_SEED = 0x5E6  # gives dropout other random numbers than drop path


class DecoderSettings(Settings):
    """UPerNet heads of a new segmenter. A segmenter in init_from keeps its own heads, except for `layers` if set."""

    defaults = "tasks/segment.yaml:decoder"

    layers: Annotated[list[Whole], Field(min_length=4, max_length=4)] | None = about(
        "four blocks, from 1; null = thirds and the end of the depth: 4, 6, 8, 12 of 12"
    )
    channels: Side | None = about("channels of the decoder; null = the backbone's width")
    pool_scales: Annotated[list[PoolScale], Field(min_length=1)] = about("grids of the pyramid pooling")
    aux_channels: Side | None = about("channels of the auxiliary head on the third map; null = no such head")


class SegmentDataSettings(DataSettings):
    """Images with label maps, and their transforms."""

    defaults = "data/shards.yaml tasks/segment.yaml:data"

    reduce_labels: Switch = about("ADE20K: 0 in a label map is ignored, ids shift by one | false: 0 is a class")
    resize: Range = about("range of the random resize ratio; 1 resizes the shorter side to image_size")
    max_share: ShareAboveZero = about("largest share of one class in a crop")
    flip: Share = about("probability of a horizontal flip")
    distort: Switch = about("distort brightness, contrast, saturation and hue")


class SegmentSettings(BackboneSettings):
    """Settings of semantic segmentation."""

    defaults = "fit.yaml tasks/segment.yaml"

    from_scratch: Switch = about("train the same network without a checkpoint")
    num_classes: ClassCount | None = about("number of classes; null = as in the shards' manifest")
    model: NetworkSettings
    decoder: DecoderSettings
    activation_checkpointing: Switch = about("saves most activation memory; a third slower", True)
    data: SegmentDataSettings
    test: SlidingWindow = about("how whole images are tested", True)
    num_visualizations: Whole = about("image | annotated | found rows after each validation; 0 = none", True)


class Segmentation(BackboneModule):
    """Trains a segmenter; validates on whole images, every pixel exactly once, on any number of processes."""

    kind = "segmenter"
    model: Segmenter

    def __init__(
        self,
        model: Segmenter,
        optim: OptimSettings,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int = 0,
        windows: SlidingWindow | None = None,
    ):
        super().__init__(model, optim, mean, std, seed)
        self.windows = windows or SlidingWindow()
        self.totals_shape = (model.num_classes, model.num_classes)  # the confusion matrix

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Cross-entropy per pixel, plus .4 times that of the auxiliary head."""
        target_BHW = batch["target"].long()
        maps = self.model(self.image_of(batch), self.drop_path_noise(batch), self.dropout_mask(batch["position"]))
        loss = main = pixel_loss(maps.main, target_BHW)
        if maps.auxiliary is not None:
            loss = main + AUX_WEIGHT * pixel_loss(maps.auxiliary, target_BHW)
        with torch.no_grad():
            found = upsampled(maps.main, target_BHW.shape[-2:]).argmax(1)
            counted = target_BHW != IGNORE
            hits = (found == target_BHW).sum()
        self.accumulate(loss=loss, decode_loss=main)
        self.accumulate(counted.sum().clamp(min=1), accuracy=hits / counted.sum().clamp(min=1))
        return loss

    def dropout_mask(self, position_B: Tensor) -> Tensor:
        """Dropout factors (B, F + aux), one per channel; like drop path's, they depend only on seed and position."""
        channels = self.model.channels + self.model.aux_channels
        return (uniforms(self.seed + KEEP_SEED, position_B, channels) >= DROPOUT).float() / (1 - DROPOUT)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        scales = [batch[f"scale_{i}"] for i in range(sum(name.startswith("scale_") for name in batch))]
        for number, target_HW in enumerate(batch["target"]):
            images = [scale[number] for scale in scales]
            found_HW = self.segment(images, target_HW.shape[-2:])
            self.totals += confusion(found_HW, target_HW.long(), self.model.num_classes)

    def segment(self, images: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Classes (H, W) at `size` of one image, given at several scales, each (C, h, w) uint8."""
        normalised = [normalise(image[None].float() / 255, self.mean, self.std) for image in images]
        return segmented(self.model, [normalised], [size], self.windows)[0]

    def on_validation_epoch_end(self) -> None:
        self.log_validation({**scores(self.sum_over_processes(self.totals))})


def pixel_loss(logits_BKhw: Tensor, target_BHW: Tensor) -> Tensor:
    """Mean cross-entropy over all pixels; ignored pixels count, with loss 0.

    So every pixel has the same weight in every batch and on any number of processes, as in the release's trainer.
    """
    logits = upsampled(logits_BKhw, target_BHW.shape[-2:])
    return F.cross_entropy(logits, target_BHW, ignore_index=IGNORE, reduction="sum") / target_BHW.numel()


class Segment(Task):
    """The task `segment`: semantic segmentation."""

    settings = SegmentSettings
    best = ("val/miou", "max")
    sync_batchnorm = True  # few images per GPU: batch-norm statistics over all GPUs, as in the release
    nondeterministic_on_gpu = "segmentation's resizing"
    module: Segmentation

    def __init__(self, cfg: SegmentSettings):
        super().__init__(cfg)
        source = None if cfg.from_scratch else read_source(cfg, expands_bias=True)
        mean, std = normalisation(cfg, source.about if source else {})
        self.data, names = segmentation_data(cfg, mean)
        decoder = to_dict(cfg.decoder)
        if source is None:
            model = Segmenter(len(names), decoder, **network(cfg))
        else:
            same = source.about.get("classes") in (None, names)
            drop = cfg.model.drop_path_rate
            model = segmenter(source, cfg.image_size, len(names), drop, decoder, new_head=not same)
            model.train()
        model.set_grad_checkpointing(cfg.activation_checkpointing)
        optim = cfg.optim.with_warmup_in_steps(self.data.samples, cfg.global_batch_size)
        self.module = Segmentation(model, optim, mean, std, cfg.seed, cfg.test)
        self.module.about |= {"classes": names, "reduce_labels": cfg.data.reduce_labels}
        self.origin = origin(source)
        if "val" in self.data.readers and cfg.num_visualizations:
            self.callbacks.append(ValidationPictures(self))

    def check_micro_batch(self, images: int, world: int, on_gpus: bool, given: str) -> None:
        """Counts the images of all GPUs, since `sync_batchnorm` shares their statistics."""
        if images * (world if on_gpus else 1) < 2:
            raise UserError(f"the decoder's batch norms need at least 2 images at once, not {images} ({given})")

    def masked(self, options: Any) -> Image.Image | None:
        """One row per image: image, overlay of its label map, overlay of the prediction."""
        check_split(self.data, options)
        module, dataset, rows = self.module, self.data.eval_dataset(options.split), []
        for position in range(min(options.images, dataset.order.samples)):
            sample = dataset.sample(position)
            scales = [torch.from_numpy(sample[name]).to(module.device) for name in sorted(sample) if "scale_" in name]
            target = sample["target"]
            found = module.segment(scales, target.shape).cpu().numpy().astype("uint8")
            image = grids.to_pil(scales[0] / 255).resize(target.shape[::-1], Image.Resampling.BICUBIC)
            rows.append(comparison(image, [("annotated", target), ("found", found)], module.about["classes"]))
        return grids.stack(rows)


def segmentation_data(cfg: SegmentSettings, fill: tuple[float, ...]) -> tuple[SegmentationData, list[str]]:
    """The data module and the class names. Raises UserError if the number of classes is unknown."""
    data, size = cfg.data, cfg.image_size
    reader = ShardReader(data.train)
    named = [list(folder.about.get("segmentation_classes") or []) for folder in reader.folders]
    if any(names != named[0] for names in named):
        raise UserError(f"data.train={data.train}: the label maps of these data sets have different classes")
    names = named[0] if data.reduce_labels or not named[0] else ["background", *named[0]]
    if cfg.num_classes is not None:
        if cfg.num_classes < len(names):
            raise UserError(f"num_classes={cfg.num_classes}, but {reader.folders[0]} names {len(names)} classes")
        names = [*names, *map(str, range(len(names), cfg.num_classes))]
    if len(names) < 2:
        raise UserError(f"{reader.folders[0]} does not name the classes of its label maps: num_classes=N is needed")
    common: dict[str, Any] = {"classes": len(names), "reduce_labels": data.reduce_labels, "channels": data.channels}
    crops = SegmentationTrainTransform(
        size,
        ratio=(data.resize[0], data.resize[1]),
        max_share=data.max_share,
        flip=data.flip,
        distort=data.distort,
        fill=fill,
        **common,
    )
    images = SegmentationEvalTransform(size, scales=cfg.test.scales, **common)
    return SegmentationData(train_views=crops, val_views=images, **data_settings(cfg)), names

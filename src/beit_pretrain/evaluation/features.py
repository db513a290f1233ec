"""Extracts features in one pass over the images and stores them: [CLS] and mean patch token after every block.

Shapes: n images, L layers, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from beit_pretrain.data.dataset import EvalSchedule, ShardDataset
from beit_pretrain.errors import UserError
from beit_pretrain.fileio import atomic_path
from beit_pretrain.models.backbone import FeatureExtractor, Features
from beit_pretrain.processes import end_with_parent
from beit_pretrain.transforms.jitter import normalise

CLS, AVG = 0, 1  # indices of the two vectors


class FeatureStore(NamedTuple):
    """Features (n, L, 2, D) float16 ([CLS] and mean of the patches), memory-mapped; labels (n,) int64, -1 = none."""

    features: np.ndarray
    labels: np.ndarray

    def layer(self, number: int, which: int) -> torch.Tensor:
        """Features (n, D) float32 of layer `number`, from 0; `which` is CLS or AVG."""
        return torch.from_numpy(np.array(self.features[:, number, which])).float()

    def batch(self, first: int, last: int, device: torch.device) -> Features:
        """Features of images `first` to `last` (exclusive) as a network returns them; the only patch is the mean."""
        x_BL2D = torch.from_numpy(np.array(self.features[first:last])).to(device).float()
        return Features(list(x_BL2D[:, :, CLS].unbind(1)), list(x_BL2D[:, :, AVG:].unbind(1)))


@torch.no_grad()
def extract(
    backbone: FeatureExtractor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    dataset: ShardDataset,
    folder: Path,
    name: str,
    num_workers: int = 0,
) -> FeatureStore:
    """Extract the features of every image of an evaluation data set, or load them if `folder` has them.

    Stored as float16 (11 significant bits). Raises UserError for values beyond its range (6.5e4).
    """
    file, labels_file = folder / f"{name}.npy", folder / f"{name}-labels.npy"
    if file.is_file() and labels_file.is_file():
        return FeatureStore(np.load(file, mmap_mode="r"), np.load(labels_file))
    assert isinstance(dataset.plan, EvalSchedule)
    folder.mkdir(parents=True, exist_ok=True)
    device = next(backbone.parameters()).device
    images, layers, width = dataset.plan.samples, len(backbone.blocks), int(backbone.embed_dim)
    labels = np.full(images, -1, np.int64)
    loader = DataLoader(
        dataset, batch_size=None, sampler=range(len(dataset)), num_workers=num_workers, worker_init_fn=end_with_parent
    )
    with (
        atomic_path(file) as temporary,
        tqdm(total=images, desc=f"features of {name.partition('-')[0]}", unit=" images") as bar,
    ):
        stored = np.lib.format.open_memmap(temporary, "w+", np.float16, (images, layers, 2, width))
        for batch in loader:
            image = batch["image"].to(device, non_blocking=True).float() / 255
            found = backbone(normalise(image, mean, std))
            pairs = zip(found.cls, found.patches, strict=True)
            both = torch.stack([torch.stack([cls, patches.mean(1)], 1) for cls, patches in pairs], 1)
            place = batch["position"].numpy()
            stored[place] = both.half().cpu().numpy()
            labels[place] = batch["label"].numpy()
            if not np.isfinite(stored[place]).all():
                raise UserError("features beyond the range of float16: is this a trained BEiT?")
            bar.update(len(place))
        stored.flush()
        np.save(labels_file, labels)
    return FeatureStore(np.load(file, mmap_mode="r"), labels)

"""The verb `probe`: linear probes and kNN of every layer from one pass over fixed views, as a table and a plot."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch

from beit_pretrain.data.datamodule import ClassificationData
from beit_pretrain.data.settings import RemoteOptions
from beit_pretrain.errors import UserError
from beit_pretrain.evaluation.features import AVG, CLS, FeatureStore, extract
from beit_pretrain.evaluation.knn import sweep
from beit_pretrain.evaluation.linear_probe import accuracy, train_probes
from beit_pretrain.evaluation.settings import ProbeSettings
from beit_pretrain.models.checkpoints.formats import Checkpoint, digest, read_checkpoint
from beit_pretrain.models.checkpoints.hub import is_address
from beit_pretrain.models.checkpoints.init_from import check_channels, normalisation, origin
from beit_pretrain.models.checkpoints.pretrained import features as feature_extractor
from beit_pretrain.settings import to_dict
from beit_pretrain.tables import table, write_csv
from beit_pretrain.transforms.views import ClassificationTransform
from beit_pretrain.visualization.plots import layers_plot


class LayerResult(NamedTuple):
    """Top-1 accuracy of a layer's linear probe and of its best kNN, with the settings of that kNN."""

    layer: int
    linear: float
    knn: float
    knn_pool: str
    knn_k: int
    knn_temperature: float


def probe(cfg: ProbeSettings) -> list[LayerResult]:
    """Print the table, and write `layers.csv`, `knn.csv`, `layers.png` and `probe.json` into `cfg.out`."""
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)
    source = read_checkpoint(cfg.init_from)
    size = cfg.image_size or source.architecture["image_size"]
    if not isinstance(size, int):
        raise UserError(f"init_from={cfg.init_from} is for images of {list(size)} pixels; set image_size to one number")
    check_channels(cfg, source)
    data = evaluation_data(cfg, size)
    if data.stream is not None:
        raise UserError("probe_layers reads every training image: data.order=stream, without an end, cannot be used")
    if not cfg.out and is_address(cfg.init_from):
        raise UserError(f"init_from={cfg.init_from} is on the Hub: say with out= where the results go")
    out = Path(cfg.out) if cfg.out else Path(cfg.init_from).absolute().parent / "probe"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stored = stored_features(cfg, source, size, data, out / "features", device)
    layers, sweeps = measured(cfg, stored, len(data.classes), device)
    write(out, layers, sweeps, cfg)
    if not cfg.keep_features:
        for file in (out / "features").glob("*-*.npy"):
            file.unlink()
        (out / "features").rmdir()
    return layers


def evaluation_data(cfg: ProbeSettings, size: int) -> ClassificationData:
    """Both splits in the evaluation view. Raises UserError without labels, or without held-out images."""
    if cfg.data.val is None:
        raise UserError("data.val is missing: held-out images are needed")
    views = ClassificationTransform(
        image_size=size, train=False, crop_ratio=cfg.data.crop_ratio, channels=cfg.data.channels
    )
    names = (*RemoteOptions.model_fields, "train", "val", "num_workers", "val_batch")
    settings = {name: getattr(cfg.data, name) for name in names}
    data = ClassificationData(train_views=views, val_views=views, global_batch_size=1, **settings)
    if len(data.classes) < 2:
        raise UserError(f"data.train={cfg.data.train} has {len(data.classes)} classes; probe needs at least 2")
    return data


def stored_features(
    cfg: ProbeSettings, source: Checkpoint, size: int, data: ClassificationData, folder: Path, device: torch.device
) -> dict[str, FeatureStore]:
    """Extract the features of both splits. File names hash everything that the features depend on."""
    backbone = feature_extractor(source, size).to(device).requires_grad_(False)
    mean, std = normalisation(cfg, source.about)
    print(f"probe of {origin(source)}: {len(backbone.blocks)} layers, {len(data.classes)} classes", flush=True)
    facts = {"backbone": digest(source.state), "size": size, "mean": mean, "std": std, "crop": cfg.data.crop_ratio}
    stored: dict[str, FeatureStore] = {}
    for split, limit in (("train", cfg.train_images), ("val", cfg.data.val_images)):
        all_facts = facts | {"images": [shard.sha256 for shard in data.readers[split].shards], "limit": limit}
        key = hashlib.sha256(json.dumps(all_facts, sort_keys=True).encode()).hexdigest()[:16]
        dataset = data.eval_dataset(split, images=limit)
        stored[split] = extract(backbone, mean, std, dataset, folder, f"{split}-{key}", cfg.data.num_workers)
    return stored


def measured(
    cfg: ProbeSettings, stored: dict[str, FeatureStore], classes: int, device: torch.device
) -> tuple[list[LayerResult], list[tuple]]:
    """Evaluate every layer. Returns one result per layer, and one kNN row per layer, pool, k and temperature."""
    train, val = stored["train"], stored["val"]
    probes = train_probes(train, classes, seed=cfg.seed, device=device, **to_dict(cfg.linear))
    linear = accuracy(probes, val, device)
    labelled = [(s, torch.from_numpy(s.labels >= 0)) for s in (train, val)]
    if not all(known.any() for _, known in labelled):
        raise UserError("probe needs labels: no training image, or no held-out image, has a class")
    bank_labels, labels = (torch.from_numpy(s.labels)[known].to(device) for s, known in labelled)
    layers, sweeps = [], []
    for number, share in enumerate(linear):
        rows = []
        for pool, which in (("avg", AVG), ("cls", CLS)):
            bank, queries = (s.layer(number, which)[known].to(device) for s, known in labelled)
            found = sweep(bank, bank_labels, queries, labels, classes, list(cfg.knn.ks), list(cfg.knn.temperatures))
            rows += [(number + 1, pool, k, t, hits) for (k, t), hits in found.items()]
        best = max(rows, key=lambda row: row[-1])
        layers.append(LayerResult(number + 1, share, best[4], *best[1:4]))
        sweeps += rows
    return layers, sweeps


def write(out: Path, layers: list[LayerResult], sweeps: list[tuple], cfg: ProbeSettings) -> None:
    """Write the files of a probe and print its table."""
    write_csv(out / "layers.csv", LayerResult._fields, [tuple(layer) for layer in layers])
    write_csv(out / "knn.csv", ("layer", "pool", "k", "temperature", "accuracy"), sweeps)
    said = {"init_from": str(cfg.init_from), "layers": [layer._asdict() for layer in layers]}
    (out / "probe.json").write_text(json.dumps(said, indent=2) + "\n")
    checkpoint = Path(cfg.init_from).absolute()
    name = checkpoint.parents[1].name if checkpoint.parent.name == "checkpoints" else checkpoint.stem
    curves = {"linear probe": [x.linear for x in layers], "kNN, best k": [x.knn for x in layers]}
    layers_plot({name: curves}, out / "layers.png")
    rows = [
        [str(x.layer), f"{x.linear:.2%}", f"{x.knn:.2%}", x.knn_pool, str(x.knn_k), f"{x.knn_temperature:g}"]
        for x in layers
    ]
    print(table(["layer", "linear probe", "kNN", "of", "k", "temperature"], rows))
    linear, knn = max(layers, key=lambda x: x.linear), max(layers, key=lambda x: x.knn)
    print(f"best: linear probe {linear.linear:.2%} (layer {linear.layer}), kNN {knn.knn:.2%} (layer {knn.layer})")
    print(f"wrote {out}: layers.csv, knn.csv, layers.png")

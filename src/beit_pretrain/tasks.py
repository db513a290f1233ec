"""From a composed config to what is trained: the network, its data, and the callbacks of this kind of run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from hydra.utils import instantiate
from lightning import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf

from beit_pretrain import checkpoint
from beit_pretrain.backbone import SIZES, Classifier, MaskedImageModel, patch_grid
from beit_pretrain.callbacks import MaskedPictures, OnlineKNN
from beit_pretrain.datamodule import ClassificationData, PretrainData, ShardData
from beit_pretrain.dvae import DiscreteVAE, Relaxation, TokenizerTraining
from beit_pretrain.errors import UserError
from beit_pretrain.finetune import Finetuning, Regularisation
from beit_pretrain.masking import BlockwiseMask
from beit_pretrain.optim import Optim
from beit_pretrain.pretrain import Pretraining
from beit_pretrain.reader import Access
from beit_pretrain.tokenizer import view_size
from beit_pretrain.training import TrainedModule
from beit_pretrain.views import HALF, ClassificationViews, PretrainViews


@dataclass
class Task:
    """A module with its data and the callbacks that only this kind of run has."""

    module: TrainedModule
    data: ShardData
    callbacks: list[Callback]


def pretrain_task(cfg: DictConfig) -> Task:
    """Masked image modelling."""
    grid = patch_grid(cfg.image_size, cfg.patch_size)
    tokenizer = instantiate(cfg.tokenizer)
    views = PretrainViews(
        image_size=cfg.image_size,
        token_image_size=view_size(grid, tokenizer, cfg.data.token_image_size),
        scale=tuple(cfg.data.scale),
        ratio=tuple(cfg.data.ratio),
        flip=cfg.data.flip,
        jitter=tuple(cfg.data.jitter),
        exact=cfg.data.exact,
    )
    data = PretrainData(views=views, masking=BlockwiseMask(grid, **cfg.mask), **data_settings(cfg))
    arguments = {**network(cfg, "image_size", "patch_size"), "vocab_size": tokenizer.vocab_size}
    module = Pretraining(MaskedImageModel(**arguments), tokenizer, optim(cfg, data.samples), cfg.mean, cfg.std)
    if cfg.init_from:
        arguments, state, _ = checkpoint.read_own(cfg.init_from, "mim")
        checkpoint.load_exactly(module.model, state, cfg.init_from)
    module.about = {"mean": list(cfg.mean), "std": list(cfg.std), "tokenizer": str(cfg.tokenizer.path)}
    callbacks: list[Callback] = []
    if "val" in data.readers:
        if cfg.pictures:
            callbacks.append(MaskedPictures(Path(cfg.run_dir) / "pictures", data, cfg.pictures))
        if len(data.classes) > 1:
            callbacks.append(OnlineKNN(data, **cfg.knn))
    return Task(module, data, callbacks)


def tokenizer_task(cfg: DictConfig) -> Task:
    """Training a dVAE."""
    if cfg.image_size % DiscreteVAE.downsample:
        raise UserError(
            f"image_size={cfg.image_size} is not divisible by {DiscreteVAE.downsample}, the pixels per token"
        )
    data = classification_data(cfg)
    module = TokenizerTraining(DiscreteVAE(**cfg.model), optim(cfg, data.samples), Relaxation(**cfg.relaxation))
    return Task(module, data, [])


def finetune_task(cfg: DictConfig) -> Task:
    """Classification."""
    patch_grid(cfg.image_size, cfg.patch_size)
    source = None if cfg.from_scratch else checkpoint.read_own(cfg.init_from, "mim")
    about = source[2] if source else {}
    mean, std = (tuple(cfg[name] or about.get(name) or HALF) for name in ("mean", "std"))
    data = classification_data(cfg, fill=mean)
    if data.readers["train"].classes_differ:
        raise UserError(f"data.train={cfg.data.train}: data sets of different classes cannot be fine-tuned on together")
    if len(data.classes) < 2:
        raise UserError(f"data.train={cfg.data.train} has {len(data.classes)} classes; fine-tuning needs at least 2")
    for split, reader in data.readers.items():
        if reader.without_class:
            raise UserError(
                f"data.{split} has {reader.without_class} images without a class; make shards of class folders alone"
            )
    if (cfg.regularisation.mixup or cfg.regularisation.cutmix) and cfg.batch_size % 2:
        raise UserError(f"mixup and cutmix pair images: batch_size={cfg.batch_size} must be even")
    model = Classifier(len(data.classes), **network(cfg, "image_size", "patch_size"))
    if source is not None:
        checkpoint.load_backbone(model, source[1], len(model.blocks), cfg.init_from)
    settings = optim(cfg, data.samples)
    module = Finetuning(model, settings, Regularisation(**cfg.regularisation), mean, std, cfg.seed)
    module.about = {
        "mean": list(mean),
        "std": list(std),
        "classes": list(data.classes),
        "crop_ratio": cfg.data.crop_ratio,
    }
    return Task(module, data, [])


TASKS: dict[str, Callable[[DictConfig], Task]] = {
    "pretrain": pretrain_task,
    "tokenizer": tokenizer_task,
    "finetune": finetune_task,
}


def data_settings(cfg: DictConfig) -> dict:
    """The settings that every data module takes, from the group `data`."""
    names = ("train", "val", "workers", "window", "streams", "val_batch", "val_images", "per_class", "weights")
    data = plain(cfg.data)
    return {
        "global_batch": cfg.global_batch,
        "seed": cfg.seed,
        "access": Access(**{field.name: data[field.name] for field in fields(Access) if field.name in data}),
        **{name: data[name] for name in names if name in data},
    }


def classification_data(cfg: DictConfig, fill: tuple[float, ...] = HALF) -> ClassificationData:
    """One view an image (a tokenizer trains on such views too, without the labels)."""
    data, size = cfg.data, cfg.image_size
    crop = {"scale": tuple(data.scale), "ratio": tuple(data.ratio), "flip": data.flip}
    return ClassificationData(
        train_views=ClassificationViews(size, True, **crop, auto_augment=data.get("auto_augment"), fill=fill),
        val_views=ClassificationViews(size, False, crop_ratio=data.get("crop_ratio")),
        **data_settings(cfg),
    )


def plain(cfg: DictConfig | ListConfig) -> dict[str, Any]:
    """A group of settings as a plain dictionary."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))


def network(cfg: DictConfig, *names: str) -> dict:
    """Arguments of the network: those of the named size, then what the group `model` sets by itself."""
    settings = plain(cfg.model)
    size = settings.pop("size", None)
    if size is not None and size not in SIZES:
        raise UserError(f"model.size={size} is not one of {', '.join(SIZES)}")
    arguments = {**SIZES.get(size, {}), **settings, **{name: cfg[name] for name in names}}
    for name in ("embed_dim", "depth", "num_heads"):
        if name not in arguments:
            raise UserError(f"model.size=null needs model.{name}")
    if arguments["embed_dim"] % arguments["num_heads"]:
        raise UserError(
            f"model.embed_dim={arguments['embed_dim']} is not divisible by model.num_heads={arguments['num_heads']}"
        )
    return arguments


def optim(cfg: DictConfig, samples: int) -> Optim:
    """Optimiser settings, with a warm-up given in epochs turned into steps."""
    settings = plain(cfg.optim)
    epochs = settings.pop("warmup_epochs")
    if epochs is not None:
        settings["warmup_steps"] = round(epochs * samples / cfg.global_batch)
    return Optim(**settings)

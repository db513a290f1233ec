"""From a composed config to what is trained: the network, its data, and the callbacks of this kind of run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from hydra.utils import instantiate
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging
from omegaconf import DictConfig, ListConfig, OmegaConf

from beit_pretrain.backbone import SIZES, Architecture, Classifier, MaskedImageModel, patch_grid
from beit_pretrain.callbacks import MaskedPictures, OnlineKNN
from beit_pretrain.datamodule import ClassificationData, PretrainData, ShardData
from beit_pretrain.dvae import DiscreteVAE, Relaxation, TokenizerTraining
from beit_pretrain.errors import UserError
from beit_pretrain.finetune import Finetuning, Regularisation
from beit_pretrain.formats import Checkpoint, digest, read_checkpoint, sizes
from beit_pretrain.masking import BlockwiseMask
from beit_pretrain.optim import Optim
from beit_pretrain.pretrain import Pretraining
from beit_pretrain.pretrained import classifier, features, mim
from beit_pretrain.probe import LayerProbes, Probing
from beit_pretrain.reader import Access
from beit_pretrain.tokenizer import check_channels, view_size
from beit_pretrain.training import TrainedModule
from beit_pretrain.views import HALF, ClassificationViews, PretrainViews, per_channel


@dataclass
class Task:
    """A module with its data and the callbacks that only this kind of run has."""

    module: TrainedModule
    data: ShardData
    callbacks: list[Callback]
    origin: str = ""  # what the network started from, in words


def pretrain_task(cfg: DictConfig) -> Task:
    """Masked image modelling."""
    source = read_source(cfg)
    patch_size = source.architecture["patch_size"] if source else cfg.patch_size or 16
    grid = patch_grid(cfg.image_size, patch_size)
    tokenizer = instantiate(cfg.tokenizer)
    channels = cfg.data.channels
    check_channels(tokenizer, channels)
    mean, std = normalisation(cfg, source.about if source else {})
    views = PretrainViews(
        image_size=cfg.image_size,
        token_image_size=view_size(grid, tokenizer, cfg.data.token_image_size),
        scale=tuple(cfg.data.scale),
        ratio=tuple(cfg.data.ratio),
        flip=cfg.data.flip,
        jitter=tuple(cfg.data.jitter),
        exact=cfg.data.exact,
        channels=channels,
    )
    data = PretrainData(views=views, masking=BlockwiseMask(grid, **cfg.mask), **data_settings(cfg))
    if source is None:
        model = MaskedImageModel(tokenizer.vocab_size, **network(cfg))
    else:
        model = continued(cfg, source, tokenizer.vocab_size).train()
    model.set_grad_checkpointing(cfg.activation_checkpointing)
    module = Pretraining(model, tokenizer, optim(cfg, data.samples), mean, std, cfg.seed)
    module.about = {"mean": list(mean), "std": list(std), "tokenizer": str(cfg.tokenizer.path)}
    callbacks: list[Callback] = []
    if "val" in data.readers:
        if cfg.pictures:
            callbacks.append(MaskedPictures(Path(cfg.run_dir) / "pictures", data, cfg.pictures))
        if len(data.classes) > 1:
            callbacks.append(OnlineKNN(data, **cfg.knn))
    return Task(module, data, callbacks, origin(source))


def tokenizer_task(cfg: DictConfig) -> Task:
    """Training a dVAE."""
    if cfg.image_size % DiscreteVAE.downsample:
        raise UserError(
            f"image_size={cfg.image_size} is not divisible by {DiscreteVAE.downsample}, the pixels per token"
        )
    data = classification_data(cfg)
    model = DiscreteVAE(**cfg.model, in_chans=cfg.data.get("channels", 3))
    module = TokenizerTraining(model, optim(cfg, data.samples), Relaxation(**cfg.relaxation))
    return Task(module, data, [])


def finetune_task(cfg: DictConfig) -> Task:
    """Classification."""
    source = None if cfg.from_scratch else read_source(cfg)
    patch_grid(cfg.image_size, source.architecture["patch_size"] if source else cfg.patch_size or 16)
    mean, std = normalisation(cfg, source.about if source else {})
    data = labelled_data(cfg, mean)
    if (cfg.regularisation.mixup or cfg.regularisation.cutmix) and cfg.batch_size % 2:
        raise UserError(f"mixup and cutmix pair images: batch_size={cfg.batch_size} must be even")
    if source is None:
        model = Classifier(len(data.classes), cfg.model.pool or "avg", **network(cfg))
    else:
        same = source.about.get("classes") in (None, list(data.classes))  # a head of other classes is of no use
        drop = cfg.model.drop_path_rate
        model = classifier(source, cfg.image_size, len(data.classes), drop, cfg.model.pool, new_head=not same)
        model.train()
    model.set_grad_checkpointing(cfg.activation_checkpointing)
    settings = optim(cfg, data.samples)
    module = Finetuning(model, settings, Regularisation(**cfg.regularisation), mean, std, cfg.seed)
    module.about = {
        "mean": list(mean),
        "std": list(std),
        "classes": list(data.classes),
        "crop_ratio": cfg.data.crop_ratio,
    }
    return Task(module, data, finetune_callbacks(cfg, data), origin(source))


def finetune_callbacks(cfg: DictConfig, data: ShardData) -> list[Callback]:
    """Averaged weights and early stopping, where they are asked for."""
    callbacks: list[Callback] = []
    if cfg.ema is not None:
        callbacks.append(EMAWeightAveraging(decay=cfg.ema))
    if cfg.early_stopping is not None:
        if "val" not in data.readers:
            raise UserError("early_stopping watches the held-out accuracy: data.val is needed")
        callbacks.append(EarlyStopping("val/accuracy", mode="max", patience=cfg.early_stopping, strict=False))
    return callbacks


def labelled_data(cfg: DictConfig, fill: tuple[float, ...]) -> ClassificationData:
    """Images that all have a class, of at least two. Raises UserError if not."""
    data = classification_data(cfg, fill)
    if data.readers["train"].classes_differ:
        raise UserError(f"data.train={cfg.data.train}: data sets of different classes cannot be used together")
    if len(data.classes) < 2:
        raise UserError(f"data.train={cfg.data.train} has {len(data.classes)} classes; {cfg.task} needs at least 2")
    for split, reader in data.readers.items():
        if without := reader.without_class:
            raise UserError(f"data.{split} has {without} images without a class; make shards of class folders alone")
    return data


def origin(source: Checkpoint | None) -> str:
    """What a run starts from, in words, for its first lines."""
    return f"{source.path} ({source.format} {source.kind}: {sizes(source.architecture)})" if source else ""


def read_source(cfg: DictConfig) -> Checkpoint | None:
    """The checkpoint that a run starts from (`init_from`), if any; its architecture is the run's.

    Raises UserError where the config asks for another size: its learning rates would be for another network.
    """
    if not cfg.init_from:
        return None
    source = read_checkpoint(cfg.init_from)
    size = cfg.model.get("size")
    if size is not None and size not in SIZES:
        raise UserError(f"model.size={size} is not one of {', '.join(SIZES)}")
    channels = source.architecture["in_chans"]
    if cfg.data.channels != channels:
        raise UserError(f"init_from={cfg.init_from} sees {channels} channels: set data.channels={channels}")
    scale = ("init_values" in cfg.model, cfg.model.get("init_values"), source.architecture["init_values"])
    if scale[0] and (scale[1] is None) != (scale[2] is None):
        raise UserError(
            f"init_from={cfg.init_from} has {sizes(source.architecture)}, but the experiment asks for "
            f"model.init_values={'null' if scale[1] is None else scale[1]}"
        )
    bias = source.architecture["rel_pos_bias"]
    expanded = "per_layer" if bias == "shared" and cfg.task == "finetune" else bias
    for name, own in (("rel_pos_bias", (bias, expanded)), ("abs_pos_emb", (source.architecture["abs_pos_emb"],))):
        if cfg.model.get(name) not in (None, *own):
            raise UserError(
                f"init_from={cfg.init_from} has {sizes(source.architecture)}, but the experiment asks for "
                f"model.{name}={cfg.model[name]}"
            )
    asked = {**SIZES.get(size, {}), **plain(cfg.model), "patch_size": cfg.patch_size}
    for name in ("embed_dim", "depth", "num_heads", "patch_size"):
        if asked.get(name) not in (None, source.architecture[name]):
            setting = "patch_size" if name == "patch_size" else f"model.size={size}" if size else f"model.{name}"
            raise UserError(
                f"init_from={cfg.init_from} has {sizes(source.architecture)}, but {setting} asks for "
                f"{name}={asked[name]}; take an experiment of its size, or "
                f"{'patch_size' if name == 'patch_size' else 'model.size'}=null to go ahead"
            )
    return source


def continued(cfg: DictConfig, source: Checkpoint, vocab_size: int) -> MaskedImageModel:
    """A pre-trained backbone to go on with; its token head only if that is for this tokenizer."""
    own = source.architecture.get("vocab_size")
    if own not in (None, vocab_size) and not cfg.new_head:
        raise UserError(
            f"init_from={cfg.init_from} predicts {own} tokens, the tokenizer has {vocab_size}; "
            "new_head=true starts a new token head"
        )
    return mim(source, cfg.image_size, cfg.model.drop_path_rate, vocab_size if cfg.new_head else None)


def normalisation(cfg: DictConfig, about: dict) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std): the config's, else those of the checkpoint, else .5."""
    mean, std = (per_channel(cfg[name] or about.get(name) or HALF, cfg.data.channels, name) for name in ("mean", "std"))
    return mean, std


def probe_task(cfg: DictConfig) -> Task:
    """Linear classifiers on frozen features."""
    source = read_source(cfg)
    assert source is not None  # a config without init_from does not get here
    mean, std = normalisation(cfg, source.about)
    data = labelled_data(cfg, mean)
    backbone = features(source, cfg.image_size)
    depth = len(backbone.blocks)
    if cfg.probe.layer is not None and cfg.probe.layer > depth:
        raise UserError(f"probe.layer={cfg.probe.layer}, but {cfg.init_from} has {depth} blocks")
    layers = [cfg.probe.layer] if cfg.probe.layer is not None else list(range(1, depth + 1))
    probes = LayerProbes(layers, backbone.embed_dim, len(data.classes), cfg.probe.pool)
    module = Probing(probes, backbone, optim(cfg, data.samples), mean, std)
    module.about = {"mean": list(mean), "std": list(std), "classes": list(data.classes)}
    module.about |= {"init_from": str(Path(cfg.init_from).absolute()), "backbone": digest(source.state)}
    return Task(module, data, [], origin(source))


TASKS: dict[str, Callable[[DictConfig], Task]] = {
    "pretrain": pretrain_task,
    "tokenizer": tokenizer_task,
    "finetune": finetune_task,
    "probe": probe_task,
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
    data, size, channels = cfg.data, cfg.image_size, cfg.data.get("channels", 3)
    if channels == 4 and data.get("auto_augment"):
        raise UserError("RandAugment takes images of 1 or 3 channels: data.channels=4 needs data.auto_augment=null")
    crop = {"scale": tuple(data.scale), "ratio": tuple(data.ratio), "flip": data.flip}
    return ClassificationData(
        train_views=ClassificationViews(
            size, True, **crop, auto_augment=data.get("auto_augment"), fill=fill, channels=channels
        ),
        val_views=ClassificationViews(size, False, crop_ratio=data.get("crop_ratio"), channels=channels),
        **data_settings(cfg),
    )


def plain(cfg: DictConfig | ListConfig) -> dict[str, Any]:
    """A group of settings as a plain dictionary."""
    return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))


def network(cfg: DictConfig) -> Architecture:
    """Arguments of a new network: those of the named size, then what the group `model` sets by itself."""
    settings = plain(cfg.model)
    size = settings.pop("size", None)
    settings.pop("pool", None)
    for name in ("rel_pos_bias", "abs_pos_emb"):
        if settings.get(name) is None:  # the network's own default
            settings.pop(name, None)
    if size is not None and size not in SIZES:
        raise UserError(f"model.size={size} is not one of {', '.join(SIZES)}")
    shape = {"image_size": cfg.image_size, "patch_size": cfg.patch_size or 16, "in_chans": cfg.data.channels}
    arguments = {**SIZES.get(size, {}), **settings, **shape}
    for name in ("embed_dim", "depth", "num_heads"):
        if name not in arguments:
            raise UserError(f"model.size=null needs model.{name}")
    if arguments["embed_dim"] % arguments["num_heads"]:
        raise UserError(
            f"model.embed_dim={arguments['embed_dim']} is not divisible by model.num_heads={arguments['num_heads']}"
        )
    return cast(Architecture, arguments)


def optim(cfg: DictConfig, samples: int) -> Optim:
    """Optimiser settings, with a warm-up given in epochs turned into steps."""
    settings = plain(cfg.optim)
    epochs = settings.pop("warmup_epochs")
    if epochs is not None:
        settings["warmup_steps"] = round(epochs * samples / cfg.global_batch)
    return Optim(**settings)

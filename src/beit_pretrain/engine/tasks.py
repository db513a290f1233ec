"""From a composed config to what is trained: the network, its data, and the callbacks of this kind of run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from hydra.utils import instantiate
from lightning import Callback
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging
from omegaconf import DictConfig

from beit_pretrain.compose import to_dict
from beit_pretrain.data.datamodule import ClassificationData, PretrainData, SegmentationData, ShardData
from beit_pretrain.data.reader import RemoteOptions, ShardReader
from beit_pretrain.engine.callbacks import MaskedPictures, SegmentationPictures
from beit_pretrain.engine.module import TrainedModule
from beit_pretrain.engine.optim import Optim
from beit_pretrain.errors import UserError
from beit_pretrain.evaluation.online_knn import OnlineKNN
from beit_pretrain.models.backbone import Classifier, MaskedImageModel, patch_grid
from beit_pretrain.models.build import network
from beit_pretrain.models.checkpoints.formats import Checkpoint, digest
from beit_pretrain.models.checkpoints.init_from import normalisation, origin, read_source
from beit_pretrain.models.checkpoints.pretrained import classifier, features, mim, segmenter
from beit_pretrain.models.linear_probe import LayerProbes
from beit_pretrain.models.upernet import Segmenter
from beit_pretrain.tasks.finetune import Finetuning, MixConfig
from beit_pretrain.tasks.linear_probe import Probing
from beit_pretrain.tasks.pretrain import Pretraining
from beit_pretrain.tasks.segment import Segmentation, SlidingWindow
from beit_pretrain.tasks.tokenizer import DiscreteVAE, GumbelConfig, TokenizerTraining
from beit_pretrain.tokenizers.token_cache import OPTIONS, TokenFolder, same_tokenizer
from beit_pretrain.tokenizers.tokenizer import Tokenizer, check_channels, view_size
from beit_pretrain.transforms.jitter import HALF
from beit_pretrain.transforms.masking import BlockwiseMask
from beit_pretrain.transforms.segmentation import SegmentationEvalTransform, SegmentationTrainTransform
from beit_pretrain.transforms.views import ClassificationTransform, TwoViewTransform


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
    targets = read_targets(cfg)
    mean, std = normalisation(cfg, source.about if source else {})
    views = pretrain_views(cfg, targets.view_size(grid, cfg.data.token_image_size))
    masking = BlockwiseMask(grid, **cfg.mask)
    data = PretrainData(views=views, masking=masking, tokens=targets.cached, **data_settings(cfg))
    if source is None:
        model = MaskedImageModel(targets.vocab_size, **network(cfg))
    else:
        model = continued(cfg, source, targets).train()
    model.set_grad_checkpointing(cfg.activation_checkpointing)
    module = Pretraining(model, targets.tokenizer, optim(cfg, data.samples), mean, std, cfg.seed)
    known = {"tokenizer": targets.name, "tokenizer_sha256": targets.sha256}
    module.about = {"mean": list(mean), "std": list(std), **known}
    callbacks: list[Callback] = []
    if "val" in data.readers:
        if cfg.num_visualizations and targets.tokenizer is not None:
            callbacks.append(MaskedPictures(Path(cfg.run_dir) / "pictures", data, cfg.num_visualizations))
        if len(data.classes) > 1:
            callbacks.append(OnlineKNN(data, **cfg.knn))
    return Task(module, data, callbacks, origin(source))


def pretrain_views(cfg: DictConfig, token_image_size: int) -> TwoViewTransform:
    """How training images are seen, from the group `data`."""
    return TwoViewTransform(
        image_size=cfg.image_size,
        token_image_size=token_image_size,
        scale=tuple(cfg.data.scale),
        ratio=tuple(cfg.data.ratio),
        flip=cfg.data.flip,
        jitter=tuple(cfg.data.jitter),
        pil_reference=cfg.data.pil_reference,
        channels=cfg.data.channels,
    )


@dataclass
class TokenSource:
    """Where the tokens to be predicted come from: a tokenizer, or token folders by split, or both."""

    name: str
    sha256: str
    vocab_size: int
    tokenizer: Tokenizer | None
    cached: dict[str, list[TokenFolder]]

    def view_size(self, grid: tuple[int, int], asked: int | None) -> int:
        """Side in pixels of the tokenizer's view; cached tokens were made with one."""
        if self.tokenizer is not None:
            return view_size(grid, self.tokenizer, asked)
        return asked or self.cached["train"][0].view["token_image_size"]


def read_targets(cfg: DictConfig) -> TokenSource:
    """The tokenizer and the token folders of the config, which belong together. Raises UserError if not."""
    cached = {}
    for split, option in OPTIONS.items():
        if (paths := cfg.data[option.removeprefix("data.")]) is not None and cfg.data[split] is not None:
            cached[split] = [TokenFolder(path) for path in ([paths] if isinstance(paths, str) else paths)]
    folders = [folder for some in cached.values() for folder in some]
    asked = cfg.get("tokenizer")
    if asked is not None and asked.get("_target_"):
        tokenizer: Tokenizer = instantiate(asked)
        check_channels(tokenizer, cfg.data.channels)
        name, sha256 = str(asked.get("path")), tokenizer.digest()
        if folders:
            same_tokenizer(folders, f"tokenizer.path={name}", sha256)
        return TokenSource(name, sha256, tokenizer.vocab_size, tokenizer, cached)
    if "train" not in cached:
        raise UserError("tokenizer=none needs data.tokens=FOLDER, as made by: python -m beit_pretrain tokenize")
    if cfg.data.val is not None and "val" not in cached:
        raise UserError(
            f"data.val={cfg.data.val} needs tokens too: data.val_tokens=FOLDER, as made by: python -m beit_pretrain "
            "tokenize; or a tokenizer that makes them: tokenizer.path="
        )
    same_tokenizer(folders)
    made_by = folders[0].tokenizer
    return TokenSource(f"{made_by['name']} (cached)", made_by["sha256"], folders[0].vocab_size, None, cached)


def tokenizer_task(cfg: DictConfig) -> Task:
    """Training a dVAE."""
    if cfg.image_size % DiscreteVAE.downsample:
        raise UserError(
            f"image_size={cfg.image_size} is not divisible by {DiscreteVAE.downsample}, the pixels per token"
        )
    data = classification_data(cfg)
    model = DiscreteVAE(**cfg.model, in_chans=cfg.data.get("channels", 3))
    module = TokenizerTraining(model, optim(cfg, data.samples), GumbelConfig(**cfg.relaxation), cfg.seed)
    return Task(module, data, [])


def finetune_task(cfg: DictConfig) -> Task:
    """Classification."""
    source = None if cfg.from_scratch else read_source(cfg)
    patch_grid(cfg.image_size, source.architecture["patch_size"] if source else cfg.patch_size or 16)
    mean, std = normalisation(cfg, source.about if source else {})
    data = labelled_data(cfg, mean)
    if source is None:
        model = Classifier(len(data.classes), cfg.model.pool or "avg", **network(cfg))
    else:
        same = source.about.get("classes") in (None, list(data.classes))  # a head of other classes is of no use
        drop = cfg.model.drop_path_rate
        model = classifier(source, cfg.image_size, len(data.classes), drop, cfg.model.pool, new_head=not same)
        model.train()
    model.set_grad_checkpointing(cfg.activation_checkpointing)
    settings = optim(cfg, data.samples)
    module = Finetuning(model, settings, MixConfig(**cfg.regularisation), mean, std, cfg.seed)
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


def continued(cfg: DictConfig, source: Checkpoint, targets: TokenSource) -> MaskedImageModel:
    """A pre-trained backbone to go on with; its token head only if that is for this tokenizer."""
    own, vocab_size = source.architecture.get("vocab_size"), targets.vocab_size
    if own not in (None, vocab_size) and not cfg.new_head:
        raise UserError(
            f"init_from={cfg.init_from} predicts {own} tokens, the tokenizer has {vocab_size}; "
            "new_head=true starts a new token head"
        )
    known = source.about.get("tokenizer_sha256")  # of our own checkpoints
    if own is not None and known not in (None, targets.sha256) and not cfg.new_head:
        raise UserError(
            f"init_from={cfg.init_from} predicts the tokens of another tokenizer ({source.about.get('tokenizer')}, "
            f"SHA-256 {known[:12]}...) than {targets.name} (SHA-256 {targets.sha256[:12]}...); new_head=true starts a "
            "new token head"
        )
    return mim(source, cfg.image_size, cfg.model.drop_path_rate, vocab_size if cfg.new_head else None)


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


def segment_task(cfg: DictConfig) -> Task:
    """Semantic segmentation."""
    source = None if cfg.from_scratch else read_source(cfg)
    patch_grid(cfg.image_size, source.architecture["patch_size"] if source else cfg.patch_size or 16)
    mean, std = normalisation(cfg, source.about if source else {})
    windows = SlidingWindow(**to_dict(cfg.test))
    data, names = segmentation_data(cfg, mean, windows)
    decoder = to_dict(cfg.decoder)
    if source is None:
        model = Segmenter(len(names), decoder, **network(cfg))
    else:
        same = source.about.get("classes") in (None, names)
        drop = cfg.model.drop_path_rate
        model = segmenter(source, cfg.image_size, len(names), drop, decoder, new_head=not same)
        model.train()
    model.set_grad_checkpointing(cfg.activation_checkpointing)
    module = Segmentation(model, optim(cfg, data.samples), mean, std, cfg.seed, windows)
    module.about = {"mean": list(mean), "std": list(std), "classes": names, "reduce_labels": cfg.data.reduce_labels}
    callbacks: list[Callback] = []
    if "val" in data.readers and cfg.num_visualizations:
        callbacks.append(SegmentationPictures(Path(cfg.run_dir) / "pictures", data, cfg.num_visualizations))
    return Task(module, data, callbacks, origin(source))


def segmentation_data(
    cfg: DictConfig, fill: tuple[float, ...], windows: SlidingWindow
) -> tuple[SegmentationData, list[str]]:
    """Images with label maps, and the names of their classes. Raises UserError if nothing says how many there are."""
    data, size = cfg.data, cfg.image_size
    reader = ShardReader(data.train if isinstance(data.train, str) else list(data.train))
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
    common = {"classes": len(names), "reduce_labels": data.reduce_labels, "channels": data.channels}
    crops = SegmentationTrainTransform(
        size,
        ratio=tuple(data.resize),
        max_share=data.max_share,
        flip=data.flip,
        distort=data.distort,
        fill=fill,
        **common,
    )
    images = SegmentationEvalTransform(size, scales=windows.scales, **common)
    return SegmentationData(train_views=crops, val_views=images, **data_settings(cfg)), names


TASKS: dict[str, Callable[[DictConfig], Task]] = {
    "pretrain": pretrain_task,
    "tokenizer": tokenizer_task,
    "finetune": finetune_task,
    "probe": probe_task,
    "segment": segment_task,
}


def data_settings(cfg: DictConfig) -> dict:
    """The settings that every data module takes, from the group `data`."""
    names = (
        "train",
        "val",
        "num_workers",
        "shuffle_block_size",
        "shuffle_streams",
        "val_batch",
        "val_images",
        "labels_per_class",
        "weights",
    )
    data = to_dict(cfg.data)
    return {
        "global_batch_size": cfg.global_batch_size,
        "seed": cfg.seed,
        "access": RemoteOptions(
            **{field.name: data[field.name] for field in fields(RemoteOptions) if field.name in data}
        ),
        **{name: data[name] for name in names if name in data},
    }


def classification_data(cfg: DictConfig, fill: tuple[float, ...] = HALF) -> ClassificationData:
    """One view an image (a tokenizer trains on such views too, without the labels)."""
    data, size, channels = cfg.data, cfg.image_size, cfg.data.get("channels", 3)
    if channels == 4 and data.get("auto_augment"):
        raise UserError("RandAugment takes images of 1 or 3 channels: data.channels=4 needs data.auto_augment=null")
    crop = {"scale": tuple(data.scale), "ratio": tuple(data.ratio), "flip": data.flip}
    return ClassificationData(
        train_views=ClassificationTransform(
            size, True, **crop, auto_augment=data.get("auto_augment"), fill=fill, channels=channels
        ),
        val_views=ClassificationTransform(size, False, crop_ratio=data.get("crop_ratio"), channels=channels),
        **data_settings(cfg),
    )


def optim(cfg: DictConfig, samples: int) -> Optim:
    """Optimiser settings, with a warm-up given in epochs turned into steps."""
    settings = to_dict(cfg.optim)
    epochs = settings.pop("warmup_epochs")
    if epochs is not None:
        settings["warmup_steps"] = round(epochs * samples / cfg.global_batch_size)
    return Optim(**settings)

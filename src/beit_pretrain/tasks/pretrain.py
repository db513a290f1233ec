"""Masked image modelling (BEiT, section 2.4, equation 1), from scratch or from the checkpoint of `init_from`: settings,
LightningModule, data, pictures.

Shapes: B batch, C channels, H W pixels, N patches, V vocabulary, K masked positions of one image (padded with -1),
M masked patches of the batch. Masks are True where a patch is masked, to be predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from PIL import Image
from torch import Tensor

from beit_pretrain.data.datamodule import ShardData, first_images
from beit_pretrain.data.dataset import BatchSchedule
from beit_pretrain.data.settings import DataSettings
from beit_pretrain.engine.callbacks import ValidationPictures
from beit_pretrain.engine.device_prefetch import DevicePrefetcher
from beit_pretrain.engine.settings import OptimSettings, VisualizeSettings
from beit_pretrain.engine.task import Task
from beit_pretrain.errors import UserError
from beit_pretrain.evaluation.online_evaluation import CollapseSettings, DenseKNNSettings, KNNSettings, OnlineEvaluation
from beit_pretrain.models.backbone import MaskedImageModel, patch_grid
from beit_pretrain.models.build import network
from beit_pretrain.models.checkpoints.formats import Checkpoint
from beit_pretrain.models.checkpoints.init_from import normalisation, origin, read_source
from beit_pretrain.models.checkpoints.pretrained import mim
from beit_pretrain.settings import Paths, Switch, Whole, about, to_dict
from beit_pretrain.tasks.common import BackboneModule, BackboneSettings, NetworkSettings, data_settings
from beit_pretrain.tokenizers.settings import TokenizerSettings
from beit_pretrain.tokenizers.token_cache import OPTIONS, CachedTokens, TokenFolder, same_tokenizer
from beit_pretrain.tokenizers.tokenizer import Tokenizer, check_channels, codebook_use, view_size
from beit_pretrain.transforms.jitter import jittered_view, jittered_views, normalise
from beit_pretrain.transforms.masking import BlockwiseMask, MaskSettings
from beit_pretrain.transforms.settings import ViewSettings
from beit_pretrain.transforms.views import TwoViewTransform
from beit_pretrain.visualization import grids
from beit_pretrain.visualization.attention_maps import attention_picture
from beit_pretrain.visualization.token_maps import token_sheet

IGNORE = -100


class PretrainDataSettings(DataSettings, ViewSettings):
    """Images, their two views, and cached tokens."""

    defaults = "data/shards.yaml tasks/pretrain.yaml:data"

    tokens: Paths | None = about("token folder of data.train, made by `tokenize`; a list if data.train is one")
    val_tokens: Paths | None = about("token folder of data.val; null = the tokenizer computes the tokens")


class PretrainSettings(BackboneSettings):
    """Settings of masked image modelling."""

    defaults = "fit.yaml tasks/pretrain.yaml"

    new_head: Switch = about("replace the token head of init_from, for another tokenizer")
    model: NetworkSettings
    activation_checkpointing: Switch = about("saves most activation memory; a third slower", True)
    tokenizer: TokenizerSettings | None
    data: PretrainDataSettings
    mask: MaskSettings
    num_visualizations: Whole = about("masked | predicted | original rows after each validation; 0 = none", True)
    knn: KNNSettings = about("online kNN accuracy, if there are labels", True)
    dense_knn: DenseKNNSettings | None = about("online kNN of patches, if there are label maps; null = none", True)
    collapse: CollapseSettings | None = about("RankMe and deviation of held-out features; null = none", True)


class MIMOutput(NamedTuple):
    """Over a batch's masked patches: sum of cross-entropies (nats), number of patches, correct predictions."""

    loss_sum: Tensor
    masked: Tensor
    correct: Tensor


class Pretraining(BackboneModule):
    """Predicts the visual tokens of masked patches.

    `tokenizer`: frozen; gives one id per patch. None if the batches contain the ids (`tokens`).
    """

    kind = "mim"
    model: MaskedImageModel

    def __init__(
        self,
        model: MaskedImageModel,
        tokenizer: Tokenizer | None,
        optim: OptimSettings,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int = 0,
    ):
        super().__init__(model, optim, mean, std, seed)
        if tokenizer is not None and model.vocab_size != tokenizer.vocab_size:
            raise UserError(f"model.vocab_size={model.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens")
        self.tokenizer = tokenizer
        self._masked = torch.zeros((), dtype=torch.int64)  # masked patches since the last optimiser step
        self._tokens_V = torch.zeros(model.vocab_size)  # targets since the last flush
        # Loss, hits, hits of the copy baseline, masked patches; then histograms of masked and of all tokens.
        self.totals_shape = (4 + 2 * model.vocab_size,)

    def setup(self, stage: str) -> None:
        if self.tokenizer is not None:
            self.tokenizer.to(self.device)
        self._tokens_V = self._tokens_V.to(self.device)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        """Equation (1): cross-entropy of the visual tokens at the masked positions."""
        image, tokens_BN = self.prepare(batch)
        position_BK, drop_BR = batch["mask_index"], self.drop_path_noise(batch)
        found = self.maybe_compile(self.objective)(image, batch["mask"], position_BK, tokens_BN, drop_BR)
        self.count(found, tokens_BN)
        self._slots = position_BK.numel()
        return found.loss_sum / self._slots

    def prepare(self, batch: dict) -> tuple[Tensor, Tensor]:
        """`image_and_tokens`, compiled if the run is compiled."""
        return self.image_and_tokens(batch) if "view" in batch else self.maybe_compile(self.image_and_tokens)(batch)

    def image_and_tokens(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Return the backbone's view in [0, 1], and the tokens (B, N), cached or computed from the tokenizer's view."""
        if "view" in batch:  # computed by `DevicePrefetcher`
            return batch["view"], batch["tokens"]
        if "tokens" in batch:
            return jittered_view(batch, "image"), batch["tokens"]
        assert self.tokenizer is not None
        image, token_image = jittered_views(batch)
        return image, self.tokenizer.encode(token_image)

    def objective(
        self, image_BCHW: Tensor, mask_BN: Tensor, position_BK: Tensor, tokens_BN: Tensor, drop_BR: Tensor | None = None
    ) -> MIMOutput:
        """Predict the tokens of the masked patches of images in [0, 1]; sum losses and correct predictions."""
        image_BCHW = normalise(image_BCHW, self.mean, self.std)
        logits_BKV = self.model.forward_at(image_BCHW, mask_BN, position_BK.clamp(min=0), drop_BR)
        target_BK = masked_targets(tokens_BN, position_BK)
        exact_BKV = logits_BKV.to(torch.promote_types(logits_BKV.dtype, torch.float32))  # half precision is too coarse
        loss_sum = F.cross_entropy(exact_BKV.flatten(0, 1), target_BK.flatten(), reduction="sum")
        return MIMOutput(loss_sum, (target_BK != IGNORE).sum(), (logits_BKV.argmax(-1) == target_BK).sum())

    def count(self, found: MIMOutput, tokens_BN: Tensor) -> None:
        """Accumulate the step's sums for the metrics and for `gradient_scale`."""
        loss_sum, masked, correct = (value.detach().clone() for value in found)  # a CUDA graph reuses its outputs
        self._masked = self._masked.to(self.device) + masked
        self._tokens_V.scatter_add_(0, tokens_BN.flatten(), torch.ones_like(tokens_BN, dtype=torch.float).flatten())
        self.accumulate(masked, loss=loss_sum / masked, masked_token_accuracy=correct / masked)
        self.accumulate(masked_ratio=masked / tokens_BN.numel())

    def masked_patches(self) -> Tensor:
        return self._masked

    def gradient_scale(self) -> Tensor:
        """Factor that makes the loss a mean over the masked patches of the *global* batch.

        Each micro-batch divides its sum by the constant B * K. Lightning divides by the number of micro-batches, DDP
        by the number of processes. The number of masked patches is known only at the last micro-batch (`exchange`).
        """
        micro_batches = self.trainer.accumulate_grad_batches * self.trainer.world_size
        masked = self._masked if self.trainer.world_size == 1 else self.exchange.masked
        self._masked = torch.zeros_like(self._masked)
        return micro_batches * self._slots / masked.double()

    def flush(self) -> None:
        use = codebook_use(self.sum_over_processes(self._tokens_V))
        self._tokens_V.zero_()
        self.accumulate(codebook_perplexity=use["codebook_perplexity"])
        super().flush()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        total_V = self.sum_over_processes(self._tokens_V)
        self._tokens_V = total_V if self.trainer.is_global_zero else torch.zeros_like(total_V)
        checkpoint["unwritten_tokens"] = total_V.cpu()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.trainer.is_global_zero and "unwritten_tokens" in checkpoint:
            self._tokens_V = checkpoint["unwritten_tokens"].clone()

    def on_fit_start(self) -> None:
        self._tokens_V = self._tokens_V.to(self.device)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Evaluates held-out images with fixed views and masks; also the baseline of copying the nearest token."""
        image, tokens_BN = self.image_and_tokens(batch)
        position_BK = batch["mask_index"]
        loss_sum, masked, correct = self.objective(image, batch["mask"], position_BK, tokens_BN)
        copied_BN = tokens_BN.gather(1, nearest_visible(batch["mask"]))
        copied = masked_targets(copied_BN, position_BK) == masked_targets(tokens_BN, position_BK)
        vocab = self.model.vocab_size
        self.totals[:4] += torch.stack([loss_sum, correct, (copied & (position_BK >= 0)).sum(), masked])
        self.totals[4 : 4 + vocab] += torch.bincount(tokens_BN[batch["mask"]], minlength=vocab)
        self.totals[4 + vocab :] += torch.bincount(tokens_BN.flatten(), minlength=vocab)

    def on_validation_epoch_end(self) -> None:
        totals = self.sum_over_processes(self.totals)
        masked_V, all_V = totals[4:].chunk(2)
        loss, hits, copied = totals[:3] / totals[3].clamp(min=1)
        self.log_validation(
            {
                "loss": loss,
                "masked_token_accuracy": hits,
                "copy_token_accuracy": copied,
                "majority_token_accuracy": masked_V.max() / totals[3].clamp(min=1),
                **codebook_use(all_V),
            }
        )


def masked_targets(tokens_BN: Tensor, index_BK: Tensor) -> Tensor:
    """Tokens (B, K) at the masked positions; `IGNORE` where a position is padding (-1)."""
    return tokens_BN.gather(1, index_BK.clamp(min=0)).masked_fill(index_BK < 0, IGNORE)


def nearest_visible(mask_BN: Tensor) -> Tensor:
    """Index (B, N) of the visible patch nearest to every patch; of equally near ones, the first."""
    row = torch.arange(round(mask_BN.shape[1] ** 0.5), device=mask_BN.device, dtype=torch.float)
    place_N2 = torch.cartesian_prod(row, row)
    return (torch.cdist(place_N2, place_N2) + mask_BN.unsqueeze(1) * 1e6).argmin(-1)


class PretrainData(ShardData):
    """Data with a mask and two views per image, or one view and its cached tokens.

    `tokens`: for "train", "val" or both, one token folder per shard folder.
    """

    def __init__(
        self,
        train,
        val=None,
        *,
        views: TwoViewTransform,
        masking: BlockwiseMask,
        tokens: Mapping[str, Sequence[TokenFolder]] | None = None,
        **settings,
    ):
        super().__init__(train, val, train_views=views, val_views=views, **settings)
        self.masking = masking
        if self.stream is not None and "train" in (tokens or {}):
            raise UserError("data.tokens belong to numbered images; a stream (data.order=stream) needs tokenizer.path=")
        for split, folders in (tokens or {}).items():
            if split in self.readers:
                self.tokens[split] = CachedTokens(folders, self.readers[split], views, masking.grid, split)


class Pretrain(Task):
    """The task `pretrain`: masked image modelling."""

    settings = PretrainSettings
    best = ("val/loss", "min")
    fsdp = True
    module: Pretraining

    def __init__(self, cfg: PretrainSettings):
        super().__init__(cfg)
        source = read_source(cfg)
        patch_size = source.architecture["patch_size"] if source else cfg.patch_size or 16
        grid = patch_grid(cfg.image_size, patch_size)
        targets = read_targets(cfg)
        mean, std = normalisation(cfg, source.about if source else {})
        views = two_views(cfg, targets.view_size(grid, cfg.data.token_image_size))
        masking = BlockwiseMask(grid=grid, **to_dict(cfg.mask))
        self.data = PretrainData(views=views, masking=masking, tokens=targets.cached, **data_settings(cfg))
        if source is None:
            model = MaskedImageModel(targets.vocab_size, **network(cfg))
        else:
            model = continued(cfg, source, targets).train()
        model.set_grad_checkpointing(cfg.activation_checkpointing)
        optim = cfg.optim.with_warmup_in_steps(self.data.samples, cfg.global_batch_size)
        self.module = Pretraining(model, targets.tokenizer, optim, mean, std, cfg.seed)
        self.module.about |= {"tokenizer": targets.name, "tokenizer_sha256": targets.sha256}
        self.origin = origin(source)
        if "val" in self.data.readers:
            if cfg.num_visualizations and targets.tokenizer is not None:
                self.callbacks.append(ValidationPictures(self))
            self.callbacks.append(OnlineEvaluation(self.data, cfg.knn, cfg.dense_knn, cfg.collapse))

    def preflight(self) -> list[str]:
        """Encode a few images and report how many different tokens they have."""
        dataset = self.data.train_dataset(BatchSchedule(self.data.global_batch_size))
        batch = first_images(dataset, 4, torch.device("cpu"))
        tokenizer = self.module.tokenizer
        cached = tokenizer is None or "tokens" in batch
        tokens = batch["tokens"] if cached else cast(Tokenizer, tokenizer).encode(jittered_views(batch)[1])
        if tokens.shape[1] != batch["mask"].shape[1]:
            raise UserError(f"the tokenizer gives {tokens.shape[1]} tokens for {batch['mask'].shape[1]} patches")
        return [f"  tokenizer: {len(tokens.unique())} different tokens in {len(tokens)} images"]

    def prepare(self) -> None:
        if not self.cfg.deterministic:
            torch.backends.cudnn.benchmark = True  # all images have one size: cuDNN times its algorithms once
        if self.cfg.device_prefetch:
            module = self.module
            self.data.wrapped = lambda loader: DevicePrefetcher(loader, module.prepare, module.device)

    def validation_pictures(self) -> Iterator[tuple[str, Image.Image]]:
        """Also attention maps and, after the first validation, token maps, which do not change."""
        module, options = self.module, VisualizeSettings(images=self.cfg.num_visualizations)
        batch = self.batch_of(options)
        yield "", masked_picture(module, batch)
        image, _ = module.image_and_tokens(batch)
        yield "attention", attention_picture(module.model, normalise(image[:2], module.mean, module.std), image[:2])
        if not any((self.cfg.folder / "pictures").glob("step-*-tokens.png")):
            yield "tokens", cast(Image.Image, self.tokens(options))

    def masked(self, options: Any) -> Image.Image | None:
        if self.module.tokenizer is None and not options.what:
            return None
        return masked_picture(self.module, self.batch_of(options))

    def tokens(self, options: Any) -> Image.Image | None:
        tokenizer = self.module.tokenizer
        if tokenizer is None:
            return None
        image, ids_BN = self.module.image_and_tokens(self.batch_of(options))
        return token_sheet(image, tokenizer.decode(ids_BN), ids_BN, tokenizer.vocab_size)


def two_views(cfg: PretrainSettings, token_image_size: int) -> TwoViewTransform:
    """The two-view transform of the group `data`."""
    views = {name: getattr(cfg.data, name) for name in ViewSettings.model_fields}
    return TwoViewTransform(image_size=cfg.image_size, **{**views, "token_image_size": token_image_size})


@dataclass
class TokenSource:
    """Source of the target tokens: a tokenizer, token folders by split, or both."""

    name: str
    sha256: str
    vocab_size: int
    tokenizer: Tokenizer | None
    cached: dict[str, list[TokenFolder]]

    def view_size(self, grid: tuple[int, int], asked: int | None) -> int:
        """Side in pixels of the tokenizer's view; for cached tokens, the side they were made with."""
        if self.tokenizer is not None:
            return view_size(grid, self.tokenizer, asked)
        return asked or self.cached["train"][0].view["token_image_size"]


def read_targets(cfg: PretrainSettings) -> TokenSource:
    """Read the tokenizer and the token folders of the config. Raises UserError if they do not belong together."""
    cached = {}
    for split, option in OPTIONS.items():
        paths, images = getattr(cfg.data, option.removeprefix("data.")), getattr(cfg.data, split)
        if paths is not None and images is not None:
            cached[split] = [TokenFolder(path) for path in ([paths] if isinstance(paths, str) else paths)]
    folders = [folder for some in cached.values() for folder in some]
    asked = cfg.tokenizer
    if asked is not None and asked.target:
        tokenizer: Tokenizer = instantiate(to_dict(asked))
        check_channels(tokenizer, cfg.data.channels)
        name, sha256 = str(asked.path), tokenizer.digest()
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


def continued(cfg: PretrainSettings, source: Checkpoint, targets: TokenSource) -> MaskedImageModel:
    """Load the network of `init_from` to continue pre-training.

    Raises UserError if its token head is for another tokenizer, unless `new_head` is set.
    """
    own, vocab_size = source.architecture.get("vocab_size"), targets.vocab_size
    if own not in (None, vocab_size) and not cfg.new_head:
        raise UserError(
            f"init_from={cfg.init_from} predicts {own} tokens, the tokenizer has {vocab_size}; "
            "new_head=true starts a new token head"
        )
    known = source.about.get("tokenizer_sha256")  # only our own checkpoints have it
    if own is not None and known not in (None, targets.sha256) and not cfg.new_head:
        raise UserError(
            f"init_from={cfg.init_from} predicts the tokens of another tokenizer ({source.about.get('tokenizer')}, "
            f"SHA-256 {known[:12]}...) than {targets.name} (SHA-256 {targets.sha256[:12]}...); new_head=true starts a "
            "new token head"
        )
    return mim(source, cfg.image_size, cfg.model.drop_path_rate, vocab_size if cfg.new_head else None)


@torch.no_grad()
def masked_picture(module: Pretraining, batch: dict[str, Tensor]):
    """Grid of masked | predicted tokens decoded | original tokens decoded | original, one row per image.

    Raises UserError without a tokenizer, which decodes the tokens.
    """
    if module.tokenizer is None:
        raise UserError("the run has only cached tokens; drawing them needs a tokenizer")
    image, tokens_BN = module.image_and_tokens(batch)
    mask_BN = batch["mask"]
    predicted_BN = tokens_BN.clone()
    logits_MV = module.model(normalise(image, module.mean, module.std), mask_BN)
    predicted_BN[mask_BN] = logits_MV.argmax(-1)
    side = int(image.shape[-1])
    decoded = [F.interpolate(module.tokenizer.decode(t), (side, side)) for t in (predicted_BN, tokens_BN)]
    columns = [grids.hide(image, mask_BN), *decoded, image]
    return grids.grid(columns, ["masked", "predicted", "tokens decoded", "original"])

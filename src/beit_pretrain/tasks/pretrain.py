"""Masked image modelling: the LightningModule of the paper's objective (BEiT, section 2.4, equation 1).

Shapes: B batch, C channels, H W pixels, N patches, V vocabulary, K masked positions of one image (padded with -1),
M masked patches of the batch. Masks are True where a patch is masked, to be predicted.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from beit_pretrain.engine.module import TrainedModule
from beit_pretrain.engine.optim import Optim
from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import MaskedImageModel, patch_grid
from beit_pretrain.tokenizers.tokenizer import Tokenizer, codebook_use
from beit_pretrain.transforms.jitter import jittered_view, jittered_views, normalise

IGNORE = -100


class MIMOutput(NamedTuple):
    """What became of a batch's masked patches: the sum of their cross-entropies, their number, the hits."""

    loss_sum: Tensor
    masked: Tensor
    correct: Tensor


class Pretraining(TrainedModule):
    """Predicts the visual tokens of masked patches.

    Args:
        model: backbone with token head.
        tokenizer: frozen; gives one id per patch. None where the batches bring the ids (`tokens`).
        optim: optimiser settings.
        mean, std: normalisation of the backbone's view.
    """

    kind = "mim"
    model: MaskedImageModel

    def __init__(
        self,
        model: MaskedImageModel,
        tokenizer: Tokenizer | None,
        optim: Optim,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int = 0,
    ):
        super().__init__(model, optim, seed)
        if tokenizer is not None and model.vocab_size != tokenizer.vocab_size:
            raise UserError(f"model.vocab_size={model.vocab_size}, but the tokenizer has {tokenizer.vocab_size} tokens")
        self.tokenizer = tokenizer
        self.mean, self.std = tuple(mean), tuple(std)
        self._masked = torch.zeros((), dtype=torch.int64)  # masked patches since the last optimiser step
        self._tokens_V = torch.zeros(model.vocab_size)  # targets since the last flush
        self._totals = torch.zeros(0)

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
        return found.loss_sum / position_BK.numel()

    def prepare(self, batch: dict) -> tuple[Tensor, Tensor]:
        """`image_and_tokens`, compiled where the run is."""
        return self.image_and_tokens(batch) if "view" in batch else self.maybe_compile(self.image_and_tokens)(batch)

    def image_and_tokens(self, batch: dict) -> tuple[Tensor, Tensor]:
        """The backbone's view in [0, 1], and the tokens (B, N): cached ones, or those of the tokenizer's view."""
        if "view" in batch:  # `DevicePrefetcher` has made them
            return batch["view"], batch["tokens"]
        if "tokens" in batch:
            return jittered_view(batch, "image"), batch["tokens"]
        assert self.tokenizer is not None
        image, token_image = jittered_views(batch)
        return image, self.tokenizer.encode(token_image)

    def objective(
        self,
        image_BCHW: Tensor,
        mask_BN: Tensor,
        position_BK: Tensor,
        tokens_BN: Tensor,
        drop_BR: Tensor | None = None,
    ) -> MIMOutput:
        """What the network makes of images in [0, 1] of which it does not see the masked patches."""
        image_BCHW = normalise(image_BCHW, self.mean, self.std)
        logits_BKV = self.model.forward_at(image_BCHW, mask_BN, position_BK.clamp(min=0), drop_BR)
        target_BK = masked_targets(tokens_BN, position_BK)
        loss_sum = F.cross_entropy(at_least_float(logits_BKV).flatten(0, 1), target_BK.flatten(), reduction="sum")
        return MIMOutput(loss_sum, (target_BK != IGNORE).sum(), (logits_BKV.argmax(-1) == target_BK).sum())

    def count(self, found: MIMOutput, tokens_BN: Tensor) -> None:
        """Keep the step's numbers for the metrics and for `gradient_scale`."""
        loss_sum, masked, correct = (value.detach().clone() for value in found)  # a CUDA graph will overwrite its own
        self._masked = self._masked.to(self.device) + masked
        self._tokens_V.scatter_add_(0, tokens_BN.flatten(), torch.ones_like(tokens_BN, dtype=torch.float).flatten())
        self.accumulate(masked, loss=loss_sum / masked, masked_token_accuracy=correct / masked)
        self.accumulate(masked_ratio=masked / tokens_BN.numel())

    def masked_patches(self) -> Tensor:
        return self._masked

    def gradient_scale(self) -> Tensor:
        """Makes the loss a mean over the masked patches of the *global* batch.

        A micro-batch divides its sum by a constant, B * K; Lightning divides by the number of micro-batches, DDP by
        that of processes. How many patches were masked is known only at the last micro-batch (`exchange`).
        """
        micro_batches = self.trainer.accumulate_grad_batches * self.trainer.world_size
        masked = self._masked if self.trainer.world_size == 1 else self.exchange.masked
        self._masked = torch.zeros_like(self._masked)
        return micro_batches * self._slots / masked.double()

    def on_train_batch_start(self, batch: dict, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self._slots = batch["mask_index"].numel()

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

    def on_validation_epoch_start(self) -> None:
        # Loss, hits, hits of copying, masked patches; then histograms of masked and of all tokens.
        self._totals = torch.zeros(4 + 2 * self.model.vocab_size, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """The same on held-out images with fixed views and masks, and two guesses that any model must beat."""
        image, tokens_BN = self.image_and_tokens(batch)
        position_BK = batch["mask_index"]
        loss_sum, masked, correct = self.objective(image, batch["mask"], position_BK, tokens_BN)
        copied_BN = tokens_BN.gather(1, nearest_visible(batch["mask"]))
        copied = masked_targets(copied_BN, position_BK) == masked_targets(tokens_BN, position_BK)
        vocab = self.model.vocab_size
        self._totals[:4] += torch.stack([loss_sum, correct, (copied & (position_BK >= 0)).sum(), masked])
        self._totals[4 : 4 + vocab] += torch.bincount(tokens_BN[batch["mask"]], minlength=vocab)
        self._totals[4 + vocab :] += torch.bincount(tokens_BN.flatten(), minlength=vocab)

    def on_validation_epoch_end(self) -> None:
        totals = self.sum_over_processes(self._totals)
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


def at_least_float(x: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def nearest_visible(mask_BN: Tensor) -> Tensor:
    """For every patch (B, N) the number of the nearest patch that is not masked (the first of equally near ones)."""
    distance_NN = _patch_distances(int(mask_BN.shape[1]), mask_BN.device)
    return (distance_NN + mask_BN.unsqueeze(1) * 1e6).argmin(-1)


@lru_cache(maxsize=4)
def _patch_distances(patches: int, device: torch.device) -> Tensor:
    side = patch_grid(round(patches**0.5), 1)[0]
    row = torch.arange(side, device=device, dtype=torch.float)
    points = torch.cartesian_prod(row, row)
    return torch.cdist(points, points)

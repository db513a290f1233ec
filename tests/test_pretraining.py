"""Masked image modelling: targets and baselines against brute force, gradient accumulation, overfitting."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning import Trainer
from tiny import MIM

from beit_pretrain.data.dataset import BatchSchedule
from beit_pretrain.data.order import MASK, generator
from beit_pretrain.engine.settings import OptimSettings
from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import MaskedImageModel
from beit_pretrain.tasks.pretrain import IGNORE, PretrainData, Pretraining, masked_targets, nearest_visible
from beit_pretrain.tokenizers.dvae import DVAETokenizer
from beit_pretrain.transforms.jitter import HALF, color_jitter
from beit_pretrain.transforms.masking import BlockwiseMask
from beit_pretrain.transforms.views import TwoViewTransform

# One attempt a block: images differ widely in how many patches are masked, which is what the objective must bear.
MASKING = BlockwiseMask((4, 4), max_patches=9, min_block=3, attempts=1)


class Brightness:
    """A tokenizer whose token is the mean brightness of a patch."""

    vocab_size, downsample = 32, 8

    def encode(self, image_BCHW):
        mean = F.avg_pool2d(image_BCHW.mean(1, keepdim=True), 8).flatten(1)
        return (mean * 320).long() % 32

    def decode(self, ids_BN):
        raise NotImplementedError

    def to(self, device):
        return self


def module(tokenizer=None, drop_path_rate=0.0, lr=1e-3, clip=None, **settings) -> Pretraining:
    torch.manual_seed(0)
    model = MaskedImageModel(**MIM | settings, drop_path_rate=drop_path_rate)
    return Pretraining(model, tokenizer or Brightness(), OptimSettings(lr=lr, clip=clip), HALF, HALF)


def data(shards, global_batch_size: int = 8, **settings) -> PretrainData:
    views = TwoViewTransform(image_size=32, token_image_size=32)
    settings = {"global_batch_size": global_batch_size, "num_workers": 0} | settings
    return PretrainData(shards / "train", shards / "val", views=views, masking=MASKING, **settings)


def trainer(max_steps: int = 1, micro_batches: int = 1) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        accumulate_grad_batches=micro_batches,
        limit_val_batches=0,
        use_distributed_sampler=False,
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )


def masks(count: int, grid: tuple[int, int] = (4, 4)) -> torch.Tensor:
    masking = BlockwiseMask(grid, grid[0] * grid[1] // 2, 3)
    drawn = [masking.draw(generator(0, position, MASK)).reshape(-1) for position in range(count)]
    return torch.from_numpy(np.stack(drawn))


class TestNearestVisible:
    @pytest.mark.parametrize("side", [4, 7, 14])
    def test_equals_brute_force(self, side):
        mask = masks(6, (side, side))
        places = list(itertools.product(range(side), repeat=2))
        for row, found in zip(mask, nearest_visible(mask), strict=True):
            visible = [n for n in range(side**2) if not row[n]]
            for n, nearest in enumerate(found.tolist()):
                expected = min(visible, key=lambda v: (math.dist(places[n], places[v]), v))
                assert nearest == expected

    def test_visible_patch_is_its_own_neighbour(self):
        mask = masks(6)
        found, own = nearest_visible(mask), torch.arange(16).expand(6, -1)
        assert torch.equal(found[~mask], own[~mask])
        assert not mask.gather(1, found).any()

    def test_single_visible_patch(self):
        mask = torch.ones(1, 16, dtype=torch.bool)
        mask[0, 11] = False
        assert nearest_visible(mask).tolist() == [[11] * 16]


def test_masked_targets():
    tokens = torch.tensor([[7, 8, 9, 10], [0, 1, 2, 3]])
    index = torch.tensor([[0, 2, 3], [1, -1, -1]])
    assert masked_targets(tokens, index).tolist() == [[7, 9, 10], [1, IGNORE, IGNORE]]


class KeepsGradients(Pretraining):
    """Records the gradients of the optimizer step."""

    def configure_gradient_clipping(self, *args, **kwargs):
        super().configure_gradient_clipping(*args, **kwargs)
        self.kept = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


class TestOneStep:
    def run(self, shards, micro_batches: int, clip: float | None = None) -> KeepsGradients:
        plain = module(clip=clip)
        keeping = KeepsGradients(plain.model, plain.tokenizer, plain.optim, HALF, HALF)
        trainer(micro_batches=micro_batches).fit(keeping, data(shards))
        return keeping

    def expected(self, shards) -> tuple[Pretraining, dict]:
        """Equation (1): the mean cross-entropy over all masked patches of the batch of eight."""
        batch = data(shards).train_dataset(BatchSchedule(8))[0]
        counts = batch["mask"].sum(1)
        assert len(set(counts.tolist())) > 1
        assert counts[:4].sum() != counts[4:].sum()  # micro-batches of unequal weight, or the test shows nothing
        fresh = module()
        jitter = batch["jitter_factors"], batch["jitter_order"], batch["jitter_tiles"].float() / 255
        image = color_jitter(batch["image"].float() / 255, *jitter)
        tokens = fresh.tokenizer.encode(color_jitter(batch["token_image"].float() / 255, *jitter))
        loss = F.cross_entropy(fresh.model(image * 2 - 1, batch["mask"]), tokens[batch["mask"]])
        loss.backward()
        return fresh, {name: p.grad for name, p in fresh.model.named_parameters() if p.grad is not None}

    @pytest.mark.parametrize("micro_batches", [1, 2, 4])
    def test_gradient_equals_full_batch(self, shards, micro_batches):
        _, expected = self.expected(shards)
        got = self.run(shards, micro_batches)
        assert got.kept.keys() == expected.keys()
        assert set(expected) == {name for name, _ in got.model.named_parameters()}
        for name, gradient in expected.items():
            assert torch.allclose(got.kept[name], gradient, atol=1e-7, rtol=1e-4), name

    def test_clip_uses_accumulated_gradient(self, shards):
        """Clipping follows the rescaling: the norm is that of the mean over masked patches."""
        fresh, _ = self.expected(shards)
        norm = torch.nn.utils.clip_grad_norm_(fresh.model.parameters(), 0.01)
        assert norm > 0.02
        got = self.run(shards, 2, clip=0.01)
        for name, parameter in fresh.model.named_parameters():
            assert torch.allclose(got.kept[name], parameter.grad, atol=1e-8, rtol=1e-4), name

    def test_metrics_reset_after_step(self, shards):
        got = self.run(shards, 2)
        assert got._masked == 0


def test_overfits_one_batch():
    """Eight images with fixed masks: the hidden tokens can only be memorized."""
    pretraining = module(embed_dim=64, num_heads=4)
    image = F.interpolate(torch.rand(8, 3, 4, 4), scale_factor=8)
    mask = masks(8)
    index = torch.stack([F.pad(row.nonzero().flatten(), (0, 8 - int(row.sum())), value=-1) for row in mask])
    tokens = pretraining.tokenizer.encode(image)
    assert len(tokens[mask].unique()) > 12
    optimizer = torch.optim.AdamW(pretraining.model.parameters(), lr=3e-3)
    for _ in range(250):
        optimizer.zero_grad()
        loss_sum, masked, correct = pretraining.objective(image, mask, index, tokens)
        (loss_sum / masked).backward()
        optimizer.step()
    assert masked == mask.sum()
    assert loss_sum / masked < 0.05
    assert correct == masked


class TestTokenizerIsNotTrained:
    def test_not_in_state_dict(self, dvae_checkpoint):
        pretraining = module(DVAETokenizer(dvae_checkpoint))
        assert all(name.startswith("model.") for name in pretraining.state_dict())
        assert not [name for name in pretraining.state_dict() if "tokenizer" in name]
        own = {id(p) for p in pretraining.model.parameters()}
        assert {id(p) for p in pretraining.parameters()} == own
        assert not own & {id(p) for p in pretraining.tokenizer.model.parameters()}

    def test_not_in_optimizer(self, dvae_checkpoint, shards):
        pretraining = module(DVAETokenizer(dvae_checkpoint))
        before = {name: p.clone() for name, p in pretraining.tokenizer.model.named_parameters()}
        run = trainer()
        run.fit(pretraining, data(shards))
        stepped = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
        assert stepped == {id(p) for p in pretraining.model.parameters()}
        assert all(torch.equal(before[name], p) for name, p in pretraining.tokenizer.model.named_parameters())
        assert not pretraining.tokenizer.model.training

    def test_vocab_size_mismatch(self):
        with pytest.raises(UserError, match=r"model\.vocab_size=16, but the tokenizer has 32 tokens"):
            module(vocab_size=16)


class TestValidation:
    @pytest.fixture(scope="class")
    def logged(self, shards) -> list[dict]:
        """Validation metrics with batches of 4, the last one smaller, and with all images in one batch."""
        results = []
        for val_batch in (4, 100):
            run = trainer()
            run.limit_val_batches = 1.0
            run.validate(module(), data(shards, val_batch=val_batch), verbose=False)
            results.append({name: float(value) for name, value in run.callback_metrics.items()})
        return results

    def test_metrics_are_independent_of_batch_size(self, logged):
        assert logged[0] == pytest.approx(logged[1], rel=1e-5)

    def test_equals_brute_force(self, logged, shards):
        dataset = data(shards, val_batch=100).eval_dataset()
        batch, pretraining = dataset[0], module()
        jitter = batch["jitter_factors"], batch["jitter_order"], batch["jitter_tiles"].float() / 255
        tokens = pretraining.tokenizer.encode(color_jitter(batch["token_image"].float() / 255, *jitter))
        mask = batch["mask"]
        with torch.no_grad():
            logits = pretraining.model.eval()(color_jitter(batch["image"].float() / 255, *jitter) * 2 - 1, mask)
        hidden = tokens[mask]
        share = tokens.flatten().bincount().double() / tokens.numel()
        expected = {
            "val/loss": F.cross_entropy(logits, hidden).item(),
            "val/masked_token_accuracy": (logits.argmax(-1) == hidden).double().mean().item(),
            "val/copy_token_accuracy": (tokens.gather(1, nearest_visible(mask))[mask] == hidden).double().mean().item(),
            "val/majority_token_accuracy": hidden.bincount().max().item() / len(hidden),
            "val/codebook_perplexity": torch.distributions.Categorical(share).entropy().exp().item(),
            "val/codebook_distinct": len(tokens.unique()),
        }
        assert logged[0] == pytest.approx(expected, rel=1e-5)

"""The masked autoencoder: parity with transformers' ViT-MAE, what masking may and may not do, checkpoints."""

from __future__ import annotations

import math
import re
import shutil
from itertools import product

import pytest
import tiny
import torch
from conftest import seeded, write_checkpoint
from foreign import scrambled

from beit_pretrain.config import compose
from beit_pretrain.engine.task import find_task
from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import SIZES, Classifier
from beit_pretrain.models.blocks import gather_tokens
from beit_pretrain.models.checkpoints.files import rebuild
from beit_pretrain.models.checkpoints.formats import read_checkpoint
from beit_pretrain.models.checkpoints.pretrained import load_pretrained
from beit_pretrain.models.drop_path import uniforms
from beit_pretrain.models.mae import (
    MaskedAutoencoder,
    Masking,
    mask_by_noise,
    patchify,
    random_masking,
    sincos_positions,
    unpatchify,
)
from beit_pretrain.tokenizers.dvae import DVAETokenizer

SIZE = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
DECODER = {"decoder_embed_dim": 24, "decoder_depth": 2, "decoder_num_heads": 3}
N = 16


def mae(**settings) -> MaskedAutoencoder:
    """A tiny autoencoder, every tensor random but its positions."""
    model = MaskedAutoencoder(**{**SIZE, **DECODER, **settings})
    tables = model.pos_embed.clone(), model.decoder_pos_embed.clone()
    scrambled(model)
    with torch.no_grad():
        model.pos_embed.copy_(tables[0])
        model.decoder_pos_embed.copy_(tables[1])
    return model


def images(batch: int = 3, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def masks(batch: int = 3, patches: int = N, ratio: float = 0.75) -> Masking:
    return random_masking(0, torch.arange(batch), patches, ratio)


class TestParity:
    """Loss, predictions and gradients are those of transformers with the same weights and noise."""

    # Theirs -> ours, of a block; q, k and v are one matrix here.
    NAMES = {"attention.o_proj": "attn.proj", "layernorm_before": "norm1", "layernorm_after": "norm2"}
    ROOTS = {
        "vit.embeddings.": "",
        "vit.layernorm": "norm",
        "vit.layers": "blocks",
        "decoder.decoder_layers": "decoder_blocks",
        "decoder.": "",
        "patch_embeddings.projection": "patch_embed.proj",
        "position_embeddings": "pos_embed",
    }

    @classmethod
    def translated(cls, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Their tensors (or gradients) by our names; a bias of k has none."""
        ours: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            for theirs, own in (cls.ROOTS | cls.NAMES).items():
                name = name.replace(theirs, own)
            if found := re.fullmatch(r"(.*)attention\.([qkv])_proj\.(weight|bias)", name):
                block, part, kind = found.groups()
                ours[f"{block}attn.{part}_bias" if kind == "bias" else f"{block}attn.qkv.weight.{part}"] = tensor
            else:
                ours[name] = tensor
        for name in [name for name in ours if name.endswith(".qkv.weight.q")]:
            stem = name.removesuffix(".q")
            ours[stem] = torch.cat([ours.pop(f"{stem}.{part}") for part in "qkv"])
        return {name: tensor for name, tensor in ours.items() if not name.endswith("k_bias")}

    @staticmethod
    def theirs(side: int, ratio: float, norm_pix_loss: bool):
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        config = ViTMAEConfig(
            image_size=side,
            patch_size=8,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=128,
            decoder_hidden_size=24,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=3,
            decoder_intermediate_size=96,
            layer_norm_eps=1e-6,
            mask_ratio=ratio,
            norm_pix_loss=norm_pix_loss,
        )
        return scrambled(ViTMAEForPreTraining(config), std=0.3).double()

    @pytest.mark.parametrize(
        ("side", "ratio", "norm_pix_loss"), list(product([32, 48], [0.5, 0.75, 0.9], [False, True]))
    )
    def test_with_transformers(self, side, ratio, norm_pix_loss):
        theirs = self.theirs(side, ratio, norm_pix_loss)
        ours = MaskedAutoencoder(**{**SIZE, **DECODER, "image_size": side}, norm_pix_loss=norm_pix_loss).double()
        ours.load_state_dict(self.translated(theirs.state_dict()))
        image = images(side=side).double()
        noise = torch.rand(3, (side // 8) ** 2, generator=torch.Generator().manual_seed(1))
        expected = theirs(image, noise=noise)
        masking = mask_by_noise(noise, ratio)
        assert torch.equal(masking.mask_BN, expected.mask == 1)
        loss = ours(image, masking)
        torch.testing.assert_close(loss, expected.loss, rtol=1e-12, atol=0)
        every = torch.arange(noise.shape[1]).expand(3, -1)
        found = ours.decode(ours.encode(image, masking.visible_BK), masking.visible_BK, every)
        torch.testing.assert_close(found, expected.logits, rtol=1e-10, atol=1e-12)

        loss.backward()
        expected.loss.backward()
        gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
        for name, gradient in self.translated(gradients).items():
            torch.testing.assert_close(ours.get_parameter(name).grad, gradient, rtol=1e-8, atol=1e-12, msg=name)
        assert all(g.abs().max() < 1e-14 for name, g in gradients.items() if name.endswith("k_proj.bias"))

    def test_base_has_their_parameters(self):
        """Names and shapes of the paper's base model with its decoder, and all but the biases of k of the number."""
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        size = {**SIZES["base"], "init_values": None}
        with torch.device("meta"):
            theirs, ours = ViTMAEForPreTraining(ViTMAEConfig()), MaskedAutoencoder(**size)
        expected = {name: tensor.shape for name, tensor in self.translated(theirs.state_dict()).items()}
        assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == expected
        less = 12 * 768 + 8 * 512
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) - less


def test_a_bias_of_k_changes_no_attention():
    """softmax over keys of q . (k + b) = q . k + q . b: the second term is the same for all keys of a query."""
    attention = scrambled(mae()).blocks[0].attn.double()
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    without = attention(x)
    attention.k_bias.copy_(torch.linspace(-3, 3, 32))
    torch.testing.assert_close(attention(x), without, rtol=1e-12, atol=1e-12)
    attention.v_bias.data += 1
    assert (attention(x) - without).abs().max() > 0.1


class TestPositions:
    @pytest.mark.parametrize("grid", [(4, 4), (2, 5), (14, 14)])
    def test_sines_and_cosines_of_column_and_row(self, grid):
        table = sincos_positions(grid, 24)
        assert table.shape == (1, 1 + grid[0] * grid[1], 24)
        assert (table[0, 0] == 0).all()
        frequency = 10000 ** -(torch.arange(6).double() / 6)
        for row, column in product(range(grid[0]), range(grid[1])):
            parts = [f(place * frequency) for place in (column, row) for f in (torch.sin, torch.cos)]
            found = table[0, 1 + row * grid[1] + column]
            torch.testing.assert_close(found, torch.cat(parts).float(), rtol=0, atol=2e-6)

    def test_positions_are_not_trained(self):
        model = seeded(MaskedAutoencoder, **SIZE, **DECODER)
        assert torch.equal(model.pos_embed, sincos_positions((4, 4), 32))
        assert torch.equal(model.decoder_pos_embed, sincos_positions((4, 4), 24))
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        assert frozen == {"pos_embed", "decoder_pos_embed"}


class TestMasking:
    def test_every_image_has_its_share(self):
        visible, masked = masking = random_masking(0, torch.arange(5), 196, 0.75)
        assert visible.shape == (5, 49)
        assert masked.shape == (5, 147)
        assert torch.equal(torch.cat(masking, dim=1).sort(1).values, torch.arange(196).expand(5, -1))
        assert masking.mask_BN.dtype == torch.bool
        assert (masking.mask_BN.sum(1) == 147).all()
        assert masking.mask_BN.gather(1, masked).all()

    def test_a_function_of_seed_and_position(self):
        whole = random_masking(3, torch.arange(64), N).mask_BN
        for positions in (torch.tensor([7]), torch.tensor([63, 0, 7]), torch.arange(1, 64, 2)):
            assert torch.equal(random_masking(3, positions, N).mask_BN, whole[positions])
        assert not torch.equal(random_masking(4, torch.arange(64), N).mask_BN, whole)
        assert len(whole.unique(dim=0)) > 50

    def test_every_patch_is_masked_alike(self):
        masked = random_masking(0, torch.arange(20_000), 196).mask_BN.double()
        assert masked.mean(0).numpy() == pytest.approx(0.75, abs=5 * math.sqrt(0.75 * 0.25 / 20_000))
        one, other = masked[:, 0], masked[:, 1]  # of two patches both: 147 x 146 of 196 x 195
        assert (one * other).mean().item() == pytest.approx(147 * 146 / (196 * 195), abs=0.02)

    def test_equal_noise_is_decided_by_the_place(self):
        assert mask_by_noise(torch.zeros(2, 4), 0.5).visible_BK.tolist() == [[0, 1], [0, 1]]
        noise = uniforms(0, torch.arange(2), N)
        assert torch.equal(random_masking(0, torch.arange(2), N).mask_BN, mask_by_noise(noise).mask_BN)

    @pytest.mark.parametrize("ratio", [0.0, 1.0, 0.99])
    def test_some_patches_must_be_visible_and_some_masked(self, ratio):
        with pytest.raises(UserError, match=f"mask_ratio={ratio} leaves .* of 16 patches visible; 1 to 15 can be"):
            masks(ratio=ratio)


class TestPatches:
    @pytest.mark.parametrize(("grid", "channels"), [((4, 4), 3), ((2, 5), 1)])
    def test_there_and_back(self, grid, channels):
        image = torch.randn(2, channels, grid[0] * 8, grid[1] * 8)
        patches = patchify(image, 8)
        assert patches.shape == (2, grid[0] * grid[1], 64 * channels)
        assert torch.equal(unpatchify(patches, grid, 8), image)
        row, column = grid[0] - 1, 1
        expected = image[0, :, row * 8 :, column * 8 : column * 8 + 8].permute(1, 2, 0)
        assert torch.equal(patches[0, row * grid[1] + column], expected.flatten())


class TestInvariances:
    """What may and what may not change the predictions."""

    def test_no_pixel_of_a_masked_patch_is_seen(self):
        model, masking, image = mae(), masks(), images()
        hidden = patchify(image, 8).masked_fill(masking.mask_BN.unsqueeze(-1), torch.nan)
        without = unpatchify(hidden, (4, 4), 8)
        assert without.isnan().any()
        assert torch.equal(model.encode(without, masking.visible_BK), model.encode(image, masking.visible_BK))
        assert torch.equal(model.predict(without, masking), model.predict(image, masking))

    def test_the_loss_is_of_the_masked_patches(self):
        """Their own pixels are its only targets: the mean of the squared errors, written out."""
        model, masking, image = mae(norm_pix_loss=False), masks(), images()
        predicted = model.predict(image, masking)
        errors = [
            (predicted[b, m] - patchify(image, 8)[b, patch]).square().mean()
            for b, patches in enumerate(masking.masked_BM.tolist())
            for m, patch in enumerate(patches)
        ]
        assert model(image, masking).item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)

    def test_normalised_targets_know_neither_brightness_nor_contrast(self):
        model, masking, image = mae(), masks(), images()
        losses = []
        for other in (image, 3 * image + 0.5):
            changed = torch.where(masking.mask_BN[..., None], patchify(other, 8), patchify(image, 8))
            losses.append(model(unpatchify(changed, (4, 4), 8), masking).item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    def test_the_order_of_patches_does_not_matter(self):
        model, image = mae(), images()
        visible, masked = masking = masks()
        other = Masking(visible.flip(1), masked.roll(5, 1))
        torch.testing.assert_close(model.predict(image, other), model.predict(image, masking).roll(5, 1))

    def test_images_are_by_themselves(self):
        model, masking, image = mae(), masks(), images()
        alone = [model.predict(image[i : i + 1], Masking(*(t[i : i + 1] for t in masking))) for i in range(3)]
        torch.testing.assert_close(torch.cat(alone), model.predict(image, masking))

    def test_the_place_of_a_patch_matters(self):
        """Two masked patches differ by their positions alone."""
        predicted = mae().predict(images(), masks())
        assert (predicted[:, 0] - predicted[:, 1]).abs().max() > 1e-3

    def test_everything_visible_is_the_backbone(self):
        model, image = mae(), images()
        every = torch.arange(N).expand(3, -1)
        torch.testing.assert_close(model.encode(image, every), model.norm(model.hidden_states(image)[-1]))


class TestTraining:
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_the_gradient_reaches_every_parameter(self, checkpointing):
        model, masking, image = mae(), masks(), images()
        model(image, masking).backward()
        plain = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all(gradient is not None and gradient.abs().max() > 0 for gradient in plain.values())
        if checkpointing:
            model.zero_grad()
            model.set_grad_checkpointing()
            model(image, masking).backward()
            for name, gradient in plain.items():
                torch.testing.assert_close(model.get_parameter(name).grad, gradient, msg=name)

    def test_it_learns(self):
        """Ramps of any direction: what is masked follows from what is visible, also in images not trained on."""
        angle = torch.rand(64, generator=torch.Generator().manual_seed(0)) * 2 * math.pi
        place = torch.linspace(-1, 1, 32)
        ramps = angle.cos()[:, None, None] * place + angle.sin()[:, None, None] * place[:, None]
        train, held_out = ramps[:, None].expand(-1, 3, -1, -1).split(48)
        model = seeded(MaskedAutoencoder, **SIZE, **DECODER)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for step in range(60):
            optimizer.zero_grad()
            loss = model(train, random_masking(0, torch.arange(48) + 48 * step, N))
            loss.backward()
            optimizer.step()
            if step == 0:
                # The variance of the targets, and that of a new layer of E inputs and P outputs: 2 E / (E + P).
                assert loss.item() == pytest.approx(1 + 2 * 24 / (24 + 192), abs=0.1)
        with torch.no_grad():
            assert model(held_out, masks(16)) < 0.2
        assert torch.equal(model.pos_embed, sincos_positions((4, 4), 32))

    def test_half_precision_keeps_the_loss_and_the_stream_in_float32(self):
        model, masking, image = mae(), masks(), images()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(image, masking)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(model(image, masking).item(), rel=0.02)

    def test_one_graph(self):
        model, masking, image = mae(), masks(), images()
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda image, position: model(image, random_masking(0, position, N)), backend="eager", fullgraph=True
        )
        assert compiled(image, torch.arange(3)).item() == pytest.approx(model(image, masking).item(), rel=1e-5)
        torch._dynamo.reset()

    def test_initial_weights(self):
        model = seeded(MaskedAutoencoder, **{**SIZE, **DECODER, "embed_dim": 64})
        for name, tensor in model.named_parameters():
            if "pos_embed" in name or name == "patch_embed.proj.bias":  # torch's own, as in the release
                continue
            if tensor.ndim == 1:
                assert (tensor == float("norm" in name and name.endswith("weight"))).all(), name
            elif "token" in name:
                assert tensor.std().item() == pytest.approx(0.02, rel=0.5), name
            else:
                bound = math.sqrt(6 / (len(tensor) + tensor[0].numel()))  # of Xavier's uniform
                assert bound * 0.98 < tensor.abs().max().item() <= bound, name
                assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name


class TestReconstruction:
    @pytest.mark.parametrize("norm_pix_loss", [False, True])
    def test_right_predictions_are_the_image(self, norm_pix_loss, monkeypatch):
        model, masking, image = mae(norm_pix_loss=norm_pix_loss), masks(), images() * 0.2 + 0.4
        target = gather_tokens(patchify(image, 8), masking.masked_BM)
        mean, std = model.patch_statistics(target)
        monkeypatch.setattr(model, "predict", lambda image, masking: (target - mean) / std)
        torch.testing.assert_close(model.reconstruct(image, masking), image)
        assert model(image, masking).item() == pytest.approx(0, abs=1e-12)

    def test_visible_patches_stay(self):
        model, masking, image = mae(), masks(), images()
        found = patchify(model.reconstruct(image, masking), 8)
        same = (found == patchify(image, 8)).all(-1)
        assert torch.equal(same, ~masking.mask_BN)


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"rel_pos_bias": "shared"}, "model.rel_pos_bias=shared: a masked autoencoder has rel_pos_bias=none"),
            ({"abs_pos_emb": False}, "a masked autoencoder has abs_pos_emb=True"),
            ({"init_values": 0.1}, "a masked autoencoder has init_values=None"),
            ({"drop_path_rate": 0.1}, "a masked autoencoder has drop_path_rate=0.0"),
            ({"embed_dim": 30, "num_heads": 3}, "model.embed_dim=30 is not divisible by 4"),
            ({"decoder_embed_dim": 30}, "model.decoder_embed_dim=30 is not divisible by 4"),
            ({"decoder_num_heads": 0}, "model.decoder_num_heads must be at least 1, got 0"),
            ({"decoder_depth": 0}, "model.decoder_depth must be at least 1, got 0"),
            ({"decoder_num_heads": 5}, "model.decoder_embed_dim=24 is not divisible by 5"),
        ],
    )
    def test_impossible_networks_are_refused(self, settings, said):
        with pytest.raises(UserError, match=said):
            MaskedAutoencoder(**{**SIZE, **DECODER, **settings})


@pytest.fixture(scope="module")
def model() -> MaskedAutoencoder:
    return mae(norm_pix_loss=False)


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    """As `fit` would save it."""
    about = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    return write_checkpoint(tmp_path_factory.mktemp("mae") / "last.ckpt", "mae", model, **about)


class TestCheckpoints:
    """One of a masked autoencoder is read wherever a backbone is."""

    def test_it_is_read_as_a_backbone(self, model, checkpoint):
        source = read_checkpoint(checkpoint)
        assert source.kind == "backbone"
        assert source.about["std"] == [0.2, 0.3, 0.4]
        assert torch.equal(
            rebuild(MaskedAutoencoder, checkpoint, "mae")[0](images(), masks()), model(images(), masks())
        )

    def test_features(self, model, checkpoint):
        network = load_pretrained(checkpoint)
        found = network(images())
        for cls, patches, expected in zip(*found, model.hidden_states(images()), strict=True):
            assert torch.equal(torch.cat([cls.unsqueeze(1), patches], dim=1), expected)
        assert network.about["mean"] == [0.5, 0.4, 0.3]

    def test_classifiers_and_segmenters(self, model, checkpoint):
        for head in ("classify", "segment"):
            network = load_pretrained(checkpoint, head, num_classes=5)
            assert network.pos_embed.requires_grad  # fine-tuning trains them, as the release does
            assert network.config["rel_pos_bias"] == "none"
            state = network.state_dict()
            for name, tensor in model.state_dict().items():
                if not name.startswith(("decoder_", "mask_token", "norm.")):
                    assert torch.equal(state[name], tensor), name
        token = load_pretrained(checkpoint, "classify", num_classes=5).norm
        assert isinstance(token, torch.nn.Identity)  # a new LayerNorm over the mean, as in the release

    @pytest.mark.parametrize("experiment", ["finetune_own", "probe_1k"])
    def test_runs_that_start_from_it(self, experiment, model, checkpoint, shards, tmp_path):
        words = ["epochs=null", "steps=2", "global_batch_size=4", "image_size=32", f"run_dir={tmp_path}", "logger=csv"]
        data = [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}"]
        more = [] if experiment == "finetune_own" else ["optim.warmup_epochs=null"]
        cfg = compose("fit", [f"+experiment={experiment}", f"init_from={checkpoint}", *words, *data, *more])
        task = find_task(cfg.task)(cfg)
        assert "backbone: 2 blocks of width 32" in task.origin
        backbone = task.module.model if experiment == "finetune_own" else task.module._backbone[0]
        assert torch.equal(backbone.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)

    def test_another_image_size(self, checkpoint):
        assert load_pretrained(checkpoint, image_size=48).pos_embed.shape == (1, 37, 32)

    def test_it_has_no_token_head(self, checkpoint):
        with pytest.raises(UserError, match="holds a backbone without a token head"):
            load_pretrained(checkpoint, "mim")

    @pytest.mark.parametrize("to", ["hf", "timm"])
    def test_a_fine_tuned_one_is_exported(self, to, checkpoint, run_cli, tmp_path):
        network = load_pretrained(checkpoint, "classify", num_classes=5)
        assert isinstance(network, Classifier)
        tuned = write_checkpoint(tmp_path / "last.ckpt", "classifier", scrambled(network))
        out = tmp_path / {"hf": "folder", "timm": "x.safetensors"}[to]
        code, stdout, stderr = run_cli("export", f"init_from={tuned}", f"to={to}", f"out={out}")
        assert code == 0, stderr
        assert "opened again and compared: the same numbers" in stdout
        assert torch.equal(load_pretrained(out, "classify")(images()), load_pretrained(tuned, "classify")(images()))


class TestTask:
    """`fit +experiment=mae_base_1k`, tiny."""

    WORDS = (
        "fit +experiment=mae_base_1k image_size=32 patch_size=8 epochs=null steps=4 optim.warmup_epochs=null "
        "global_batch_size=8 batch_size=4 model.size=null +model.embed_dim=32 +model.depth=2 +model.num_heads=2 "
        "model.decoder_embed_dim=24 model.decoder_depth=1 model.decoder_num_heads=3 data.num_workers=0 threads=1 "
        "log_every=1 val_every=2 save_every=2 data.val_batch=4 data.val_images=8 logger=csv run_dir=m"
    ).split()

    def test_from_images_to_a_classifier_probes_and_a_folder(self, shards, run_cli, tmp_path):
        """Training, resume, pictures; its checkpoint in fine-tuning, probes and export."""
        data = [f"data.train={shards / 'train'}", f"data.val={shards / 'val'}"]
        for steps in ("steps=2", "steps=4"):
            code, _, stderr = run_cli(*self.WORDS, *data, steps, *(["resume=never"] if steps == "steps=2" else []))
            assert (code == 0) == (steps == "steps=2"), stderr
        assert "holds a run with other settings (steps: 2 -> 4)" in stderr
        assert run_cli(*self.WORDS, *data, "resume=never")[0] == 0
        assert (tmp_path / "m/pictures/step-000004.png").is_file()
        header, *rows = (tmp_path / "m/metrics.csv").read_text().splitlines()
        assert len(rows) == 4
        assert {"train/loss", "val/loss", "val/knn_accuracy", "val/rankme", "val/dense_knn_miou"} <= set(
            header.split(",")
        )
        assert run_cli("visualize", "run=m")[0] == 0
        checkpoint = "init_from=m/checkpoints/last.ckpt"
        common = (
            "model.size=null epochs=null steps=2 optim.warmup_epochs=null global_batch_size=4 image_size=32".split()
        )
        tuning = ["fit", "+experiment=finetune_own", checkpoint, *common, *data, "run_dir=f", "data.num_workers=0"]
        assert run_cli(*tuning)[0] == 0
        assert run_cli("probe", checkpoint, *data, "data.num_workers=0", "linear.epochs=1", "knn.ks=[1]")[0] == 0
        code, stdout, stderr = run_cli("export", checkpoint, "to=hf", "out=hf")
        assert code == 0, stderr
        ours, theirs = load_pretrained("m/checkpoints/last.ckpt"), load_pretrained("hf")
        for one, other in zip(ours(images()).patches, theirs(images()).patches, strict=True):
            assert torch.equal(one, other)

    def test_a_resumed_run_is_the_same(self, shards, run_cli, tmp_path):
        words = [*self.WORDS, f"data.train={shards / 'train'}", f"data.val={shards / 'val'}", "threads=1"]
        assert run_cli(*words, "run_dir=whole")[0] == 0
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
        folder = tmp_path / "cut/checkpoints"
        (folder / "previous.ckpt").replace(folder / "last.ckpt")
        (tmp_path / "cut/finished.json").unlink()
        assert run_cli(*words, "run_dir=cut")[0] == 0
        tiny.same_run(tmp_path / "whole", tmp_path / "cut")

    def test_it_continues_at_another_size_with_the_colours_of_the_file(self, model, checkpoint, shards):
        words = [*self.WORDS[1:], f"data.train={shards / 'train'}", f"init_from={checkpoint}", "model.decoder_depth=2"]
        task = find_task("mae")(compose("fit", [*words, "image_size=48", "mean=null", "std=null"]))
        assert task.module.mean == (0.5, 0.4, 0.3)
        network = task.module.model
        assert network.grid == (6, 6)
        assert network.config["norm_pix_loss"]  # as the run asks, not as in the file
        assert torch.equal(network.decoder_blocks[0].mlp.fc1.weight, model.decoder_blocks[0].mlp.fc1.weight)
        assert torch.equal(network.pos_embed, mae(image_size=48).pos_embed)
        fixed = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
        assert sorted(fixed) == ["decoder_pos_embed", "pos_embed"]

    @pytest.mark.parametrize(
        ("word", "said"),
        [
            ("model.size=base", "has depth=2, but the run asks for 12; model.size=null keeps it"),
            ("model.decoder_depth=1", "has decoder_depth=2, but the run asks for 1; set model.decoder_depth=2"),
            ("patch_size=16", "has patch_size=8, but the run asks for 16; set patch_size=8"),
            ("data.channels=1 mean=null std=null", "has in_chans=3, but the run asks for 1; set data.channels=3"),
            ("image_size=36", "image_size=36 is not divisible by patch_size=8"),
        ],
    )
    def test_a_checkpoint_of_another_network_is_refused(self, word, said, checkpoint, shards, refused):
        words = [w for w in self.WORDS if not (w.startswith("+model") and word == "model.size=base")]
        words.append("model.decoder_depth=2")
        assert said in refused(*words, f"data.train={shards / 'train'}", f"init_from={checkpoint}", *word.split())

    def test_checkpoints_of_other_kinds_are_refused(self, checkpoint, dvae_checkpoint, shards, refused):
        words = [*self.WORDS, f"data.train={shards / 'train'}"]
        said = refused(*words, f"init_from={dvae_checkpoint}")
        assert "holds a tokenizer (dVAE); a checkpoint of kind 'mae' is needed here" in said
        with pytest.raises(UserError, match=r"holds a checkpoint of kind 'mae'; a tokenizer \(dVAE\) is needed here"):
            DVAETokenizer(checkpoint)

    def test_a_ratio_that_leaves_nothing_is_refused(self, shards, run_cli):
        code, _, stderr = run_cli(*self.WORDS, f"data.train={shards / 'train'}", "mask.ratio=0.999")
        assert (code, stderr.count("\n")) == (2, 1)
        assert "leaves 0 of 16 patches visible" in stderr

"""The backbone: parity with timm, what masking may and may not do, sizes, initial weights and names."""

import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from timm.models.beit import Beit

from beit_pretrain.errors import UserError
from beit_pretrain.models.backbone import SIZES, Classifier, MaskedImageModel, patch_grid

TINY = {"image_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
N = 16


@pytest.fixture(scope="module")
def base() -> MaskedImageModel:
    """The paper's base model, untrained."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MaskedImageModel(**SIZES["base"], vocab_size=8192).eval()


def scrambled(model):
    """Every parameter random: fresh bias tables, biases and norms are 0 or 1 and would hide a mistake."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def image_and_mask(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(batch, 3, 32, 32), torch.rand(batch, N) < 0.4


def mim(**settings) -> MaskedImageModel:
    return scrambled(MaskedImageModel(**{**TINY, "vocab_size": 32, **settings}))


class TestBase:
    """One full-size model for everything that needs its size."""

    def test_number_of_parameters(self, base):
        assert sum(p.numel() for p in base.parameters()) == 91_965_776

    def test_loss_at_step_0(self, base):
        """ln 8192 + sigma^2 / 2. The mean over all possible targets: 150 drawn ones alone would scatter it by .02."""
        torch.manual_seed(0)
        mask = torch.zeros(2, 196, dtype=torch.bool)
        mask[:, torch.randperm(196)[:75]] = True
        with torch.no_grad():
            logits = base(torch.rand(2, 3, 224, 224) * 2 - 1, mask)
        assert logits.shape == (150, 8192)
        uniform = torch.full_like(logits, 1 / 8192)
        assert F.cross_entropy(logits, uniform).item() == pytest.approx(9.056, abs=0.03)

    def test_initial_weights(self, base):
        check_initial_weights(base, 0.1)

    def test_one_bias_table_for_all_blocks(self, base):
        tables = {name: p for name, p in base.named_parameters() if "table" in name}
        assert list(tables) == ["rel_pos_bias.relative_position_bias_table"]
        (table,) = tables.values()
        assert table.shape == (732, 12)
        assert (table == 0).all()

    def test_drop_path_grows_with_depth(self, base):
        rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in base.blocks]
        assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])

    def test_norms(self, base):
        norms = [m for m in base.modules() if isinstance(m, torch.nn.LayerNorm)]
        assert len(norms) == 25
        assert {norm.eps for norm in norms} == {1e-6}


def check_initial_weights(model: MaskedImageModel, layer_scale: float) -> None:
    """Mean, standard deviation and maximum of every tensor: a normal of std .02 cut at one sigma has std .010791."""
    for name, tensor in model.named_parameters():
        if "norm" in name or name.endswith(("bias", "bias_table")):
            assert (tensor == (1.0 if name.endswith("weight") else 0.0)).all(), name
            continue
        if "gamma" in name:
            assert (tensor == layer_scale).all(), name
            continue
        found = re.match(r"blocks\.(\d+)\.(attn\.proj|mlp\.fc2)", name)
        factor = math.sqrt(2 * (int(found[1]) + 1)) if found else 1.0
        count = tensor.numel()
        error = 5 / math.sqrt(count)  # five standard errors
        assert tensor.std().item() * factor == pytest.approx(0.010791, rel=max(error, 1e-3)), name
        assert tensor.mean().abs().item() * factor <= 0.0108 * error, name
        largest = tensor.abs().max().item() * factor
        assert largest <= 0.02 * (1 + 1e-6), name
        assert largest >= 0.02 * (1 - 20 / count), name


@pytest.mark.long
def test_initial_weights_of_large():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        large = MaskedImageModel(**SIZES["large"])
    check_initial_weights(large, 1e-5)
    norms, rates = (
        [m for m in large.modules() if isinstance(m, torch.nn.LayerNorm)],
        [getattr(block.drop_path1, "drop_prob", 0.0) for block in large.blocks],
    )
    assert len(norms) == 49
    assert rates == pytest.approx([0.1 * i / 23 for i in range(24)])


def test_sizes():
    paper = {"base": (768, 12, 12, 0.1), "large": (1024, 24, 16, 1e-5)}
    for name, expected in paper.items():
        assert tuple(SIZES[name][key] for key in ("embed_dim", "depth", "num_heads", "init_values")) == expected
    assert all(size["embed_dim"] == 64 * size["num_heads"] for size in SIZES.values())


OPTIONS = list(itertools.product((True, False), (True, False), (0.1, None)))


@pytest.mark.parametrize(("shared", "absolute", "scale"), OPTIONS)
class TestMasking:
    def test_without_a_mask_it_is_timms(self, shared, absolute, scale):
        model = mim(rel_pos_bias="shared" if shared else "none", abs_pos_emb=absolute, init_values=scale)
        options = {"use_shared_rel_pos_bias": shared, "use_abs_pos_emb": absolute, "init_values": scale}
        reference = Beit(**TIMM, num_classes=0, global_pool="", **options).eval()
        missing, unexpected = reference.load_state_dict(model.state_dict(), strict=False)
        assert missing == []
        assert unexpected == ["mask_token", "lm_head.weight", "lm_head.bias"]
        image, _ = image_and_mask()
        with torch.no_grad():
            expected = reference.forward_features(image)
            found = model.encode(image)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)  # another kernel for the same attention
            assert torch.equal(model.encode(image, torch.zeros(3, N, dtype=torch.bool)), found)

    def test_masked_pixels_have_no_influence(self, shared, absolute, scale):
        model = mim(rel_pos_bias="shared" if shared else "none", abs_pos_emb=absolute, init_values=scale)
        image, mask = image_and_mask()
        pixels = mask.view(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
        with torch.no_grad():
            expected = model.encode(image, mask)
            for fill in (0.0, 1e6, float("nan")):
                changed = torch.where(pixels, torch.tensor(fill), image)
                assert torch.equal(model.encode(changed, mask), expected)
                assert torch.equal(model(changed, mask), model(image, mask))
            assert not torch.equal(model.encode(image), expected)

    def test_visible_pixels_have_influence(self, shared, absolute, scale):
        model = mim(rel_pos_bias="shared" if shared else "none", abs_pos_emb=absolute, init_values=scale)
        image, mask = image_and_mask()
        assert not mask[0, 5]
        changed = image.clone()
        changed[0, :, 8:16, 8:16] += 1  # patch 5 is in row 1, column 1
        with torch.no_grad():
            first, second = model.encode(image, mask), model.encode(changed, mask)
        assert not torch.equal(first[0], second[0])
        assert torch.equal(first[1:], second[1:])


def test_both_forwards_agree_at_masked_positions():
    model = mim()
    image, mask = image_and_mask()
    index = torch.full((3, N), -1)
    for row, of_image in zip(index, mask, strict=True):
        masked = of_image.nonzero().flatten()
        row[: len(masked)] = masked
    assert len(set(mask.sum(1).tolist())) > 1
    with torch.no_grad():
        at = model.forward_at(image, mask, index.clamp(min=0))
        logits = model(image, mask)
    assert logits.shape == (int(mask.sum()), 32)
    assert torch.allclose(at[index >= 0], logits, atol=1e-5, rtol=1e-5)


def test_the_mask_token_is_the_only_thing_at_a_masked_patch():
    """With all patches masked and no positions, all patches look alike; with absolute positions they do not."""
    image, everything = torch.randn(1, 3, 32, 32), torch.ones(1, N, dtype=torch.bool)
    with torch.no_grad():
        alike = mim(rel_pos_bias="none").encode(image, everything)[0, 1:]
        placed = mim(rel_pos_bias="none", abs_pos_emb=True).encode(image, everything)[0, 1:]
    assert torch.allclose(alike, alike[:1].expand_as(alike), atol=1e-5)
    assert not torch.allclose(placed, placed[:1].expand_as(placed), atol=1e-1)


def test_hidden_states_are_the_blocks_outputs():
    model, (image, mask) = mim(), image_and_mask()
    with torch.no_grad():
        states = model.hidden_states(image, mask)
        assert torch.equal(model.norm(states[-1]), model.encode(image, mask))
    assert [state.shape for state in states] == [(3, 1 + N, 32)] * 2


@pytest.mark.parametrize(("relative", "absolute"), [(True, False), (False, True), (True, True)])
def test_classifier_equals_timm_with_mean_pooling(relative, absolute):
    model = scrambled(Classifier(7, **TINY, rel_pos_bias="per_layer" if relative else "none", abs_pos_emb=absolute))
    options = {"use_rel_pos_bias": relative, "use_abs_pos_emb": absolute, "init_values": 0.1}
    reference = Beit(**TIMM, num_classes=7, global_pool="avg", **options).eval()
    reference.load_state_dict(model.state_dict())
    image, _ = image_and_mask()
    with torch.no_grad():
        logits = model(image)
        pooled = model.hidden_states(image)[-1][:, 1:].mean(1)
        assert torch.allclose(logits, reference(image), atol=1e-5, rtol=1e-5)
        assert torch.allclose(logits, model.head(model.fc_norm(pooled)), atol=1e-5, rtol=1e-5)
    assert logits.shape == (3, 7)


def test_initial_weights_of_fine_tuning():
    """Normal of std .02, not cut in practice; head x .001; the patch convolution as torch makes it."""
    torch.manual_seed(0)
    model = Classifier(1000, image_size=32, patch_size=16, embed_dim=192, depth=3, num_heads=3)
    for layer, block in enumerate(model.blocks, start=1):
        for weight in (block.attn.qkv.weight, block.mlp.fc1.weight):
            assert weight.std().item() == pytest.approx(0.02, rel=0.02)
            assert weight.abs().max() > 0.06
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(0.02 / math.sqrt(2 * layer), rel=0.02)
        assert block.attn.relative_position_bias_table.shape == (12, 3)  # (2 * 2 - 1)^2 + 3
        assert (block.attn.relative_position_bias_table == 0).all()
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.02)
    bound = 1 / math.sqrt(3 * 16 * 16)  # nn.Conv2d's own uniform distribution
    conv = model.patch_embed.proj
    assert conv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert conv.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert conv.bias.abs().max() > 0


BLOCK = {"gamma_1", "gamma_2"} | {
    f"{layer}.{kind}" for layer in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2") for kind in ("weight", "bias")
}
BLOCK |= {"attn.qkv.weight", "attn.q_bias", "attn.v_bias"}  # k has no bias
STEM = {"cls_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_state_dict_names_of_pretraining():
    """timm's and the authors' names: checkpoints of others, and our old ones, must keep loading."""
    expected = STEM | {f"blocks.{i}.{name}" for i in range(2) for name in BLOCK}
    expected |= {"mask_token", "rel_pos_bias.relative_position_bias_table", "norm.weight", "norm.bias"}
    expected |= {"lm_head.weight", "lm_head.bias"}
    assert set(mim().state_dict()) == expected
    assert set(mim(abs_pos_emb=True).state_dict()) == expected | {"pos_embed"}


def test_state_dict_names_of_fine_tuning():
    own = BLOCK | {"attn.relative_position_bias_table"}
    expected = STEM | {f"blocks.{i}.{name}" for i in range(2) for name in own}
    expected |= {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert set(Classifier(7, **TINY).state_dict()) == expected


def test_k_has_no_bias():
    attention = mim().blocks[0].attn
    assert attention.qkv.bias is None
    assert (attention.k_bias == 0).all()


def test_config_builds_the_same_network():
    for model in (mim(abs_pos_emb=True), Classifier(7, **TINY)):
        again = type(model)(**model.config)
        assert {n: p.shape for n, p in again.state_dict().items()} == {
            n: p.shape for n, p in model.state_dict().items()
        }


@pytest.mark.parametrize(
    ("image", "patch", "near"), [(225, 16, "240 would be"), (20, 32, "32 would be"), (30, 8, "32 would be")]
)
def test_an_image_that_does_not_divide_into_patches(image, patch, near):
    with pytest.raises(UserError, match=f"image_size={image} is not divisible by patch_size={patch}; .*{near}"):
        patch_grid(image, patch)
    with pytest.raises(UserError):
        MaskedImageModel(image_size=image, patch_size=patch)


@pytest.mark.parametrize("name", ["depth", "embed_dim", "num_heads", "in_chans", "num_classes"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_below_one_are_refused(name, value):
    with pytest.raises(UserError, match=f"model.{name} must be at least 1, got {value}"):
        Classifier(**{"num_classes": 7, **TINY, name: value})


@pytest.mark.parametrize(("image", "patch"), [(0, 8), (-8, 8), (8, 0), (8, -8)])
def test_image_and_patch_sizes_below_one_are_refused(image, patch):
    with pytest.raises(UserError):
        patch_grid(image, patch)


def test_patch_grid():
    assert patch_grid(224, 16) == (14, 14)

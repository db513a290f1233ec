"""Schedules, parameter groups, layer decay (release: optim_factory.py), and gradient clipping against torch."""

import math

import pytest
import torch
from torch import nn

from beit_pretrain.config import compose
from beit_pretrain.engine.optim import (
    clip_gradients,
    configure,
    layer_of,
    learning_rate,
    parameter_groups,
    poly_rate,
    rate,
)
from beit_pretrain.engine.settings import OptimSettings
from beit_pretrain.engine.trainer import total_steps
from beit_pretrain.models.backbone import Classifier, MaskedImageModel
from beit_pretrain.models.upernet import Segmenter

TINY = {"image_size": 16, "patch_size": 8, "embed_dim": 16, "num_heads": 2}


def mim(**settings) -> MaskedImageModel:
    return MaskedImageModel(**TINY, depth=2, vocab_size=8, **settings)


def classifier() -> Classifier:
    return Classifier(3, **TINY, depth=12, abs_pos_emb=True)


class TestPoly:
    @pytest.mark.parametrize(
        ("step", "expected"),
        [
            (0, 1e-6 * 1.0),  # 1e-6 of the rate of step 0
            (1, 0.9 * (1 - 0.75 * (1 - 1e-6))),  # a quarter of the warm-up, of the rate of step 1
            (3, 0.7 * (1 - 0.25 * (1 - 1e-6))),
            (4, 0.6),  # on the line from here on
            (9, 0.1),
            (10, 0.0),
            (99, 0.0),
        ],
    )
    def test_values(self, step, expected):
        assert poly_rate(step, 10, 4, 1.0, 0.0, 1e-6) == pytest.approx(expected, abs=1e-12)

    def test_without_warmup(self):
        assert [poly_rate(s, 4, 0, 1.0, 0.2, 0.0) for s in range(5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])

    def test_release_schedule(self):
        settings = OptimSettings(lr=7e-4, min_lr=0.0, warmup_steps=1500, schedule="poly", warmup_start=1e-6)
        rates = [rate(settings, step, 160_000) for step in (0, 750, 1500, 80_000, 159_999)]
        half = 7e-4 * (1 - 750 / 160_000) * 0.5000005
        assert rates == pytest.approx([7e-10, half, 7e-4 * (1 - 1500 / 160_000), 3.5e-4, 7e-4 / 160_000])

    def test_every_group_follows_schedule(self):
        settings = OptimSettings(lr=1.0, min_lr=0.0, warmup_steps=2, schedule="poly", layer_decay=0.5)
        found = configure(classifier(), settings, total_steps=4, depth=12)
        optimizer, schedule = found["optimizer"], found["lr_scheduler"]["scheduler"]
        for step in range(4):
            for group in optimizer.param_groups:
                assert group["lr"] == pytest.approx(group["lr_scale"] * rate(settings, step, 4))
            optimizer.step()
            schedule.step()

    def test_unknown_schedule(self):
        with pytest.raises(ValueError, match="schedule"):
            OptimSettings(lr=1.0, schedule="step")


class TestLearningRate:
    @pytest.mark.parametrize(
        ("step", "expected"),
        [
            (0, 0.0),
            (1, 0.25),
            (2, 0.5),
            (3, 0.75),
            (4, 1.0),  # W - 1: the end of linspace(0, 1, 5)
            (5, 1.0),  # W: the beginning of the cosine
            (10, 0.1 + 0.45 * (1 + math.sqrt(0.5))),  # an eighth of a turn
            (15, 0.55),  # half way down
            (24, 0.1 + 0.45 * (1 + math.cos(0.95 * math.pi))),  # the last step is one step short of the end
            (25, 0.1),
            (1000, 0.1),
        ],
    )
    def test_values(self, step, expected):
        assert learning_rate(step, total=25, warmup=5, peak=1.0, end=0.1) == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize(("warmup", "expected"), [(0, [1, 1]), (1, [0, 1]), (2, [0, 1])])
    def test_short_warm_ups(self, warmup, expected):
        rates = [learning_rate(step, total=1000, warmup=warmup, peak=1.0, end=0.0) for step in (0, 1)]
        assert rates == pytest.approx(expected, abs=1e-5)

    def test_warmup_only(self):
        rates = [learning_rate(step, total=3, warmup=3, peak=1.0, end=0.0) for step in range(4)]
        assert rates == [0.0, 0.5, 1.0, 1.0]

    def test_paper_schedule(self):
        rates = [learning_rate(step, 1_040_000, 10_000, 1.5e-3, 1e-5) for step in (0, 1, 9_999, 10_000, 525_000)]
        assert rates == pytest.approx([0, 1.5e-3 / 9_999, 1.5e-3, 1.5e-3, (1.5e-3 + 1e-5) / 2])

    @pytest.mark.parametrize(
        ("name", "images", "points"),
        [
            # 1,039,828 steps, 10,000 of warm-up from 0: 1.5e-3 x 5000/9999; half way down after 10,000 + 514,914 steps.
            ("base_22k", 14_197_122, {0: 0, 5000: 7.5007501e-4, 9999: 1.5e-3, 10_000: 1.5e-3, 524_914: 7.55e-4}),
            ("large_22k", 14_197_122, {9_998: 1.49985e-3, 10_000: 1.5e-3, 1_039_828: 1e-5}),
            # 500,455 steps, 6,256 of warm-up; a quarter of the way down: 1e-5 + 1.49e-3 x (2 + sqrt 2) / 4.
            ("base_1k", 1_281_167, {1: 2.3980815e-7, 6255: 1.5e-3, 6256 + 123_549.75: 1.28179455e-3, 500_455: 1e-5}),
            # 125,113 steps, 25,023 of warm-up; ends at 1e-6.
            (
                "finetune_base_1k",
                1_281_167,
                {0: 0, 25_022: 4e-3, 25_023: 4e-3, 25_023 + 50_045: 2.0005e-3, 125_113: 1e-6},
            ),
            # 62,556 steps, 6,256 of warm-up.
            ("finetune_large_1k", 1_281_167, {6_255: 1e-3, 6_256 + 28_150: 5.005e-4, 62_556: 1e-6}),
            # 75,068 steps, 12,511 of warm-up.
            ("finetune_large_1k_22kft", 1_281_167, {12_510: 2e-5, 12_511 + 31_278.5: 1.05e-5, 75_068: 1e-6}),
        ],
    )
    def test_shipped_experiments_at_some_steps(self, name, images, points):
        given = ["data.train=x", "init_from=x" if "finetune" in name else "tokenizer.path=x"]
        cfg = compose("fit", [f"+experiment={name}", *given])
        settings, total = cfg.optim.with_warmup_in_steps(images, cfg.global_batch_size), total_steps(cfg, images)
        rates = {s: learning_rate(s, total, settings.warmup_steps, settings.lr, settings.min_lr) for s in points}
        assert rates == pytest.approx(points, rel=2e-6)

    def test_optimizer_groups_follow_schedule(self):
        settings = OptimSettings(lr=2e-3, min_lr=1e-4, warmup_steps=3, layer_decay=0.65)
        configured = configure(classifier(), settings, total_steps=8, depth=12)
        optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]
        assert schedule["interval"] == "step"
        for step in range(8):
            expected = learning_rate(step, 8, 3, 2e-3, 1e-4)
            rates = [group["lr"] / group["lr_scale"] for group in optimizer.param_groups]
            assert rates == pytest.approx([expected] * len(rates), abs=1e-12)
            optimizer.step()
            schedule["scheduler"].step()


class TestGroups:
    @pytest.mark.parametrize("shared", [True, False])
    def test_weight_decay_groups(self, shared):
        model = mim(abs_pos_emb=True, rel_pos_bias="shared" if shared else "none")
        groups = parameter_groups(model.named_parameters(), lr=1.0, weight_decay=0.05)
        decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
        expected = {"mask_token", "patch_embed.proj.weight", "lm_head.weight"}
        expected |= {"rel_pos_bias.relative_position_bias_table"} if shared else set()
        expected |= {f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
        assert decayed == expected
        rest = {name for group in groups if not group["weight_decay"] for name in group["names"]}
        assert rest == {name for name, _ in model.named_parameters()} - expected
        assert {"pos_embed", "cls_token", "norm.weight", "blocks.0.gamma_1", "blocks.0.attn.q_bias"} <= rest
        assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
        assert {group["lr"] for group in groups} == {1.0}

    def test_finetuning_bias_tables_decay(self):
        groups = parameter_groups(classifier().named_parameters(), 1.0, 0.05)
        decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
        assert {f"blocks.{i}.attn.relative_position_bias_table" for i in range(12)} <= decayed
        assert "head.weight" in decayed
        assert not decayed & {"fc_norm.weight", "head.bias", "pos_embed", "cls_token"}

    def test_every_parameter_is_in_one_group(self):
        model = classifier()
        groups = parameter_groups(model.named_parameters(), 1.0, 0.05, layer_decay=0.65, depth=12)
        names = [name for group in groups for name in group["names"]]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())
        own = dict(model.named_parameters())
        for group in groups:
            assert all(own[n] is p for n, p in zip(group["names"], group["params"], strict=True))

    def test_layer_decay(self):
        groups = parameter_groups(classifier().named_parameters(), 2.0, 0.05, layer_decay=0.65, depth=12)
        scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
        expected = {"cls_token": 13, "pos_embed": 13, "patch_embed.proj.weight": 13, "patch_embed.proj.bias": 13}
        expected |= {f"blocks.{i}.attn.qkv.weight": 12 - i for i in range(12)}
        expected |= {f"blocks.{i}.gamma_1": 12 - i for i in range(12)}
        expected |= {"fc_norm.weight": 0, "fc_norm.bias": 0, "head.weight": 0, "head.bias": 0}
        assert {name: scales[name] for name in expected} == pytest.approx({n: 0.65**e for n, e in expected.items()})
        assert all(group["lr"] == pytest.approx(2.0 * group["lr_scale"]) for group in groups)

    @pytest.mark.parametrize(
        ("depth", "decay", "by_hand"),
        [
            # base, .65 ** (13 - layer): embeddings, first, sixth, last block, head
            (12, 0.65, {"patch_embed.proj.weight": 3.69720e-3, "blocks.0.norm1.weight": 5.68800e-3,
                        "blocks.5.mlp.fc1.weight": 4.90222790e-2, "blocks.11.attn.qkv.weight": 0.65, "head.weight": 1}),
            # large, .75 ** (25 - layer)
            (24, 0.75, {"patch_embed.proj.weight": 7.52540e-4, "blocks.0.norm1.weight": 1.00339e-3,
                        "blocks.11.gamma_1": 2.37573e-2, "blocks.23.mlp.fc2.bias": 0.75, "fc_norm.bias": 1}),
            (24, 0.9, {"cls_token": 7.17898e-2, "blocks.23.attn.proj.weight": 0.9, "head.bias": 1}),
        ],
    )  # fmt: skip
    def test_layer_decay_of_base_and_large(self, depth, decay, by_hand):
        model = Classifier(3, **TINY, depth=depth)
        groups = parameter_groups(model.named_parameters(), 1.0, 0.05, layer_decay=decay, depth=depth)
        scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
        assert {name: scales[name] for name in by_hand} == pytest.approx(by_hand, rel=1e-5)
        decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
        matrices = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
        tables = ("attn.relative_position_bias_table",)
        expected = {f"blocks.{i}.{name}" for i in range(depth) for name in (*matrices, *tables)}
        assert decayed == expected | {"patch_embed.proj.weight", "head.weight"}

    def test_pretraining_only_parameters(self):
        assert layer_of("mask_token", 12) == 0
        assert layer_of("rel_pos_bias.relative_position_bias_table", 12) == 13
        assert layer_of("norm.weight", 12) == layer_of("lm_head.weight", 12) == 13

    def test_frozen_parameters_are_excluded(self):
        model = mim()
        model.patch_embed.requires_grad_(False)
        names = [n for group in parameter_groups(model.named_parameters(), 1.0, 0.05) for n in group["names"]]
        assert "mask_token" in names
        assert not [name for name in names if name.startswith("patch_embed")]

    def test_adamw(self):
        optimizer = configure(mim(), OptimSettings(lr=1e-3, betas=(0.8, 0.9), eps=1e-6), 10)["optimizer"]
        assert isinstance(optimizer, torch.optim.AdamW)
        assert {(*group["betas"], group["eps"]) for group in optimizer.param_groups} == {(0.8, 0.9, 1e-6)}


def parameters(seed: int = 0) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    made = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 4), (5,), (2, 2, 2), (7,))]
    for parameter in made[:-1]:  # the last one got no gradient
        parameter.grad = torch.randn_like(parameter)
    return made


@pytest.mark.parametrize("clip", [None, 0.1, 3.0, 1e6])
@pytest.mark.parametrize("scale", [1.0, 0.5, torch.tensor(20.0, dtype=torch.float64)])
def test_clip_equals_torch(clip, scale):
    ours, theirs = parameters(), parameters()
    norm = clip_gradients(ours, clip, scale)
    for parameter in theirs[:-1]:
        parameter.grad *= scale
    expected = nn.utils.clip_grad_norm_(theirs, math.inf if clip is None else clip)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(ours[:-1], theirs[:-1], strict=True):
        assert one.grad.dtype == torch.float32
        assert torch.allclose(one.grad, other.grad, rtol=1e-5, atol=1e-8)
    assert ours[-1].grad is None


def test_norm_without_gradients():
    assert clip_gradients([nn.Parameter(torch.zeros(3))], 1.0) == 0


def test_layer_decay_of_segmenter():
    """The decoder has the full rate, the backbone decays by depth (LayerDecayOptimizerConstructor of the release)."""
    model = Segmenter(3, {"aux_channels": 8, "channels": 8}, **TINY, depth=12)
    groups = parameter_groups(model.named_parameters(), 1.0, 0.05, 0.65, 12)
    scale = {name: group["lr_scale"] for group in groups for name in group["names"]}
    for name, factor in scale.items():
        if name.startswith(("fpn", "decode_head.", "auxiliary_head.")):
            assert factor == 1
        elif name.startswith("blocks."):
            assert factor == pytest.approx(0.65 ** (12 - int(name.split(".")[1])))
        else:
            assert factor == pytest.approx(0.65**13)
    decayed = {name for group in groups if group["weight_decay"] for name in group["names"]}
    assert "decode_head.bottleneck.conv.weight" in decayed
    assert "decode_head.bottleneck.bn.weight" not in decayed
    assert {name for name, _ in model.named_parameters()} == scale.keys()


@pytest.mark.parametrize("scale", [0.5, torch.tensor(20.0, dtype=torch.float64)])
@pytest.mark.parametrize("clip", [None, 0.1, torch.tensor(0.1)])
def test_clip_factor_has_gradient_dtype(clip, scale, monkeypatch):
    """With a float64 factor torch would launch a kernel for each gradient."""
    factors, multiply = [], torch._foreach_mul_
    monkeypatch.setattr(torch, "_foreach_mul_", lambda given, by: factors.append(by) or multiply(given, by))
    clip_gradients(parameters(), clip, scale)
    assert [getattr(factor, "dtype", torch.float32) for factor in factors] == [torch.float32]


def test_clip_factor_of_half_gradients_is_not_rounded():
    """In bf16 .7011 is .6992, and 1.5 times that the number below."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    parameter.grad = torch.full_like(parameter, 1.5)
    clip_gradients([parameter], None, torch.tensor(0.7011, dtype=torch.float64))
    assert parameter.grad.item() == 1.0546875


def test_unclipped_gradients_are_not_rewritten(monkeypatch):
    monkeypatch.setattr(torch, "_foreach_mul_", lambda *given: pytest.fail("a pass over all gradients"))
    assert clip_gradients(parameters(), None, 1.0) > 0

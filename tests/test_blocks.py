"""What the blocks leave out changes nothing: outputs and gradients are those of timm's blocks, run in full."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_backbone import N, image_and_mask, mim
from timm.models import beit
from torch.backends.cuda import cudnn_sdp_enabled

from beit_pretrain.models import blocks
from beit_pretrain.models.backbone import MaskedImageModel, embed
from beit_pretrain.models.blocks import bias_rows, biased_attention, pad_bias_stride, residual
from beit_pretrain.models.drop_path import uniforms

TOKENS, HEADS = 1 + N, 2


def plain_forward_at(model: MaskedImageModel, image, mask, position_BK, drop_BR):
    """The paper's computation by timm's own blocks in full: attention that adds the bias, factors for drop path."""
    x, bias = embed(model, image, mask), model.rel_pos_bias() if model.rel_pos_bias is not None else None
    for number, block in enumerate(model.blocks):
        rate = getattr(block.drop_path1, "drop_prob", 0.0)
        keep_2B = ((drop_BR[:, 2 * number : 2 * number + 2] >= rate).float() / (1 - rate)).T[:, :, None, None]
        gamma_1, gamma_2 = (1.0, 1.0) if block.gamma_1 is None else (block.gamma_1, block.gamma_2)
        x = x + gamma_1 * beit.Attention.forward(block.attn, block.norm1(x), bias) * keep_2B[0]
        x = x + gamma_2 * block.mlp(block.norm2(x)) * keep_2B[1]
    hidden = model.norm(x)[:, 1:]
    return model.lm_head(hidden.gather(1, position_BK[..., None].expand(-1, -1, hidden.shape[-1])))


def gradients(model, logits) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (logits.float().sin().sum() / logits.numel()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def at() -> torch.Tensor:
    """Masked positions, (3, 5)."""
    return torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(i))[:5] for i in range(3)])


@pytest.mark.parametrize("bias", ["shared", "per_layer", "none"])
@pytest.mark.parametrize("scale", [0.1, None])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_and_gradients_are_those_of_everything_in_full(bias, scale, checkpointing, at):
    model = mim(rel_pos_bias=bias, init_values=scale, depth=3, drop_path_rate=0.5)
    image, mask = image_and_mask()
    drop = uniforms(0, torch.arange(3), model.branches)
    rates = torch.tensor([getattr(b.drop_path1, "drop_prob", 0.0) for b in model.blocks]).repeat_interleave(2)
    dropped = drop < rates
    assert dropped.any()
    assert not dropped.all()
    expected = plain_forward_at(model, image, mask, at, drop)
    model.set_grad_checkpointing(checkpointing)
    logits = model.forward_at(image, mask, at, drop)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    for (name, found), wanted in zip(gradients(model, logits).items(), gradients(model, expected).values()):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5, msg=name)


def test_a_branch_that_all_images_drop_still_has_gradients():
    """Zeros, but there: with DDP every process must have a gradient of every parameter."""
    layer = torch.nn.Linear(4, 4)
    x = torch.randn(3, 2, 4)
    out = residual(x, layer, 0.5, torch.zeros(3), skip=True)
    assert torch.equal(out, x)
    out.sum().backward()
    assert torch.equal(layer.weight.grad, torch.zeros(4, 4))


def test_dropped_branches_are_not_computed():
    seen = []
    x, drawn = torch.randn(4, 2, 4), torch.tensor([0.1, 0.9, 0.2, 0.8])

    def branch(x):
        seen.append(len(x))
        return 2 * x

    skipped, whole = residual(x, branch, 0.5, drawn, skip=True), residual(x, branch, 0.5, drawn)
    assert seen == [2, 4]
    torch.testing.assert_close(skipped, whole)


def test_the_last_block_works_at_the_masked_positions_alone(at, monkeypatch):
    widths = []
    model = mim(depth=2)
    model.blocks[0].mlp.register_forward_pre_hook(lambda _, given: widths.append(given[0].shape[1]))
    model.blocks[1].mlp.register_forward_pre_hook(lambda _, given: widths.append(given[0].shape[1]))
    model.forward_at(*image_and_mask(), at)
    assert widths == [TOKENS, 5]


@pytest.mark.parametrize("keys", [16, 17, 23], ids=["whole", "7 missing", "1 missing"])
@pytest.mark.parametrize("images", [1, 3], ids=["one bias", "a bias an image"])
@pytest.mark.parametrize("learns", [True, False])
def test_attention_is_the_formula(learns, images, keys):
    """Also where keys are filled up to a multiple of `cpu_kernels.KEYS`; neither a bias nor keys are written to."""
    q, k, v = (torch.randn(3, HEADS, n, 8, requires_grad=True) for n in (5, keys, keys))
    bias = torch.randn(images, HEADS, 5, keys, requires_grad=learns)
    expected = (q @ k.transpose(-2, -1) / 8**0.5 + bias).softmax(-1) @ v
    found = biased_attention(q, k, v, bias)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    inputs = (q, k, v, bias) if learns else (q, k, v)
    for one, other in zip(
        torch.autograd.grad(found.sin().sum(), inputs), torch.autograd.grad(expected.sin().sum(), inputs)
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_the_bias_is_aligned_where_kernels_want_it(monkeypatch):
    """As on a GPU: rows begin at multiples of 16 numbers, also those of the asked tokens; values and gradient stay."""
    bias = torch.randn(1, HEADS, TOKENS, TOKENS, requires_grad=True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    padded = pad_bias_stride(bias, torch.zeros(1))
    token_BK = torch.tensor([[3, 0, 16], [5, 5, 1]])
    rows = bias_rows(padded, token_BK)
    for tensor in (padded, rows):
        assert all(stride % blocks.ALIGNED == 0 for stride in tensor.stride()[:-1])
        assert tensor.stride(-1) == 1
    assert torch.equal(padded, bias)
    expected = torch.stack([bias[0, :, tokens] for tokens in token_BK])
    assert torch.equal(rows, expected)
    weights = torch.randn_like(rows)
    (found,) = torch.autograd.grad((rows * weights).sum(), bias, retain_graph=True)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), bias)
    torch.testing.assert_close(found, wanted)


def test_under_autocast_the_bias_is_of_its_precision(at):
    model, (image, mask) = mim(), image_and_mask()
    full = model.forward_at(image, mask, at)
    with torch.autocast("cpu", torch.bfloat16):
        assert pad_bias_stride(model.rel_pos_bias()[None], image).dtype == torch.bfloat16
        half = model.forward_at(image, mask, at)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, atol=0.05, rtol=0.05)
    assert all(grad.isfinite().all() for grad in gradients(model, half).values())


@pytest.mark.long
def test_compiled_it_is_the_same(at):
    """Static shapes, nothing skipped: one graph, the same numbers."""
    model = mim(depth=3, drop_path_rate=0.5)
    image, mask = image_and_mask()
    drop = uniforms(0, torch.arange(3), model.branches)
    expected = model.forward_at(image, mask, at, drop)
    wanted = gradients(model, expected)
    compiled = torch.compile(model.forward_at, fullgraph=True, dynamic=False)
    found = compiled(image, mask, at, drop)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for name, grad in gradients(model, found).items():
        torch.testing.assert_close(grad, wanted[name], atol=1e-5, rtol=1e-5, msg=name)


def test_without_gradients_cudnns_attention_is_not_taken(monkeypatch):
    """Also not by whoever asks for a fused kernel on a GPU: it would plan anew for every shape."""
    allowed = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *given, **_: allowed.append(cudnn_sdp_enabled()))
    x = torch.zeros(1, 2, 5, 8)
    with torch.no_grad():
        biased_attention(x, x, x, torch.zeros(1, 2, 5, 5))
        biased_attention(x, x, x, None)
    assert allowed == [False, False]
    assert cudnn_sdp_enabled()  # elsewhere it is left as it was


def test_a_recomputed_block_saves_no_random_state(monkeypatch):
    asked = []
    again = blocks.checkpoint
    monkeypatch.setattr(blocks, "checkpoint", lambda *given, **how: asked.append(how) or again(*given, **how))
    model = mim()
    model.set_grad_checkpointing(True)
    model(*image_and_mask())
    assert [how["preserve_rng_state"] for how in asked] == [False] * len(model.blocks)

"""What is for CPUs alone gives torch's numbers, forward and backward, and all of it has one switch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_backbone import image_and_mask, mim

from beit_pretrain.benchmarks.measure import counted_flops
from beit_pretrain.models import cpu_kernels as ours
from beit_pretrain.models.cpu_kernels import Linear, by_onednn, linear
from beit_pretrain.models.drop_path import uniforms
from beit_pretrain.tokenizers.dalle_encoder import FusedEncoder

CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(ours.ONEDNN is None, reason="torch without oneDNN")


@pytest.fixture
def always(monkeypatch):
    """Products of any size by oneDNN."""
    monkeypatch.setattr(ours, "LARGE", 0)


def outcome(function, x, weight, bias):
    """Output and all gradients."""
    wanted = [t.detach().clone().requires_grad_() for t in (x, weight, *([] if bias is None else [bias]))]
    out = function(*wanted) if bias is not None else function(*wanted, None)
    out.sin().sum().backward()
    return [out, *(t.grad for t in wanted)]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("width", [20, 12, 8], ids=["wider", "alike", "narrower"])
@pytest.mark.parametrize("shape", [(5, 12), (3, 7, 12), (2, 3, 4, 12)])
@pytest.mark.parametrize("narrow", [True, False], ids=["AVX-512 of AMD", "others"])
def test_output_and_gradients_are_torchs(narrow, shape, width, with_bias, always, monkeypatch):
    monkeypatch.setattr(ours, "mkl_is_narrow", lambda: narrow)
    monkeypatch.setattr(ours, "ROWS", 10)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(width, 12), torch.randn(width) if with_bias else None
    assert by_onednn(x, weight)
    for found, expected in zip(outcome(linear, x, weight, bias), outcome(F.linear, x, weight, bias), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_no_gradient_for_frozen_weights(always):
    layer = Linear(12, 20).requires_grad_(False)
    x = torch.randn(3, 12, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, -1))
    assert layer.weight.grad is None


def test_only_float32_on_a_cpu_outside_of_autocast(always):
    x, weight = torch.randn(3, 12), torch.randn(20, 12)
    assert not by_onednn(x.double(), weight.double())
    assert not by_onednn(x.to("meta"), weight.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not by_onednn(x, weight)
        assert linear(x, weight).dtype == torch.bfloat16


def test_small_products_stay_with_torch():
    assert not by_onednn(torch.randn(3, 12), torch.randn(20, 12))


@pytest.mark.parametrize(
    ("text", "narrow"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\n", True),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 25\n", False),
        ("vendor_id\t: GenuineIntel\ncpu family\t: 26\n", False),
        ("vendor_id\t: AuthenticAMD\ncpu family\t: unknown\n", False),
        ("vendor_id\t: AuthenticAMD\n", False),
        ("Processor\t: ARMv8\n", False),
    ],
)
def test_which_processors_mkl_does_not_use_whole(text, narrow, monkeypatch):
    monkeypatch.setattr(ours.Path, "read_text", lambda path: text)
    assert ours.mkl_is_narrow.__wrapped__() == narrow


@pytest.mark.parametrize("narrow", [True, False])
def test_every_operation_counts_by_whichever_product(narrow, monkeypatch):
    monkeypatch.setattr(ours, "mkl_is_narrow", lambda: narrow)
    model = mim()
    image, mask = image_and_mask()

    def step():
        model(image, mask).sum().backward()

    plain, called, product = counted_flops(step), [], ours.product
    monkeypatch.setattr(ours, "LARGE", 0)
    monkeypatch.setattr(ours, "product", lambda *words: called.append(words) or product(*words))
    assert counted_flops(step) == plain
    # qkv, proj, fc1, fc2, the head: forward and gradient of x; of fc2, whose input is wider, always the weight's too.
    # The patch embedding: forward and the weight's gradient, since a patch has more numbers than a token.
    layers = 4 * len(model.blocks) + 1
    assert len(called) == 2 + (3 * layers if narrow else 2 * layers + len(model.blocks))


@pytest.fixture
def off(monkeypatch):
    """The switch turned off, and an error for whoever goes past it."""
    monkeypatch.setattr(ours, "ENABLED", False)
    for name in ("product", "attention", "residual_of_kept"):
        monkeypatch.setattr(ours, name, None)


def step(model) -> list[torch.Tensor]:
    """Logits and gradients of a step with drop path."""
    image, mask = image_and_mask()
    at = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i))[:5] for i in range(3)])
    logits = model.forward_at(image, mask, at, uniforms(0, torch.arange(3), model.branches))
    (logits.sin().sum() / logits.numel()).backward()
    return [logits, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("bias", ["shared", "per_layer", "none"])
def test_the_switch_leaves_plain_torch(bias, always, request):
    expected = step(mim(rel_pos_bias=bias, depth=3, drop_path_rate=0.5))
    request.getfixturevalue("off")
    for found, wanted in zip(step(mim(rel_pos_bias=bias, depth=3, drop_path_rate=0.5)), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tokens", [16, 17], ids=["whole", "padded"])
@pytest.mark.parametrize("biases", [1, 2], ids=["one bias", "a bias for each image"])
@pytest.mark.parametrize(("batch", "heads"), [(2, 1), (1, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("half", [False, True])
def test_attention_of_any_number_of_heads_is_torchs(half, batch, heads, biases, tokens):
    """Also of one head, where the bias of all images is the same memory; the bias itself stays as it is."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, batch, heads, tokens, 4, dtype=torch.bfloat16 if half else torch.float32)
    bias = torch.randn(min(batch, biases), heads, tokens, tokens, dtype=q.dtype, requires_grad=True)
    grown, before = bias * 1, bias.detach().clone()  # no leaf, as the bias of a table
    found = ours.attention(q, k, v, grown)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    tolerance = 0.05 if half else 1e-5
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)
    assert torch.equal(grown, before)
    gradients = [torch.autograd.grad(out.float().sin().sum(), bias)[0] for out in (found, expected)]
    torch.testing.assert_close(*gradients, atol=tolerance, rtol=tolerance)


def test_the_switch_is_that_of_the_tokenizer_too(monkeypatch):
    from dall_e.encoder import Encoder

    torch.manual_seed(0)
    encoder = Encoder(n_hid=16, n_blk_per_group=1, vocab_size=64, device=CPU, requires_grad=False)
    image, arranged = torch.rand(2, 3, 32, 32), FusedEncoder(encoder, CPU)
    monkeypatch.setattr(ours, "ENABLED", False)
    plain = FusedEncoder(encoder, CPU)
    assert (arranged.blocked, plain.blocked) == (True, False)
    torch.testing.assert_close(plain(image), arranged(image), atol=1e-4, rtol=1e-4)


def test_the_switch_is_for_cpus_alone():
    assert ours.active(CPU)
    assert not ours.active(torch.device("cuda"))

"""Linear layers by oneDNN's products are torch's, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_backbone import image_and_mask, mim

from beit_pretrain.benchmarks.measure import counted_flops
from beit_pretrain.models import linear as ours
from beit_pretrain.models.linear import Linear, by_onednn, linear

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


def test_no_gradient_that_nobody_wants(always):
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

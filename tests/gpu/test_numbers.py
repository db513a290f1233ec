"""A GPU computes the same as a CPU within stated bounds: views, tokens, attention, objective, gradients."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from dall_e import map_pixels
from dall_e.encoder import Encoder
from tiny import seeded
from torch import Tensor

from beit_pretrain.engine.optim import clip_gradients
from beit_pretrain.engine.settings import OptimSettings
from beit_pretrain.models.backbone import MaskedImageModel
from beit_pretrain.models.blocks import bias_rows, biased_attention, pad_bias_stride
from beit_pretrain.models.drop_path import uniforms
from beit_pretrain.tasks.pretrain import Pretraining
from beit_pretrain.tokenizers.dalle_encoder import SplitProduct, conv_relu
from beit_pretrain.tokenizers.tokenizer import OpenAITokenizer
from beit_pretrain.transforms.jitter import ORDERS, jittered_views, normalise
from beit_pretrain.transforms.mean_color_grid import SIDE

BATCH, SIZE, PATCHES, MASKED, HALF = 8, 64, 64, 24, (0.5, 0.5, 0.5)
MODEL = {"image_size": SIZE, "patch_size": 8, "vocab_size": 512, "embed_dim": 128, "depth": 3, "num_heads": 2}


def batch_of(count: int = BATCH, seed: int = 0) -> dict[str, Tensor]:
    """A batch as from the loader, on the CPU."""
    draw = torch.Generator().manual_seed(seed)

    def pixels(side: int) -> Tensor:  # smooth, as photos are: noise has near-ties everywhere
        coarse = torch.rand(count, 3, 6, 6, generator=draw)
        return (F.interpolate(coarse, (side, side), mode="bicubic").clamp(0, 1) * 255).byte()

    masked = torch.stack([torch.randperm(PATCHES, generator=draw)[:MASKED].sort().values for _ in range(count)])
    index = masked.clone()
    index[::2, -3:] = -1  # some images have fewer
    mask = torch.zeros(count, PATCHES, dtype=torch.bool)
    for row, chosen in zip(mask, index, strict=True):
        row[chosen[chosen >= 0]] = True
    return {
        "image": pixels(SIZE),
        "token_image": pixels(SIZE),
        "jitter_factors": 0.6 + 0.8 * torch.rand(count, 3, generator=draw),
        "jitter_order": torch.from_numpy(ORDERS)[torch.randint(len(ORDERS), (count,), generator=draw)],
        "jitter_tiles": torch.randint(0, 256, (count, SIDE**2, 3), generator=draw, dtype=torch.uint8),
        "mask": mask,
        "mask_index": index,
        "position": torch.arange(count) + 100 * seed,
        "tokens": torch.randint(512, (count, PATCHES), generator=draw),
    }


def moved(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in batch.items()}


def encoder() -> Encoder:
    return seeded(Encoder, n_hid=64, n_blk_per_group=2, vocab_size=512).eval().requires_grad_(False)


def pretraining(device: torch.device, **settings) -> Pretraining:
    """A module with weights of noticeable size and a small version of OpenAI's tokenizer."""
    model = seeded(MaskedImageModel, **MODEL | settings)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    tokenizer = OpenAITokenizer.of(encoder()).to(device)
    module = Pretraining(model.to(device), tokenizer, OptimSettings(lr=1e-3, clip=1.0), HALF, HALF).to(device)
    module.setup("fit")
    return module


Gradients = tuple[float, dict[str, Tensor]]  # the loss, and the gradients by name


def loss_and_gradients(module: Pretraining, batch: dict[str, Tensor], half: bool = False) -> Gradients:
    """Loss (mean over masked patches) and gradients with drop path, for given tokens."""
    view = batch["image"].float() / 255
    module.model.zero_grad()
    with torch.autocast(module.device.type, torch.bfloat16, enabled=half):
        objective = module.maybe_compile(module.objective)
        found = objective(view, batch["mask"], batch["mask_index"], batch["tokens"], module.drop_path_noise(batch))
    loss = found.loss_sum / found.masked
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in module.model.named_parameters()}


def error(found: Tensor, exact: Tensor) -> float:
    """Relative error of the norm; NaN exceeds every bound."""
    exact = exact.detach().double().cpu()
    return float((found.detach().double().cpu() - exact).norm() / exact.norm())


def assert_near(found: Gradients, exact: Gradients, of_loss: float, of_gradients: float) -> None:
    """Assert that the loss and every gradient tensor are within the relative bounds."""
    assert found[0] == pytest.approx(exact[0], rel=of_loss)
    errors = {name: error(found[1][name], exact[1][name]) for name in exact[1]}
    assert all(each < of_gradients for each in errors.values()), errors


def test_views(device):
    batch = batch_of()
    expected, found = jittered_views(batch), jittered_views(moved(batch, device))
    for one, other in zip(expected, found, strict=True):
        off = (one - other.cpu()).abs()
        assert off.max() <= 1.01 / 255 * 2  # a level that was rounded the other way, perhaps stretched by what follows
        assert (off > 1e-5).float().mean() < 1e-3


def test_normalisation(device):
    image = torch.rand(2, 3, 8, 8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for _ in range(2):  # the second time its constants are there
        torch.testing.assert_close(normalise(image.to(device), mean, std).cpu(), normalise(image, mean, std))


def test_drop_path_noise_is_bit_identical(device):
    position = torch.tensor([0, 1, 5, 2**40, 2**62])
    assert torch.equal(uniforms(7, position.to(device), 24).cpu(), uniforms(7, position, 24))


def test_tokens_equal_dall_e_on_same_device(device):
    """fp16 convolutions as in dall_e, with a more exact output layer: only near-ties may differ."""
    package = encoder().to(device)
    image = batch_of(32)["token_image"].to(device).float() / 255
    with torch.no_grad():
        expected = package(map_pixels(image)).argmax(1).flatten(1)
    tokens = OpenAITokenizer.of(encoder()).to(device).encode(image)
    assert tokens.unique().numel() > 10
    assert (tokens != expected).float().mean() < 0.02


def test_tokens_match_single_precision(device):
    image = batch_of(32)["token_image"].float() / 255
    with torch.no_grad():
        exact = encoder()(map_pixels(image)).argmax(1).flatten(1)
    tokens = OpenAITokenizer.of(encoder()).to(device).encode(image.to(device)).cpu()
    assert (tokens != exact).float().mean() < 0.02


def test_fused_relu_equals_convolution_and_relu(cuda):
    x = torch.randn(4, 64, 14, 14, device=cuda).half().contiguous(memory_format=torch.channels_last)
    weight = (0.05 * torch.randn(128, 64, 3, 3, device=cuda)).half().contiguous(memory_format=torch.channels_last)
    bias = torch.randn(128, device=cuda).half()
    torch.library.opcheck(conv_relu, (x, weight, bias, 1))
    for kernel, padding in ((weight, 1), (weight[:, :, :1, :1].contiguous(memory_format=torch.channels_last), 0)):
        exact = F.conv2d(x.double(), kernel.double(), bias.double(), padding=padding).relu()
        poison = torch.full(exact.shape, math.nan, device=cuda, dtype=torch.half)
        del poison  # what cuDNN gets for its output: it must not be read, not even times zero
        found = conv_relu(x, kernel, bias, padding)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert error(found, exact) < 1e-3


def test_split_product_is_as_accurate_as_float32(device):
    weight, bias = 0.05 * torch.randn(512, 2048, 1, 1), torch.randn(512)
    x = torch.randn(2, 2048, 7, 7).relu().half()
    exact = F.conv2d(x.double(), weight.double(), bias.double())
    product = SplitProduct(weight.to(device), bias.to(device))
    # Tensor cores round sums towards zero (Fasi et al. 2021): of 4,096 terms by some 3e-6. TF32 would be off by 1.6e-4.
    bound = 2e-5 if device.type == "cuda" else 5e-7
    assert error(product(x.to(device).contiguous(memory_format=torch.channels_last)), exact) < bound


def leaf(tensor: Tensor) -> Tensor:
    """A copy with a gradient of its own."""
    return tensor.detach().clone().requires_grad_()


def exact_bound(device: torch.device) -> float:
    """Of attention in float32: a GPU computes it from three products of TF32, on tensor cores."""
    return 2e-5 if device.type == "cuda" else 5e-6


def exact_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """In float64, on the CPU."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias
    return scores.softmax(-1) @ v


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, None), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("tokens", [17, 50, 197])
def test_attention_and_its_bias_gradient(device, tokens, dtype, bound):
    bound = bound or exact_bound(device)
    draw = [torch.randn(4, 3, tokens, 64).to(dtype) for _ in range(4)]
    bias, weight = torch.randn(1, 3, tokens, tokens), draw.pop()
    given = [leaf(t.to(device)) for t in (*draw, bias)]
    exact = [leaf(t.double()) for t in (*draw, bias)]
    out = biased_attention(*given[:3], pad_bias_stride(given[3], given[0]))
    expected = exact_attention(*exact)
    out.backward(weight.to(device))
    expected.backward(weight.double())
    assert error(out, expected) < bound
    for name, one, other in zip("qkvb", given, exact, strict=True):
        assert error(one.grad, other.grad) < bound, name


def test_attention_of_some_queries(device):
    """As in the last block: the bias rows of the masked patches are gathered for each image."""
    tokens, asked = 50, torch.stack([torch.randperm(50)[:20] for _ in range(4)])
    q, k, v = torch.randn(4, 3, 20, 64), *(torch.randn(4, 3, tokens, 64) for _ in range(2))
    bias = torch.randn(1, 3, tokens, tokens)
    given = [leaf(t.to(device)) for t in (q, k, v, bias)]
    exact = [leaf(t.double()) for t in (q, k, v, bias)]
    out = biased_attention(*given[:3], bias_rows(pad_bias_stride(given[3], given[0]), asked.to(device)))
    rows = exact[3][0].transpose(0, 1)[asked].transpose(1, 2)
    expected = exact_attention(*exact[:3], rows)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert error(out, expected) < exact_bound(device)
    for one, other in zip(given, exact, strict=True):
        assert error(one.grad, other.grad) < exact_bound(device)


def test_attention_without_gradients(device):
    q, k, v = (torch.randn(4, 3, 197, 64) for _ in range(3))
    bias = torch.randn(1, 3, 197, 197)
    with torch.no_grad():
        out = biased_attention(*(t.to(device) for t in (q, k, v)), pad_bias_stride(bias.to(device), q.to(device)))
    assert error(out, exact_attention(*(t.double() for t in (q, k, v, bias)))) < exact_bound(device)


@pytest.mark.parametrize("bias", ["shared", "per_layer", "none"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_match_cpu(device, bias, checkpointing):
    batch = batch_of()
    exact = loss_and_gradients(pretraining(torch.device("cpu"), rel_pos_bias=bias), batch)
    module = pretraining(device, rel_pos_bias=bias)
    module.model.set_grad_checkpointing(checkpointing)
    assert_near(loss_and_gradients(module, moved(batch, device)), exact, 1e-5, 1e-4)


def test_bf16_gradients_are_close(device):
    """Every tensor within 3 % of float32's, the loss within .2 %."""
    batch = moved(batch_of(), device)
    module = pretraining(device)
    exact = loss_and_gradients(module, batch)
    assert_near(loss_and_gradients(module, batch, half=True), exact, 2e-3, 0.03)


def test_clipping(device):
    parameters = [torch.nn.Parameter(torch.zeros(n, 3)) for n in (2, 5, 400)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    there = [torch.nn.Parameter(p.detach().to(device)) for p in parameters]
    for one, other in zip(there, parameters, strict=True):
        one.grad = other.grad.clone().to(device)
    scale = torch.tensor(20.0, dtype=torch.float64)
    norms = clip_gradients(there, 0.5, scale.to(device)).item(), clip_gradients(parameters, 0.5, scale).item()
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    for one, other in zip(there, parameters, strict=True):
        torch.testing.assert_close(one.grad.cpu(), other.grad)


def test_deepcopied_module(device):
    """As EMA and predictors copy it."""
    module = pretraining(device)
    other = copy.deepcopy(module.model)
    image = torch.rand(2, 3, SIZE, SIZE, device=device)
    assert torch.equal(module.model.encode(image), other.encode(image))

"""Tests of the Triton attention on a CPU, by Triton's interpreter; `test_triton_attention.py` runs this file.

TRITON_INTERPRET=1 must be set before Triton is imported, and so these tests have a process of their own:

    TRITON_INTERPRET=1 python -m pytest tests/interpreted_attention.py --noconftest [-s for the table of errors]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime import interpreter

from beit_pretrain.models import triton_attention
from beit_pretrain.models.backbone import MaskedImageModel
from beit_pretrain.models.blocks import attentions
from beit_pretrain.models.drop_path import uniforms
from beit_pretrain.models.triton_attention import Shape, Tiles, attention_at, packed_attention, parts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("packed", "packed, a bias an image", "queries", "tokens")
# How much larger than torch's our error (root mean square) may be. Torch's math path widens half precision to fp32 and
# rounds the result once. Ours, like every fused kernel, also rounds the weights or the gradient of the scores for the
# matrix product, and takes delta from the rounded output: three roundings, 3 ** .5 = 1.73 times the error of one, and
# with few numbers a little more by chance. In fp32 weights are computed again from the rounded log-sum-exp.
FACTOR = 2.0
FACTOR_OF_FUSED = 1.25  # the same next to torch's fused kernel on a GPU, which rounds as often
CHANCE = 1.05  # next to the same roundings in another order


@pytest.fixture(autouse=True, scope="module")
def rounded_bf16() -> Iterator[None]:
    """Round fp32 to bf16 as a GPU does; the interpreter truncates."""
    plain = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, source, target):
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return plain(self, source, target)
        bits = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16).view(torch.uint16)
        return interpreter.TensorHandle(bits.numpy(), tl.bfloat16)

    interpreter.InterpreterBuilder.cast_impl = cast_impl
    yield
    interpreter.InterpreterBuilder.cast_impl = plain


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fill new memory with NaN, so that elements a kernel does not write are noticed."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    assert torch.zeros(1).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def fenced(*shape: int, dtype: torch.dtype, row: int | None = None, device: str = "cpu") -> Tensor:
    """Random numbers with NaN after the last one and after each row, which is `row` numbers long in memory."""
    row = row or shape[-1]
    count = int(np.prod(shape[:-1]))
    memory = torch.full((count * row + 4096,), float("nan"), dtype=dtype, device=device)
    memory[: count * row].view(count, row)[:, : shape[-1]] = torch.randn(count, shape[-1]).to(device, dtype)
    return memory[: count * row].view(*shape[:-1], row)[..., : shape[-1]]


def inputs(
    kind: str,
    images: int,
    heads: int,
    keys: int,
    queries: int,
    width: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> list[Tensor]:
    """[qkv, bias], or [q, kv, bias] and perhaps the queries' tokens; fresh numbers at each call."""
    there = {"dtype": dtype, "device": device}
    lines, of_each = queries if kind == "queries" else keys, images if "an image" in kind else 1
    bias = fenced(of_each, heads, lines, keys, row=-(-keys // 16) * 16, **there)
    if kind.startswith("packed"):
        return [fenced(images, keys, 3, heads, width, **there), bias]
    given = [fenced(images, queries, heads, width, **there), fenced(images, keys, 2, heads, width, **there), bias]
    if kind == "tokens":  # any order, and most of the last third is one token, as in a padded list
        token_BK = torch.randint(0, keys, (images, queries))
        token_BK[:, -(queries // 3) :] = token_BK[:, :1]
        given.append(token_BK.to(device))
    return given


def in_float64(given: list[Tensor]) -> list[Tensor]:
    return [t.double() if t.is_floating_point() else t for t in given]


def ours(*given: Tensor) -> Tensor:
    return packed_attention(*given) if len(given) == 2 else attention_at(*given)


def torchs(*given: Tensor) -> Tensor:
    """The same computation by torch's attention."""
    if len(given) == 2:
        q, k, v, bias = *given[0].unbind(2), given[1]
    else:
        q, k, v, bias = given[0], *given[1].unbind(2), given[2]
    if len(given) == 4:
        bias = torch.stack([bias[i % len(bias)][:, token_K] for i, token_K in enumerate(given[3])])
    # A GPU's own answer is the fused kernel; it takes no float64.
    fused = q.is_cuda and q.dtype != torch.float64
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION if fused else SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=bias)
    return out.transpose(1, 2)


def results(function: Callable[..., Tensor], given: list[Tensor], grad: Tensor) -> dict[str, Tensor]:
    """out, dq, dk, dv, dbias."""
    learned = [t.detach().requires_grad_() for t in given[:3] if t.is_floating_point()]
    out = function(*learned, *given[len(learned) :])
    found = torch.autograd.grad(out, learned, grad)
    qkv = found[0].unbind(2) if len(learned) == 2 else (found[0], *found[1].unbind(2))
    return {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), qkv)), "dbias": found[-1]}


def as_fused(given: list[Tensor], grad: Tensor) -> dict[str, Tensor]:
    """What the roundings of a fused kernel alone do, everything else in float64.

    Rounded are the weights and the gradient of the scores, before the matrix product that takes them, the output, and
    each image's gradient of the bias (CUDA's memory-efficient kernel has that in memory).
    """
    half = given[0].dtype

    def rounded(x: Tensor) -> Tensor:
        return x.to(half).double()

    exact = in_float64(given)
    q, k, v = exact[0].unbind(2) if len(given) == 2 else (exact[0], *exact[1].unbind(2))
    q, k, v, grad = (t.transpose(1, 2) for t in (q, k, v, grad.double()))
    bias = exact[-1] if len(given) < 4 else exact[2]
    scale = q.shape[-1] ** -0.5
    if len(given) == 4:
        bias = torch.stack([bias[i % len(bias)][:, token_K] for i, token_K in enumerate(given[3])])
    weight = (q @ k.transpose(-2, -1) * scale + bias).softmax(-1)
    out = rounded(rounded(weight) @ v)
    of_score = weight * (grad @ v.transpose(-2, -1) - (out * grad).sum(-1, keepdim=True))
    of_bias = rounded(of_score)
    if len(given) == 4:
        lines = torch.zeros(len(of_bias), *exact[2].shape[1:], dtype=torch.float64)
        index = given[3][:, None, :, None].expand(of_bias.shape)
        of_bias = lines.scatter_add_(2, index, of_bias)
    if exact[2 if len(given) > 2 else 1].shape[0] == 1:
        of_bias = of_bias.sum(0, keepdim=True)
    found = {"out": out, "dq": rounded(of_score) @ k * scale, "dk": rounded(of_score).transpose(-2, -1) @ q * scale}
    found["dv"] = rounded(weight).transpose(-2, -1) @ grad
    found = {name: rounded(t).transpose(1, 2) for name, t in found.items()}
    return {**found, "dbias": rounded(of_bias)}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    return {name: ((found[name].double() - t).norm() / t.norm()).item() for name, t in exact.items()}


def compare(
    kind: str,
    keys: int,
    queries: int,
    dtype: torch.dtype,
    width: int = 64,
    heads: int = 2,
    images: int = 2,
    device: str = "cpu",
) -> None:
    """Assert that our error against float64 is at most that of a fused kernel's roundings and near torch's own.

    In fp32 the former has none. On a GPU torch's is the fused kernel.
    """
    torch.manual_seed(keys + queries)
    given = inputs(kind, images, heads, keys, queries, width, dtype, device)
    grad = torch.randn(images, keys if kind.startswith("packed") else queries, heads, width).to(device, dtype)
    exact = results(torchs, in_float64(given), grad.double())
    of_ours, of_torch = (errors(results(function, given, grad), exact) for function in (ours, torchs))
    name = f"{kind}, N {keys}" + ("" if kind.startswith("packed") else f", K {queries}") + f", {str(dtype)[6:]}"
    print(f"{name:42}", *(f"{part} {of_ours[part]:.2g} ({of_torch[part]:.2g})" for part in exact))
    factor = FACTOR if device == "cpu" else FACTOR_OF_FUSED
    assert all(of_ours[part] <= factor * of_torch[part] for part in exact), (of_ours, of_torch)
    if dtype != torch.float32 and device == "cpu":
        of_fused = errors(as_fused(given, grad), exact)
        assert all(of_ours[part] <= CHANCE * of_fused[part] for part in exact), (of_ours, of_fused)


@pytest.mark.parametrize(("kind", "dtype"), [("packed", torch.bfloat16), ("tokens", torch.float32)])
def test_error_of_few_tokens_is_at_most_that_of_torch(kind, dtype):
    compare(kind, 17, 12, dtype, width=16)
    compare(kind, 50, 40, dtype, width=32)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keys", [17, 50, 197, pytest.param(577, marks=pytest.mark.soak)])
def test_error_is_at_most_that_of_torch(keys, kind, dtype):
    compare(kind, keys, 75, dtype, heads=2 if keys < 100 else 1)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("width", [16, 32, 128])
@pytest.mark.parametrize("kind", ["packed", "tokens"])
def test_error_for_every_head_dim(kind, width, dtype):
    compare(kind, 150, 75, dtype, width=width, heads=1)


@pytest.mark.parametrize(
    ("kind", "images"), [("tokens", 5), ("packed", 5), pytest.param("packed", 4, marks=pytest.mark.long)]
)
def test_bias_gradient_is_summed_over_batch_parts(kind, images, monkeypatch):
    """With 5 images in 3 parts the last part has a single image."""
    monkeypatch.setattr(triton_attention, "PROGRAMS", 6)
    tiles = triton_attention.TILES["bias", 4, 16]
    assert parts(Shape(images, 17, 17, 2, 16, 17), tiles, per_image=False) == ((3, 2) if images == 5 else (2, 2))
    given = inputs(kind, images, 2, 17, 12, 16, torch.float32)
    grad = torch.randn(images, 17 if kind == "packed" else 12, 2, 16)
    found, exact = (
        results(ours, given, grad),
        results(torchs, in_float64(given), grad.double()),
    )
    assert max(errors(found, exact).values()) < 1e-6


def test_number_of_parts_depends_only_on_shapes():
    base, tiles = Shape(256, 197, 197, 12, 64, 197), Tiles(128, 64, 8, 2)
    assert parts(base, tiles, per_image=False) == (8, 32)
    assert parts(base, tiles, per_image=True) == (256, 1)
    assert parts(base._replace(images=1), tiles, per_image=False) == (1, 1)
    assert parts(Shape(8, 1025, 1025, 16, 64, 1025), tiles, per_image=False) == (1, 8)


@pytest.mark.parametrize("kind", [pytest.param("packed", marks=pytest.mark.long), "tokens"])
def test_minus_infinity_masks(kind):
    """Single keys of a row, a whole tile of keys, a whole row (zeros, as in torch); very negative numbers."""
    given = inputs(kind, 2, 2, 50, 40, 16, torch.float32)
    bias = given[1 if kind == "packed" else 2]
    bias[:, :, 3, 5:9] = -torch.inf
    bias[:, :, 4, :32] = -torch.inf
    bias[:, 0, 7, :] = -torch.inf
    bias[:, :, 8, :40] = -1e30
    bias[:, :, 9, 10:] = -3e4
    if kind == "tokens":
        given[3][:, :6] = torch.tensor([3, 4, 7, 7, 8, 9])
    grad = torch.randn(2, 50 if kind == "packed" else 40, 2, 16)
    found = results(ours, given, grad)
    exact = results(torchs, in_float64(given), grad.double())
    assert not found["out"][:, 7 if kind == "packed" else 2, 0].any()
    assert max(errors(found, exact).values()) < 1e-6


@pytest.mark.long
def test_strided_tensors():
    """Transposed q, k, v and bias, and an expanded gradient."""
    given = inputs("packed", 2, 2, 17, 0, 16, torch.float32)
    other = [
        given[0].transpose(1, 4).contiguous().transpose(1, 4),
        given[1].transpose(2, 3).contiguous().transpose(2, 3),
    ]
    grad = torch.ones(()).expand(2, 17, 2, 16)
    for name, tensor in results(ours, given, grad).items():
        assert torch.equal(tensor, results(ours, other, grad)[name])


@pytest.mark.long
@pytest.mark.parametrize(
    "learns", [(True, True, False), (False, False, True), (True, False, False), (False, True, True)]
)
def test_gradients_of_some_inputs(learns):
    given = inputs("tokens", 2, 2, 17, 12, 16, torch.float32)
    grad = torch.randn(2, 12, 2, 16)
    exact = [t.requires_grad_() for t in given[:3]]
    wanted = torch.autograd.grad(ours(*exact, given[3]), exact, grad)
    found = [t.detach().requires_grad_(needed) for t, needed in zip(given, learns)]
    ours(*found, given[3]).backward(grad)
    for tensor, expected, needed in zip(found, wanted, learns):
        assert (tensor.grad is not None) == needed
        assert not needed or torch.equal(tensor.grad, expected)


@pytest.mark.long
def test_runs_are_bit_identical():
    given = inputs("tokens", 3, 2, 50, 40, 16, torch.bfloat16)
    grad = torch.randn(3, 40, 2, 16).bfloat16()
    first, second = (results(ours, given, grad) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_double_backward_raises():
    qkv, bias = (t.requires_grad_() for t in inputs("packed", 1, 1, 17, 0, 16, torch.float32))
    out = packed_attention(qkv, bias).sum()
    out.backward()
    with pytest.raises(RuntimeError, match="second time"):
        out.backward()
    (grad,) = torch.autograd.grad(packed_attention(qkv, bias).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_backward"):
        grad.sum().backward()


@pytest.mark.parametrize(("images", "queries"), [(0, 12), (2, 0)])
def test_empty_batch_and_no_queries(images, queries):
    given = inputs("tokens", images, 2, 17, queries, 16, torch.float32)
    learned = [t.requires_grad_() for t in given[:3]]
    out = attention_at(*learned, given[3])
    assert out.shape == (images, queries, 2, 16)
    out.sum().backward()
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in learned)


def test_invalid_shapes_and_dtypes():
    q, kv, bias, token_BK = inputs("tokens", 2, 2, 17, 12, 16, torch.float32)
    for wrong in (
        (q.double(), kv.double(), bias, token_BK),
        (q[..., :12], kv[..., :12], bias, token_BK),
        (q, kv.half(), bias, token_BK),
        (q, kv, bias[:, :, :5], token_BK),
        (q, kv, bias, token_BK[:, :5]),
        (q, kv, bias, None),
        (q[:, 0], kv, bias, token_BK),
    ):
        with pytest.raises(ValueError, match=r"do not fit|must be|heads of width"):
            attention_at(*wrong)
    with pytest.raises(ValueError, match="qkv must be"):
        packed_attention(kv, bias)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["packed", "tokens"])
def test_opcheck(kind):
    """Schemas, shapes without contents, gradients, tracing by the compiler."""
    given = [t.requires_grad_(t.is_floating_point()) for t in inputs(kind, 2, 2, 17, 12, 16, torch.float32)]
    whole = (given[0], None, given[1], None) if kind == "packed" else tuple(given)
    torch.use_deterministic_algorithms(False)
    torch.library.opcheck(torch.ops.beit_pretrain.attention, whole)
    with torch.no_grad():
        out, lse = torch.ops.beit_pretrain.attention(*whole)
        arguments = (torch.randn_like(out), out, lse, *(t if t is None else t.detach() for t in whole), True, True)
    torch.library.opcheck(torch.ops.beit_pretrain.attention_backward, arguments)


def test_flop_count_equals_torch():
    given = [t.requires_grad_() for t in inputs("packed", 2, 2, 17, 0, 16, torch.float32)]
    with FlopCounterMode(display=False) as counter:
        packed_attention(*given).sum().backward()
    assert counter.get_total_flops() == 2 * (2 + 5) * 2 * 2 * 17 * 17 * 16


def use_triton(network: MaskedImageModel) -> None:
    for layer in attentions(network):
        layer.kernel = "triton"


def model(bias: str, checkpointing: bool = False, image_size: tuple[int, int] = (32, 48)) -> MaskedImageModel:
    torch.manual_seed(0)
    shape = {"embed_dim": 32, "depth": 3, "num_heads": 2, "image_size": image_size, "patch_size": 8}
    found = MaskedImageModel(20, **shape, rel_pos_bias=bias, drop_path_rate=0.5)
    found.set_grad_checkpointing(checkpointing)
    for parameter in found.parameters():  # tables start at zero
        torch.nn.init.normal_(parameter, std=0.1)
    return found


def loss_and_gradients(network: MaskedImageModel) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    patches = network.grid[0] * network.grid[1]
    image, mask = torch.randn(3, 3, *(8 * n for n in network.grid), generator=draw), torch.zeros(3, patches, dtype=bool)
    position_BK = torch.stack([torch.randperm(patches, generator=draw)[:7] for _ in range(3)])
    mask.scatter_(1, position_BK, True)
    position_BK[1, 4:], position_BK[2, 1:] = 0, position_BK[2, 0]  # padded lists
    drop = uniforms(0, torch.arange(3), network.branches)
    there = network.mask_token.device
    network.zero_grad()
    loss = network.forward_at(*(t.to(there) for t in (image, mask, position_BK, drop))).float().sin().mean()
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in network.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize(
    ("bias", "checkpointing"),
    [
        *(("shared", False), ("per_layer", True)),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [("shared", True), ("per_layer", False), ("none", True)]
        ),
    ],
)
def test_network_loss_and_gradients(bias, checkpointing):
    network = model(bias, checkpointing)
    wanted = loss_and_gradients(network)
    use_triton(network)
    found = loss_and_gradients(network)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.long
@pytest.mark.parametrize("bias", ["shared", "per_layer"])
def test_compiled_network_loss_and_gradients(bias, monkeypatch):
    """Compiles to a single graph."""
    torch.use_deterministic_algorithms(False)
    network = model(bias)
    use_triton(network)
    monkeypatch.setattr(network, "forward_at", torch.compile(network.forward_at, fullgraph=True, dynamic=False))
    found = loss_and_gradients(network)
    monkeypatch.undo()
    for name, tensor in loss_and_gradients(network).items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.long
def test_network_under_autocast():
    network = model("shared")
    wanted = loss_and_gradients(network)
    use_triton(network)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss_and_gradients(network)
    for name, tensor in found.items():
        assert (tensor - wanted[name]).norm() <= 0.05 * wanted[name].norm() + 1e-4, name


def test_kernels_are_used_with_bias(monkeypatch):
    calls: list[str] = []
    for name in ("packed_attention", "attention_at"):
        plain = getattr(triton_attention, name)
        monkeypatch.setattr(
            triton_attention, name, lambda *a, name=name, plain=plain: (calls.append(name), plain(*a))[1]
        )
    network = model("shared")
    loss_and_gradients(network)
    assert not calls
    use_triton(network)
    loss_and_gradients(network)
    assert calls == ["packed_attention", "packed_attention", "attention_at"]
    use_triton(without := model("none"))
    loss_and_gradients(without)
    assert len(calls) == 3

"""Attention with an additive bias that learns, by Triton kernels of our own: `attention=triton`.

What it saves next to CUDA's memory-efficient kernel: no gradient of the bias of every image in memory; gradients of q,
k, v are written into one tensor, as the linear layer wants them, and are not copied there; queries of some tokens find
their lines of the bias by themselves. Every sum has a fixed order: two runs are equal bit by bit.

Two entry points: `packed_attention` (every token has a query) and `attention_at` (some tokens have). Shapes: B images,
N tokens, K queries, H heads, d width of a head (`WIDTHS`). q, k, v in bf16, fp16 or fp32, the bias in any of these;
products of fp32 are exact, not TF32. No GPU has run these kernels yet: they are tested by Triton's interpreter and
compiled for sm_90.

They are plain custom operators, not `triton_op`: the compile cache of torch 2.11 does not see block sizes and the
kernels of a backward pass, so that after a change of either a warm cache would run the old ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.library import custom_op
from torch.utils.flop_counter import register_flop_formula
from triton.runtime.jit import JITFunction

from beit_pretrain.models.triton_gradients import backward_kernel, bias_kernel, delta_kernel
from beit_pretrain.models.triton_kernels import Call, forward_kernel

WIDTHS = (16, 32, 64, 128)  # of a head
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PROGRAMS = 768  # of the bias's gradient, at least, where the batch can be split into so many: 6 for each SM of an H100
DELTA_ROWS = 64
# torch.compile hands tensors over as they lie. By default it would copy the bias once a layer to give it exact strides.
TAGS = (torch.Tag.needs_fixed_stride_order,)
KERNELS = ("forward", "backward", "bias", "bias_rows")  # the last: of the bias, where queries have lines of any order
# TRITON_INTERPRET=1 when Triton was imported: kernels run on a CPU, in numpy.
INTERPRETED = not isinstance(forward_kernel, JITFunction)


class Tiles(NamedTuple):
    """How a kernel is cut: `block` rows that a program holds, `step` rows of the other side at once, warps, stages."""

    block: int
    step: int  # of the bias's gradient: columns
    warps: int
    stages: int


# By kernel, bytes of a number and width of a head. A fixed choice, never timed at run time: results would depend on it.
# Chosen by reckoning and by what the compiler says for sm_90 (no spills); a benchmark may replace entries.
TILES: dict[tuple[str, int, int], Tiles] = {
    **{("forward", 2, width): Tiles(128, 64, 8, 2) for width in WIDTHS},
    **{("backward", 2, width): Tiles(64, 32, 4, 2) for width in WIDTHS},
    **{("bias", 2, width): Tiles(128, 64, 8, 2) for width in WIDTHS},
    **{("bias_rows", 2, width): Tiles(64, 32, 4, 2) for width in WIDTHS},
    ("backward", 2, 128): Tiles(64, 32, 8, 2),
    ("bias", 2, 128): Tiles(64, 32, 4, 2),
    ("bias_rows", 2, 128): Tiles(32, 32, 4, 2),
    **{(name, 4, width): Tiles(32, 32, 8, 2) for name in KERNELS for width in WIDTHS},
    **{(name, 4, 128): Tiles(16, 32, 8, 1) for name in ("forward", "backward")},
}


def packed_attention(qkv_BN3Hd: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, (B, N, H, d); `bias` (1 or B, H, N, N).

    The gradient of qkv is one tensor like it. A bias of one image's size gets the sum over the batch as its gradient.
    """
    if qkv_BN3Hd.ndim != 5 or qkv_BN3Hd.shape[2] != 3:
        raise ValueError(f"qkv must be (B, N, 3, H, d), not {tuple(qkv_BN3Hd.shape)}")
    _check(qkv_BN3Hd, None, bias, None)
    out: Tensor = torch.ops.beit_pretrain.attention(qkv_BN3Hd, None, bias, None)[0]
    return out


def attention_at(q_BKHd: Tensor, kv_BN2Hd: Tensor, bias: Tensor, token_BK: Tensor | None = None) -> Tensor:
    """The same for some queries, (B, K, H, d): keys and values of all tokens, one tensor (B, N, 2, H, d).

    With `token_BK`, the numbers in [0, N) of the queries' tokens in any order and with repetitions, `bias` is
    (1 or B, H, N, N) and each query has its token's line; without, it is (1 or B, H, K, N).
    """
    if q_BKHd.ndim != 4 or kv_BN2Hd.ndim != 5 or kv_BN2Hd.shape[2] != 2:
        raise ValueError(f"q and kv must be (B, K, H, d) and (B, N, 2, H, d), not {q_BKHd.shape}, {kv_BN2Hd.shape}")
    _check(q_BKHd, kv_BN2Hd, bias, token_BK)
    out: Tensor = torch.ops.beit_pretrain.attention(q_BKHd, kv_BN2Hd, bias, token_BK)[0]
    return out


class Shape(NamedTuple):
    """Of a call: B images, M queries and N keys of an image, H heads of width d, L lines of the bias."""

    images: int
    queries: int
    keys: int
    heads: int
    width: int
    lines: int


def _shape(q: Tensor, kv: Tensor | None, row: Tensor | None) -> Shape:
    keys = (q if kv is None else kv).shape[1]
    return Shape(q.shape[0], q.shape[1], keys, q.shape[-2], q.shape[-1], q.shape[1] if row is None else keys)


def _check(q: Tensor, kv: Tensor | None, bias: Tensor, row: Tensor | None) -> None:
    images, queries, keys, heads, width, lines = _shape(q, kv, row)
    if width not in WIDTHS or q.dtype not in DTYPES or bias.dtype not in DTYPES:
        raise ValueError(f"heads of width {width} in {q.dtype} and a bias in {bias.dtype}: not {WIDTHS} and {DTYPES}")
    if kv is not None and (kv.dtype != q.dtype or kv.shape[0] != images or kv.shape[3:] != q.shape[2:]):
        raise ValueError(f"q {tuple(q.shape)} {q.dtype} and kv {tuple(kv.shape)} {kv.dtype} do not fit")
    if bias.ndim != 4 or bias.shape[0] not in (1, images) or bias.shape[1:] != (heads, lines, keys):
        raise ValueError(f"bias must be (1 or {images}, {heads}, {lines}, {keys}), not {tuple(bias.shape)}")
    if row is not None and row.shape != (images, queries):
        raise ValueError(f"token_BK must be {(images, queries)}, not {tuple(row.shape)}")
    if q.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"these kernels need a GPU of CUDA, not a tensor on {q.device}")


def rest(count: int, block: int) -> int:
    """The tile for what is left of `count` rows behind whole tiles of `block`; 0 = nothing is left."""
    left = count % block
    return max(16, triton.next_power_of_2(left)) if left else 0


def call(shape: Shape, packed: bool, rows: bool, tiles: Tiles) -> Call:
    """What a kernel is compiled for."""
    _, queries, keys, heads, width, lines = shape
    block, step, row = tiles.block, tiles.step, heads * width
    return Call(
        M=queries,
        N=keys,
        HEADS=heads,
        WIDTH=width,
        PACKED=packed,
        ROWS=rows,
        PRECISION="interpreter" if INTERPRETED else "ieee",
        LINES=lines,
        D=row,
        STRIDE_Q=3 * row if packed else row,
        STRIDE_KV=3 * row if packed else 2 * row,
        SCALE=width**-0.5,
        BLOCK=block,
        STEP=step,
        TAIL_M=rest(queries, block),
        TAIL_N=rest(keys, block),
        TAIL_L=rest(lines, block),
        REST_M=rest(queries, step),
        REST_N=rest(keys, step),
    )


def parts(shape: Shape, tiles: Tiles, per_image: bool) -> tuple[int, int]:
    """The parts of the batch whose gradients of the bias are summed one after the other, and the images of a part.

    A function of the shapes alone, so that every GPU sums in the same order.
    """
    programs = shape.heads * -(-shape.lines // tiles.block) * -(-shape.keys // tiles.step)
    share = 1 if per_image else -(-shape.images // min(shape.images, -(-PROGRAMS // programs)))
    return -(-shape.images // share), share


def _launch(kernel: Any, programs: int, like: Tensor, tiles: Tiles, *arguments: Any, **fixed: Any) -> None:
    with torch.cuda.device_of(like):
        kernel[(programs,)](*arguments, **fixed, num_warps=tiles.warps, num_stages=tiles.stages)


def _readable(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _lines(bias: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """The bias, not copied where its rows are not scattered, and its strides over images, heads, lines."""
    bias = bias if bias.stride(3) == 1 else bias.contiguous()
    return bias, (0 if bias.shape[0] == 1 else bias.stride(0), bias.stride(1), bias.stride(2))


@custom_op("beit_pretrain::attention", mutates_args=(), tags=TAGS)
def attention(q: Tensor, kv: Tensor | None, bias: Tensor, row: Tensor | None) -> tuple[Tensor, Tensor]:
    """Outputs (B, M, H, d), and for the backward pass log-sum-exp (B, H, M). Without `kv`, q holds q, k and v."""
    shape, (out, lse) = _shape(q, kv, row), _outputs(q, kv, bias, row)
    if out.numel():
        tiles = TILES["forward", q.element_size(), shape.width]
        (q_, kv_, row_), (bias, strides) = _readable(q, kv, row), _lines(bias)
        programs = shape.images * shape.heads * -(-shape.queries // tiles.block)
        fixed = call(shape, kv is None, row is not None, tiles)
        _launch(forward_kernel, programs, q, tiles, q_, kv_, bias, row_, out, lse, *strides, CALL=fixed)
    return out, lse


@attention.register_fake
def _outputs(q: Tensor, kv: Tensor | None, bias: Tensor, row: Tensor | None) -> tuple[Tensor, Tensor]:
    images, queries, _, heads, width, _ = _shape(q, kv, row)
    return q.new_empty(images, queries, heads, width), q.new_empty(images, heads, queries, dtype=torch.float32)


@custom_op("beit_pretrain::attention_backward", mutates_args=(), tags=TAGS)
def attention_backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    kv: Tensor | None,
    bias: Tensor,
    row: Tensor | None,
    of_inputs: bool,
    of_bias: bool,
) -> list[Tensor]:
    """Gradients of q and (if it is one) kv, laid out like these, if `of_inputs`; then of the bias, if `of_bias`."""
    shape, found = _shape(q, kv, row), _gradients(grad, out, lse, q, kv, bias, row, of_inputs, of_bias)
    if not out.numel():
        return [tensor.zero_() for tensor in found]
    size, packed, rows, delta = q.element_size(), kv is None, row is not None, torch.empty_like(lse)
    (grad_, out_, q_, kv_, row_), (bias_, strides) = _readable(grad, out, q, kv, row), _lines(bias)
    tiles = Tiles(DELTA_ROWS, DELTA_ROWS, 4, 1)
    programs, fixed = -(-lse.numel() // DELTA_ROWS), call(shape, packed, rows, tiles)
    _launch(delta_kernel, programs, q, tiles, out_, grad_, delta, lse.numel(), CALL=fixed)
    given = (q_, kv_, bias_, row_, grad_, lse, delta)
    if of_inputs:
        tiles = TILES["backward", size, shape.width]
        programs = shape.images * shape.heads * (-(-shape.queries // tiles.block) + -(-shape.keys // tiles.block))
        grad_kv = None if packed else found[1]
        fixed = call(shape, packed, rows, tiles)
        _launch(backward_kernel, programs, q, tiles, *given, found[0], grad_kv, *strides, CALL=fixed)
    if of_bias:
        tiles = TILES["bias_rows" if rows else "bias", size, shape.width]
        number, share = parts(shape, tiles, per_image=bias.shape[0] > 1)
        one = number == bias.shape[0]
        sums = found[-1] if one else bias.new_empty(number, *bias.shape[1:], dtype=torch.float32)
        programs = number * shape.heads * -(-shape.lines // tiles.block) * -(-shape.keys // tiles.step)
        fixed = call(shape, packed, rows, tiles)
        _launch(bias_kernel, programs, q, tiles, *given, sums, shape.images, *strides, CALL=fixed, SHARE=share)
        if not one:
            found[-1] = sums.sum(0, keepdim=True).to(bias.dtype)
    return found


@attention_backward.register_fake
def _gradients(grad, out, lse, q, kv, bias, row, of_inputs, of_bias) -> list[Tensor]:
    like = [t for t, needed in ((q, of_inputs), (kv, of_inputs), (bias, of_bias)) if t is not None and needed]
    return [tensor.new_empty(tensor.shape) for tensor in like]


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.set_materialize_grads(False)  # log-sum-exp has no gradient; nobody shall fill one with zeros


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    q, kv, bias, row, out, lse = ctx.saved_tensors
    of_inputs, of_bias = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[2]
    found = iter(torch.ops.beit_pretrain.attention_backward(grad, out, lse, q, kv, bias, row, of_inputs, of_bias))
    of_q = next(found) if of_inputs else None
    of_kv = next(found) if of_inputs and kv is not None else None
    return of_q, of_kv, next(found) if of_bias else None, None


attention.register_autograd(_backward, setup_context=_save)


def _products(out: Any, bias: Any, number: int) -> int:
    images, queries, heads, width = out
    return 2 * number * images * heads * queries * bias[-1] * width


@register_flop_formula(torch.ops.beit_pretrain.attention)
def _flops(q: Any, kv: Any, bias: Any, *_: Any, out_shape: Any) -> int:
    return _products(out_shape[0], bias, 2)


@register_flop_formula(torch.ops.beit_pretrain.attention_backward)
def _backward_flops(grad: Any, out: Any, lse: Any, q: Any, kv: Any, bias: Any, *_: Any, out_shape: Any) -> int:
    """As torch counts its own attention: five products, however many are computed again."""
    return _products(out, bias, 5)

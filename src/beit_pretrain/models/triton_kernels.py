"""Triton kernels of attention with an additive bias that learns: the forward pass, and what all kernels share.

Method: FlashAttention-2 (Dao 2023, arXiv:2307.08691, algorithms 1 and 2) with a bias in the scores. No matrix of scores
is in memory, sums are in fp32, and there are no atomics: every number is written by one program, summed in a fixed
order, so two runs are equal bit by bit. The gradients are in `triton_gradients.py`, the operators in
`triton_attention.py`.

Arguments: CALL (a `Call`) holds what is the same in all programs. An image has M queries and N keys, HEADS heads of
WIDTH numbers. q, k, v lie as the linear layer writes them. PACKED: `q` is (B, N, 3, HEADS, WIDTH), and `kv` is not
used. Otherwise `q` is (B, M, HEADS, WIDTH) and `kv` (B, N, 2, HEADS, WIDTH). `out` and `grad` (its gradient) are
(B, M, HEADS, WIDTH). `lse`, the logarithm to base 2 of the sum of a row's exponentials, and `delta`, the sum of
out x grad over WIDTH, are (B, HEADS, M) in fp32. ROWS: `row` (B, M) says which line of the bias each query has;
otherwise query i has line i. The bias keeps its strides.

Tiles: a program holds a tile of BLOCK rows and reads the other side in tiles of STEP rows. N = 197 is 3 x 64 + 5:
whole tiles need no mask, and the rest is one smaller tile (TAIL of BLOCK, REST of STEP), a power of two of at least 16.
So the last five keys cost 16 and not 64.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

# The kernels take many numbers; one a line would double the file.
# fmt: off

LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Call:
    """What kernels are compiled for. Fields, no properties: Triton's cache sees the values, not the code of a class."""

    M: int
    N: int
    HEADS: int
    WIDTH: int
    PACKED: bool
    ROWS: bool
    PRECISION: str  # of products: "ieee", or "interpreter"
    LINES: int  # of the bias
    D: int  # HEADS x WIDTH
    STRIDE_Q: int  # from a query to the next
    STRIDE_KV: int
    SCALE: float  # of scores
    BLOCK: int  # rows of a tile
    STEP: int  # rows of the other side at once; in the gradient of the bias, columns
    TAIL_M: int  # the rest of M in tiles of BLOCK, and so on; 0 = there is none
    TAIL_N: int
    TAIL_L: int
    REST_M: int  # in tiles of STEP
    REST_N: int


@triton.jit
def dot(a, b, CALL: tl.constexpr):
    """a b, summed in fp32."""
    if CALL.PRECISION == "interpreter":  # it would multiply the bits of bf16 as integers
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=CALL.PRECISION)


@triton.jit
def starts(q, kv, image, head, CALL: tl.constexpr):
    """Where q, k and v of one image and head begin."""
    image = image.to(tl.int64)  # a large batch has more than 2^31 numbers
    if CALL.PACKED:
        q += image * (3 * CALL.N * CALL.D) + head * CALL.WIDTH
        return q, q + CALL.D, q + 2 * CALL.D
    else:  # Triton compiles what follows a return
        q += image * (CALL.M * CALL.D) + head * CALL.WIDTH
        kv += image * (2 * CALL.N * CALL.D) + head * CALL.WIDTH
        return q, kv, kv + CALL.D


@triton.jit
def load_rows(base, first, STRIDE: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
              WHOLE: tl.constexpr):
    """Rows from `first` of q, k, v or a gradient, (BLOCK, WIDTH); zeros past the last of COUNT rows."""
    row = first + tl.arange(0, BLOCK)
    at = base + row[:, None] * STRIDE + tl.arange(0, WIDTH)[None, :]
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=row[:, None] < COUNT, other=0.0)


@triton.jit
def store_rows(base, value, first, STRIDE: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
               WHOLE: tl.constexpr):
    """Write a tile (BLOCK, WIDTH), in the precision of the memory."""
    row = first + tl.arange(0, BLOCK)
    at = base + row[:, None] * STRIDE + tl.arange(0, WIDTH)[None, :]
    value = value.to(base.dtype.element_ty)
    if WHOLE:
        tl.store(at, value)
    else:
        tl.store(at, value, mask=row[:, None] < COUNT)


@triton.jit
def load_lines(row, first, CALL: tl.constexpr, BLOCK: tl.constexpr):
    """The line of the bias of each query, (BLOCK,); past the last query any line that exists."""
    query = tl.minimum(first + tl.arange(0, BLOCK), CALL.M - 1)
    if CALL.ROWS:
        return tl.load(row + query).to(tl.int32)
    return query


@triton.jit
def load_bias(bias, line, bias_line, key, N: tl.constexpr, WHOLE: tl.constexpr):
    """bias[line, key] in fp32; minus infinity past the last key, so that it has no weight."""
    at = bias + line * bias_line + key
    if WHOLE:
        return tl.load(at).to(tl.float32)
    return tl.load(at, mask=key < N, other=float("-inf")).to(tl.float32)


@triton.jit
def _online_softmax(q, k, v, bias, most, total, acc, CALL: tl.constexpr):
    """One tile of keys: the largest score so far, the sum of weights and the output that is not yet divided by it."""
    scores = dot(q, tl.trans(k), CALL) * CALL.SCALE + bias
    new = tl.maximum(most, tl.max(scores, 1) * LOG2E)
    base = tl.where(new == float("-inf"), 0.0, new)  # all scores minus infinity so far: inf - inf is no number
    weight = tl.exp2(scores * LOG2E - base[:, None])
    shrink = tl.exp2(most - base)
    acc = acc * shrink[:, None] + dot(weight.to(v.dtype), v, CALL)
    return new, total * shrink + tl.sum(weight, 1), acc


@triton.jit
def _forward_rows(q, k, v, bias, row, out, lse, first, bias_line, CALL: tl.constexpr, BLOCK: tl.constexpr,
                  WHOLE: tl.constexpr):
    """Outputs of a tile of queries."""
    WIDTH: tl.constexpr = CALL.WIDTH
    END: tl.constexpr = CALL.N // CALL.STEP * CALL.STEP
    q_t = load_rows(q, first, CALL.STRIDE_Q, CALL.M, WIDTH, BLOCK, WHOLE)
    line = load_lines(row, first, CALL, BLOCK)[:, None]
    if CALL.REST_N > 0:  # requested first and used last, so that the end does not wait for memory
        k_rest = load_rows(k, END, CALL.STRIDE_KV, CALL.N, WIDTH, CALL.REST_N, False)
        v_rest = load_rows(v, END, CALL.STRIDE_KV, CALL.N, WIDTH, CALL.REST_N, False)
        b_rest = load_bias(bias, line, bias_line, END + tl.arange(0, CALL.REST_N)[None, :], CALL.N, False)
    most = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, WIDTH), tl.float32)
    for j in range(0, END, CALL.STEP):
        k_t = load_rows(k, j, CALL.STRIDE_KV, CALL.N, WIDTH, CALL.STEP, True)
        v_t = load_rows(v, j, CALL.STRIDE_KV, CALL.N, WIDTH, CALL.STEP, True)
        b_t = load_bias(bias, line, bias_line, j + tl.arange(0, CALL.STEP)[None, :], CALL.N, True)
        most, total, acc = _online_softmax(q_t, k_t, v_t, b_t, most, total, acc, CALL)
    if CALL.REST_N > 0:
        most, total, acc = _online_softmax(q_t, k_rest, v_rest, b_rest, most, total, acc, CALL)
    # A row whose scores are all minus infinity gives zeros, as in torch, and no gradient: with this lse no key has a
    # weight.
    empty = total == 0
    query = first + tl.arange(0, BLOCK)
    tl.store(lse + query, tl.where(empty, float("inf"), most + tl.log2(total)), mask=query < CALL.M)
    store_rows(out, acc / tl.where(empty, 1.0, total)[:, None], first, CALL.D, CALL.M, WIDTH, BLOCK, WHOLE)


@triton.jit
def forward_kernel(q, kv, bias, row, out, lse, bias_image, bias_head, bias_line, CALL: tl.constexpr):
    """out = softmax(q k^T / sqrt(WIDTH) + bias) v, and lse. A program has a tile of queries of one image and head."""
    TILES: tl.constexpr = CALL.M // CALL.BLOCK + (CALL.TAIL_M > 0)
    program = tl.program_id(0)  # tiles of the same keys run side by side: the second finds them in the cache
    tile, head, image = program % TILES, program // TILES % CALL.HEADS, program // TILES // CALL.HEADS
    q, k, v = starts(q, kv, image, head, CALL)
    bias += image.to(tl.int64) * bias_image + head * bias_head
    if CALL.ROWS:
        row += image * CALL.M
    out += image.to(tl.int64) * (CALL.M * CALL.D) + head * CALL.WIDTH
    lse += (image * CALL.HEADS + head) * CALL.M
    first = tile * CALL.BLOCK
    if CALL.M >= CALL.BLOCK and tile < CALL.M // CALL.BLOCK:
        _forward_rows(q, k, v, bias, row, out, lse, first, bias_line, CALL, CALL.BLOCK, True)
    if CALL.TAIL_M > 0 and tile == CALL.M // CALL.BLOCK:
        _forward_rows(q, k, v, bias, row, out, lse, first, bias_line, CALL, CALL.TAIL_M, False)

"""Triton kernels of the gradients of attention with a bias; `triton_kernels.py` says what the arguments are.

Three kernels. `delta_kernel` reads out and grad once. `backward_kernel` has the programs of dQ and those of dK and dV
of an image and head side by side, so that q, k, v and grad come from the device's memory once. `bias_kernel` sums the
gradient of a tile of the bias over the images in registers. It is a kernel of its own, since in the programs of dQ the
sum over the batch would be kept in memory: 8 bytes read and written a score, where this one reads 6 (bf16, d = 64).
"""

from __future__ import annotations

import triton
import triton.language as tl

from beit_pretrain.models.triton_kernels import LOG2E, dot, load_bias, load_lines, load_rows, starts, store_rows

# The kernels take many numbers; one a line would double the file.
# fmt: off


@triton.jit
def delta_kernel(out, grad, delta, rows, CALL: tl.constexpr):
    """delta = sum over WIDTH of out x grad. A program has BLOCK of `rows` = B x M x HEADS rows."""
    number = tl.program_id(0).to(tl.int64) * CALL.BLOCK + tl.arange(0, CALL.BLOCK)
    at = number[:, None] * CALL.WIDTH + tl.arange(0, CALL.WIDTH)[None, :]
    exists = number < rows
    product = tl.load(out + at, mask=exists[:, None], other=0.0).to(tl.float32)
    product *= tl.load(grad + at, mask=exists[:, None], other=0.0).to(tl.float32)
    query, head = number // CALL.HEADS, number % CALL.HEADS
    place = (query // CALL.M * CALL.HEADS + head) * CALL.M + query % CALL.M
    tl.store(delta + place, tl.sum(product, 1), mask=exists)


@triton.jit
def _load_number(base, first, OTHER: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """One number a query, (BLOCK,)."""
    query = first + tl.arange(0, BLOCK)
    if WHOLE:
        return tl.load(base + query)
    return tl.load(base + query, mask=query < COUNT, other=OTHER)


@triton.jit
def _weights(a, b, c, e, bias, lse, delta, CALL: tl.constexpr):
    """Softmax's weights and the gradient of the scores, from q k^T = a b^T and grad v^T = c e^T.

    With the arguments of both products exchanged (k q^T and v grad^T) the results are transposed.
    """
    scores = dot(a, tl.trans(b), CALL) * CALL.SCALE + bias
    weight = tl.exp2(scores * LOG2E - lse)
    return weight, weight * (dot(c, tl.trans(e), CALL) - delta)


@triton.jit
def _query_rows(q, k, v, bias, row, grad, lse, delta, grad_q, first, bias_line, CALL: tl.constexpr,
                BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Gradient of a tile of queries."""
    WIDTH: tl.constexpr = CALL.WIDTH
    END: tl.constexpr = CALL.N // CALL.STEP * CALL.STEP
    q_t = load_rows(q, first, CALL.STRIDE_Q, CALL.M, WIDTH, BLOCK, WHOLE)
    g_t = load_rows(grad, first, CALL.D, CALL.M, WIDTH, BLOCK, WHOLE)
    l_t = _load_number(lse, first, float("inf"), CALL.M, BLOCK, WHOLE)[:, None]
    d_t = _load_number(delta, first, 0.0, CALL.M, BLOCK, WHOLE)[:, None]
    line = load_lines(row, first, CALL, BLOCK)[:, None]
    if CALL.REST_N > 0:  # requested first and used last
        k_rest = load_rows(k, END, CALL.STRIDE_KV, CALL.N, WIDTH, CALL.REST_N, False)
        v_rest = load_rows(v, END, CALL.STRIDE_KV, CALL.N, WIDTH, CALL.REST_N, False)
        b_rest = load_bias(bias, line, bias_line, END + tl.arange(0, CALL.REST_N)[None, :], CALL.N, False)
    acc = tl.zeros((BLOCK, WIDTH), tl.float32)
    for j in range(0, END, CALL.STEP):
        k_t = load_rows(k, j, CALL.STRIDE_KV, CALL.N, WIDTH, CALL.STEP, True)
        v_t = load_rows(v, j, CALL.STRIDE_KV, CALL.N, WIDTH, CALL.STEP, True)
        b_t = load_bias(bias, line, bias_line, j + tl.arange(0, CALL.STEP)[None, :], CALL.N, True)
        _, s_t = _weights(q_t, k_t, g_t, v_t, b_t, l_t, d_t, CALL)
        acc += dot(s_t.to(k_t.dtype), k_t, CALL)
    if CALL.REST_N > 0:
        _, s_t = _weights(q_t, k_rest, g_t, v_rest, b_rest, l_t, d_t, CALL)
        acc += dot(s_t.to(k_rest.dtype), k_rest, CALL)
    store_rows(grad_q, acc * CALL.SCALE, first, CALL.STRIDE_Q, CALL.M, WIDTH, BLOCK, WHOLE)


@triton.jit
def _add_queries(acc_k, acc_v, q, k_t, v_t, bias, row, grad, lse, delta, key, first, bias_line, CALL: tl.constexpr,
                 WHOLE_N: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Add what a tile of queries gives to the gradients of a tile of keys and values; scores are (keys, queries)."""
    q_t = load_rows(q, first, CALL.STRIDE_Q, CALL.M, CALL.WIDTH, BLOCK, WHOLE)
    g_t = load_rows(grad, first, CALL.D, CALL.M, CALL.WIDTH, BLOCK, WHOLE)
    l_t = _load_number(lse, first, float("inf"), CALL.M, BLOCK, WHOLE)[None, :]  # past the last query: no weight
    d_t = _load_number(delta, first, 0.0, CALL.M, BLOCK, WHOLE)[None, :]
    b_t = load_bias(bias, load_lines(row, first, CALL, BLOCK)[None, :], bias_line, key[:, None], CALL.N, WHOLE_N)
    weight, s_t = _weights(k_t, q_t, v_t, g_t, b_t, l_t, d_t, CALL)
    acc_v += dot(weight.to(g_t.dtype), g_t, CALL)
    acc_k += dot(s_t.to(q_t.dtype), q_t, CALL)
    return acc_k, acc_v


@triton.jit
def _key_rows(q, k, v, bias, row, grad, lse, delta, grad_k, grad_v, first, bias_line, CALL: tl.constexpr,
              BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Gradients of a tile of keys and of its values."""
    WIDTH: tl.constexpr = CALL.WIDTH
    END: tl.constexpr = CALL.M // CALL.STEP * CALL.STEP
    key = first + tl.arange(0, BLOCK)
    k_t = load_rows(k, first, CALL.STRIDE_KV, CALL.N, WIDTH, BLOCK, WHOLE)
    v_t = load_rows(v, first, CALL.STRIDE_KV, CALL.N, WIDTH, BLOCK, WHOLE)
    acc_k = tl.zeros((BLOCK, WIDTH), tl.float32)
    acc_v = tl.zeros((BLOCK, WIDTH), tl.float32)
    for i in range(0, END, CALL.STEP):
        acc_k, acc_v = _add_queries(acc_k, acc_v, q, k_t, v_t, bias, row, grad, lse, delta, key, i, bias_line, CALL,
                                    WHOLE, CALL.STEP, True)
    if CALL.REST_M > 0:
        acc_k, acc_v = _add_queries(acc_k, acc_v, q, k_t, v_t, bias, row, grad, lse, delta, key, END, bias_line, CALL,
                                    WHOLE, CALL.REST_M, False)
    store_rows(grad_k, acc_k * CALL.SCALE, first, CALL.STRIDE_KV, CALL.N, WIDTH, BLOCK, WHOLE)
    store_rows(grad_v, acc_v, first, CALL.STRIDE_KV, CALL.N, WIDTH, BLOCK, WHOLE)


@triton.jit
def backward_kernel(q, kv, bias, row, grad, lse, delta, grad_q, grad_kv, bias_image, bias_head, bias_line,
                    CALL: tl.constexpr):
    """Gradients of q, k, v, laid out like these. A program has a tile of queries, or one of keys, of an image and head.
    """
    TILES_M: tl.constexpr = CALL.M // CALL.BLOCK + (CALL.TAIL_M > 0)
    TILES: tl.constexpr = TILES_M + CALL.N // CALL.BLOCK + (CALL.TAIL_N > 0)
    program = tl.program_id(0)
    tile, head, image = program % TILES, program // TILES % CALL.HEADS, program // TILES // CALL.HEADS
    q, k, v = starts(q, kv, image, head, CALL)
    grad_q, grad_k, grad_v = starts(grad_q, grad_kv, image, head, CALL)
    bias += image.to(tl.int64) * bias_image + head * bias_head
    if CALL.ROWS:
        row += image * CALL.M
    grad += image.to(tl.int64) * (CALL.M * CALL.D) + head * CALL.WIDTH
    lse += (image * CALL.HEADS + head) * CALL.M
    delta += (image * CALL.HEADS + head) * CALL.M
    first = tile * CALL.BLOCK
    if CALL.M >= CALL.BLOCK and tile < CALL.M // CALL.BLOCK:
        _query_rows(q, k, v, bias, row, grad, lse, delta, grad_q, first, bias_line, CALL, CALL.BLOCK, True)
    if CALL.TAIL_M > 0 and tile == CALL.M // CALL.BLOCK:
        _query_rows(q, k, v, bias, row, grad, lse, delta, grad_q, first, bias_line, CALL, CALL.TAIL_M, False)
    tile -= TILES_M
    first = tile * CALL.BLOCK
    if CALL.N >= CALL.BLOCK and (tile >= 0) & (tile < CALL.N // CALL.BLOCK):
        _key_rows(q, k, v, bias, row, grad, lse, delta, grad_k, grad_v, first, bias_line, CALL, CALL.BLOCK, True)
    if CALL.TAIL_N > 0 and tile == CALL.N // CALL.BLOCK:
        _key_rows(q, k, v, bias, row, grad, lse, delta, grad_k, grad_v, first, bias_line, CALL, CALL.TAIL_N, False)


@triton.jit
def _score_gradient(q, k, v, bias, row, grad, lse, delta, counts, first, j, bias_line, CALL: tl.constexpr,
                    BLOCK: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr, WHOLE_N: tl.constexpr):
    """Gradient of the scores of the queries from `first` and the keys from `j`, (BLOCK, COLUMNS); 0 if not `counts`."""
    q_t = load_rows(q, first, CALL.STRIDE_Q, CALL.M, CALL.WIDTH, BLOCK, WHOLE)
    k_t = load_rows(k, j, CALL.STRIDE_KV, CALL.N, CALL.WIDTH, COLUMNS, WHOLE_N)
    v_t = load_rows(v, j, CALL.STRIDE_KV, CALL.N, CALL.WIDTH, COLUMNS, WHOLE_N)
    g_t = load_rows(grad, first, CALL.D, CALL.M, CALL.WIDTH, BLOCK, WHOLE)
    l_t = _load_number(lse, first, float("inf"), CALL.M, BLOCK, WHOLE)
    l_t = tl.where(counts, l_t, float("inf"))[:, None]
    d_t = _load_number(delta, first, 0.0, CALL.M, BLOCK, WHOLE)[:, None]
    key = j + tl.arange(0, COLUMNS)[None, :]
    b_t = load_bias(bias, load_lines(row, first, CALL, BLOCK)[:, None], bias_line, key, CALL.N, WHOLE_N)
    _, s_t = _weights(q_t, k_t, g_t, v_t, b_t, l_t, d_t, CALL)
    return s_t


@triton.jit
def _add_lines(acc, s_t, row, first, line, M: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    """Add the gradients of queries to the lines of the bias that they have, whichever: a product with zeros and ones.

    HALF: split into two bf16 numbers, 16 bits in all.
    """
    query = first + tl.arange(0, BLOCK)
    found = tl.load(row + query, mask=query < M, other=-1).to(tl.int32)
    has = line == found[None, :]
    if HALF:
        high = s_t.to(tl.bfloat16)
        low = (s_t - high.to(tl.float32)).to(tl.bfloat16)
        return acc + tl.dot(has.to(tl.bfloat16), high) + tl.dot(has.to(tl.bfloat16), low)
    else:
        return acc + tl.dot(has.to(tl.float32), s_t, input_precision="ieee")


@triton.jit
def _bias_tile(q, kv, bias, row, grad, lse, delta, grad_bias, image, images, head, i, j, bias_line, CALL: tl.constexpr,
               BLOCK: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr, WHOLE_N: tl.constexpr,
               SHARE: tl.constexpr):
    """Gradient of a tile of the bias, summed over SHARE images from `image`, one after the other."""
    END: tl.constexpr = CALL.M // CALL.BLOCK * CALL.BLOCK
    HALF: tl.constexpr = q.dtype.element_ty != tl.float32 and CALL.PRECISION != "interpreter"
    line = (i + tl.arange(0, BLOCK))[:, None]
    acc = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for number in range(0, SHARE):
        counts = image + number < images  # the last part may have fewer
        b = tl.minimum(image + number, images - 1)
        q_b, k_b, v_b = starts(q, kv, b, head, CALL)
        g_b = grad + b.to(tl.int64) * (CALL.M * CALL.D) + head * CALL.WIDTH
        l_b = lse + (b * CALL.HEADS + head) * CALL.M
        d_b = delta + (b * CALL.HEADS + head) * CALL.M
        if CALL.ROWS:
            r_b = row + b * CALL.M
            for first in range(0, END, CALL.BLOCK):
                s_t = _score_gradient(q_b, k_b, v_b, bias, r_b, g_b, l_b, d_b, counts, first, j, bias_line, CALL,
                                      CALL.BLOCK, True, COLUMNS, WHOLE_N)
                acc = _add_lines(acc, s_t, r_b, first, line, CALL.M, HALF, CALL.BLOCK)
            if CALL.TAIL_M > 0:
                s_t = _score_gradient(q_b, k_b, v_b, bias, r_b, g_b, l_b, d_b, counts, END, j, bias_line, CALL,
                                      CALL.TAIL_M, False, COLUMNS, WHOLE_N)
                acc = _add_lines(acc, s_t, r_b, END, line, CALL.M, HALF, CALL.TAIL_M)
        else:
            acc += _score_gradient(q_b, k_b, v_b, bias, row, g_b, l_b, d_b, counts, i, j, bias_line, CALL, BLOCK, WHOLE,
                                   COLUMNS, WHOLE_N)
    key = j + tl.arange(0, COLUMNS)[None, :]
    tl.store(grad_bias + line * CALL.N + key, acc.to(grad_bias.dtype.element_ty),
             mask=(line < CALL.LINES) & (key < CALL.N))


@triton.jit
def _bias_lines(q, kv, bias, row, grad, lse, delta, grad_bias, image, images, head, i, tile, bias_line,
                CALL: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, SHARE: tl.constexpr):
    """The same for a tile of lines whose size is known, and any tile of columns."""
    j = tile * CALL.STEP
    if CALL.N >= CALL.STEP and tile < CALL.N // CALL.STEP:
        _bias_tile(q, kv, bias, row, grad, lse, delta, grad_bias, image, images, head, i, j, bias_line, CALL, BLOCK,
                   WHOLE, CALL.STEP, True, SHARE)
    if CALL.REST_N > 0 and tile == CALL.N // CALL.STEP:
        _bias_tile(q, kv, bias, row, grad, lse, delta, grad_bias, image, images, head, i, j, bias_line, CALL, BLOCK,
                   WHOLE, CALL.REST_N, False, SHARE)


@triton.jit
def bias_kernel(q, kv, bias, row, grad, lse, delta, grad_bias, images, bias_image, bias_head, bias_line,
                CALL: tl.constexpr, SHARE: tl.constexpr):
    """Gradient of the bias, (parts, HEADS, lines, N): each part is the sum over SHARE of the `images`.

    A program has a tile of one head and one part. ROWS: its queries, of any lines, pass by in tiles of BLOCK.
    """
    TILES_L: tl.constexpr = CALL.LINES // CALL.BLOCK + (CALL.TAIL_L > 0)
    TILES_N: tl.constexpr = CALL.N // CALL.STEP + (CALL.REST_N > 0)
    program = tl.program_id(0)
    tile_n, tile, slab = program % TILES_N, program // TILES_N % TILES_L, program // (TILES_N * TILES_L)
    head, image = slab % CALL.HEADS, slab // CALL.HEADS * SHARE
    bias += image.to(tl.int64) * bias_image + head * bias_head  # a bias of each image: parts of one image
    grad_bias += slab.to(tl.int64) * (CALL.LINES * CALL.N)
    if CALL.LINES >= CALL.BLOCK and tile < CALL.LINES // CALL.BLOCK:
        _bias_lines(q, kv, bias, row, grad, lse, delta, grad_bias, image, images, head, tile * CALL.BLOCK, tile_n,
                    bias_line, CALL, CALL.BLOCK, True, SHARE)
    if CALL.TAIL_L > 0 and tile == CALL.LINES // CALL.BLOCK:
        _bias_lines(q, kv, bias, row, grad, lse, delta, grad_bias, image, images, head, tile * CALL.BLOCK, tile_n,
                    bias_line, CALL, CALL.TAIL_L, False, SHARE)

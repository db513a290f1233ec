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
def delta_kernel(out, grad, delta, rows, M: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
                 BLOCK: tl.constexpr):
    """delta = sum over WIDTH of out x grad. A program has BLOCK of `rows` = B x M x HEADS rows."""
    number = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = number[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    exists = number < rows
    product = tl.load(out + at, mask=exists[:, None], other=0.0).to(tl.float32)
    product *= tl.load(grad + at, mask=exists[:, None], other=0.0).to(tl.float32)
    query, head = number // HEADS, number % HEADS
    tl.store(delta + (query // M * HEADS + head) * M + query % M, tl.sum(product, 1), mask=exists)


@triton.jit
def _load_number(base, first, OTHER: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """One number a query, (BLOCK,)."""
    query = first + tl.arange(0, BLOCK)
    if WHOLE:
        return tl.load(base + query)
    return tl.load(base + query, mask=query < COUNT, other=OTHER)


@triton.jit
def _weights(a, b, c, e, bias, lse, delta, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """Softmax's weights and the gradient of the scores, from q k^T = a b^T and grad v^T = c e^T.

    With the arguments of both products exchanged (k q^T and v grad^T) the results are transposed.
    """
    scores = dot(a, tl.trans(b), PRECISION) * SCALE + bias
    weight = tl.exp2(scores * LOG2E - lse)
    return weight, weight * (dot(c, tl.trans(e), PRECISION) - delta)


@triton.jit
def _query_rows(q, k, v, bias, row, grad, lse, delta, grad_q, first, bias_line, M: tl.constexpr, N: tl.constexpr,
                HEADS: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr,
                PRECISION: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, STEP: tl.constexpr,
                REST: tl.constexpr):
    """Gradient of a tile of queries."""
    SCALE: tl.constexpr = WIDTH**-0.5
    D: tl.constexpr = HEADS * WIDTH
    STRIDE_Q: tl.constexpr = 3 * D if PACKED else D
    STRIDE_KV: tl.constexpr = 3 * D if PACKED else 2 * D
    END: tl.constexpr = N // STEP * STEP
    q_t = load_rows(q, first, STRIDE_Q, M, WIDTH, BLOCK, WHOLE)
    g_t = load_rows(grad, first, D, M, WIDTH, BLOCK, WHOLE)
    l_t = _load_number(lse, first, float("inf"), M, BLOCK, WHOLE)[:, None]
    d_t = _load_number(delta, first, 0.0, M, BLOCK, WHOLE)[:, None]
    line = load_lines(row, first, M, ROWS, BLOCK)[:, None]
    if REST > 0:  # requested first and used last
        k_rest = load_rows(k, END, STRIDE_KV, N, WIDTH, REST, False)
        v_rest = load_rows(v, END, STRIDE_KV, N, WIDTH, REST, False)
        b_rest = load_bias(bias, line, bias_line, END + tl.arange(0, REST)[None, :], N, False)
    acc = tl.zeros((BLOCK, WIDTH), tl.float32)
    for j in range(0, END, STEP):
        k_t = load_rows(k, j, STRIDE_KV, N, WIDTH, STEP, True)
        v_t = load_rows(v, j, STRIDE_KV, N, WIDTH, STEP, True)
        b_t = load_bias(bias, line, bias_line, j + tl.arange(0, STEP)[None, :], N, True)
        _, s_t = _weights(q_t, k_t, g_t, v_t, b_t, l_t, d_t, SCALE, PRECISION)
        acc += dot(s_t.to(k_t.dtype), k_t, PRECISION)
    if REST > 0:
        _, s_t = _weights(q_t, k_rest, g_t, v_rest, b_rest, l_t, d_t, SCALE, PRECISION)
        acc += dot(s_t.to(k_rest.dtype), k_rest, PRECISION)
    store_rows(grad_q, acc * SCALE, first, STRIDE_Q, M, WIDTH, BLOCK, WHOLE)


@triton.jit
def _add_queries(acc_k, acc_v, q, k_t, v_t, bias, row, grad, lse, delta, key, first, bias_line, M: tl.constexpr,
                 N: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr,
                 PRECISION: tl.constexpr, WHOLE_N: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """Add what a tile of queries gives to the gradients of a tile of keys and values; scores are (keys, queries)."""
    D: tl.constexpr = HEADS * WIDTH
    STRIDE_Q: tl.constexpr = 3 * D if PACKED else D
    q_t = load_rows(q, first, STRIDE_Q, M, WIDTH, BLOCK, WHOLE)
    g_t = load_rows(grad, first, D, M, WIDTH, BLOCK, WHOLE)
    l_t = _load_number(lse, first, float("inf"), M, BLOCK, WHOLE)[None, :]  # past the last query: no weight
    d_t = _load_number(delta, first, 0.0, M, BLOCK, WHOLE)[None, :]
    b_t = load_bias(bias, load_lines(row, first, M, ROWS, BLOCK)[None, :], bias_line, key[:, None], N, WHOLE_N)
    weight, s_t = _weights(k_t, q_t, v_t, g_t, b_t, l_t, d_t, WIDTH**-0.5, PRECISION)
    acc_v += dot(weight.to(g_t.dtype), g_t, PRECISION)
    acc_k += dot(s_t.to(q_t.dtype), q_t, PRECISION)
    return acc_k, acc_v


@triton.jit
def _key_rows(q, k, v, bias, row, grad, lse, delta, grad_k, grad_v, first, bias_line, M: tl.constexpr,
              N: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr,
              PRECISION: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, STEP: tl.constexpr,
              REST: tl.constexpr):
    """Gradients of a tile of keys and of its values."""
    D: tl.constexpr = HEADS * WIDTH
    STRIDE_KV: tl.constexpr = 3 * D if PACKED else 2 * D
    END: tl.constexpr = M // STEP * STEP
    key = first + tl.arange(0, BLOCK)
    k_t = load_rows(k, first, STRIDE_KV, N, WIDTH, BLOCK, WHOLE)
    v_t = load_rows(v, first, STRIDE_KV, N, WIDTH, BLOCK, WHOLE)
    acc_k = tl.zeros((BLOCK, WIDTH), tl.float32)
    acc_v = tl.zeros((BLOCK, WIDTH), tl.float32)
    for i in range(0, END, STEP):
        acc_k, acc_v = _add_queries(acc_k, acc_v, q, k_t, v_t, bias, row, grad, lse, delta, key, i, bias_line, M, N,
                                    HEADS, WIDTH, PACKED, ROWS, PRECISION, WHOLE, STEP, True)
    if REST > 0:
        acc_k, acc_v = _add_queries(acc_k, acc_v, q, k_t, v_t, bias, row, grad, lse, delta, key, END, bias_line, M, N,
                                    HEADS, WIDTH, PACKED, ROWS, PRECISION, WHOLE, REST, False)
    store_rows(grad_k, acc_k * WIDTH**-0.5, first, STRIDE_KV, N, WIDTH, BLOCK, WHOLE)
    store_rows(grad_v, acc_v, first, STRIDE_KV, N, WIDTH, BLOCK, WHOLE)


@triton.jit
def backward_kernel(q, kv, bias, row, grad, lse, delta, grad_q, grad_kv, bias_image, bias_head, bias_line,
                    M: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr,
                    ROWS: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
                    TAIL_M: tl.constexpr, TAIL_N: tl.constexpr, REST_M: tl.constexpr, REST_N: tl.constexpr):
    """Gradients of q, k, v, laid out like these. A program has a tile of queries, or one of keys, of an image and head.
    """
    TILES_M: tl.constexpr = M // BLOCK + (TAIL_M > 0)
    TILES: tl.constexpr = TILES_M + N // BLOCK + (TAIL_N > 0)
    program = tl.program_id(0)
    tile, head, image = program % TILES, program // TILES % HEADS, program // TILES // HEADS
    q, k, v = starts(q, kv, image, head, M, N, HEADS, WIDTH, PACKED)
    grad_q, grad_k, grad_v = starts(grad_q, grad_kv, image, head, M, N, HEADS, WIDTH, PACKED)
    bias += image.to(tl.int64) * bias_image + head * bias_head
    if ROWS:
        row += image * M
    grad += image.to(tl.int64) * (M * HEADS * WIDTH) + head * WIDTH
    lse += (image * HEADS + head) * M
    delta += (image * HEADS + head) * M
    first = tile * BLOCK
    if M >= BLOCK and tile < M // BLOCK:
        _query_rows(q, k, v, bias, row, grad, lse, delta, grad_q, first, bias_line, M, N, HEADS, WIDTH, PACKED,
                    ROWS, PRECISION, BLOCK, True, STEP, REST_N)
    if TAIL_M > 0 and tile == M // BLOCK:
        _query_rows(q, k, v, bias, row, grad, lse, delta, grad_q, first, bias_line, M, N, HEADS, WIDTH, PACKED,
                    ROWS, PRECISION, TAIL_M, False, STEP, REST_N)
    tile -= TILES_M
    first = tile * BLOCK
    if N >= BLOCK and (tile >= 0) & (tile < N // BLOCK):
        _key_rows(q, k, v, bias, row, grad, lse, delta, grad_k, grad_v, first, bias_line, M, N, HEADS, WIDTH,
                  PACKED, ROWS, PRECISION, BLOCK, True, STEP, REST_M)
    if TAIL_N > 0 and tile == N // BLOCK:
        _key_rows(q, k, v, bias, row, grad, lse, delta, grad_k, grad_v, first, bias_line, M, N, HEADS, WIDTH,
                  PACKED, ROWS, PRECISION, TAIL_N, False, STEP, REST_M)


@triton.jit
def _score_gradient(q, k, v, bias, row, grad, lse, delta, counts, first, j, bias_line, M: tl.constexpr,
                    N: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr,
                    PRECISION: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr,
                    WHOLE_N: tl.constexpr):
    """Gradient of the scores of the queries from `first` and the keys from `j`, (BLOCK, COLUMNS); 0 if not `counts`."""
    D: tl.constexpr = HEADS * WIDTH
    STRIDE_Q: tl.constexpr = 3 * D if PACKED else D
    STRIDE_KV: tl.constexpr = 3 * D if PACKED else 2 * D
    q_t = load_rows(q, first, STRIDE_Q, M, WIDTH, BLOCK, WHOLE)
    k_t = load_rows(k, j, STRIDE_KV, N, WIDTH, COLUMNS, WHOLE_N)
    v_t = load_rows(v, j, STRIDE_KV, N, WIDTH, COLUMNS, WHOLE_N)
    g_t = load_rows(grad, first, D, M, WIDTH, BLOCK, WHOLE)
    l_t = _load_number(lse, first, float("inf"), M, BLOCK, WHOLE)
    l_t = tl.where(counts, l_t, float("inf"))[:, None]
    d_t = _load_number(delta, first, 0.0, M, BLOCK, WHOLE)[:, None]
    key = j + tl.arange(0, COLUMNS)[None, :]
    b_t = load_bias(bias, load_lines(row, first, M, ROWS, BLOCK)[:, None], bias_line, key, N, WHOLE_N)
    _, s_t = _weights(q_t, k_t, g_t, v_t, b_t, l_t, d_t, WIDTH**-0.5, PRECISION)
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
def _bias_tile(q, kv, bias, row, grad, lse, delta, grad_bias, image, images, head, i, j, bias_line, M: tl.constexpr,
               N: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr,
               PRECISION: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr,
               WHOLE_N: tl.constexpr, SHARE: tl.constexpr, STEP: tl.constexpr, REST_M: tl.constexpr):
    """Gradient of a tile of the bias, summed over SHARE images from `image`, one after the other."""
    LINES: tl.constexpr = N if ROWS else M
    END: tl.constexpr = M // STEP * STEP
    HALF: tl.constexpr = q.dtype.element_ty != tl.float32 and PRECISION != "interpreter"
    line = (i + tl.arange(0, BLOCK))[:, None]
    acc = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for number in range(0, SHARE):
        counts = image + number < images  # the last part may have fewer
        b = tl.minimum(image + number, images - 1)
        q_b, k_b, v_b = starts(q, kv, b, head, M, N, HEADS, WIDTH, PACKED)
        g_b = grad + b.to(tl.int64) * (M * HEADS * WIDTH) + head * WIDTH
        l_b = lse + (b * HEADS + head) * M
        d_b = delta + (b * HEADS + head) * M
        if ROWS:
            r_b = row + b * M
            for first in range(0, END, STEP):
                s_t = _score_gradient(q_b, k_b, v_b, bias, r_b, g_b, l_b, d_b, counts, first, j, bias_line, M, N,
                                      HEADS, WIDTH, PACKED, ROWS, PRECISION, STEP, True, COLUMNS, WHOLE_N)
                acc = _add_lines(acc, s_t, r_b, first, line, M, HALF, STEP)
            if REST_M > 0:
                s_t = _score_gradient(q_b, k_b, v_b, bias, r_b, g_b, l_b, d_b, counts, END, j, bias_line, M, N, HEADS,
                                      WIDTH, PACKED, ROWS, PRECISION, REST_M, False, COLUMNS, WHOLE_N)
                acc = _add_lines(acc, s_t, r_b, END, line, M, HALF, REST_M)
        else:
            acc += _score_gradient(q_b, k_b, v_b, bias, row, g_b, l_b, d_b, counts, i, j, bias_line, M, N, HEADS,
                                   WIDTH, PACKED, ROWS, PRECISION, BLOCK, WHOLE, COLUMNS, WHOLE_N)
    key = j + tl.arange(0, COLUMNS)[None, :]
    tl.store(grad_bias + line * N + key, acc.to(grad_bias.dtype.element_ty), mask=(line < LINES) & (key < N))


@triton.jit
def _bias_lines(q, kv, bias, row, grad, lse, delta, grad_bias, image, images, head, i, tile, bias_line, M: tl.constexpr,
                N: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr,
                PRECISION: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, COLUMNS: tl.constexpr,
                TAIL_N: tl.constexpr, SHARE: tl.constexpr, STEP: tl.constexpr, REST_M: tl.constexpr):
    """The same for a tile of lines whose size is known, and any tile of columns."""
    j = tile * COLUMNS
    if N >= COLUMNS and tile < N // COLUMNS:
        _bias_tile(q, kv, bias, row, grad, lse, delta, grad_bias, image, images, head, i, j, bias_line, M, N, HEADS,
                   WIDTH, PACKED, ROWS, PRECISION, BLOCK, WHOLE, COLUMNS, True, SHARE, STEP, REST_M)
    if TAIL_N > 0 and tile == N // COLUMNS:
        _bias_tile(q, kv, bias, row, grad, lse, delta, grad_bias, image, images, head, i, j, bias_line, M, N, HEADS,
                   WIDTH, PACKED, ROWS, PRECISION, BLOCK, WHOLE, TAIL_N, False, SHARE, STEP, REST_M)


@triton.jit
def bias_kernel(q, kv, bias, row, grad, lse, delta, grad_bias, images, bias_image, bias_head, bias_line,
                M: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr,
                ROWS: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
                TAIL_L: tl.constexpr, TAIL_N: tl.constexpr, REST_M: tl.constexpr, SHARE: tl.constexpr):
    """Gradient of the bias, (parts, HEADS, lines, N): each part is the sum over SHARE of the `images`.

    A program has a tile of one head and one part. ROWS: its queries, of any lines, pass by in tiles of BLOCK.
    """
    LINES: tl.constexpr = N if ROWS else M
    TILES_L: tl.constexpr = LINES // BLOCK + (TAIL_L > 0)
    TILES_N: tl.constexpr = N // COLUMNS + (TAIL_N > 0)
    program = tl.program_id(0)
    tile_n, tile, slab = program % TILES_N, program // TILES_N % TILES_L, program // (TILES_N * TILES_L)
    head, image = slab % HEADS, slab // HEADS * SHARE
    bias += image.to(tl.int64) * bias_image + head * bias_head  # a bias of each image: parts of one image
    grad_bias += slab.to(tl.int64) * (LINES * N)
    if LINES >= BLOCK and tile < LINES // BLOCK:
        _bias_lines(q, kv, bias, row, grad, lse, delta, grad_bias, image, images, head, tile * BLOCK, tile_n,
                    bias_line, M, N, HEADS, WIDTH, PACKED, ROWS, PRECISION, BLOCK, True, COLUMNS, TAIL_N, SHARE,
                    BLOCK, REST_M)
    if TAIL_L > 0 and tile == LINES // BLOCK:
        _bias_lines(q, kv, bias, row, grad, lse, delta, grad_bias, image, images, head, tile * BLOCK, tile_n,
                    bias_line, M, N, HEADS, WIDTH, PACKED, ROWS, PRECISION, TAIL_L, False, COLUMNS, TAIL_N, SHARE,
                    BLOCK, REST_M)

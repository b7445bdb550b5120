"""Triton kernels of the FAVOR+ backward pass; the features are computed again, never stored.

The formulas are those of `kernels/reference.py`, names and conventions those of
`kernels/favor_forward.py`. With g_i = grad_i / den_i, four kernels in this order (and for exact
gradients `find_key_max` of the forward file before the last):

    query_gradient     per block of tokens: dq, and delta_i = g_i . (out_i - mu)
    summary_gradient   per split of the tokens: sums of E g and of E delta (gradients of A and c)
    combine_gradients  the splits of these sums, with the eps parts
    key_gradient       per block of tokens: dk and dv

dq, dk and dv lie in one buffer (T, 3, H, K), or dq in its own and dk and dv in (T, 2, H, K) where
queries and keys differ in number: PARTS is 3, or 1 and 2. The first two kernels run over the
queries of a cell, the last over its keys. Sums have a fixed order: no atomics.
"""

import triton
import triton.language as tl

from kernels.favor_forward import (
    LOG2E,
    cell_rows,
    dot,
    head_rows,
    inner,
    place_of_max,
    rounded,
    rows_per_split,
    sum_of_scalars,
    sum_of_tiles,
)


@inner
def _query_tile(q, g, w, a, c, offset, delta, direct, through_den, slope, PADDED: tl.constexpr):
    """Add one tile of features to the sums of a block of tokens."""
    exponent = dot(q, tl.trans(w), None) * slope - offset[:, None]
    if PADDED:
        # Padding has A = c = w = 0; the bound keeps inf from meeting them.
        exponent = tl.minimum(exponent, 0.0)
    e = tl.exp2(exponent)
    u = e * dot(g, tl.trans(a), None)
    delta += tl.sum(u, 1)
    direct = dot(rounded(u, w.dtype), w, direct)
    through_den = dot(rounded(e * c[None, :], w.dtype), w, through_den)
    return delta, direct, through_den


@triton.jit(do_not_specialize=["n_tokens", "n_heads", "total"])
def query_gradient(
    q_ptr, grad_ptr, w_ptr, a_ptr, c_ptr, a_sum_ptr, c_sum_ptr, rows_ptr, arg_ptr, cu_seqlens_ptr,
    dq_ptr, delta_ptr,
    n_tokens, n_heads, total,
    stride_qb, stride_qn, stride_qh, stride_gb, stride_gn, stride_gh, scale, eps,
    M: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr,
    PARTS: tl.constexpr, EXACT: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Compute dq of BLOCK_N tokens of one head, and their delta (H, T).

    Grid (BH, blocks of tokens). delta is known after the last tile only, so the parts of dq with
    and without it are summed apart.
    """
    bh = tl.program_id(0)
    b, h = bh // n_heads, bh % n_heads
    first, n = cell_rows(cu_seqlens_ptr, b, n_tokens, VARLEN)
    start = tl.program_id(1) * BLOCK_N
    if start >= n:
        return
    slope = scale * LOG2E
    cols, rows = tl.arange(0, K), tl.arange(0, BLOCK_N)
    inside = rows < n - start
    q_rows = head_rows(q_ptr, b, h, first, stride_qb, stride_qn, stride_qh, VARLEN)
    q_rows += start.to(tl.int64) * stride_qn
    g_rows = head_rows(grad_ptr, b, h, first, stride_gb, stride_gn, stride_gh, VARLEN)
    g_rows += start.to(tl.int64) * stride_gn
    q = tl.load(q_rows + rows[:, None] * stride_qn + cols[None, :], mask=inside[:, None], other=0.0)
    grad = tl.load(
        g_rows + rows[:, None] * stride_gn + cols[None, :], mask=inside[:, None], other=0.0
    )
    at = h.to(tl.int64) * total + first + start + rows
    offset = tl.load(rows_ptr + at, mask=inside, other=0.0)
    den = tl.load(rows_ptr + n_heads.to(tl.int64) * total + at, mask=inside, other=1.0)
    g32 = grad.to(tl.float32) * (1.0 / den)[:, None]
    g = rounded(g32, q_ptr.dtype.element_ty)
    direct = tl.zeros([BLOCK_N, K], tl.float32)
    through_den = tl.zeros([BLOCK_N, K], tl.float32)
    delta = tl.zeros([BLOCK_N], tl.float32)
    summary = bh.to(tl.int64) * WIDTH
    for tile in range(0, M // BLOCK_M * BLOCK_M if TAIL > 0 else M, BLOCK_M):
        features = tile + tl.arange(0, BLOCK_M)
        w = tl.load(w_ptr + features[:, None] * K + cols[None, :])
        a = tl.load(a_ptr + (summary + features[:, None]) * K + cols[None, :])
        c = tl.load(c_ptr + summary + features)
        delta, direct, through_den = _query_tile(
            q, g, w, a, c, offset, delta, direct, through_den, slope,
            TAIL == 0 and M % BLOCK_M != 0,
        )  # fmt: skip
    if TAIL > 0:
        tail = M // BLOCK_M * BLOCK_M + tl.arange(0, TAIL)
        w = tl.load(w_ptr + tail[:, None] * K + cols[None, :])
        a = tl.load(a_ptr + (summary + tail[:, None]) * K + cols[None, :])
        c = tl.load(c_ptr + summary + tail)
        delta, direct, through_den = _query_tile(
            q, g, w, a, c, offset, delta, direct, through_den, slope, M % BLOCK_M != TAIL
        )
    a_sum = sum_of_tiles(a_sum_ptr, bh, TILES, TILES_PADDED, K)
    c_sum = sum_of_scalars(c_sum_ptr, bh.to(tl.int64) * TILES, TILES, TILES_PADDED)
    g_a = tl.sum(g32 * a_sum[None, :], 1)
    delta = (delta + eps * g_a) / den
    # Weight of what the exponent subtracts, the squared norm and the maximum, in closed form.
    flow = eps * (delta * c_sum - g_a)
    dq = direct - delta[:, None] * through_den
    if EXACT:
        arg = tl.load(arg_ptr + at, mask=inside, other=0).to(tl.int32)
        dq -= flow[:, None] * tl.load(w_ptr + arg[:, None] * K + cols[None, :]).to(tl.float32)
    dq = scale * dq - (scale * scale) * flow[:, None] * q.to(tl.float32)
    dq_rows = dq_ptr + ((first + start) * PARTS * n_heads + h) * K
    tl.store(
        dq_rows + rows[:, None] * (PARTS * n_heads * K) + cols[None, :],
        rounded(dq, dq_ptr.dtype.element_ty),
        mask=inside[:, None],
    )
    tl.store(delta_ptr + at, delta, mask=inside)


@inner
def _summary_tile(w, q, g, offset, delta, da, dc, slope):
    """Add one tile of tokens to the gradients of A and c of a block of features."""
    e = tl.exp2(dot(w, tl.trans(q), None) * slope - offset[None, :])
    da = dot(rounded(e, g.dtype), g, da)
    dc += tl.sum(e * delta[None, :], 1)
    return da, dc


@triton.jit(do_not_specialize=["n_tokens", "n_heads", "total"])
def summary_gradient(
    q_ptr, grad_ptr, w_ptr, rows_ptr, delta_ptr, cu_seqlens_ptr,
    da_ptr, dc_ptr, g_sum_ptr, delta_sum_ptr,
    n_tokens, n_heads, total,
    stride_qb, stride_qn, stride_qh, stride_gb, stride_gn, stride_gh, scale,
    K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Sum E g and E delta over one split of one head's tokens, for MAIN + TAIL features.

    Grid (BH, splits, blocks of features), like `key_pass`. Writes per split (features, K) and
    (features,), and the sums of g (K,) and delta. Padding holds values that nobody reads.
    """
    bh, split, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, parts = tl.num_programs(1), tl.num_programs(2)
    b, h = bh // n_heads, bh % n_heads
    first, n = cell_rows(cu_seqlens_ptr, b, n_tokens, VARLEN)
    per_split = rows_per_split(n, splits, BLOCK_N)
    lo = split * per_split
    hi = tl.minimum(n, lo + per_split)
    if lo >= n:
        return
    slope = scale * LOG2E
    cols, rows = tl.arange(0, K), tl.arange(0, BLOCK_N)
    q_rows = head_rows(q_ptr, b, h, first, stride_qb, stride_qn, stride_qh, VARLEN)
    g_rows = head_rows(grad_ptr, b, h, first, stride_gb, stride_gn, stride_gh, VARLEN)
    q_rows += lo.to(tl.int64) * stride_qn
    g_rows += lo.to(tl.int64) * stride_gn
    at = h.to(tl.int64) * total + first + lo + rows
    den_ptr = rows_ptr + n_heads.to(tl.int64) * total

    features = part * (MAIN + TAIL) + tl.arange(0, MAIN)
    w = tl.load(w_ptr + features[:, None] * K + cols[None, :])
    da = tl.zeros([MAIN, K], tl.float32)
    dc = tl.zeros([MAIN], tl.float32)
    if TAIL > 0:
        tail = part * (MAIN + TAIL) + MAIN + tl.arange(0, TAIL)
        w_tail = tl.load(w_ptr + tail[:, None] * K + cols[None, :])
        da_tail = tl.zeros([TAIL, K], tl.float32)
        dc_tail = tl.zeros([TAIL], tl.float32)
    g_sum = tl.zeros([K], tl.float32)
    delta_sum = tl.zeros([BLOCK_N], tl.float32)
    for start in range(lo, hi, BLOCK_N):
        inside = rows < hi - start
        mask = inside[:, None]
        q = tl.load(q_rows + rows[:, None] * stride_qn + cols[None, :], mask=mask, other=0.0)
        grad = tl.load(g_rows + rows[:, None] * stride_gn + cols[None, :], mask=mask, other=0.0)
        offset = tl.load(rows_ptr + at, mask=inside, other=0.0)
        den = tl.load(den_ptr + at, mask=inside, other=1.0)
        delta = tl.load(delta_ptr + at, mask=inside, other=0.0)
        g32 = grad.to(tl.float32) * (1.0 / den)[:, None]
        g = rounded(g32, q_ptr.dtype.element_ty)
        da, dc = _summary_tile(w, q, g, offset, delta, da, dc, slope)
        if TAIL > 0:
            da_tail, dc_tail = _summary_tile(w_tail, q, g, offset, delta, da_tail, dc_tail, slope)
        g_sum += tl.sum(g32, 0)
        delta_sum += delta
        q_rows += BLOCK_N * stride_qn
        g_rows += BLOCK_N * stride_gn
        at += BLOCK_N

    program = (bh * splits + split).to(tl.int64)
    row = program * parts * (MAIN + TAIL)
    tl.store(da_ptr + (row + features[:, None]) * K + cols[None, :], da)
    tl.store(dc_ptr + row + features, dc)
    if TAIL > 0:
        tl.store(da_ptr + (row + tail[:, None]) * K + cols[None, :], da_tail)
        tl.store(dc_ptr + row + tail, dc_tail)
    if part == 0:
        tl.store(g_sum_ptr + program * K + cols, g_sum)
        tl.store(delta_sum_ptr + program, tl.sum(delta_sum, 0))


@triton.jit(do_not_specialize=["n_tokens", "n_heads", "splits"])
def combine_gradients(
    da_part_ptr, dc_part_ptr, g_sum_ptr, delta_sum_ptr,
    da_ptr, dc_ptr, da_sum_ptr, dc_sum_ptr, cu_seqlens_ptr,
    n_tokens, n_heads, splits, eps,
    M: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, PARTIAL_WIDTH: tl.constexpr,
    SPLIT_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Add the splits of the gradients of A and c, for one tile of features of one head.

    Grid (BH, WIDTH / BLOCK_M). Writes both with zeros for padding, and their sums over the tile.
    """
    bh, tile, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    _, n = cell_rows(cu_seqlens_ptr, bh // n_heads, n_tokens, VARLEN)
    bh = bh.to(tl.int64)
    cols = tl.arange(0, K)
    features = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = features < M
    g_sum = tl.zeros([K], tl.float32)
    delta_sum = tl.zeros([1], tl.float32)
    da = tl.zeros([BLOCK_M, K], tl.float32)
    dc = tl.zeros([BLOCK_M], tl.float32)
    for split in range(tl.cdiv(n, rows_per_split(n, splits, SPLIT_ROWS))):
        program = bh * splits + split
        g_sum += tl.load(g_sum_ptr + program * K + cols)
        delta_sum += tl.load(delta_sum_ptr + program)
        at = program * PARTIAL_WIDTH + features
        da += tl.load(da_part_ptr + at[:, None] * K + cols[None, :], mask=real[:, None], other=0.0)
        dc += tl.load(dc_part_ptr + at, mask=real, other=0.0)
    da = tl.where(real[:, None], da + eps * g_sum[None, :], 0.0)
    dc = tl.where(real, -(dc + eps * delta_sum), 0.0)
    at = bh * WIDTH + features
    tl.store(da_ptr + at[:, None] * K + cols[None, :], rounded(da, da_ptr.dtype.element_ty))
    tl.store(dc_ptr + at, dc)
    tl.store(da_sum_ptr + (bh * tiles + tile) * K + cols, tl.sum(da, 0))
    tl.store(dc_sum_ptr + bh * tiles + tile, tl.sum(dc, 0))


@inner
def _key_tile(k, centred, w, da, dc, offset, row_sum, dk, dv, slope, PADDED: tl.constexpr):
    """Add one tile of features to the gradients of a block of tokens."""
    exponent = dot(k, tl.trans(w), None) * slope - offset[:, None]
    if PADDED:
        # Padding has dA = dc = w = 0; the bound keeps inf from meeting them.
        exponent = tl.minimum(exponent, 0.0)
    f = tl.exp2(exponent)
    dv = dot(rounded(f, da.dtype), da, dv)
    p = f * (dot(centred, tl.trans(da), None) + dc[None, :])
    row_sum += tl.sum(p, 1)
    dk = dot(rounded(p, w.dtype), w, dk)
    return row_sum, dk, dv


@triton.jit(do_not_specialize=["n_tokens", "n_heads", "scope_heads", "chunks"])
def key_gradient(
    k_ptr, v_ptr, w_ptr, da_ptr, dc_ptr, da_sum_ptr, dc_sum_ptr, mean_ptr, max_ptr, winner_ptr,
    value_ptr, cu_seqlens_ptr, dkv_ptr,
    n_tokens, n_heads, scope_heads, chunks,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, scale, eps,
    M: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr,
    PARTS: tl.constexpr, EXACT: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv, side by side, of BLOCK_N tokens of one head.

    Grid (BH, blocks of tokens).
    """
    bh = tl.program_id(0)
    b, h = bh // n_heads, bh % n_heads
    first, n = cell_rows(cu_seqlens_ptr, b, n_tokens, VARLEN)
    start = tl.program_id(1) * BLOCK_N
    if start >= n:
        return
    slope = scale * LOG2E
    cols, rows = tl.arange(0, K), tl.arange(0, BLOCK_N)
    inside = rows < n - start
    k_rows = head_rows(k_ptr, b, h, first, stride_kb, stride_kn, stride_kh, VARLEN)
    v_rows = head_rows(v_ptr, b, h, first, stride_vb, stride_vn, stride_vh, VARLEN)
    k_rows += start.to(tl.int64) * stride_kn
    v_rows += start.to(tl.int64) * stride_vn
    k = tl.load(k_rows + rows[:, None] * stride_kn + cols[None, :], mask=inside[:, None], other=0.0)
    v = tl.load(v_rows + rows[:, None] * stride_vn + cols[None, :], mask=inside[:, None], other=0.0)
    mean = tl.load(mean_ptr + bh * K + cols)
    k32 = k.to(tl.float32)
    offset = tl.sum(k32 * k32, 1) * (0.5 * scale * slope) + tl.load(max_ptr + bh)
    centred = rounded(v.to(tl.float32) - mean[None, :], v_ptr.dtype.element_ty)
    dk = tl.zeros([BLOCK_N, K], tl.float32)
    dv = tl.zeros([BLOCK_N, K], tl.float32)
    row_sum = tl.zeros([BLOCK_N], tl.float32)
    summary = bh.to(tl.int64) * WIDTH
    for tile in range(0, M // BLOCK_M * BLOCK_M if TAIL > 0 else M, BLOCK_M):
        features = tile + tl.arange(0, BLOCK_M)
        w = tl.load(w_ptr + features[:, None] * K + cols[None, :])
        da = tl.load(da_ptr + (summary + features[:, None]) * K + cols[None, :])
        dc = tl.load(dc_ptr + summary + features)
        row_sum, dk, dv = _key_tile(
            k, centred, w, da, dc, offset, row_sum, dk, dv, slope,
            TAIL == 0 and M % BLOCK_M != 0,
        )  # fmt: skip
    if TAIL > 0:
        tail = M // BLOCK_M * BLOCK_M + tl.arange(0, TAIL)
        w = tl.load(w_ptr + tail[:, None] * K + cols[None, :])
        da = tl.load(da_ptr + (summary + tail[:, None]) * K + cols[None, :])
        dc = tl.load(dc_ptr + summary + tail)
        row_sum, dk, dv = _key_tile(
            k, centred, w, da, dc, offset, row_sum, dk, dv, slope, M % BLOCK_M != TAIL
        )
    dv += eps * sum_of_tiles(da_sum_ptr, bh, TILES, TILES_PADDED, K)[None, :]
    if EXACT:
        # The maximum of the scope is one entry (token, feature) of one head: its row gets all.
        scope = bh // scope_heads
        chunk = place_of_max(value_ptr, scope.to(tl.int64) * chunks, chunks, 128)
        winner = winner_ptr + scope.to(tl.int64) * (2 + chunks)
        token = tl.load(winner + 2 + chunk) - start
        feature = tl.load(winner + 1)
        flow = 0.0
        if tl.load(winner) == bh:
            first_sum = scope.to(tl.int64) * scope_heads * TILES
            flow = -eps * n * sum_of_scalars(dc_sum_ptr, first_sum, scope_heads * TILES, 128)
        w_max = tl.load(w_ptr + feature * K + cols).to(tl.float32)
        dk -= tl.where(rows == token, flow, 0.0)[:, None] * w_max[None, :]
    dk = scale * dk - (scale * scale) * row_sum[:, None] * k32
    dk_rows = dkv_ptr + ((first + start) * PARTS * n_heads + h) * K
    at = rows[:, None] * (PARTS * n_heads * K) + cols[None, :]
    tl.store(dk_rows + at, rounded(dk, dkv_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(
        dk_rows + n_heads * K + at, rounded(dv, dkv_ptr.dtype.element_ty), mask=inside[:, None]
    )

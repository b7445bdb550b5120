"""Triton kernels of the FAVOR+ forward pass; the features never reach memory.

The formulas are those of `kernels/reference.py`. Exponents are in base 2: `slope` is s log2(e) and
`half` is s^2 log2(e) / 2, so E = exp2(slope q.w - half |q|^2 - slope M). Four kernels, launched by
`kernels/favor_launch.py` in this order:

    key_pass       per split of the tokens: sums of F and of F v with running maxima per feature
    combine_keys   the splits, brought to the common maximum: A, c and their sums
    query_pass     per block of tokens: the output, with a running maximum over tiles of features
    find_key_max   which head, token and feature attain the key maximum; the backward pass of exact
                   gradients alone asks for it

Every sum has a fixed order, and the number of splits depends on the number of heads alone: the same
cell gives the same bits alone, in a batch and packed with others.

In the interpreter (TRITON_INTERPRET=1) `tl.dot` multiplies the bit patterns of bf16 and casts to
bf16 truncate (triton issue 11584); `dot` and `rounded` stand in for both there.

Shapes: B cells, N tokens of a cell, T tokens of all cells, H heads, K head width, M features.
`bh` counts the heads of all cells. Source: arXiv:2009.14794.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
inner = (lambda function: function) if INTERPRETED else triton.jit
"""Marks what loops call: the interpreter takes a millisecond for every call of a jit function."""
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)
"""Stands for minus infinity: differences of two of them are 0, not NaN."""


@inner
def dot(a, b, acc):
    """Return a b + acc in float32; float32 operands are split in three TF32 products."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="tf32x3")


@inner
def rounded(x, dtype: tl.constexpr):
    """Return float32 x rounded to nearest even in `dtype` (in the interpreter still float32)."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            return bits.to(tl.float32, bitcast=True)
        else:
            return x
    else:
        return x.to(dtype)


@triton.jit
def cell_rows(cu_seqlens_ptr, b, n_tokens, VARLEN: tl.constexpr):
    """Return a cell's first token among those of all cells (int64) and how many it has."""
    if VARLEN:
        first = tl.load(cu_seqlens_ptr + b)
        return first.to(tl.int64), tl.load(cu_seqlens_ptr + b + 1) - first
    else:
        return b.to(tl.int64) * n_tokens, n_tokens


@triton.jit
def head_rows(ptr, b, h, first, stride_b, stride_n, stride_h, VARLEN: tl.constexpr):
    """Return the address of a head's first row in (B, N, H, K), or in (T, H, K) if VARLEN."""
    if VARLEN:
        return ptr + first * stride_n + h.to(tl.int64) * stride_h
    else:
        return ptr + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h


@triton.jit
def rows_per_split(n, splits, BLOCK_N: tl.constexpr):
    """Return how many of n tokens each split takes: whole tiles; the last splits may get none."""
    return tl.maximum(tl.cdiv(tl.cdiv(n, splits), BLOCK_N), 1) * BLOCK_N


@triton.jit
def sum_of_tiles(ptr, bh, TILES: tl.constexpr, TILES_PADDED: tl.constexpr, K: tl.constexpr):
    """Return the sum over tiles (K,) of partial sums (BH, TILES, K)."""
    tiles, cols = tl.arange(0, TILES_PADDED), tl.arange(0, K)
    at = ptr + (bh.to(tl.int64) * TILES + tiles[:, None]) * K + cols[None, :]
    return tl.sum(tl.load(at, mask=tiles[:, None] < TILES, other=0.0), 0)


@triton.jit
def sum_of_scalars(ptr, first, count, BLOCK: tl.constexpr):
    """Return the sum of `count` floats from index `first`."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(ptr + first + at, mask=at < count, other=0.0)
    return tl.sum(total, 0)


@inner
def _key_tile(w, k, v, ones, norm, peak, z, sums, slope):
    """Add one tile of tokens to the sums of a block of features.

    The tile is transposed, features by tokens: its maxima need no exchange between warps, and the
    features go from registers into the second product. z sums the rounded features on the tensor
    cores, so that sums - z mu is exactly the weighted mean that `sums` holds.
    """
    y = dot(w, tl.trans(k), None)
    top = tl.maximum(peak, tl.max(y, 1))
    decay = tl.exp2((peak - top) * slope)
    f = rounded(tl.exp2(y * slope - (norm[None, :] + (top * slope)[:, None])), v.dtype)
    z = dot(f, ones, z * decay[:, None])
    sums = dot(f, v, sums * decay[:, None])
    return top, z, sums


@triton.jit
def _store_key_tile(
    features, sums, z, peak, row, sums_ptr, z_ptr, peak_ptr, slope,
    M: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Write one block of features of a split; features from M on are padding: maximum LOWEST."""
    cols = tl.arange(0, K)
    real = features < M
    at = row + features
    tl.store(sums_ptr + at[:, None] * K + cols[None, :], tl.where(real[:, None], sums, 0.0))
    tl.store(z_ptr + at, tl.where(real, tl.sum(z, 1) * 0.0625, 0.0))
    peak = tl.where(real, peak * slope, LOWEST)
    tl.store(peak_ptr + at, peak)
    return tl.max(peak, 0)


@triton.jit(do_not_specialize=["n_tokens", "n_heads"])
def key_pass(
    k_ptr, v_ptr, w_ptr, cu_seqlens_ptr,
    sums_ptr, z_ptr, peak_ptr, top_ptr, v_sum_ptr,
    n_tokens, n_heads,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    scale,
    M: tl.constexpr, K: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_N: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Sum F and F v over one split of one head's tokens, for one block of MAIN + TAIL features.

    Grid (BH, splits, blocks of features). Writes per split sums (features, K), z and peak
    (features,), relative to the running maximum `peak` of each feature; per program its largest
    maximum (top); per split the sum of v (K,).
    """
    bh, split, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits, parts = tl.num_programs(1), tl.num_programs(2)
    b, h = bh // n_heads, bh % n_heads
    first, n = cell_rows(cu_seqlens_ptr, b, n_tokens, VARLEN)
    per_split = rows_per_split(n, splits, BLOCK_N)
    lo = split * per_split
    hi = tl.minimum(n, lo + per_split)
    program = (bh * splits + split).to(tl.int64)
    if lo >= n:
        tl.store(top_ptr + program * parts + part, LOWEST)
        return
    slope = scale * LOG2E
    cols, rows = tl.arange(0, K), tl.arange(0, BLOCK_N)
    k_rows = head_rows(k_ptr, b, h, first, stride_kb, stride_kn, stride_kh, VARLEN)
    v_rows = head_rows(v_ptr, b, h, first, stride_vb, stride_vn, stride_vh, VARLEN)
    k_rows += lo.to(tl.int64) * stride_kn
    v_rows += lo.to(tl.int64) * stride_vn

    features = part * (MAIN + TAIL) + tl.arange(0, MAIN)
    w = tl.load(w_ptr + features[:, None] * K + cols[None, :])
    peak = tl.full([MAIN], LOWEST, tl.float32)
    z = tl.zeros([MAIN, 16], tl.float32)
    sums = tl.zeros([MAIN, K], tl.float32)
    if TAIL > 0:
        tail = part * (MAIN + TAIL) + MAIN + tl.arange(0, TAIL)
        w_tail = tl.load(w_ptr + tail[:, None] * K + cols[None, :])
        peak_tail = tl.full([TAIL], LOWEST, tl.float32)
        z_tail = tl.zeros([TAIL, 16], tl.float32)
        sums_tail = tl.zeros([TAIL, K], tl.float32)
    ones = rounded(tl.full([BLOCK_N, 16], 1.0, tl.float32), k_ptr.dtype.element_ty)
    v_sum = tl.zeros([K], tl.float32)
    for start in range(lo, hi, BLOCK_N):
        # Rows past the end repeat the last one, which no maximum notices; their norm makes F zero.
        at = tl.minimum(rows, hi - start - 1)
        inside = rows < hi - start
        k = tl.load(k_rows + at[:, None] * stride_kn + cols[None, :])
        v = tl.load(v_rows + at[:, None] * stride_vn + cols[None, :])
        k32 = k.to(tl.float32)
        norm = tl.where(inside, tl.sum(k32 * k32, 1) * (0.5 * scale * slope), -LOWEST)
        peak, z, sums = _key_tile(w, k, v, ones, norm, peak, z, sums, slope)
        if TAIL > 0:
            peak_tail, z_tail, sums_tail = _key_tile(
                w_tail, k, v, ones, norm, peak_tail, z_tail, sums_tail, slope
            )
        v_sum += tl.sum(tl.where(inside[:, None], v.to(tl.float32), 0.0), 0)
        k_rows += BLOCK_N * stride_kn
        v_rows += BLOCK_N * stride_vn

    row = program * parts * (MAIN + TAIL)
    top = _store_key_tile(features, sums, z, peak, row, sums_ptr, z_ptr, peak_ptr, slope, M, K)
    if TAIL > 0:
        top_tail = _store_key_tile(
            tail, sums_tail, z_tail, peak_tail, row, sums_ptr, z_ptr, peak_ptr, slope, M, K
        )
        top = tl.maximum(top, top_tail)
    tl.store(top_ptr + program * parts + part, top)
    if part == 0:
        tl.store(v_sum_ptr + program * K + cols, v_sum)


@triton.jit
def _scope_max(top_ptr, first, count, BLOCK: tl.constexpr):
    """Return the largest of `count` program maxima from index `first`."""
    best = tl.full([BLOCK], LOWEST, tl.float32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        best = tl.maximum(best, tl.load(top_ptr + first + at, mask=at < count, other=LOWEST))
    return tl.max(best, 0)


@triton.jit(do_not_specialize=["n_tokens", "n_heads", "splits", "parts", "scope_heads"])
def combine_keys(
    sums_ptr, z_ptr, peak_ptr, top_ptr, v_sum_ptr, cu_seqlens_ptr,
    a_ptr, c_ptr, mean_ptr, max_ptr, a_sum_ptr, c_sum_ptr,
    n_tokens, n_heads, splits, parts, scope_heads, eps,
    M: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, PARTIAL_WIDTH: tl.constexpr,
    SPLIT_ROWS: tl.constexpr, BLOCK_M: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Bring the splits of one head to the common maximum, and centre: A, c of a tile of features.

    Grid (BH, WIDTH / BLOCK_M). The maximum is over `scope_heads` heads: H, or 1. Writes A and c
    with zeros for padding, their sums over the tile, and (tile 0) the mean of v and the maximum.
    """
    bh, tile, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    _, n = cell_rows(cu_seqlens_ptr, bh // n_heads, n_tokens, VARLEN)
    programs = splits * parts
    scope = bh // scope_heads * scope_heads
    top = _scope_max(top_ptr, scope.to(tl.int64) * programs, scope_heads * programs, 128)
    cols = tl.arange(0, K)
    features = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    real = features < M
    mean = tl.zeros([K], tl.float32)
    sums = tl.zeros([BLOCK_M, K], tl.float32)
    z = tl.zeros([BLOCK_M], tl.float32)
    for split in range(tl.cdiv(n, rows_per_split(n, splits, SPLIT_ROWS))):
        program = bh.to(tl.int64) * splits + split
        mean += tl.load(v_sum_ptr + program * K + cols)
        at = program * PARTIAL_WIDTH + features
        factor = tl.exp2(tl.load(peak_ptr + at, mask=real, other=LOWEST) - top)
        z += factor * tl.load(z_ptr + at, mask=real, other=0.0)
        part = tl.load(sums_ptr + at[:, None] * K + cols[None, :], mask=real[:, None], other=0.0)
        sums += factor[:, None] * part
    mean = mean / tl.maximum(n, 1)
    a = sums - z[:, None] * mean[None, :]
    c = tl.where(real, z + eps * n, 0.0)
    bh = bh.to(tl.int64)
    at = bh * WIDTH + features
    tl.store(a_ptr + at[:, None] * K + cols[None, :], rounded(a, a_ptr.dtype.element_ty))
    tl.store(c_ptr + at, c)
    tl.store(a_sum_ptr + (bh * tiles + tile) * K + cols, tl.sum(a, 0))
    tl.store(c_sum_ptr + bh * tiles + tile, tl.sum(c, 0))
    if tile == 0:
        tl.store(mean_ptr + bh * K + cols, mean)
        tl.store(max_ptr + bh, top)


@triton.jit
def place_of_max(ptr, first, count, BLOCK: tl.constexpr):
    """Return the index, from `first`, of the largest of `count` floats; the first one of equals."""
    best = tl.full([], LOWEST * 2, tl.float32)
    index = tl.zeros([], tl.int32)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(ptr + first + at, mask=at < count, other=LOWEST * 2)
        value, where = tl.max(values, 0, return_indices=True)
        index = tl.where(value > best, start + where, index)
        best = tl.maximum(best, value)
    return index


@triton.jit(do_not_specialize=["n_tokens", "n_heads", "splits", "parts", "scope_heads"])
def find_key_max(
    k_ptr, w_ptr, top_ptr, peak_ptr, cu_seqlens_ptr, winner_ptr, value_ptr,
    n_tokens, n_heads, splits, parts, scope_heads, stride_kb, stride_kn, stride_kh,
    K: tl.constexpr, PARTIAL_WIDTH: tl.constexpr, SPLIT_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Find the entry that attains the maximum: int32 per scope bh, feature, and a token a chunk.

    Grid (scopes, chunks). The winning split is in the maxima of the programs of `key_pass`, the
    feature in those of that split, and each chunk looks at BLOCK_N tokens of it for the highest
    value (float32) and its token: `key_gradient` takes the first of the highest. SPLIT_ROWS is the
    BLOCK_N of `key_pass`. Of a cell without tokens nothing is read, and nothing written.
    """
    scope, chunk, chunks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    _, n = cell_rows(cu_seqlens_ptr, tl.program_id(0) * scope_heads // n_heads, n_tokens, VARLEN)
    if n == 0:
        return
    programs = splits * parts
    best = place_of_max(top_ptr, scope * scope_heads * programs, scope_heads * programs, 128)
    bh = scope.to(tl.int32) * scope_heads + best // programs
    split = best % programs // parts
    program = bh.to(tl.int64) * splits + split
    feature = place_of_max(peak_ptr, program * PARTIAL_WIDTH, PARTIAL_WIDTH, 128)
    b, h = bh // n_heads, bh % n_heads
    first, n = cell_rows(cu_seqlens_ptr, b, n_tokens, VARLEN)
    per_split = rows_per_split(n, splits, SPLIT_ROWS)
    lo = split * per_split + chunk * BLOCK_N
    hi = tl.minimum(n, (split + 1) * per_split)
    cols, rows = tl.arange(0, K), tl.arange(0, BLOCK_N)
    inside = rows < hi - lo
    k_rows = head_rows(k_ptr, b, h, first, stride_kb, stride_kn, stride_kh, VARLEN)
    k_rows += lo.to(tl.int64) * stride_kn
    w = tl.load(w_ptr + feature * K + cols).to(tl.float32)
    k = tl.load(k_rows + rows[:, None] * stride_kn + cols[None, :], mask=inside[:, None], other=0.0)
    y = tl.where(inside, tl.sum(k.to(tl.float32) * w[None, :], 1), LOWEST)
    value, where = tl.max(y, 0, return_indices=True)
    winner = winner_ptr + scope * (2 + chunks)
    tl.store(value_ptr + scope * chunks + chunk, value)
    tl.store(winner + 2 + chunk, lo + where)
    if chunk == 0:
        tl.store(winner, bh)
        tl.store(winner + 1, feature)


@inner
def _query_tile(
    q, w, a, c, first, features, top, den, num, arg, slope,
    M: tl.constexpr, RAGGED: tl.constexpr, FIND: tl.constexpr,
):  # fmt: skip
    """Add one tile of features to the sums of a block of tokens; features from M on are padding."""
    x = dot(q, tl.trans(w), None)
    if RAGGED:
        x = tl.where((features < M)[None, :], x, LOWEST)
    if FIND:
        tile_top, where = tl.max(x, 1, return_indices=True)
        arg = tl.where(tile_top > top, first + where, arg)
    else:
        tile_top = tl.max(x, 1)
    new_top = tl.maximum(top, tile_top)
    decay = tl.exp2((top - new_top) * slope)
    e = tl.exp2(x * slope - (new_top * slope)[:, None])
    den = den * decay + tl.sum(e * c[None, :], 1)
    num = dot(rounded(e, a.dtype), a, num * decay[:, None])
    return new_top, den, num, arg


@triton.jit(do_not_specialize=["n_tokens", "n_heads", "total"])
def query_pass(
    q_ptr, w_ptr, a_ptr, c_ptr, mean_ptr, a_sum_ptr, c_sum_ptr, cu_seqlens_ptr,
    out_ptr, rows_ptr, arg_ptr,
    n_tokens, n_heads, total, stride_qb, stride_qn, stride_qh, scale, eps,
    M: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, TILES: tl.constexpr,
    TILES_PADDED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, TAIL: tl.constexpr,
    SAVE: tl.constexpr, EXACT: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """Compute the output of BLOCK_N tokens of one head; shaped like flash attention over features.

    Grid (BH, blocks of tokens): neighbouring programs read neighbouring heads. What whole tiles of
    BLOCK_M features leave goes into one of TAIL, or into a last whole one. The squared norm is
    common to a row of E, so it is applied once, at the end. Writes the output (T, H, K); if SAVE,
    exponent offset and denominator (2, H, T); if EXACT also, the feature of each row's maximum.
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
    q = tl.load(q_rows + rows[:, None] * stride_qn + cols[None, :], mask=inside[:, None], other=0.0)
    top = tl.full([BLOCK_N], LOWEST, tl.float32)
    den = tl.zeros([BLOCK_N], tl.float32)
    num = tl.zeros([BLOCK_N, K], tl.float32)
    arg = tl.zeros([BLOCK_N], tl.int32)
    summary = bh.to(tl.int64) * WIDTH
    for tile in range(0, M // BLOCK_M * BLOCK_M if TAIL > 0 else M, BLOCK_M):
        features = tile + tl.arange(0, BLOCK_M)
        w = tl.load(w_ptr + features[:, None] * K + cols[None, :])
        a = tl.load(a_ptr + (summary + features[:, None]) * K + cols[None, :])
        c = tl.load(c_ptr + summary + features)
        top, den, num, arg = _query_tile(
            q, w, a, c, tile, features, top, den, num, arg, slope,
            M, TAIL == 0 and M % BLOCK_M != 0, SAVE and EXACT,
        )  # fmt: skip
    if TAIL > 0:
        tail = M // BLOCK_M * BLOCK_M + tl.arange(0, TAIL)
        w = tl.load(w_ptr + tail[:, None] * K + cols[None, :])
        a = tl.load(a_ptr + (summary + tail[:, None]) * K + cols[None, :])
        c = tl.load(c_ptr + summary + tail)
        top, den, num, arg = _query_tile(
            q, w, a, c, M // BLOCK_M * BLOCK_M, tail, top, den, num, arg, slope,
            M, M % BLOCK_M != TAIL, SAVE and EXACT,
        )  # fmt: skip
    q32 = q.to(tl.float32)
    norm = tl.sum(q32 * q32, 1) * (0.5 * scale * slope)
    common = tl.exp2(-norm)
    a_sum = sum_of_tiles(a_sum_ptr, bh, TILES, TILES_PADDED, K)
    c_sum = sum_of_scalars(c_sum_ptr, bh.to(tl.int64) * TILES, TILES, TILES_PADDED)
    den = den * common + eps * c_sum
    mean = tl.load(mean_ptr + bh * K + cols)
    inverse = 1.0 / den
    out = mean[None, :] + num * (common * inverse)[:, None]
    out += inverse[:, None] * (eps * a_sum)[None, :]
    out_rows = out_ptr + ((first + start) * n_heads + h) * K
    tl.store(
        out_rows + rows[:, None] * (n_heads * K) + cols[None, :],
        rounded(out, out_ptr.dtype.element_ty),
        mask=inside[:, None],
    )
    if SAVE:
        at = h.to(tl.int64) * total + first + start + rows
        tl.store(rows_ptr + at, top * slope + norm, mask=inside)
        tl.store(rows_ptr + n_heads.to(tl.int64) * total + at, den, mask=inside)
        if EXACT:
            tl.store(arg_ptr + at, arg.to(tl.int16), mask=inside)

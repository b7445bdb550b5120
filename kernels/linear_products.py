"""Linear layers whose matrix products are in fewer bits than their weights.

`bf16`: input, weight and gradient are rounded to bfloat16 for the product alone, sums are in
float32 and the result is rounded to bfloat16: for CPUs that multiply bfloat16 (AVX512_BF16, AMX).

`fp8`: the output and the input's gradient are products of 8-bit floats, each row of the left and
each column of the right factor scaled so that its largest entry is the format's largest: e4m3 for
values and weights, e5m2 for gradients. The weight's gradient, whose sum is over all tokens, is in
bfloat16. A token's scale is its own, so it gives the same bits in any batch. On a GPU the products
are `torch._scaled_mm`; elsewhere the rounded factors are multiplied in the input's dtype. Source:
arXiv:2209.05433 for the formats.

Shapes: ... any dimensions, N tokens in all, I width in, O width out.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

Products = Literal["precision", "bf16", "fp8"]
_FEWER: tuple[Products, ...] = ("bf16", "fp8")


class Linear(nn.Linear):
    """Linear layer that multiplies as `products` tells; `precision`: in its weight's dtype."""

    products: Products = "precision"

    def forward(self, x: Tensor) -> Tensor:
        """Return x (..., I) times the weight, plus the bias: (..., O), in the dtype of x."""
        return linear(x, self.weight, self.bias, self.products)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, products: Products) -> Tensor:
    """Return x W^T + b.

    Args:
        x: (..., I).
        weight: W (O, I).
        bias: b (O,) or None.
        products: How the products are computed.

    Returns:
        (..., O) in the dtype of x.
    """
    if products not in _FEWER:
        return nn.functional.linear(x, weight, bias)
    out: Tensor = _Product.apply(x, weight, bias, products == "fp8")
    return out


def scaled_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return rows in an 8-bit format and their scales.

    Args:
        x: (N, I).
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.

    Returns:
        (N, I) in `dtype` and float32 (N, 1); their product is x, each entry rounded relative to
        itself or, far below its row's largest, to a multiple of the format's smallest number.
    """
    limit = torch.finfo(dtype).max
    # Few passes over memory: at most widths they take as long as the products save.
    largest = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True).float()
    # Not 0, where the row is of zeros or of numbers so small that the quotient is.
    scale = (largest / limit).clamp(min=torch.finfo(torch.float32).tiny)
    # The largest entry over its rounded scale may lie above the largest number, which is nan then.
    return (x / scale).clamp_(-limit, limit).to(dtype), scale


def fp8_matmul(a: Tensor, b: Tensor, a_dtype: torch.dtype) -> Tensor:
    """Return a b^T of factors rounded to 8 bits, row by row.

    Args:
        a: (N, I).
        b: (O, I), rounded to e4m3.
        a_dtype: Format of a.

    Returns:
        (N, O) in the dtype of a.
    """
    (qa, scale_a), (qb, scale_b) = scaled_rows(a, a_dtype), scaled_rows(b, torch.float8_e4m3fn)
    if a.is_cuda:
        # A GPU reads the rows of the left and the columns of the right factor in one piece.
        found = torch._scaled_mm(
            qa.contiguous(), qb.contiguous().T, scale_a=scale_a, scale_b=scale_b.T,
            out_dtype=torch.bfloat16,
        )  # fmt: skip
        return found.to(a.dtype)
    exact = torch.promote_types(a.dtype, torch.float32)  # a product of two such numbers is exact
    found = torch.matmul(qa.to(exact), qb.to(exact).T)
    return (found * scale_a * scale_b.T).to(a.dtype)


class _Product(torch.autograd.Function):
    """x W^T in fewer bits, plus the bias; keeps the input in bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, fp8: bool) -> Tensor:
        rows = x.flatten(0, -2)
        rounded = rows.bfloat16()
        # The weight itself, not a copy: ZeRO-3 gathers it again before the backward pass.
        ctx.save_for_backward(rounded, weight)
        ctx.fp8, ctx.dtype = fp8, x.dtype
        if fp8:
            out = fp8_matmul(rows, weight, torch.float8_e4m3fn)
        else:
            out = torch.matmul(rounded, weight.bfloat16().T).to(x.dtype)
        if bias is not None:
            out.add_(bias)  # on a CPU a second tensor takes longer than the sum
        return out.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        g = grad.flatten(0, -2)
        rounded = g.bfloat16()
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            if ctx.fp8:
                dx = fp8_matmul(g, weight.T, torch.float8_e5m2)
            else:
                dx = torch.matmul(rounded, weight.bfloat16()).to(ctx.dtype)
            dx = dx.unflatten(0, grad.shape[:-1])
        if ctx.needs_input_grad[1]:
            dw = torch.matmul(rounded.T, rows).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            db = g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32)).to(weight.dtype)
        return dx, dw, db, None

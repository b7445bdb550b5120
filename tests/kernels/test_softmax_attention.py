"""Exact attention: its definition, and the same bits whatever lies beside a cell."""

import pytest
import torch

from kernels.softmax_attention import softmax_attention, softmax_attention_packed

LENGTHS = [130, 0, 1, 600, 31]


def made(dtype=torch.float32, heads=3, width=16):
    """Return packed queries, keys and values, and a gradient of the output."""
    gen = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(LENGTHS), 3, heads, width, generator=gen, dtype=torch.float64)
    grad = torch.randn(sum(LENGTHS), heads, width, generator=gen, dtype=torch.float64)
    return qkv.to(dtype), grad.to(dtype)


def both(attention, qkv, grad):
    """Return output and gradient."""
    leaf = qkv.detach().clone().requires_grad_()
    out = attention(leaf)
    out.backward(grad)
    return out.detach(), leaf.grad


def of_batch(qkv):
    return softmax_attention(*qkv.unbind(2))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_is_the_definition_and_cells_do_not_see_each_other(dtype, tolerance):
    qkv, grad = made(dtype)

    def by_definition(packed):
        q, k, v = packed.unbind(1)
        cell = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
        scores = torch.einsum("phk,nhk->hpn", q, k) / 4
        scores = scores.masked_fill(cell[:, None] != cell, -torch.inf)
        return torch.einsum("hpn,nhk->phk", scores.softmax(-1), v)

    got = both(lambda x: softmax_attention_packed(x, LENGTHS), qkv, grad)
    for mine, wanted in zip(got, both(by_definition, qkv, grad), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cell_has_the_bits_of_the_cell_alone(dtype):
    """Packed, in a batch, without gradients, and as queries beside keys and values."""
    qkv, grad = made(dtype)
    out, dqkv = both(lambda x: softmax_attention_packed(x, LENGTHS), qkv, grad)
    start = 0
    for length in LENGTHS:
        rows = slice(start, start := start + length)
        cell, of_cell = qkv[rows][None], grad[rows][None]
        alone = both(of_batch, cell, of_cell)
        assert torch.equal(out[rows], alone[0][0])
        assert torch.equal(dqkv[rows], alone[1][0])
        with torch.no_grad():
            assert torch.equal(of_batch(cell), alone[0])
        if length:
            others = torch.stack([qkv[:length], qkv[rows], qkv[-length:]])
            batch = both(of_batch, others, torch.stack([grad[rows]] * 3))
            assert torch.equal(batch[0][1], out[rows])
            assert torch.equal(batch[1][1], dqkv[rows])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_packed_cells_of_a_gpu_have_the_bits_of_each_alone():
    qkv = made(torch.bfloat16)[0].cuda()
    out, start = softmax_attention_packed(qkv, LENGTHS), 0
    for length in LENGTHS:
        rows = slice(start, start := start + length)
        assert torch.equal(out[rows], softmax_attention_packed(qkv[rows], [length]))

"""FAVOR+ in plain torch: equal to its definition, batch-invariant to the bit, correct gradients."""

import pytest
import torch

from kernels.reference import favor_attention, favor_attention_oracle, orthogonal_features


def make(b=2, n=37, h=3, k=8, m=20, dtype=torch.float64, scale=1.0, seed=0):
    gen = torch.Generator().manual_seed(seed)
    q, key, v = (torch.randn(b, n, h, k, generator=gen, dtype=dtype) * scale for _ in range(3))
    return q, key, v + 0.5, orthogonal_features(m, k, generator=gen).to(dtype)


@pytest.mark.parametrize("scope", ["sample", "head", "tensor"])
@pytest.mark.parametrize("scale", [0.3, 1.0, 3.0])
def test_equals_definition_forward_and_backward(scope, scale):
    q, k, v, w = make(scale=scale)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    truth = [t.clone().requires_grad_() for t in (q, k, v)]
    out = favor_attention(*leaves, w, scope=scope)
    expected = favor_attention_oracle(*truth, w, scope=scope)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    for got, want in zip(leaves, truth, strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("shape", [{"n": 1}, {"n": 13, "m": 31}, {"h": 1, "k": 16, "m": 44}])
def test_gradcheck(shape):
    q, k, v, w = make(**({"b": 1, "n": 9} | shape))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    assert torch.autograd.gradcheck(lambda a, b, c: favor_attention(a, b, c, w), leaves)


def test_batch_invariant_to_the_bit():
    q, k, v, w = make(b=5, n=101, dtype=torch.float32)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out = favor_attention(*leaves, w)
    out.square().sum().backward()
    for b in (0, 3, 4):
        alone = [t[b : b + 1].clone().requires_grad_() for t in (q, k, v)]
        single = favor_attention(*alone, w)
        single.square().sum().backward()
        assert torch.equal(out[b], single[0])
        for whole, one in zip(leaves, alone, strict=True):
            assert torch.equal(whole.grad[b], one.grad[0])


def test_strided_inputs_give_the_same_bits():
    q, k, v, w = make(dtype=torch.float32)
    packed = torch.stack([q, k, v], dim=2)
    a, b, c = packed.unbind(2)
    assert not a.is_contiguous()
    assert torch.equal(favor_attention(a, b, c, w), favor_attention(q, k, v, w))


def test_bf16_close_to_float64():
    q, k, v, w = make(n=300, h=2, k=16, m=44, scale=0.577)
    expected = favor_attention(q, k, v, w)
    out = favor_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), w)
    assert out.dtype == torch.bfloat16
    assert (out.double() - expected).norm() / expected.norm() < 5e-3


def test_extreme_inputs_stay_finite():
    q, k, v, w = make(dtype=torch.float32)
    for factor in (0.0, 30.0):
        leaves = [(t * factor).requires_grad_() for t in (q, k, v)]
        out = favor_attention(*leaves, w)
        out.sum().backward()
        assert torch.isfinite(out).all()
        assert all(torch.isfinite(t.grad).all() for t in leaves)


def test_features_are_block_orthogonal_and_reproducible():
    w = orthogonal_features(20, 8, generator=torch.Generator().manual_seed(3))
    again = orthogonal_features(20, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(w, again)
    unit = w / w.norm(dim=1, keepdim=True)
    for block in (unit[:8], unit[8:16], unit[16:]):
        torch.testing.assert_close(block @ block.T, torch.eye(len(block)), atol=1e-5, rtol=0)


def test_approaches_softmax_attention_with_more_features():
    q, k, v, _ = make(b=1, n=50, h=2, k=8, scale=0.5)
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v))
    ).transpose(1, 2)
    errors = []
    for m in (64, 16_384):
        w = orthogonal_features(m, 8, generator=torch.Generator().manual_seed(1)).double()
        errors.append((favor_attention(q, k, v, w, eps=0.0) - exact).norm().item())
    # The error falls with the square root of the number of features: 16 times fewer here.
    assert errors[1] < errors[0] / 5

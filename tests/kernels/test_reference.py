"""FAVOR+ in plain torch: equal to its definition, batch-invariant to the bit, correct gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import favor_torch
from kernels.reference import (
    favor_attention,
    favor_attention_kv,
    favor_attention_oracle,
    random_features,
)
from sclong_ds.config.rules import MIN_FAVOR_EPS

ROOT = Path(__file__).parents[2]


def make(b=2, n=37, h=3, k=8, m=20, dtype=torch.float64, scale=1.0, seed=0):
    gen = torch.Generator().manual_seed(seed)
    q, key, v = (torch.randn(b, n, h, k, generator=gen, dtype=dtype) * scale for _ in range(3))
    return q, key, v + 0.5, random_features(m, k, generator=gen).to(dtype)


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


@pytest.mark.parametrize("scope", ["sample", "head", "tensor"])
@pytest.mark.parametrize("largest", [0, 20, 36])
def test_the_key_maximum_is_found_in_any_block_of_tokens(scope, largest, monkeypatch):
    """Its gradient goes to one key, whose block alone is searched in the backward pass."""
    monkeypatch.setattr(favor_torch, "_BLOCK_BYTES", {"cpu": 0})  # blocks of 16 tokens
    q, k, v, w = make()
    k[:, largest] *= 4
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    truth = [t.clone().requires_grad_() for t in (q, k, v)]
    favor_attention(*leaves, w, scope=scope, eps=0.1).square().sum().backward()
    favor_attention_oracle(*truth, w, scope=scope, eps=0.1).square().sum().backward()
    for got, want in zip(leaves, truth, strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-8, atol=1e-11)


def test_the_sums_over_the_keys_are_made_once(monkeypatch):
    made = []
    key_forward = favor_torch._key_forward
    monkeypatch.setattr(
        favor_torch, "_key_forward", lambda *given: (made.append(1), key_forward(*given))
    )
    q, k, v, w = make(b=3)
    favor_attention(q, k.requires_grad_(), v, w).square().sum().backward()
    assert len(made) == 3


@pytest.mark.parametrize("size", [0.5, 6.0, 50.0])
def test_the_smallest_eps_leaves_no_denominator_of_zero(size):
    """Of queries and keys so large that their features vanish in float32, too."""
    q, k, v, w = make(n=300, k=16, dtype=torch.float32)
    leaves = [t.clone().requires_grad_() for t in (q * size, k * size, v)]
    out = favor_attention(*leaves, w, eps=MIN_FAVOR_EPS)
    out.square().sum().backward()
    assert all(t.isfinite().all() for t in (out, *(leaf.grad for leaf in leaves)))


@pytest.mark.parametrize("scope", ["sample", "head", "tensor"])
@pytest.mark.parametrize("queries", [0, 1, 9, 60])
def test_queries_that_differ_in_number_from_the_keys(scope, queries):
    q, k, v, w = make(n=60)
    q, k, v = q[:, :queries], k[:, :37], v[:, :37]
    leaves = [t.clone().requires_grad_() for t in (q, torch.stack([k, v], dim=2))]
    truth = [t.clone().requires_grad_() for t in (q, k, v)]
    out = favor_attention_kv(*leaves, w, scope=scope)
    expected = favor_attention_oracle(*truth, w, scope=scope)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    got = (leaves[0].grad, *leaves[1].grad.unbind(2))
    for one, want in zip(got, truth, strict=True):
        torch.testing.assert_close(one, want.grad, rtol=1e-8, atol=1e-11)


def test_packed_queries_and_keys_have_the_bits_of_each_cell_alone():
    q, k, v, w = make(b=1, n=110, dtype=torch.float32)
    ends, query_ends = [0, 66, 69, 69, 110], [0, 3, 73, 73, 73]
    leaves = [t.requires_grad_() for t in (q[0, :73], torch.stack([k[0], v[0]], dim=1))]
    cu_seqlens = {
        name: torch.tensor(e, dtype=torch.int32)
        for name, e in (("cu_seqlens", ends), ("query_cu_seqlens", query_ends))
    }
    out = favor_attention_kv(*leaves, w, **cu_seqlens)
    out.square().sum().backward()
    for b in (0, 1):
        spans = slice(*query_ends[b : b + 2]), slice(*ends[b : b + 2])
        alone = [t.detach()[None, at].requires_grad_() for t, at in zip(leaves, spans, strict=True)]
        single = favor_attention_kv(*alone, w)
        single.square().sum().backward()
        assert torch.equal(out[spans[0]], single[0])
        for whole, one, at in zip(leaves, alone, spans, strict=True):
            assert torch.equal(whole.grad[at], one.grad[0])
    assert not leaves[1].grad[69:].any()  # a cell without queries
    cu_seqlens["query_cu_seqlens"] = torch.tensor([0, 3, 70, 73, 73], dtype=torch.int32)
    with pytest.raises(ValueError, match="cell 2 has 3 queries and no keys"):
        favor_attention_kv(*leaves, w, **cu_seqlens)


def test_detached_maxima():
    q, k, v, w = make(scale=0.9)
    results = {}
    for name, function in (("ours", favor_attention), ("truth", favor_attention_oracle)):
        for max_grad in ("exact", "detach"):
            leaves = [t.clone().requires_grad_() for t in (q, k, v)]
            function(*leaves, w, max_grad=max_grad).square().sum().backward()
            results[name, max_grad] = [t.grad for t in leaves]
    for got, want in zip(results["ours", "detach"], results["truth", "detach"], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)
    assert not torch.allclose(results["ours", "detach"][1], results["ours", "exact"][1], rtol=0.01)


@pytest.mark.thorough
@pytest.mark.parametrize("scope", ["sample", "head", "tensor"])
def test_many_blocks_of_heads_and_tokens(scope):
    """Features of 9 heads and 900 tokens take several blocks; sums and maxima go across them."""
    q, k, v, w = make(b=2, n=900, h=9, m=70, scale=0.8)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    truth = [t.clone().requires_grad_() for t in (q, k, v)]
    out = favor_attention(*leaves, w, scope=scope)
    expected = favor_attention_oracle(*truth, w, scope=scope)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    for got, want in zip(leaves, truth, strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-8, atol=1e-10)


def test_features_of_all_heads_are_never_in_memory():
    q, k, v, w = make(b=1, n=2000, h=16, m=70, dtype=torch.float32)
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for t in result if isinstance(result, tuple) else [result]:
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.untyped_storage().nbytes())
            return result

    with Sizes():
        favor_attention(q.requires_grad_(), k, v, w).sum().backward()
    # dq, dk and dv in one buffer, against the features of one of two.
    assert largest == 3 * q.nbytes < 16 * 2000 * 70 * 4


@pytest.mark.thorough
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
    w = random_features(20, 8, generator=torch.Generator().manual_seed(3))
    again = random_features(20, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(w, again)
    unit = w / w.norm(dim=1, keepdim=True)
    for block in (unit[:8], unit[8:16], unit[16:]):
        torch.testing.assert_close(block @ block.T, torch.eye(len(block)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["orthogonal", "orthogonal_qr", "gaussian"])
def test_features_do_not_depend_on_the_number_of_threads(kind):
    """At the width of the published heads; a QR of 8 columns is the same anyway."""
    threads, drawn = torch.get_num_threads(), []
    try:
        for number in (1, 2, 8):
            torch.set_num_threads(number)
            generator = torch.Generator().manual_seed(0)
            drawn.append(
                [random_features(266, 64, generator=generator, kind=kind) for _ in range(20)]
            )
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert all(
        torch.equal(a, b) for other in drawn[1:] for a, b in zip(drawn[0], other, strict=True)
    )


@pytest.mark.parametrize("kind", ["orthogonal", "gaussian"])
def test_features_do_not_depend_on_the_instructions_of_the_cpu(kind):
    program = (
        "import hashlib, torch; from kernels.reference import random_features; "
        "generator = torch.Generator().manual_seed(0); "
        f"w = random_features(266, 64, generator=generator, kind='{kind}'); "
        "print(hashlib.sha256(w.numpy().tobytes()).hexdigest())"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True,
            env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        ).stdout
        for capability in ("default", "avx2")
    ]  # fmt: skip
    assert said[0] == said[1] != b""


def test_approaches_softmax_attention_with_more_features():
    q, k, v, _ = make(b=1, n=50, h=2, k=8, scale=0.5)
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v))
    ).transpose(1, 2)
    errors = []
    for m in (64, 16_384):
        w = random_features(m, 8, generator=torch.Generator().manual_seed(1)).double()
        errors.append((favor_attention(q, k, v, w, eps=0.0) - exact).norm().item())
    # The error falls with the square root of the number of features: 16 times fewer here.
    assert errors[1] < errors[0] / 5


@pytest.mark.parametrize("kind", ["orthogonal", "orthogonal_qr", "gaussian"])
def test_kinds_of_features(kind):
    w = random_features(4000, 8, generator=torch.Generator().manual_seed(0), kind=kind)
    unit = w / w.norm(dim=1, keepdim=True)
    gram = unit[:8] @ unit[:8].T
    orthogonal = torch.allclose(gram, torch.eye(8), atol=1e-5)
    assert orthogonal == (kind != "gaussian")
    # The signs that QR leaves make feature i of a block lean along axis i; the others have mean 0.
    leaning = unit.view(-1, 8, 8).diagonal(dim1=1, dim2=2).mean(0).abs().max() > 0.1
    assert leaning == (kind == "orthogonal_qr")
    # Whatever the directions, the squared norms are those of Gaussian vectors.
    assert abs(w.square().sum(1).mean() - 8) < 0.3

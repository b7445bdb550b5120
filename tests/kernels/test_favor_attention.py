"""FAVOR+ attention: choice of the backend, packed forms, tracing; the Triton kernels.

The kernels' own tests run in two further processes: `interpreted_favor.py` and `compiled_favor.py`.

Covers also `kernels/favor_backward.py`, `kernels/favor_forward.py`, `kernels/favor_launch.py` and
`kernels/favor_plan.py`.
"""

import os
import subprocess
import sys

import pytest
import torch
from launching import ROOT
from torch.utils.checkpoint import checkpoint

from kernels import reference
from kernels.favor_attention import (
    favor_attention,
    favor_attention_kv,
    favor_attention_packed,
    triton_obstacle,
)

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def make(b=2, n=50, h=2, k=16, m=20, dtype=torch.float32, std=0.577, device="cpu"):
    gen = torch.Generator().manual_seed(0)
    qkv = torch.randn(b, n, 3, h, k, generator=gen) * std
    qkv[:, :, 2] += 0.5
    grad = torch.randn(b, n, h, k, generator=gen)
    w = reference.random_features(m, k, generator=gen)
    return qkv.to(device, dtype), w.to(device), grad.to(device, dtype)


def both(qkv, w, grad, **options):
    """Return output and gradient of `favor_attention_packed`."""
    leaf = qkv.detach().clone().requires_grad_()
    out = favor_attention_packed(leaf, w, **options)
    out.backward(grad)
    return out.detach(), leaf.grad


def run_pytest(file, **environment):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run(
        [*command, f"tests/kernels/{file}"],
        cwd=ROOT,
        env=env | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_kernels_in_the_interpreter():
    assert " passed" in run_pytest("interpreted_favor.py", TRITON_INTERPRET="1")


def test_kernels_compile_without_spills(tmp_path):
    output = run_pytest("compiled_favor.py", TRITON_CACHE_DIR=str(tmp_path))
    assert " passed" in output or "no cuobjdump" in output


@pytest.mark.parametrize("scope", ["sample", "head", "tensor"])
@pytest.mark.parametrize("max_grad", ["exact", "detach"])
def test_torch_backend_on_the_cpu(scope, max_grad):
    qkv, w, grad = make()
    options = {"scope": scope, "max_grad": max_grad}
    out, dqkv = both(qkv, w, grad, **options)
    leaves = [t.clone().requires_grad_() for t in qkv.unbind(2)]
    expected = reference.favor_attention(*leaves, w, **options)
    expected.backward(grad)
    assert torch.equal(out, expected)
    for i, leaf in enumerate(leaves):
        assert torch.equal(dqkv[:, :, i], leaf.grad)
    apart = favor_attention(*qkv.unbind(2), w, backend="torch", **options)
    assert torch.equal(apart, out)


def test_cells_of_different_lengths_have_the_bits_of_each_alone():
    qkv, w, grad = make(b=1, n=300)
    ends = [0, 130, 130, 131, 300]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    out, dqkv = both(qkv[0], w, grad[0], cu_seqlens=cu_seqlens)
    for lo, hi in ((0, 130), (130, 131), (131, 300)):
        alone = both(qkv[:, lo:hi], w, grad[:, lo:hi])
        assert torch.equal(out[lo:hi], alone[0][0])
        assert torch.equal(dqkv[lo:hi], alone[1][0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "cuda"}, "backend must be auto, triton or torch: got 'cuda'"),
        ({"backend": "triton"}, "on cpu, not on a CUDA GPU; use backend=torch or auto"),
        ({"k": torch.zeros(2, 50, 2, 8)}, "must agree in shape and dtype"),
        ({"features": torch.zeros(20, 8)}, r"features must be \(M, 16\)"),
        ({"max_seqlen": 5}, "max_seqlen has a meaning with cu_seqlens only"),
        ({"cu_seqlens": torch.tensor([0, 50])}, r"must be \(T, H, K\), as cu_seqlens is given"),
        ({"scope": "x"}, "scope 'x': allowed are sample, head, tensor"),
        ({"max_grad": "none"}, "max_grad 'none': allowed are exact, detach"),
        ({"eps": -1e-4}, "eps -0.0001: must be a finite number of 0 or more"),
        ({"eps": float("nan")}, "eps nan: must be"),
    ],
)
def test_wrong_arguments(changes, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    qkv, w, _ = make()
    q, k, v = qkv.unbind(2)
    arguments = {"q": q, "k": k, "v": v, "features": w} | changes
    with pytest.raises(ValueError, match=message):
        favor_attention(**arguments)


@pytest.mark.parametrize(
    ("ends", "longest", "message"),
    [
        ([0, 20, 49], None, "must rise from 0 to 50, all tokens: got 0, 20, 49"),
        ([1, 20, 50], 50, "must rise from 0 to 50"),
        ([0, 30, 20, 50], None, "must rise from 0 to 50"),
        ([0, 20, 50], 29, "max_seqlen 29: a cell has 30 tokens; give 30 or more"),
    ],
)
def test_cells_that_are_not_those_of_the_tokens(ends, longest, message):
    qkv, w, _ = make(b=1)
    cells = {"cu_seqlens": torch.tensor(ends, dtype=torch.int32), "max_seqlen": longest}
    with pytest.raises(ValueError, match=message):
        favor_attention_packed(qkv[0], w, **cells)


def test_wrong_packed_arguments():
    qkv, w, _ = make()
    with pytest.raises(ValueError, match=r"qkv must be \(B, N, 3, H, K\)"):
        favor_attention_packed(qkv[:, :, :2], w)
    with pytest.raises(ValueError, match=r"cu_seqlens must be int32 \(B \+ 1,\): got torch.int64"):
        favor_attention_packed(qkv[0], w, cu_seqlens=torch.tensor([0, 50]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv": torch.zeros(2, 50, 3, 2, 16)}, r"\(B, N, 2, H, K\)"),
        ({"kv": torch.zeros(2, 50, 2, 2, 16).double()}, "of one dtype"),
        ({"q": torch.zeros(3, 7, 2, 16)}, "must be of the same cells"),
        ({"cu_seqlens": torch.tensor([0, 50])}, "go together: give both or none"),
        ({"max_queries": 5}, "max_seqlen has a meaning with cu_seqlens only"),
    ],
)
def test_wrong_queries_and_keys(changes, message):
    arguments = {"q": torch.zeros(2, 7, 2, 16), "kv": torch.zeros(2, 50, 2, 2, 16)}
    with pytest.raises(ValueError, match=message):
        favor_attention_kv(**(arguments | {"features": torch.zeros(20, 16)} | changes))


@pytest.mark.thorough
@pytest.mark.parametrize("form", ["packed", "queries and keys", "apart"])
def test_torch_operator_is_registered_right(form):
    """What torch.compile sees of the torch backend."""
    qkv, w, _ = make(b=1, n=9, h=1)
    q, k, v = qkv.unbind(2)
    tensors = {
        "packed": (qkv, None, None),
        "queries and keys": (q[:, :4], qkv[:, :, 1:], None),
        "apart": (q, k, v),
    }[form]
    tensors = [t if t is None else t.clone().requires_grad_() for t in tensors]
    torch.library.opcheck(
        torch.ops.sclong_ds.favor_attention_torch.default,
        (*tensors, w, None, None, "sample", 1e-4, True),
    )


def test_what_the_kernels_do_not_support(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    qkv, w, _ = make()
    q = qkv[:, :, 0]
    assert triton_obstacle(q, w, "sample") is None
    assert "float16" in triton_obstacle(q.half(), w, "sample")
    assert "head width is 12" in triton_obstacle(q[..., :12], w, "sample")
    assert "scope=tensor" in triton_obstacle(q, w, "tensor")
    assert "32768 random features" in triton_obstacle(q, w.new_zeros(2**15, 16), "sample")
    assert "empty" in triton_obstacle(q[:0], w, "sample")


def test_reference_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, kernels.reference, "
        "kernels.favor_attention as f; x = torch.zeros(1, 4, 3, 2, 16);"
        "print(f.favor_attention_packed(x, torch.ones(5, 16)).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["torch.Size([1,", "4,", "2,", "16])"]


# torch.compile itself makes an instance of the class while it traces an autograd function.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_traces_to_one_graph():
    qkv, w, grad = make()
    expected = both(qkv, w, grad)
    compiled = torch.compile(
        lambda x: favor_attention_packed(x * 2, w), fullgraph=True, backend="aot_eager"
    )
    leaf = (qkv / 2).requires_grad_()
    out = compiled(leaf)
    out.backward(grad)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(leaf.grad, 2 * expected[1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    qkv, w, grad = make()
    leaf = qkv.clone().requires_grad_()
    checkpoint(lambda x: favor_attention_packed(x, w), leaf, use_reentrant=reentrant).backward(grad)
    assert torch.equal(leaf.grad, both(qkv, w, grad)[1])


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m", [256, 266, 110])
@pytest.mark.parametrize("n", [1000, 4096])
@pytest.mark.parametrize("options", [{}, {"scope": "head"}, {"max_grad": "detach"}])
def test_kernels_on_the_gpu(dtype, m, n, options):
    qkv, w, grad = make(n=n, h=4, k=64, m=m, dtype=dtype, device="cuda")
    got = both(qkv, w, grad, backend="triton", **options)
    want = both(qkv.double(), w.to(dtype).double(), grad.double(), backend="torch", **options)
    for_out, for_gradients = (5e-3, 1e-2) if dtype == torch.bfloat16 else (1e-5, 1e-5)
    assert error(got[0], want[0]) < for_out
    for i in range(3):
        assert error(got[1][:, :, i], want[1][:, :, i]) < for_gradients
    again = both(qkv, w, grad, backend="triton", **options)
    assert torch.equal(got[0], again[0])
    assert torch.equal(got[1], again[1])
    alone = both(qkv[1:], w, grad[1:], backend="triton", **options)
    assert torch.equal(alone[0], got[0][1:])
    assert torch.equal(alone[1], got[1][1:])


@gpu
@needs_gpu
def test_compiled_model_code_on_the_gpu():
    qkv, w, grad = make(n=500, k=64, m=266, dtype=torch.bfloat16, device="cuda")
    leaf = qkv.clone().requires_grad_()
    out = torch.compile(lambda x: favor_attention_packed(x, w, backend="triton"), fullgraph=True)(
        leaf
    )
    out.backward(grad)
    expected = both(qkv, w, grad, backend="triton")
    assert torch.equal(out, expected[0])
    assert torch.equal(leaf.grad, expected[1])

"""The Triton kernels of FAVOR+ attention, run on the CPU by Triton's interpreter.

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted_favor.py

Not collected by name: the interpreter must be chosen before Triton is imported, so
`test_favor_attention.py` runs this file in a process of its own. All memory that the kernels get is
poisoned with NaN first.
"""

import os

import pytest
import torch
import torch.utils.checkpoint

from kernels import favor_launch
from kernels.favor_attention import favor_attention, favor_attention_kv, favor_attention_packed
from kernels.favor_launch import Setting, backward, forward
from kernels.favor_plan import Block, Plan, default_plan
from kernels.reference import favor_attention_oracle, random_features

assert os.environ.get("TRITON_INTERPRET") == "1", "set TRITON_INTERPRET=1"
TOLERANCE = {torch.float32: (1e-6, 3e-6), torch.bfloat16: (3e-3, 7e-3)}
"""Relative error of output and gradients, in norm. One token can carry most of dk, so that in
bfloat16 the rounding of a single row is what the error of dk shows."""


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what torch.empty returns with NaN: an element that no kernel writes is found."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def make(b=1, n=70, h=2, k=64, m=110, dtype=torch.float32, std=0.577, seed=0):
    gen = torch.Generator().manual_seed(seed)
    qkv = torch.randn(b, n, 3, h, k, generator=gen) * std
    qkv[:, :, 2] += 0.5
    grad = torch.randn(b, n, h, k, generator=gen)
    return qkv.to(dtype), random_features(m, k, generator=gen), grad.to(dtype)


def kernels(qkv, w, grad, **options):
    """Return the output and the gradient of qkv."""
    leaf = qkv.detach().clone().requires_grad_()
    out = favor_attention_packed(leaf, w, backend="triton", **options)
    out.backward(grad)
    return out.detach(), leaf.grad


def truth(qkv, w, grad, **options):
    """Return the same of the definition, in float64, with features rounded like the kernels'."""
    leaf = qkv.detach().double().requires_grad_()
    out = favor_attention_oracle(*leaf.unbind(-3), w.to(qkv.dtype).double(), **options)
    out.backward(grad.double())
    return out.detach(), leaf.grad


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


def check(got, want):
    for_out, for_gradients = TOLERANCE[got[0].dtype]
    assert error(got[0], want[0]) < for_out, "out"
    for i, name in enumerate(("dq", "dk", "dv")):
        assert error(got[1].select(-3, i), want[1].select(-3, i)) < for_gradients, name


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        (torch.float32, {"m": 256, "n": 64}),
        (torch.float32, {"m": 266, "n": 97}),
        (torch.float32, {"m": 110, "n": 130, "k": 32}),
        (torch.float32, {"m": 128, "n": 65, "h": 1}),
        (torch.float32, {"m": 60, "n": 33, "k": 128}),
        (torch.float32, {"m": 31, "n": 2, "k": 16, "h": 3}),
        (torch.bfloat16, {"m": 256, "n": 100}),
        (torch.bfloat16, {"m": 266, "n": 129}),
        (torch.bfloat16, {"m": 300, "n": 65, "k": 32}),
        (torch.bfloat16, {"m": 110, "n": 70, "k": 128, "h": 1}),
    ],
)
def test_equals_definition(dtype, sizes):
    """Ragged lengths, features that fill their tiles or not, several blocks of features."""
    case = make(dtype=dtype, **sizes)
    check(kernels(*case), truth(*case))


@pytest.mark.parametrize("scope", ["sample", "head"])
@pytest.mark.parametrize("max_grad", ["exact", "detach"])
def test_scopes_and_gradients_of_the_maxima(scope, max_grad):
    case = make(b=2, n=67, m=44, k=32, std=0.9)
    options = {"scope": scope, "max_grad": max_grad}
    got, want = kernels(*case, **options), truth(*case, **options)
    check(got, want)
    other = truth(*case, scope=scope, max_grad="exact" if max_grad == "detach" else "detach")
    assert error(other[1], want[1]) > 3e-4


def test_eps_changes_the_result():
    case = make(n=40, m=44, k=32)
    check(kernels(*case, eps=1e-2), truth(*case, eps=1e-2))


def test_several_tiles_in_a_split():
    """The running maximum is carried from tile to tile, and to the token that attains it."""
    qkv, w, grad = make(n=270, h=1, k=16, m=20)
    block = Block(rows=16, features=16)
    plan = Plan(
        key_pass=block,
        query_pass=block,
        query_gradient=block,
        summary_gradient=block,
        key_gradient=block,
    )
    setting = Setting(eps=1e-4, per_head=False, exact=True, max_seqlen=0)
    parts = qkv.unbind(2)
    out, saved = forward(*parts, w, None, setting, plan, save=True)
    dqkv = backward(grad, *parts, 20, None, saved, setting, plan)[0]
    check((out, dqkv), truth(qkv, w, grad))


def test_single_token():
    """The output is v, and no weight can change it."""
    qkv, w, grad = make(n=1, m=31, k=16, h=3)
    out, dqkv = kernels(qkv, w, grad)
    torch.testing.assert_close(out, qkv[:, :, 2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dqkv[:, :, 2], grad, rtol=1e-5, atol=1e-6)
    assert dqkv[:, :, :2].abs().max() < 1e-6


def test_cell_of_a_batch_has_the_bits_of_the_cell_alone_and_of_another_run():
    qkv, w, grad = make(b=3, n=75, m=44, k=32, dtype=torch.bfloat16)
    out, dqkv = kernels(qkv, w, grad)
    again = kernels(qkv, w, grad)
    assert torch.equal(out, again[0])
    assert torch.equal(dqkv, again[1])
    for b in range(3):
        alone = kernels(qkv[b : b + 1], w, grad[b : b + 1])
        assert torch.equal(out[b], alone[0][0])
        assert torch.equal(dqkv[b], alone[1][0])


def test_packed_cells_have_the_bits_of_each_cell_alone():
    lengths, cu_seqlens = (65, 1, 0, 40), torch.tensor([0, 65, 66, 66, 106], dtype=torch.int32)
    qkv, w, grad = make(n=106, m=44, k=32)
    out, dqkv = kernels(qkv[0], w, grad[0], cu_seqlens=cu_seqlens)
    for i, length in enumerate(lengths):
        rows = slice(int(cu_seqlens[i]), int(cu_seqlens[i]) + length)
        if length:
            alone = kernels(qkv[:, rows], w, grad[:, rows])
            assert torch.equal(out[rows], alone[0][0])
            assert torch.equal(dqkv[rows], alone[1][0])


@pytest.mark.parametrize("form", ["apart", "strided", "heads_first", "last_stride_2", "broadcast"])
def test_strides_do_not_change_the_bits(form):
    qkv, w, grad = make(n=35, m=44, k=32)
    expected = kernels(qkv, w, grad)
    leaves = [t.contiguous() for t in qkv.unbind(2)]
    if form == "strided":
        leaves = [torch.stack([t, t], 2).unbind(2)[0] for t in leaves]
    if form == "heads_first":
        leaves = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in leaves]
    if form == "last_stride_2":
        leaves = [torch.stack([t, t], -1)[..., 1] for t in leaves]
    if form == "broadcast":
        grad = torch.ones(()).expand(grad.shape)
        expected = kernels(qkv, w, grad.contiguous())
    leaves = [t.detach().requires_grad_() for t in leaves]
    out = favor_attention(*leaves, w, backend="triton")
    out.backward(grad)
    assert torch.equal(out, expected[0])
    for i, leaf in enumerate(leaves):
        assert torch.equal(leaf.grad, expected[1][:, :, i])


KINDS = ["zero", "large", "one_large_element", "all_large_elements", "all_equal"]


@pytest.mark.parametrize("kind", KINDS)
def test_extreme_inputs(kind):
    qkv, w, grad = make(n=20, m=44, k=32)
    if kind == "zero":
        qkv = qkv * 0
    if kind == "large":
        qkv[:, :, :2] *= 30 / qkv[:, :, :2].norm(dim=-1, keepdim=True)
    if kind == "one_large_element":
        qkv[..., 3] = 30.0
    if kind == "all_large_elements":
        qkv[:, :, :2] = 30 * qkv[:, :, :2].sign()
    if kind == "all_equal":
        qkv = torch.full_like(qkv, 0.75)
    got, want = kernels(qkv, w, grad), truth(qkv, w, grad)
    assert (got[0].double() - want[0]).norm() <= 1e-5 * want[0].norm()
    # Where the true gradient vanishes, only its absolute error has a meaning. Equal rows share the
    # gradient of the maximum in any way: their sum is defined.
    got_sum, want_sum = (x[1].double().sum(1) for x in (got, want))
    assert (got_sum - want_sum).norm() < 1e-4 * (1 + want_sum.norm())
    assert got[1].isfinite().all()


def test_no_gradient_wanted():
    qkv, w, grad = make(n=40, m=44, k=32)
    expected = kernels(qkv, w, grad)[0]
    assert torch.equal(favor_attention_packed(qkv, w, backend="triton"), expected)
    leaf = qkv.clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(favor_attention_packed(leaf, w, backend="triton"), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    qkv, w, grad = make(n=40, m=44, k=32)
    expected = kernels(qkv, w, grad)
    leaf = qkv.clone().requires_grad_()
    out = torch.utils.checkpoint.checkpoint(
        lambda x: favor_attention_packed(x, w, backend="triton"), leaf, use_reentrant=reentrant
    )
    out.backward(grad)
    assert torch.equal(leaf.grad, expected[1])


def chosen_queries(qkv, w, grad, places, **options):
    """Return output, dq and dkv of the queries at `places` of every cell."""
    q = qkv[:, places, 0].detach().requires_grad_()
    kv = qkv[:, :, 1:].detach().requires_grad_()
    out = favor_attention_kv(q, kv, w, backend="triton", **options)
    out.backward(grad[:, places])
    return out.detach(), q.grad, kv.grad


@pytest.mark.parametrize("scope", ["sample", "head"])
@pytest.mark.parametrize("places", [slice(3, 4), slice(20, 87)], ids=["one", "67"])
def test_fewer_queries_than_keys(places, scope):
    """Outputs have the bits of all queries' run; the gradients are those of a loss on the few."""
    qkv, w, grad = make(b=2, n=100, m=44, k=32)
    few = torch.zeros_like(grad)
    few[:, places] = grad[:, places]
    out, dq, dkv = chosen_queries(qkv, w, grad, places, scope=scope)
    whole = kernels(qkv, w, few, scope=scope)
    assert torch.equal(out, whole[0][:, places])
    assert torch.equal(dq, whole[1][:, places, 0])
    want = truth(qkv, w, few, scope=scope)[1]
    for i in range(2):
        assert error(dkv[:, :, i], want[:, :, 1 + i]) < 3e-6


def test_more_queries_than_keys_in_bfloat16():
    qkv, w, grad = make(n=130, m=44, k=32, dtype=torch.bfloat16)
    q = qkv[:, :, 0].detach().requires_grad_()
    kv = qkv[:, :40, 1:].detach().requires_grad_()
    out = favor_attention_kv(q, kv, w, backend="triton")
    out.backward(grad)
    exact = [t.detach().double().requires_grad_() for t in (q, kv)]
    want = favor_attention_oracle(exact[0], *exact[1].unbind(2), w.bfloat16().double())
    want.backward(grad.double())
    assert error(out, want) < 3e-3
    for got, true in ((q, exact[0]), (kv, exact[1])):
        assert error(got.grad, true.grad) < 7e-3


def test_packed_queries_and_keys_have_the_bits_of_each_cell_alone():
    """Cells with less, more and no queries; no cell at all has neither queries nor keys."""
    qkv, w, grad = make(n=110, m=44, k=32)
    ends, query_ends = [0, 66, 69, 69, 110], [0, 3, 73, 73, 73]
    q = qkv[0, :73, 0].detach().requires_grad_()
    kv = qkv[0, :, 1:].detach().requires_grad_()
    cu_seqlens, queries = (torch.tensor(e, dtype=torch.int32) for e in (ends, query_ends))
    lengths = {"max_seqlen": 70, "max_queries": 80}
    out = favor_attention_kv(
        q, kv, w, backend="triton", cu_seqlens=cu_seqlens, query_cu_seqlens=queries, **lengths
    )
    out.backward(grad[0, :73])
    for b in (0, 1):
        rows, of_queries = slice(*ends[b : b + 2]), slice(*query_ends[b : b + 2])
        alone = [t.detach()[None].requires_grad_() for t in (q[of_queries], kv[rows])]
        single = favor_attention_kv(*alone, w, backend="triton")
        single.backward(grad[:, of_queries])
        assert torch.equal(out[of_queries], single[0])
        assert torch.equal(q.grad[of_queries], alone[0].grad[0])
        assert torch.equal(kv.grad[rows], alone[1].grad[0])
    assert not kv.grad[69:].any()


@pytest.mark.parametrize("packed", [True, False])
def test_operator_is_registered_right(packed):
    """Shapes of the fake implementation, autograd, no aliasing, tracing with symbolic shapes."""
    torch.use_deterministic_algorithms(False)  # the check compares workspaces between two runs
    qkv, w, _ = make(n=5, m=20, k=16, h=1)
    leaves = (qkv, None, None) if packed else tuple(qkv.unbind(2))
    leaves = tuple(t if t is None else t.detach().requires_grad_() for t in leaves)
    operator = torch.ops.sclong_ds.favor_attention.default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        operator, (*leaves, w, None, None, 0, 0, False, 1e-4, True, True), test_utils=checks
    )


def test_operator_with_queries_apart_is_registered_right():
    torch.use_deterministic_algorithms(False)  # as above
    qkv, w, _ = make(n=5, m=20, k=16, h=1)
    q, kv = qkv[:, :2, 0].detach().requires_grad_(), qkv[:, :, 1:].detach().requires_grad_()
    torch.library.opcheck(
        torch.ops.sclong_ds.favor_attention.default,
        (q, kv, None, w, None, None, 0, 0, False, 1e-4, True, True),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_compiles_to_one_graph():
    qkv, w, grad = make(n=20, m=20, k=16, h=1)
    expected = kernels(qkv, w, grad)
    compiled = torch.compile(
        lambda x: favor_attention_packed(x * 2, w, backend="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    leaf = (qkv / 2).requires_grad_()
    out = compiled(leaf)
    out.backward(grad)
    assert torch.equal(out, expected[0])
    assert torch.equal(leaf.grad, 2 * expected[1])


@pytest.mark.parametrize("packed", [True, False])
def test_groups_of_cells_do_not_change_the_bits(packed, monkeypatch):
    """Partial sums are kept for four cells at a time here: nine cells take three groups."""
    qkv, w, grad = make(b=9, n=17, m=20, k=16, h=1)
    options = {}
    if packed:
        qkv, grad = qkv.flatten(0, 1), grad.flatten(0, 1)
        ends = [0, 40, 40, 41, 60, 77, 78, 110, 120, 153]
        options["cu_seqlens"] = torch.tensor(ends, dtype=torch.int32)
    together = kernels(qkv, w, grad, **options)
    monkeypatch.setattr(favor_launch, "_PARTIAL_BYTES", 1)
    in_groups = kernels(qkv, w, grad, **options)
    assert torch.equal(in_groups[0], together[0])
    assert torch.equal(in_groups[1], together[1])


def test_forward_pass_does_not_look_for_the_key_maximum():
    """Only the backward pass of exact gradients reads where it is."""
    launched = []

    def record(kernel, *_, **__):
        launched.append(kernel.fn.__name__)

    qkv, w, grad = make(n=20, m=20, k=16, h=1)
    plan = default_plan(20, 16, torch.float32, (9, 0))
    for exact in (True, False):
        setting = Setting(eps=1e-4, per_head=False, exact=exact, max_seqlen=0)
        saved = forward(*qkv.unbind(2), w, None, setting, plan, save=True, run=record)[1]
        assert "find_key_max" not in launched
        backward(grad, *qkv.unbind(2), 20, None, saved, setting, plan, run=record)
        assert ("find_key_max" in launched) == exact
        launched.clear()

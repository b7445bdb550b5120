"""Each cell's own number of genes in the large encoder: which ones, and that packing is exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from no_sync import NoHostSync
from small_model import G, cells, close, gradients, small_model

from sclong_ds.config.sections import PerformerConfig
from sclong_ds.model.routing import candidate_order, inverse, route, unknown_genes

TOP = 12
PRECISION = [(torch.float32, 1e-6), (torch.float64, 1e-12)]


def mixed_cells(dtype=torch.float32):
    """Cells with more candidates than fit, few, one, none, and hidden ones alone."""
    x, mask = cells(6, dtype)
    x[1, 8:], mask[1] = 0, False
    x[2], mask[2] = 0, False
    x[2, 31] = 2.0
    x[3], mask[3] = 0, False
    mask[4] = x[4] > 0
    mask[5, 7] = True  # a hidden zero
    x[5, 7] = 0
    return x, mask


def lengths_of(x, mask):
    return ((x > 0) | mask).sum(1).clamp(max=TOP).tolist()


def test_candidates_come_first_hidden_ones_behind_the_others():
    x = torch.tensor([[0.0, 5.0, 0.0, 2.0, 5.0, 0.0]])
    mask = torch.tensor([[False, True, False, False, False, True]])
    assert candidate_order(x, mask).tolist() == [[4, 3, 1, 5, 0, 2]]
    assert candidate_order(x, None).tolist() == [[1, 4, 3, 0, 2, 5]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 0.0, 1.0, 2.0, -1.0]), min_size=9, max_size=9),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 8),
)
def test_every_token_has_one_place(values, top):
    """Cells of visible values and, for -1, hidden ones of 1."""
    x = torch.tensor(values)
    mask = x < 0
    x = x.abs()
    routes = route(x, mask, top_seq_len=top, lengths=None)
    assert torch.equal(routes.order[routes.places], torch.arange(x.numel()))
    candidates, order = (x > 0) | mask, candidate_order(x, mask)
    high, low = [], []
    for b in range(len(x)):
        n = min(int(candidates[b].sum()), top)
        assert (routes.high.lengths[b], routes.low.lengths[b]) == (n, 9 - n)
        high += (order[b, :n] + 9 * b).tolist()
        low += (order[b, n:] + 9 * b).tolist()
    assert routes.order.tolist() == high + low
    for packed in (routes.high, routes.low):
        assert packed.cu_seqlens.dtype == torch.int32
        assert packed.cu_seqlens.diff().tolist() == list(packed.lengths)
        assert packed.longest >= max(packed.lengths)


EXACT = PerformerConfig(
    depth=2, heads=2, dim_head=8, nb_features=None, ff_mult=2, attention="softmax"
)
CHANGES = {
    "plain": {},
    "pad token": {"pad_token": True, "gene_bias": True},
    "large only": {"contextual_encoder": "large"},
    "softmax": {"attention": "softmax"},
    "softmax in the large encoder": {"large_encoder": EXACT},
    "maximum per head": {"stabiliser_scope": "head"},
}


@pytest.mark.thorough
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_batch_equals_its_cells_one_by_one(changes, dtype, tolerance, recompute):
    """Predictions, and gradients of all parameters."""
    model = small_model(routing="expressed", **changes).to(dtype).train()
    for performer in model.performers().values():
        performer.recompute = recompute
    x, mask = mixed_cells(dtype)
    lengths = lengths_of(x, mask)
    assert lengths[2:4] == [1, 0]
    assert max(lengths) == TOP
    whole = model(x, mask, lengths=lengths)
    whole.square().sum().backward()
    together = gradients(model)
    for b in range(len(x)):
        alone = model(x[b : b + 1], mask[b : b + 1])
        assert close(whole[b], alone[0], tolerance)
        alone.square().sum().backward()
    for name, wanted in gradients(model).items():
        assert close(together[name], wanted, 20 * tolerance), name


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
def test_equals_the_paper_where_every_cell_expresses_top_seq_len_genes(dtype, tolerance):
    x, _ = cells(5, dtype, expressed=1.0)
    x = torch.where(x >= x.topk(TOP, dim=1).values[:, -1:], x, 0.0)
    nothing = x < 0
    assert lengths_of(x, nothing) == [TOP] * 5
    results = []
    for routing in ("top", "expressed"):
        model = small_model(routing=routing).to(dtype).train()
        out = model(x, nothing)
        out.square().sum().backward()
        results.append((out, gradients(model)))
    assert close(results[1][0], results[0][0], tolerance)
    for name, wanted in results[0][1].items():
        assert close(results[1][1][name], wanted, 20 * tolerance), name


def test_the_large_encoder_reads_no_visible_zero():
    model, seen = small_model(routing="expressed", pad_token=True), {}
    for name in ("to_large", "mini_encoder"):
        part = getattr(model, name)
        part.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0]}))
    x, mask = mixed_cells()
    model(x, mask)
    assert len(seen["to_large"]) == sum(lengths_of(x, mask))
    assert len(seen["mini_encoder"]) == len(x) * (G + 1) - sum(lengths_of(x, mask))
    x[3, 5] = 1.0
    model(x, mask)
    assert len(seen["to_large"]) == sum(lengths_of(x, mask))
    assert lengths_of(x, mask)[3] == 1


@pytest.mark.parametrize("attention", ["favor", "softmax"])
def test_no_cell_expresses_anything(attention):
    model = small_model(routing="expressed", attention=attention).train()
    x = torch.zeros(2, G)
    out = model(x, x > 0, lengths=[0, 0])
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not model.large_encoder.layers[0].attention.to_qkv.weight.grad.any()


def test_wrong_lengths_are_refused():
    model = small_model(routing="expressed")
    x, mask = mixed_cells()
    right = lengths_of(x, mask)
    assert torch.equal(model(x, mask, lengths=right), model(x, mask))
    swapped = [right[1], right[0], *right[2:]]
    assert swapped != right
    for wrong in (swapped, right[:-1], [n + 1 for n in right]):
        with pytest.raises(ValueError, match="expressed or hidden genes of at most 12"):
            model(x, mask, lengths=wrong)


@pytest.mark.thorough
@pytest.mark.parametrize("changes", [{}, {"large_encoder": EXACT}], ids=["favor", "softmax"])
@pytest.mark.parametrize("routing", ["top", "expressed"])
@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_waits_for_the_device(routing, recompute, changes):
    settings = {"routing": routing, "mask_vector_max_norm": 1.0, "gene_bias": True}
    model = small_model(**settings, **changes).train()
    for performer in model.performers().values():
        performer.recompute = recompute
    x, mask = mixed_cells()
    positions = torch.arange(5).expand(len(x), 5)
    model(x, mask)  # draws the features, builds the graph
    lengths = lengths_of(x, mask)
    with NoHostSync():
        out = model(x, mask, lengths=lengths, positions=positions)
        (out - x.gather(1, positions)).square().sum().backward()
        model(x, mask, lengths=lengths).square().sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("routing", ["top", "expressed"])
def test_a_gpu_is_not_waited_for(routing):
    sizes = {"depth": 2, "heads": 2, "dim_head": 16, "nb_features": None, "ff_mult": 2}
    stack = PerformerConfig(**sizes, attention=None)
    stacks = dict.fromkeys(("large_encoder", "mini_encoder", "decoder"), stack)
    if routing == "expressed":
        stacks["large_encoder"] = PerformerConfig(**sizes, attention="softmax")
    model = small_model(routing=routing, gene_bias=True, **stacks).bfloat16().cuda().train()
    for performer in model.performers().values():
        for layer in performer.layers:
            layer.attention.backend = "triton"  # the torch backend waits for packed cells
    x, mask = mixed_cells()
    lengths = lengths_of(x, mask)
    positions = torch.arange(5).expand(len(x), 5).cuda()
    x, mask = x.cuda(), mask.cuda()
    wanted = model(x, mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = model(x, mask, lengths=lengths, positions=positions)
        out.square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert close(out.float(), wanted.gather(1, positions).float(), 2e-2)


def test_genes_that_are_not_measured_go_with_hidden_values_or_with_zeros():
    mask = torch.tensor([[True, False, False]])
    unmeasured = torch.tensor([[False, False, True]])
    assert unknown_genes(mask, unmeasured, routing="top").tolist() == [[True, False, True]]
    assert unknown_genes(None, unmeasured, routing="top") is unmeasured
    assert unknown_genes(mask, unmeasured, routing="expressed") is mask
    assert unknown_genes(mask, None, routing="top") is mask


def test_inverse_of_permutations_is_what_a_second_sort_gives():
    order = torch.argsort(torch.rand(3, 50, generator=torch.Generator().manual_seed(0)), dim=1)
    assert torch.equal(inverse(order), torch.argsort(order, dim=1))
    assert torch.equal(inverse(order[0]), torch.argsort(order[0]))

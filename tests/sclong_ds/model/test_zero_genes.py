"""Cells of which only some unexpressed genes are read."""

import pytest
import torch
from small_model import G, cells, close, gradients, small_model

from sclong_ds.model.routing import read_genes

FEW = {"routing": "expressed", "zero_genes": 7}
PRECISION = [(torch.float32, 1e-6), (torch.float64, 1e-12)]


def odd_cells(dtype=torch.float32):
    """Cells with more candidates than the large encoder takes, one, none, and all genes."""
    x, mask = cells(5, dtype)
    x[1], mask[1] = 0, False
    x[1, 31] = 2.0
    x[2], mask[2] = 0, False
    x[3] = 1 + torch.arange(G, dtype=dtype)
    return x, mask


def test_read_are_the_candidates_and_some_zeros():
    x, mask = odd_cells()
    unmeasured = torch.zeros_like(mask)
    unmeasured[0, (x[0] == 0) & (torch.arange(G) > 20)] = True
    read = read_genes(x, mask, unmeasured, top_seq_len=12, zero_genes=7)
    assert read.cells.cu_seqlens.tolist() == [0, *torch.tensor(read.cells.lengths).cumsum(0)]
    assert sorted(read.order.tolist()) == list(range(len(read.rows)))
    start = 0
    for b, n in enumerate(read.cells.lengths):
        genes = read.rows[start : start + n] - b * G
        candidates = ((x[b] > 0) | mask[b]).nonzero()[:, 0]
        assert set(candidates.tolist()) <= set(genes.tolist())
        assert n == len(set(genes.tolist()))
        zeros = ((x[b] == 0) & ~mask[b] & ~unmeasured[b]).sum()
        assert n == len(candidates) + min(7, zeros)
        assert not unmeasured[b, genes].any()
        assert torch.equal(read.places[b, genes], torch.arange(start, start + n))
        assert (read.places[b] == len(read.rows)).sum() == G - n
        assert read.high.lengths[b] == min(12, len(candidates))
        assert read.low.lengths[b] == n - read.high.lengths[b]
        start += n


def test_other_zeros_are_read_when_others_are_hidden_and_all_have_their_turn():
    x = torch.zeros(1, 1000)
    x[0, :100] = 1.0
    times = torch.zeros(1000)
    for visit in range(400):
        mask = torch.zeros(1, 1000, dtype=torch.bool)
        mask[0, torch.randperm(100, generator=torch.Generator().manual_seed(visit))[:15]] = True
        times[read_genes(x, mask, None, top_seq_len=100, zero_genes=90).rows] += 1
    assert (times[:100] == 400).all()
    # 90 of 900: a tenth of the visits each, as independent draws would give.
    assert abs(times[100:].mean() - 40) < 1e-3
    assert 4.5 < times[100:].std() < 7.5
    assert times[100:].min() > 10


def test_the_same_zeros_are_read_in_every_precision():
    x = torch.zeros(1, 5000)
    x[0, :100] = torch.arange(100) / 64 + 1
    wanted, *others = (
        read_genes(x.to(dtype), None, None, top_seq_len=90, zero_genes=64).rows
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    )
    assert all(set(rows.tolist()) == set(wanted.tolist()) for rows in others)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISION)
@pytest.mark.parametrize("encoder", ["dual", "large", "mini"])
def test_a_batch_equals_its_cells_one_by_one(encoder, dtype, tolerance):
    model = small_model(contextual_encoder=encoder, **FEW).to(dtype).train()
    x, mask = odd_cells(dtype)
    whole = model(x, mask)
    whole.square().sum().backward()
    together = gradients(model)
    for b in range(len(x)):
        alone = model(x[b : b + 1], mask[b : b + 1])
        assert close(whole[b], alone[0], tolerance)
        alone.square().sum().backward()
    for name, wanted in gradients(model).items():
        assert close(together[name], wanted, 20 * tolerance), name


def test_all_zeros_read_is_the_model_that_reads_everything():
    """The order of tokens differs, and nothing else."""
    x, mask = cells(3, torch.float64)
    positions = mask.long().argsort(dim=1, descending=True)[:, :4]
    full = small_model(routing="expressed").double()
    same = small_model(routing="expressed", zero_genes=G).double()
    same.load_state_dict(full.state_dict())
    assert close(same(x, mask), full(x, mask), 1e-12)
    assert close(same.encode(x, mask, genes="all"), full.encode(x, mask, genes="all"), 1e-12)
    assert close(same(x, mask, positions=positions), full(x, mask, positions=positions), 1e-12)


def test_genes_that_are_not_read_are_without_context():
    model = small_model(gene_bias=True, **FEW)
    x, mask = cells(3)
    vectors, values = model.encode(x, mask, genes="all"), model(x, mask)
    unread = (vectors == 0).all(-1)
    assert unread.sum(1).tolist() == [G - n for n in ((x > 0) | mask).sum(1).add(7).tolist()]
    nothing = model.head(torch.zeros(1, G, model.config.base_dim))
    assert torch.equal(values[unread], nothing.expand(3, G)[unread])
    read = ~unread
    assert not torch.equal(values[read], nothing.expand(3, G)[read])

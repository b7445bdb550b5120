"""The losses beside the mean squared error: against scipy, by finite differences, by their sums.

Also of the head that one of them trains: `sclong_ds/model/values/zero_head.py`.
"""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import stats
from small_model import G, cells, small_model

from sclong_ds.config.load import load_config
from sclong_ds.model.values.depth import expected_value
from sclong_ds.model.values.zero_head import ZeroHead, expressed_chance, log_chances
from sclong_ds.objective.batch import MaskedBatch
from sclong_ds.objective.losses import ExpressedScore, count_loss, loss_of, outputs_of, zero_loss

OBJECTIVE = dataclasses.replace(load_config("sclong_tiny").objective, zero_mask_prob=0.05)


def with_zero_head(**changes):
    settings = {"gene_bias": True, "cell_offset": "poisson", "cell_vector": "random"}
    model = small_model(**(settings | {"zero_head": True} | changes))
    with torch.no_grad():
        model.zero_head.weight.normal_(std=0.02)
        model.cell_vector.down.normal_()
    return model


def masked_cells(n=4):
    """Return cells of which some values and some zeros are targets, most of them hidden."""
    x, _ = cells(n)
    one = torch.tensor([[0.5], [1.0], [2.0], [4.0]])[:n]
    x = torch.where(x > 0, torch.log1p(one * (1 + (x * 3).floor())), 0.0)
    positions = torch.stack([torch.randperm(G)[:20] for _ in range(n)])
    hidden = torch.zeros(n, G, dtype=torch.bool).scatter(1, positions[:, :16], True)
    valid = torch.ones(n, 20, dtype=torch.bool)
    valid[:, 18:] = False
    return MaskedBatch(x, hidden, positions, valid, x.gather(1, positions))


@pytest.mark.parametrize("dispersion", [None, 0.5, 40.0])
@pytest.mark.parametrize("rate", [0.01, 1.3, 30.0])
def test_a_counts_cost_is_its_negative_log_likelihood_above_zero(rate, dispersion):
    counts = np.array([1, 2, 7, 40])
    if dispersion is None:
        law, r = stats.poisson(rate), None
    else:
        law = stats.nbinom(dispersion, dispersion / (dispersion + rate))
        r = torch.full((4,), np.log(dispersion), dtype=torch.float64)
    wanted = -(law.logpmf(counts) - np.log(-np.expm1(law.logpmf(0))))
    level = torch.full((4,), np.log(rate), dtype=torch.float64)
    found = count_loss(level, torch.tensor(counts, dtype=torch.float64), r)
    assert np.allclose(found.numpy(), wanted, rtol=1e-6)


@pytest.mark.parametrize(("rate", "r"), [(0.05, 0.5), (2.0, 3.0), (7.0, 1.0), (200.0, 5.0)])
def test_the_expected_value_of_a_negative_binomial_count(rate, r):
    one = 0.7
    k = np.arange(1, 20_000)
    law = stats.nbinom(r, r / (r + rate))
    wanted = (law.pmf(k) * np.log1p(one * k)).sum() / law.sf(0)
    level = torch.tensor([[np.log(rate * one)]])
    found = expected_value(level, torch.tensor([[one]]).double(), torch.tensor([[np.log(r)]]))
    assert found.item() == pytest.approx(wanted, rel=0.02)


def test_gradients_of_the_losses():
    torch.manual_seed(0)
    level, r, eta = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    counts = torch.tensor([[1.0, 2, 3, 9, 30]] * 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: count_loss(a, counts, None), level)
    assert torch.autograd.gradcheck(lambda a, b: count_loss(a, counts, b), (level, r))
    assert torch.autograd.gradcheck(lambda a: torch.stack(log_chances(3 * a)), eta)
    part = ZeroHead(3, np.zeros(5)).double()
    given = [torch.randn(3, 3).double().requires_grad_(), *part.parameters()]
    one = torch.rand(3, 1).double() + 0.5

    def says(cell, *weights):
        named = dict(zip(dict(part.named_parameters()), weights, strict=True))
        return torch.func.functional_call(part, named, (cell, one))

    assert torch.autograd.gradcheck(says, given)
    positions = torch.tensor([[0, 4], [1, 1], [3, 2]])
    some = part(given[0], one, positions)
    assert torch.allclose(some, part(given[0], one).gather(1, positions))


@pytest.mark.parametrize("offset", ["poisson", "negative_binomial"])
@pytest.mark.parametrize("loss", ["mse", "likelihood"])
def test_the_loss_of_a_batch_is_that_of_its_cells_and_trains_every_weight(loss, offset):
    model = with_zero_head(cell_offset=offset).train()
    objective = dataclasses.replace(OBJECTIVE, loss=loss)
    whole = masked_cells()
    outputs = outputs_of(model.config, objective)

    def of(some):
        batch = MaskedBatch(*(getattr(whole, f)[some] for f in list(whole.__slots__)[:5]))
        found = model(batch.x, batch.hidden, positions=batch.positions, outputs=outputs)
        return loss_of(found, batch, model.config, objective)

    total = of(slice(None))
    assert total.item() == pytest.approx(sum(of(slice(b, b + 1)).item() for b in range(4)), 1e-4)
    total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if not (name == "head.dispersion" and loss == "mse"):
            assert parameter.grad.abs().sum() > 0, name


def test_values_alone_have_the_loss_of_values_and_zeros_that_of_the_zero_head():
    model, masked = with_zero_head(), masked_cells()
    outputs = outputs_of(model.config, OBJECTIVE)
    assert outputs == ("value", "eta")
    found = model(masked.x, masked.hidden, positions=masked.positions, outputs=outputs)
    share = OBJECTIVE.mask_prob / OBJECTIVE.zero_mask_prob
    values = masked.valid & (masked.true > 0)
    squares = ((found[0] - masked.true) ** 2)[values].sum()
    wanted = squares + zero_loss(found[1], masked, share)
    assert torch.allclose(loss_of(found, masked, model.config, OBJECTIVE), wanted)
    # By hand for one cell: three in place of each zero, the mean times the cell's values.
    chance = expressed_chance(found[1][0])
    top = cost = 0.0
    for place in range(16):
        weight = 1.0 if masked.true[0, place] > 0 else share
        top += weight
        p = chance[place] if masked.true[0, place] > 0 else 1 - chance[place]
        cost -= weight * p.log()
    first = MaskedBatch(*(getattr(masked, f)[:1] for f in list(masked.__slots__)[:5]))
    by_hand = cost / top * values[0].sum()
    assert torch.allclose(zero_loss(found[1][:1], first, share), by_hand, rtol=1e-4)


def test_untrained_the_zero_head_says_what_depth_says():
    model, masked = with_zero_head(), masked_cells()
    torch.nn.init.zeros_(model.zero_head.weight)
    level = model.zero_head.bias.detach().numpy()
    score = ExpressedScore(level, 3.0, torch.device("cpu"))
    found = model(masked.x, masked.hidden, positions=masked.positions, outputs=("value", "eta"))
    score.add(found[1], masked)
    figures = score.compute()
    assert figures["val/expressed/brier"] == pytest.approx(figures["val/expressed/poisson/brier"])
    assert ExpressedScore(level, 3.0, torch.device("cpu")).compute() == {}


def test_predict_gives_the_chance_and_the_expected_value():
    model = with_zero_head()
    x, mask = cells()
    said = model.predict(x, mask)
    assert torch.equal(said.given_expressed, model(x, mask))
    assert torch.equal(said.expected, said.expressed * said.given_expressed)
    assert ((said.expressed > 0) & (said.expressed <= 1)).all()
    # Whether a gene without counts is hidden or not changes nothing of its chance.
    zeros = torch.where(x == 0, True, mask)
    assert torch.equal(model.predict(x, zeros).expressed, said.expressed)
    with pytest.raises(ValueError, match="no zero head"):
        small_model().predict(x)


def test_the_keys_that_need_each_other():
    poisson = ["model.cell_vector=svd", "model.cell_offset=poisson"]
    zeros = ["model.zero_head=true", "objective.zero_mask_prob=0.01"]
    assert load_config("sclong_tiny", [*poisson, *zeros]).model.zero_head
    for given, message in (
        ([*zeros, "model.cell_vector=none"], "model.zero_head reads the cell's vector"),
        ([*poisson, zeros[0]], "zero_mask_prob above 0"),
        ([*poisson, *zeros, "objective.mask_prob_range=[0.1, 0.2]"], "mask_prob_range=null"),
        (
            [poisson[0], "objective.loss=likelihood", "model.cell_offset=none"],
            "needs model.cell_offset=poisson",
        ),
        (["objective.loss=likelihood"], "set model.cell_vector=svd, or objective.loss=mse"),
        (["model.cell_offset=visible"], r"\(got visible\), or model.cell_vector=svd"),
        ([*poisson, "objective.loss=likelihood", zeros[1]], "zero targets"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config("sclong_tiny", given)

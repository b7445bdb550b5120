"""Figures of attention: known values, and the weights that the kernels compute."""

from __future__ import annotations

import pytest
import torch
from small_model import cells, small_model

from kernels.reference import EPS, favor_attention_oracle, random_features
from sclong_ds.config.sections import PerformerConfig
from sclong_ds.model.attention_use import (
    LAYER_FIGURES,
    attention_figures,
    cell_figures,
    favor_weights,
    softmax_weights,
    spread,
)


def made(n: int = 50, heads: int = 2, width: int = 8) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, heads, width, generator=generator) for _ in range(3))
    return q, k, v, random_features(16, width, generator=generator)


@pytest.mark.parametrize("eps", [EPS, 1e-2])
@pytest.mark.parametrize("scope", ["sample", "head"])
def test_weights_are_those_of_the_computed_attention(scope: str, eps: float) -> None:
    q, k, v, features = made()
    found = favor_weights(q, k, features, per_head=scope == "head", eps=eps)
    wanted = favor_attention_oracle(q[None], k[None], v[None], features, scope=scope, eps=eps)[0]
    got = torch.einsum("hpn,nhk->phk", found.weights, v)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(2, 50))


def test_the_share_of_eps_is_that_of_the_definition() -> None:
    """Without eps there is none; a key far from every feature leaves nothing else."""
    q, k, _, features = made()
    s = 8**-0.25
    x, y = (torch.einsum("nhk,mk->hnm", t * s, features) for t in (q, k))
    e = torch.exp(x - (q * s).square().sum(-1).T[..., None] / 2 - x.amax(-1, keepdim=True))
    f = torch.exp(y - (k * s).square().sum(-1).T[..., None] / 2 - y.amax())
    with_eps = torch.einsum("hpm,hnm->hp", e + EPS, f + EPS)
    without = torch.einsum("hpm,hnm->hp", e, f)
    torch.testing.assert_close(
        favor_weights(q, k, features).eps_share, 1 - without / with_eps, rtol=1e-3, atol=1e-5
    )
    assert (favor_weights(20 * q, 20 * k, features).eps_share > 0.99).all()


def test_equal_weights_have_one_effective_key_per_key_and_nothing_beyond_the_mean() -> None:
    _, k, v, features = made()
    for found in (favor_weights(0 * k, 0 * k, features), softmax_weights(0 * k, k)):
        *figures, number = cell_figures(found, v).tolist()
        assert figures[1] / number == pytest.approx(1.0)
        assert figures[2] / number == pytest.approx(0.0, abs=1e-5)
        assert number == 100


def test_one_key_that_gets_all_is_one_effective_key() -> None:
    _, k, v, _ = made()
    far = torch.zeros_like(k)
    far[7] = 1000.0
    found = softmax_weights(torch.ones_like(k), far)
    *figures, number = cell_figures(found, v).tolist()
    assert figures[1] / number == pytest.approx(1 / 50)
    mean = v.mean(0)
    beyond = ((v[7] - mean).norm(dim=-1) / mean.norm(dim=-1)).mean()
    assert figures[2] / number == pytest.approx(float(beyond), rel=1e-4)


def test_queries_are_spread_over_all() -> None:
    assert spread(1) == [0]
    assert spread(5) == [0, 1, 2, 3, 4]
    assert (spread(1000)[0], spread(1000)[-1], len(spread(1000))) == (0, 999, 32)


EXACT = PerformerConfig(
    depth=2, heads=2, dim_head=8, nb_features=None, ff_mult=2, attention="softmax"
)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"routing": "expressed"}, {"zero_genes": 8}, {"contextual_encoder": "mini"},
        {"attention": "softmax"}, {"pad_token": True}, {"large_encoder": EXACT, "zero_genes": 8},
    ],
    ids=str,
)  # fmt: skip
def test_figures_of_a_model(changes: dict) -> None:
    model = small_model(**changes)
    x, mask = cells()
    positions = torch.argsort(mask.int(), dim=1, descending=True, stable=True)[:, :6]
    calls = []

    def predict() -> torch.Tensor:
        calls.append(1)
        with torch.no_grad():
            return model(x, mask, positions=positions)

    def error(predicted: torch.Tensor) -> torch.Tensor:
        wanted = mask.gather(1, positions)
        squared = (predicted - x.gather(1, positions)).square()[wanted]
        return torch.stack([squared.sum(), wanted.sum()])

    before = predict()
    found = attention_figures(model, lambda: error(predict()), lambda sums: None)
    stacks = list(model.performers())
    softmax = changes.get("attention") == "softmax"
    assert len(calls) - 1 == 1 + len(stacks) + (not softmax)
    total, number = error(before)
    assert found["attention/mse"] == pytest.approx(float(total / number), rel=1e-5)
    for stack in stacks:
        assert found[f"attention/{stack}/mean_mse"] != pytest.approx(
            found["attention/mse"], rel=1e-7
        )
        for layer in range(2):
            exact = softmax or changes.get(stack) is EXACT
            assert (f"attention/{stack}.{layer}/eps_share" in found) == (not exact)
            for figure in LAYER_FIGURES[exact:]:
                assert found[f"attention/{stack}.{layer}/{figure}"] > 0
            assert found[f"attention/{stack}.{layer}/effective_keys"] <= 1 + 1e-5
    # Nothing is left behind: hooks are gone.
    assert torch.equal(predict(), before)
    assert attention_figures(model, lambda: error(predict()), lambda sums: None, counts=False) == {}
    if not softmax:
        exact = small_model(**changes | {"attention": "softmax"})
        exact.load_state_dict(model.state_dict())
        with torch.no_grad():
            total, number = error(exact(x, mask, positions=positions))
        assert found["attention/softmax_mse"] == pytest.approx(float(total / number), rel=1e-4)


def test_a_stack_of_which_the_mean_is_taken_ignores_queries_and_keys() -> None:
    """Changing them changes the model, but not the figure."""
    model = small_model()
    x, mask = cells()

    def figures() -> dict[str, float]:
        def error() -> torch.Tensor:
            with torch.no_grad():
                squared = (model(x, mask) - x).square()[mask]
            return torch.stack([squared.sum(), mask.sum()])

        return attention_figures(model, error, lambda sums: None)

    before = figures()
    inner = 16
    for layer in model.decoder.layers:
        with torch.no_grad():
            layer.attention.to_qkv.weight[: 2 * inner] *= 3.0
    after = figures()
    assert after["attention/mse"] != pytest.approx(before["attention/mse"], rel=1e-6)
    assert after["attention/decoder/mean_mse"] == pytest.approx(
        before["attention/decoder/mean_mse"], rel=1e-6
    )

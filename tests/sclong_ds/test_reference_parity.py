"""The model gives the released code's numbers: outputs, encodings, loss, gradients.

Every model golden of `--golden-dir` is rebuilt from its state dict and compared in float32 and
float64; the released code's one key maximum per batch is the scope `tensor`, which no configuration
offers. A table of errors ends the test run. Schedule, masks and random features are compared too.

Covers also `sclong_ds/released/mapping.py`.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator
from typing import Any

import goldens
import numpy as np
import pytest
import torch
from goldens import REPORT, Golden
from torch import Tensor

from kernels import reference as favor
from sclong_ds.config.load import load_config
from sclong_ds.engine.schedule import learning_rate
from sclong_ds.model.routing import expression_order
from sclong_ds.model.sclong import ScLong
from sclong_ds.objective.targets import target_count
from sclong_ds.released.mapping import (
    ReferenceWeights,
    check_hyper_parameters,
    reference_config,
    reference_features,
    released_names,
)

# Measured between the released code in float32 and float64, and in float64 between two legal
# orders of its operations, with a margin of about ten.
TOLERANCES = {torch.float32: {"atol": 2e-5, "rtol": 1e-5}, torch.float64: {"atol": 1e-9, "rtol": 0}}
GRADIENT_TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-8}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument, kind in (("golden", "model"), ("training_golden", "training")):
        if argument in metafunc.fixturenames:
            goldens.parametrize(metafunc, kind, argument=argument)


def build(golden: Golden, data: Any, dtype: torch.dtype) -> ScLong:
    """Build the model of a golden from its state dict and constructor arguments."""
    state = {n[3:]: torch.from_numpy(data[n]) for n in data.files if n.startswith("sd/")}
    wanted = golden.about["constructor_kwargs"]
    config = reference_config(state, top_seq_len=wanted["top_seq_len"])
    check_hyper_parameters(wanted, config, n_tokens=wanted["max_seq_len"])
    weights = ReferenceWeights(state, config)
    assert weights.unused == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = ScLong(
            config,
            n_genes=wanted["max_seq_len"] - 1,
            graph=(data["G_go"], data["G_go_weight"]),
            features=reference_features(state, config),
        )
    model.to(dtype).load_state_dict(weights)
    return model.eval()


def set_scope(model: ScLong, scope: favor.Scope) -> None:
    for performer in model.performers().values():
        for layer in performer.layers:
            layer.attention.scope = scope


class Recorder:
    """Runs a case and keeps what flows between the parts of the model."""

    def __init__(
        self, model: ScLong, golden: Golden, data: Any, case: str, rows: slice = slice(None)
    ) -> None:
        parameter = next(model.parameters())
        self.model, self.seen = model, {}
        self.handles = [
            module.register_forward_hook(self._keep(name)) for name, module in model.named_modules()
        ]
        x = torch.from_numpy(data[f"{case}/x"][rows]).to(parameter.dtype)
        # The last position is the released code's pad token, which our model adds itself.
        assert (x[:, -1] == 0).all()
        labels = torch.from_numpy(data[f"{case}/labels"][rows])
        self.mask = x <= golden.about["constructor_kwargs"]["mask_token_thres"]
        predicted = model(x[:, :-1], self.mask[:, :-1])
        self.order = expression_order(x, self.mask)
        targets = labels != golden.about["label_ignore"]
        self.exp_out = model.head(self.seen["norm"])
        torch.testing.assert_close(self.exp_out[:, :-1], predicted)
        self.loss = (self.exp_out - labels)[targets].square().mean()
        for handle in self.handles:
            handle.remove()

    def _keep(self, name: str) -> Any:
        def hook(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.seen[name] = output
            self.seen[f"{name}:in"] = inputs[0] if inputs else None

        return hook

    def in_gene_order(self, top: Tensor, rest: Tensor) -> Tensor:
        """Put the tokens of both encoders back into gene order."""
        ordered = torch.cat([top, rest], dim=1)
        index = torch.argsort(self.order, dim=1)[..., None].expand(-1, -1, ordered.shape[-1])
        return ordered.gather(1, index)

    def encodings(self, top_indices: Tensor) -> dict[str, Tensor]:
        """Return all encodings in the released order of tokens.

        Args:
            top_indices: (B, T) the released order of the large encoder's tokens.
        """
        seen, split = self.seen, top_indices.shape[1]
        assert torch.equal(top_indices.sort(1).values, self.order[:, :split].sort(1).values)
        rank = torch.argsort(self.order, dim=1)
        large = rank.gather(1, top_indices)
        mini = torch.argsort(self.order[:, split:], dim=1)

        def pick(t: Tensor, index: Tensor) -> Tensor:
            return t.gather(1, index.flatten(1)[..., None].expand(-1, -1, t.shape[-1]))

        def heads(t: Tensor, n_heads: int) -> Tensor:
            return pick(t, large).unflatten(-1, (n_heads, -1)).transpose(1, 2)

        first = self.model.large_encoder.layers[0].attention
        q, k, v = seen["large_encoder.layers.0.attention.to_qkv"].chunk(3, dim=-1)
        genes = seen["gene_encoder"]
        vectors = self.model.gene_encoder.vectors
        found = {
            "top_encodings": pick(seen["from_large"], large),
            "left_encodings": pick(seen["mini_encoder"], mini),
            "merged_encodings": seen["decoder:in"],
            "merged_decodings": seen["norm"],
            "exp_out": self.exp_out[..., None],
            "token_emb": seen["expression_encoder.mlp"],
            "token_norm": seen["expression_encoder"],
            "pos_emb": vectors,
            "go_conv": genes - vectors,
            "x_emb": self.in_gene_order(seen["to_large:in"], seen["mini_encoder:in"]),
            "large_in": pick(seen["to_large"], large),
            "large_encoder.0.q": heads(q, first.heads),
            "large_encoder.0.k": heads(k, first.heads),
            "large_encoder.0.v": heads(v, first.heads),
            "large_encoder.0.fast_attention": heads(
                seen["large_encoder.layers.0.attention.to_out:in"], first.heads
            ),
            "large_out": pick(seen["large_encoder"], large),
            "mini_out": pick(seen["mini_encoder"], mini),
            "decoder_out": seen["decoder"],
        }
        for stack, order in (("large_encoder", large), ("mini_encoder", mini), ("decoder", None)):
            for name, part in (("attn", "attention"), ("ff", "feed_forward")):
                value = seen[f"{stack}.layers.0.{part}"]
                found[f"{stack}.0.{name}"] = value if order is None else pick(value, order)
        found |= self._features(found["large_encoder.0.q"], found["large_encoder.0.k"])
        return found

    def _features(self, q: Tensor, k: Tensor) -> dict[str, Tensor]:
        """Return the kernel features of the first large layer by their definition."""
        w = self.model.large_encoder.features(q.device)[0].to(q.dtype)
        d = q.shape[-1] ** -0.25
        x, y = q * d @ w.T, k * d @ w.T
        half_q, half_k = ((t * d).square().sum(-1, keepdim=True) / 2 for t in (q, k))
        phi_q = torch.exp(x - half_q - x.amax(-1, keepdim=True)) + favor.EPS
        phi_k = torch.exp(y - half_k - y.max()) + favor.EPS
        scale = w.shape[0] ** -0.5
        return {
            "large_encoder.0.q_prime": phi_q * scale,
            "large_encoder.0.k_prime": phi_k * scale,
        }

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients of the loss under their released names."""
        self.model.zero_grad()
        self.loss.backward()
        found = {}
        for name, parameter in self.model.named_parameters():
            sources = released_names(self.model.config)[name]
            # Without a hidden value the mask vector has no part in the loss.
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for source, part in zip(sources, gradient.chunk(len(sources)), strict=True):
                found[source] = part
        return found


def relative(ours: Tensor, theirs: np.ndarray) -> float:
    want = torch.from_numpy(np.asarray(theirs)).double()
    error = (ours.detach().double().reshape(want.shape) - want).abs().max()
    return float(error / want.abs().max().clamp(min=1e-30))


def cases(golden: Golden) -> Iterator[tuple[str, favor.Scope]]:
    """Name the cases of a golden and the scopes in which they must agree."""
    for case, about in golden.about["cases"].items():
        yield case, "tensor"
        if about["batch"] == 1:
            yield case, "sample"


def add_row(
    config: pytest.Config,
    what: tuple[str, str, str, torch.dtype],
    errors: dict[str, float],
    relative_errors: tuple[float, ...],
) -> None:
    """Add one row to the table of errors that ends the test run.

    Args:
        config: pytest's configuration.
        what: Golden, case, scope of the key maximum, dtype.
        errors: Largest absolute error by encoding.
        relative_errors: Of the loss, the worst gradient, the worst gradient norm.
    """
    layout = "{:10} {:8} {:7} {:8} {:>7} {:>8} {:32} {:>8} {:>9} {:>8}"
    lines = config.stash[REPORT]
    if not lines:
        heads = ("golden", "case", "scope", "dtype", "tensors", "exp_out", "worst encoding")
        lines.append(layout.format(*heads, "loss", "gradients", "norms"))
    golden, case, scope, dtype = what
    worst = max(errors, key=lambda name: errors[name])
    numbers = [f"{e:.1e}" if not math.isnan(e) else "-" for e in relative_errors] or ["-"] * 3
    shown = (len(errors), f"{errors['exp_out']:.1e}", f"{errors[worst]:.1e} ({worst})")
    lines.append(layout.format(golden, case, scope, str(dtype)[6:], *shown, *numbers))


def paired_encodings(
    run: Recorder, data: Any, case: str, prefix: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return our and the released encodings of a case, by name."""
    top = run.order[:, : run.model.config.top_seq_len]
    if f"{case}/inter/top_indices" in data.files:
        top = torch.from_numpy(data[f"{case}/inter/top_indices"])
    pairs = {}
    for name, ours in run.encodings(top).items():
        for key in (f"{prefix}/{name}", f"{prefix}/inter/{name}"):
            if key in data.files:
                pairs[name] = (ours.detach(), torch.from_numpy(data[key]).to(ours.dtype))
    assert {"exp_out", "merged_decodings"} <= set(pairs)
    return pairs


def gradient_errors(run: Recorder, data: Any, prefix: str, order: list[str]) -> dict[str, float]:
    """Return the relative errors of the gradients, by name, and of the gradients' norms."""
    found = run.gradients()
    assert set(order) == set(found)
    errors = {
        name: relative(found[name], data[f"{prefix}/grad/{name}"])
        for name in found
        if f"{prefix}/grad/{name}" in data.files
    }
    if f"{prefix}/grad_norms" in data.files:
        want = data[f"{prefix}/grad_norms"]
        norms = [relative(found[name].double().norm(), want[i]) for i, name in enumerate(order)]
        errors["norms"] = max(norms)
    return errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_model_agrees_with_the_released_code(
    golden: Golden, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    data = golden.arrays()
    model = build(golden, data, dtype)
    for case, scope in cases(golden):
        set_scope(model, scope)
        run = Recorder(model, golden, data, case)
        prefix = f"{case}/f64" if dtype == torch.float64 else case
        pairs = paired_encodings(run, data, case, prefix)
        errors = {name: float((ours - want).abs().max()) for name, (ours, want) in pairs.items()}
        loss = relative(run.loss, data[f"{prefix}/loss"])
        order = golden.about["param_names_for_grad_norms"]
        gradients = gradient_errors(run, data, prefix, order)
        norms = gradients.pop("norms", math.nan)
        worst = max(gradients.values(), default=math.nan)
        what = (golden.path.stem, case, scope, dtype)
        add_row(request.config, what, errors, (loss, worst, norms))
        for name, (ours, want) in pairs.items():
            message = f"{case} {scope} {name}: {errors[name]:.1e}"
            torch.testing.assert_close(ours, want, **TOLERANCES[dtype], msg=message)
        assert loss <= TOLERANCES[dtype]["atol"]
        limit = GRADIENT_TOLERANCES[dtype]
        assert not {n: e for n, e in gradients.items() if not e <= limit}
        assert math.isnan(norms) or norms <= limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_cell_of_a_batch_agrees_with_the_released_code_alone(
    golden: Golden, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    data = golden.arrays()
    model = build(golden, data, dtype)
    for case in golden.about["cases"]:
        if f"{case}/solo_exp_out" not in data.files:
            continue
        want = torch.from_numpy(data[f"{case}/solo_exp_out"])[..., 0]
        together = Recorder(model, golden, data, case).exp_out.detach().float()
        rows = [slice(i, i + 1) for i in range(len(want))]
        alone = [Recorder(model, golden, data, case, row).exp_out.detach().float() for row in rows]
        errors = {"exp_out": float((together - want).abs().max())}
        add_row(request.config, (golden.path.stem, f"{case}/solo", "sample", dtype), errors, ())
        for ours in (together, torch.cat(alone)):
            # The cells alone are given in float32 only.
            torch.testing.assert_close(ours, want, **TOLERANCES[torch.float32])


def test_mask_vector_is_cut_as_released(golden: Golden) -> None:
    data = golden.arrays()
    model = build(golden, data, torch.float32)
    before = torch.from_numpy(data["sd/mask_emb.weight"])[0]
    after = torch.from_numpy(data["sd_after/mask_emb.weight"])[0]
    assert before.norm() > 1.5
    ours = model.expression_encoder._mask_vector()
    torch.testing.assert_close(ours.detach(), after, atol=1e-7, rtol=1e-6)


def test_schedule_is_the_released_one(training_golden: Golden) -> None:
    data, about = training_golden.arrays(), training_golden.about["sched_kwargs"]
    optim = dataclasses.replace(
        load_config("sclong_reference").optim,
        schedule="warm_restarts",
        lr=about["max_lr"],
        min_lr_ratio=about["min_lr"] / about["max_lr"],
        warmup_steps=about["warmup_steps"],
        decay_steps=about["first_cycle_steps"],
        cycle_mult=float(about["cycle_mult"]),
        cycle_gamma=about["gamma"],
    )
    want = data["sched/lr"]
    ours = np.array([learning_rate(optim, step) for step in range(len(want))])
    np.testing.assert_allclose(ours, want, rtol=1e-12, atol=0)


def test_number_of_targets_is_the_released_one(training_golden: Golden) -> None:
    """The released draw, redone with our count of targets, gives the released masks."""
    data, about = training_golden.arrays(), training_golden.about["mask"]
    objective = load_config("sclong_reference").objective
    raw = torch.from_numpy(data["mask/x_raw"])
    torch.manual_seed(about["seed"])
    order = torch.rand(raw.shape).masked_fill(raw == 0, -1.0).argsort(dim=1, descending=True)
    kept = torch.empty(raw.shape).uniform_() >= objective.replace_prob
    for row, x, labels in zip(range(len(raw)), data["mask/x"], data["mask/labels"], strict=True):
        n = target_count(int((raw[row] > 0).sum()), objective)
        targets = order[row, :n].sort().values.numpy()
        np.testing.assert_array_equal(np.flatnonzero(labels != -10), targets)
        np.testing.assert_array_equal(labels[targets], raw[row, targets])
        hidden = targets[~kept[row, targets].numpy()]
        np.testing.assert_array_equal(np.flatnonzero(x == -10), hidden)


def test_random_features_are_the_released_ones(training_golden: Golden) -> None:
    data, seed = training_golden.arrays(), training_golden.about["proj"]["seed"]
    names = [n for n in data.files if n.startswith("proj/")]
    assert names
    for name in names:
        rows, columns = map(int, name.removeprefix("proj/").split("x"))
        generator = torch.Generator().manual_seed(seed)
        ours = favor.random_features(rows, columns, generator=generator, kind="orthogonal_qr")
        torch.testing.assert_close(ours, torch.from_numpy(data[name]), atol=2e-5, rtol=1e-5)

"""One run of the study: the product's model, objective, schedule and optimizer in a plain loop.

A candidate is a list of configuration overrides (of `sclong_tiny` behind `BEFORE`). What is no
configuration key, because it is a control or has not earned one, begins with `study.`:

- `study.graph=permuted`: the gene graph with its genes permuted (another permutation each seed).
- `study.vectors_sd=1`: gene vectors and the gene table start at normal(0, sd).
- `study.qk_scale=2`: queries and keys of all stacks start at so many times their size.
- `study.gene_vectors=svd`: gene vectors and the gene table start at the principal directions.
- `study.parts=vector`: no transformer: the head alone, with the cell's vector.
- `study.attention=uniform`: every stack is trained with the mean of its values for attention.
- `study.transformer_rate=5`: so many times the rate for all but the cell's vector and the head.
- `study.cell_into=decoder`: a learned projection of the cell's vector is added to the tokens that
  the decoder reads; it starts at 0.
- `study.vector_steps=600`: the cell's vector and the head are trained alone for so many steps, then
  frozen; run.max_steps then train the transformer on what they leave.
- `study.curve=1500`: the hidden MSE is measured after every so many steps.
- `study.tokens=residual`: tokens are made of a visible value less what the cell's vector and the
  biases expect of it (`model.cell_offset=poisson`), which `study.vector_steps` froze.
- `study.qk=2`: queries and keys of all stacks start as the same orthogonal map of the tokens, so
  many times a length that makes products near 1: attention starts as a kernel over likeness of
  tokens (with `study.gene_vectors=svd`, of genes that vary together).
- `study.cells=0.25`: trained on so many of the training cells, as many of each dataset (others each
  seed); gene statistics and the vector's start are of these too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch.utils.hooks import RemovableHandle

from benchmarks.recipe.baselines import baseline_predictions, hidden_mask
from benchmarks.recipe.panel import Panel, with_share
from sclong_ds.config.load import load_config
from sclong_ds.config.sections import ObjectiveConfig, RunConfig
from sclong_ds.engine.deepspeed_engine import parameter_groups
from sclong_ds.engine.schedule import learning_rate
from sclong_ds.model import performer
from sclong_ds.model.sclong import ScLong
from sclong_ds.model.values.cell_vector import CellStart, above_centre, principal_directions
from sclong_ds.model.values.depth import expected_value, one_count
from sclong_ds.model.values.zero_head import expressed_chance
from sclong_ds.objective.batch import MaskedBatch
from sclong_ds.objective.losses import ExpressedScore, loss_of, n_scored, outputs_of
from sclong_ds.objective.scores import TargetTable, scores
from sclong_ds.objective.starts import first_output, start_from
from sclong_ds.objective.targets import Targets
from sclong_ds.planning.costs import training_flops_per_cell

PREFIX = "study."
BEFORE = ["model.cell_vector=svd", "optim.lr=1e-3"]
"""What `sclong_tiny` had when most candidates were tried: they name what they have instead."""


class Study:
    """The panel with the targets of its held-out cells and what the baselines predict there."""

    def __init__(self, panel: Panel, objective: ObjectiveConfig) -> None:
        self.panel = panel
        every = np.arange(len(panel.held_out.rows))
        self.targets = panel.held_out.targets(every, objective, seed=0, epoch=-1)
        self.x = panel.held_out.values(every)
        self.hidden = hidden_mask(self.x.shape, self.targets)
        self.baselines = baseline_predictions(panel, self.targets, objective)

    def figures(self, predicted: NDArray[np.floating]) -> dict[str, float]:
        """Return the product's figures of predictions (n, P) beside those of the baselines."""
        targets, cells = self.targets, self.panel.held_out
        valid = targets.valid
        cell = np.broadcast_to(np.arange(len(cells.rows))[:, None], valid.shape)[valid]
        gene = targets.positions[valid]
        table = TargetTable(
            true=self.x.numpy().astype(np.float64)[cell, gene],
            hidden=targets.hidden[valid],
            several=np.asarray(cells.counts[cell, gene]).ravel() > 1,
            cell=cell,
            gene=gene,
            dataset=cells.dataset[cell],
            predicted={"model": predicted.astype(np.float64)[valid]}
            | {name: values[valid] for name, values in self.baselines.items()},
        )
        return scores(table, self.panel.datasets)

    def cell_errors(self, predicted: NDArray[np.floating]) -> dict[str, list[float]]:
        """Return sums of squared errors of hidden values, a number per held-out cell.

        By predictor: `model`, and each baseline; `n_hidden` is how many values each cell has.
        """
        wanted = self.targets.valid & self.targets.hidden
        true = np.take_along_axis(self.x.numpy(), self.targets.positions, 1)
        found = {"n_hidden": wanted.sum(1).astype(float).tolist()}
        for name, values in {"model": predicted, **self.baselines}.items():
            found[name] = np.where(wanted, (values - true) ** 2, 0.0).sum(1).round(5).tolist()
        return found


def run(
    study: Study, overrides: list[str], *, seed: int, preset: str = "sclong_tiny"
) -> dict[str, Any]:
    """Train one candidate and return its figures, CPU seconds and number of parameters."""
    extra = dict(o[len(PREFIX) :].split("=") for o in overrides if o.startswith(PREFIX))
    before = BEFORE if preset == "sclong_tiny" else []
    config = load_config(preset, [*before, *(o for o in overrides if not o.startswith(PREFIX))])
    if config.model.cell_vector == "residuals" and {"vector_steps", "tokens"} & set(extra):
        raise ValueError("study.vector_steps and study.tokens need model.cell_vector=svd")
    panel = study.panel
    if "cells" in extra:
        panel = with_share(panel, float(extra["cells"]), seed=seed)
    torch.manual_seed(seed)
    net = build(panel, config, extra, seed=seed)
    if "qk_scale" in extra:
        scale_queries_and_keys(net, float(extra["qk_scale"]))
    change(net, extra)
    started = time.process_time()
    first = int(extra.get("vector_steps", 0))
    if first:
        vector_first(net, panel, config, first, seed=seed)
    curve: dict[str, float] = {}

    def look(step: int) -> None:
        if "curve" in extra and step % int(extra["curve"]) == 0:
            curve[str(step)] = study.figures(predict(net, study))["val/mse"]
            print(f"  step {step}: hidden MSE {curve[str(step)]:.5f}", flush=True)

    factor = float(extra.get("transformer_rate", 1))
    train(net, panel, config, seed=seed, factor=factor, after=look)
    seconds = time.process_time() - started
    predicted = predict(net, study)
    figures = study.figures(predicted)
    errors = study.cell_errors(predicted)
    if extra.get("parts") != "vector":
        stacks = net.performers()
        for name, stack in stacks.items():
            with uniform_attention(stack):
                mse = study.figures(predict(net, study))["val/mse"]
            figures[f"uniform_{name.removesuffix('_encoder')}_mse"] = mse
        with ExitStack() as all_of_them:
            for stack in stacks.values():
                all_of_them.enter_context(uniform_attention(stack))
            figures["uniform_all_mse"] = study.figures(predict(net, study))["val/mse"]
    if config.model.zero_head:
        figures |= expressed_figures(net, study, config)
    visits = (config.run.max_steps + first) * config.engine.train_batch_size
    parameters = sum(p.numel() for p in net.parameters())
    about: dict[str, Any] = {"seed": seed, "visits": visits, "cpu_s": seconds}
    about |= {"parameters": parameters, "n_training_cells": len(panel.train.rows)}
    cells = {"cell_dataset": study.panel.held_out.dataset.tolist(), "cell_errors": errors}
    about["curve"] = curve
    return about | {"flops": visits * visit_flops(study.panel, config)} | figures | cells


def visit_flops(panel: Panel, config: RunConfig) -> float:
    """Return FLOPs of training with one cell, forward and backward, of the mean training cell."""
    n_expressed = panel.train.counts.nnz / len(panel.train.rows)
    n_edges = 0 if panel.graph is None else panel.graph[0].shape[1]
    return training_flops_per_cell(
        config.model,
        len(panel.stats.n_expressing),
        n_edges,
        micro_batch=config.engine.train_batch_size,
        n_expressed=round(n_expressed),
        n_wanted=round(config.objective.mask_prob * n_expressed),
    )


def build(panel: Panel, config: RunConfig, extra: dict[str, str], *, seed: int) -> ScLong:
    """Return the untrained model of a candidate."""
    n_genes, graph = len(panel.stats.n_expressing), None
    rng = np.random.default_rng(seed)
    if config.model.gene_encoder == "graph":
        assert panel.graph is not None, "model.gene_encoder=graph needs --graph"
        graph = panel.graph
        if extra.get("graph") == "permuted":
            graph = rng.permutation(n_genes)[graph[0]], graph[1]
    vectors = None
    start = _cell_start(panel, config)
    if extra.get("gene_vectors") == "svd":
        centred = above_centre(_train_values(panel), panel.stats.mean_expressed)
        found = principal_directions(centred, config.model.base_dim)
        vectors = found * np.sqrt(n_genes)
    if "vectors_sd" in extra:
        vectors = rng.normal(0, float(extra["vectors_sd"]), (n_genes, config.model.base_dim))
    return ScLong(
        config.model,
        n_genes=n_genes,
        graph=graph,
        gene_vectors=vectors,
        output_mean=first_output(config.model, panel.stats),
        cell_start=start,
    )


def _cell_start(panel: Panel, config: RunConfig) -> CellStart:
    """Return what the cell's vector starts from, as training does, of all training cells."""
    centre = panel.stats.mean_expressed
    if config.model.cell_vector in ("none", "random"):
        return CellStart(centre, None)
    return start_from(config.model, _train_values(panel), panel.stats)


def _train_values(panel: Panel) -> csr_matrix:
    return csr_matrix(panel.train.values(np.arange(len(panel.train.rows))).numpy())


def vector_first(net: ScLong, panel: Panel, config: RunConfig, steps: int, *, seed: int) -> None:
    """Train the cell's vector and the head alone, then freeze what predicts from the vector."""
    whole, optim = net._represent, config.optim.in_steps(steps)
    net._represent = MethodType(_nothing, net)  # type: ignore[method-assign]
    alone = replace(config, optim=optim, run=replace(config.run, max_steps=steps))
    train(net, panel, alone, seed=seed)
    net._represent = whole  # type: ignore[method-assign]
    with torch.no_grad():
        # What the head says of no representation at all becomes part of its biases.
        net.head.bias += net.head.body(torch.zeros(config.model.base_dim)) @ net.head.weight
        net.head.weight.zero_()
    frozen = [*net.cell_vector.parameters(), net.head.bias]
    for weight in (*frozen, net.head.cell_weight):
        weight.requires_grad_(False)


def train(
    net: ScLong,
    panel: Panel,
    config: RunConfig,
    *,
    seed: int,
    factor: float = 1.0,
    after: Callable[[int], None] = lambda step: None,
) -> None:
    """Train for run.max_steps, one batch after the other through shuffled epochs.

    All but the cell's vector and the head has `factor` times the rate. `after` is called with the
    number of steps done.
    """
    optim, batch = config.optim.in_steps(config.run.max_steps), config.engine.train_batch_size
    direct = {id(p) for n, p in net.named_parameters() if n.startswith(("cell_vector", "head"))}
    groups = [
        {**group, "params": own, "factor": times}
        for group in parameter_groups(net, optim)
        for times, inside in ((1.0, True), (factor, False))
        if (own := [p for p in group["params"] if (id(p) in direct) == inside])
    ]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps)
    outputs = outputs_of(config.model, config.objective)
    visits = _visits(len(panel.train.rows), seed)
    for step in range(config.run.max_steps):
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(optim, step)
        some = [next(visits) for _ in range(batch)]
        rows, epoch = np.array([row for row, _ in some]), some[0][1]
        drawn = panel.train.targets(rows, config.objective, seed=seed, epoch=epoch)
        x = panel.train.values(rows)
        positions = torch.from_numpy(drawn.positions)
        hidden, valid = hidden_mask(x.shape, drawn), torch.from_numpy(drawn.valid)
        found = net(x, hidden, positions=positions, outputs=outputs)
        masked = MaskedBatch(x, hidden, positions, valid, x.gather(1, positions))
        error = loss_of(found, masked, config.model, config.objective)
        optimizer.zero_grad()
        (error / n_scored(drawn, config.model)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), config.engine.gradient_clipping)
        optimizer.step()
        after(step + 1)


def _visits(n_cells: int, seed: int) -> Iterator[tuple[int, int]]:
    """Yield (cell, epoch) without end."""
    rng, epoch = np.random.default_rng(seed), 0
    while True:
        for cell in rng.permutation(n_cells).tolist():
            yield cell, epoch
        epoch += 1


def predict(net: ScLong, study: Study) -> NDArray[np.floating]:
    """Return the predictions (n, P) at the targets of the held-out cells."""
    positions: Targets = study.targets
    net.eval()
    with torch.inference_mode():
        parts = [
            net(
                study.x[i : i + 8],
                study.hidden[i : i + 8],
                positions=torch.from_numpy(positions.positions[i : i + 8]),
            )
            for i in range(0, len(study.x), 8)
        ]
    net.train()
    return torch.cat(parts).numpy()


def change(net: ScLong, extra: dict[str, str]) -> None:
    """Change an untrained model as the study's own keys say."""
    if extra.get("parts") == "vector":
        net._represent = MethodType(_nothing, net)  # type: ignore[method-assign]
        return
    if extra.get("attention") == "uniform":
        for stack in net.performers().values():
            take_mean_of_values(stack)
    if extra.get("cell_into") == "decoder":
        _cell_into_decoder(net)
    if "qk" in extra:
        tie_queries_to_keys(net, float(extra["qk"]))
    if extra.get("tokens") == "residual":
        whole = net._represent
        net._represent = MethodType(partial(_of_residuals, whole), net)  # type: ignore[method-assign]


def _nothing(
    net: ScLong, x: torch.Tensor, _mask: Any, positions: torch.Tensor | None, *_rest: Any
) -> dict[str, torch.Tensor]:
    shape = x.shape if positions is None else positions.shape
    return {"decoder": x.new_zeros(*shape, net.config.base_dim)}


def _of_residuals(
    whole: Callable[..., dict[str, torch.Tensor]],
    net: ScLong,
    x: torch.Tensor,
    mask: torch.Tensor | None,
    *rest: Any,
    **named: Any,
) -> dict[str, torch.Tensor]:
    """Represent a cell by its values less those that its vector expects."""
    visible = (x > 0) if mask is None else (x > 0) & ~mask
    with torch.no_grad():
        level = net.head.bias + net.cell_vector(x, visible) @ net.head.cell_weight.T
        one = one_count(x, visible).expand_as(x)[visible]
        left = torch.zeros_like(x)
        left[visible] = x[visible] - expected_value(level[visible][:, None], one[:, None])[:, 0]
    return whole(left, mask, *rest, **{**named, "routes": x})


def tie_queries_to_keys(net: ScLong, temperature: float) -> None:
    """Start queries and keys as one orthogonal map, by which likeness of tokens is attended to."""
    for part in net.modules():
        if isinstance(part, performer.SelfAttention):
            inner, dim = part.heads * part.dim_head, part.to_qkv.in_features
            same = torch.empty(max(inner, dim), max(inner, dim))
            torch.nn.init.orthogonal_(same)
            # Tokens are of norm sqrt(dim) behind the layer norm, and products are divided by
            # sqrt(dim_head): of a token with itself, `temperature` per head.
            size = (temperature * part.dim_head**0.5 / part.dim_head) ** 0.5
            with torch.no_grad():
                part.to_qkv.weight[:inner] = size * same[:inner, :dim]
                part.to_qkv.weight[inner : 2 * inner] = size * same[:inner, :dim]


def _cell_into_decoder(net: ScLong) -> None:
    """Add a learned projection of the cell's vector to every token of the decoder."""
    width = net.config.base_dim
    net.into_norm = torch.nn.LayerNorm(width)
    net.into = torch.nn.Linear(width, width)
    torch.nn.init.zeros_(net.into.weight)
    torch.nn.init.zeros_(net.into.bias)
    seen: list[torch.Tensor] = []

    def note(_net: Any, args: tuple[Any, ...]) -> None:
        x, mask = args[0], args[1]
        seen[:] = [net.into(net.into_norm(net.cell_vector(x, (x > 0) & ~mask)))]

    def add(_stack: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens, cells = args[0], args[1]
        if cells is None:
            return (tokens + seen[0][:, None], *args[1:])
        lengths = torch.tensor(cells.lengths)
        return (tokens + seen[0].repeat_interleave(lengths, 0), *args[1:])

    net.register_forward_pre_hook(note)
    net.decoder.register_forward_pre_hook(add)


def expressed_figures(net: ScLong, study: Study, config: RunConfig) -> dict[str, float]:
    """Return the product's figures of the zero head, on hidden targets with zeros among them.

    `expressed/K` is how often genes are expressed of which it says K / 10 to (K + 1) / 10, and
    `said/K` the mean of what it says of them.
    """
    panel, cells = study.panel, study.panel.held_out
    share = config.objective.mask_prob / config.objective.zero_mask_prob
    level = np.asarray(first_output(config.model, panel.stats))
    score = ExpressedScore(level, share, torch.device("cpu"))
    drawn = cells.targets(np.arange(len(cells.rows)), config.objective, seed=0, epoch=-1)
    positions, hidden = torch.from_numpy(drawn.positions), hidden_mask(study.x.shape, drawn)
    masked = MaskedBatch(
        study.x, hidden, positions, torch.from_numpy(drawn.valid), study.x.gather(1, positions)
    )
    with torch.inference_mode():
        visible = (study.x > 0) & ~hidden
        one, cell = one_count(study.x, visible), net.cell_vector(study.x, visible)
        eta = net.zero_head(cell, one, positions)
    score.add(eta, masked)
    found = score.compute()
    is_value, said = (masked.true > 0).double(), expressed_chance(eta).double()
    weight = torch.where(masked.true > 0, 1.0, share) * torch.from_numpy(drawn.hidden & drawn.valid)
    for k in range(10):
        own = weight * ((said * 10).floor().clamp(max=9) == k)
        found[f"expressed/{k}"] = float((is_value * own).sum() / own.sum())
        found[f"said/{k}"] = float((said * own).sum() / own.sum())
    return found


def scale_queries_and_keys(net: ScLong, factor: float) -> None:
    """Start with queries and keys that are this many times as large."""
    for part in net.modules():
        if isinstance(part, performer.SelfAttention):
            with torch.no_grad():
                part.to_qkv.weight[: 2 * part.heads * part.dim_head] *= factor


@contextmanager
def uniform_attention(stack: performer.Performer) -> Iterator[None]:
    """Let the attention of a stack return the mean of its values meanwhile."""
    hooks = take_mean_of_values(stack)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def take_mean_of_values(stack: performer.Performer) -> list[RemovableHandle]:
    """Let the attention of a stack return the mean of its values, for every query the same."""

    def mean_of_values(
        part: performer.SelfAttention, args: tuple[Any, ...], _out: torch.Tensor
    ) -> torch.Tensor:
        x, cells = args[0], args[2] if len(args) > 2 else None
        v = part.to_qkv(x).chunk(3, dim=-1)[2]
        if cells is None:
            return part.to_out(v.mean(1, keepdim=True).expand_as(v))
        means = [own.mean(0, keepdim=True).expand_as(own) for own in v.split(cells.lengths)]
        return part.to_out(torch.cat(means))

    parts = [m for m in stack.modules() if isinstance(m, performer.SelfAttention)]
    return [part.register_forward_hook(mean_of_values) for part in parts]

"""Stages of `benchmarks/gpu_check.py` about the whole model.

`model` trains the published configuration on random cells with bf16 weights and AdamW on float32
copies of them, without DeepSpeed, an optimizer step after each micro-batch: predictions at the
hidden values, as in training, and for comparison at all genes; `reference` does the same with the
released model, imported from a checkout.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sclong_ds.config.load import load_config
from sclong_ds.config.sections import ModelConfig
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.model.sclong import ScLong
from sclong_ds.planning.costs import training_flops_per_cell

Row = dict[str, Any]
PEAK_TFLOPS = 989.0
"""Dense bf16 peak of H100 SXM and H200, from NVIDIA's data sheet."""
EDGES_PER_GENE = 20
EXPRESSED, HIDDEN = 0.07, 0.15
"""Share of a cell's genes that have a count (1,950 of 27,874), and of those the targets."""
RELEASED_CLASS = "DualEncoderSCFM"


def _sizes(args: argparse.Namespace) -> tuple[ModelConfig, int]:
    """Return the model's configuration and number of genes."""
    if not args.tiny:
        return load_config("sclong_1b").model, len(GeneVocabulary.bundled())
    tiny = load_config("sclong_tiny", ["model.top_seq_len=64"]).model
    return replace(tiny, large_encoder=replace(tiny.large_encoder, depth=1)), 200


def random_graph(n_genes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a random graph of the size of the real one."""
    rng = np.random.default_rng(0)
    edges = rng.integers(0, n_genes, (2, EDGES_PER_GENE * n_genes))
    return edges, rng.random(edges.shape[1], dtype=np.float32)


def random_cells(b: int, n_genes: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return expression (B, G), the genes to hide (B, P) and the same as a mask (B, G).

    Every cell has the same number of expressed genes.
    """
    generator = torch.Generator(device).manual_seed(1)
    draw = torch.rand(b, n_genes, generator=generator, device=device)
    genes = draw.topk(round(EXPRESSED * n_genes), dim=1).indices
    values = 0.5 + 4 * torch.rand(genes.shape, generator=generator, device=device)
    positions = genes[:, : max(1, round(HIDDEN * genes.shape[1]))].contiguous()
    x = torch.zeros_like(draw).scatter_(1, genes, values)
    return x, positions, torch.zeros_like(x, dtype=torch.bool).scatter_(1, positions, True)


def _timed(step: Callable[[], object], device: str, *, steps: int) -> float:
    """Return seconds per step, after two steps to warm up."""
    for _ in range(2):
        step()
    _wait(device)
    started = time.perf_counter()
    for _ in range(steps):
        step()
    _wait(device)
    return (time.perf_counter() - started) / steps


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class MasterWeights:
    """AdamW on float32 copies of bf16 parameters, as DeepSpeed has them."""

    def __init__(self, parameters: Iterable[nn.Parameter], device: str) -> None:
        self.parameters = list(parameters)
        self.masters = [p.detach().float() for p in self.parameters]
        self.adamw = torch.optim.AdamW(self.masters, lr=1e-5, fused=device == "cuda")

    @torch.no_grad()
    def step(self) -> None:
        """Make a step and forget the gradients."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            assert parameter.grad is not None
            master.grad, parameter.grad = parameter.grad.float(), None
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        torch._foreach_copy_(self.parameters, self.masters)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to make a training step."""

    backend: str
    """`engine.attention_backend`."""
    cells: int
    """Micro-batch."""
    routing: str = "top"
    """`model.routing`."""
    all_genes: bool = False
    """Predict every gene and not the hidden ones alone."""
    compiled: bool = False
    """`engine.compile_layers`."""

    def __str__(self) -> str:
        """Return the case as readable text."""
        extras = {"all genes": self.all_genes, "compiled layers": self.compiled}
        extras["expressed genes only"] = self.routing == "expressed"
        return " ".join(
            [f"{self.backend} micro-batch {self.cells}", *(k for k, v in extras.items() if v)]
        )


def cases(*, on_gpu: bool) -> list[Case]:
    """Return what is measured, in the order of worth."""
    if not on_gpu:
        return [
            Case(backend="torch", cells=1, all_genes=True),
            Case(backend="torch", cells=2),
            Case(backend="torch", cells=2, routing="expressed"),
        ]
    return [
        Case(backend="triton", cells=4),
        Case(backend="triton", cells=1),
        Case(backend="triton", cells=6),
        Case(backend="triton", cells=4, routing="expressed"),
        Case(backend="triton", cells=4, all_genes=True),
        Case(backend="torch", cells=1, all_genes=True),
        Case(backend="triton", cells=4, compiled=True),
    ]


LEAST_S = {False: 10.0, True: 60.0}
"""A case, with compiled layers or not, is not started with less time left."""


def model(args: argparse.Namespace) -> Iterator[Row]:
    """Yield cells/s, MFU and peak memory of each case."""
    config, n_genes = _sizes(args)
    graph = random_graph(n_genes)
    torch.manual_seed(0)
    with torch.device(args.device):
        net = ScLong(config, n_genes=n_genes, graph=graph, output_mean=1.0)
    net = net.to(torch.bfloat16)
    optimizer = MasterWeights(net.parameters(), args.device)
    for case in cases(on_gpu=args.device == "cuda"):
        if time.monotonic() > args.deadline - LEAST_S[case.compiled]:
            yield {"case": str(case), "skipped": "no time"}
            continue
        net.config = replace(config, routing=case.routing)
        for performer in net.performers().values():
            performer.compile_layers = case.compiled
            for layer in performer.layers:
                layer.attention.backend = case.backend
        try:
            yield {"case": str(case)} | _step(net, optimizer, case, n_genes, graph, args)
        except torch.OutOfMemoryError:
            yield {"case": str(case), "out_of_memory": True}
        except RuntimeError as error:  # one case costs no other; a wrong device shows in all
            yield {"case": str(case), "failed": str(error).strip().splitlines()[:1]}
        net.zero_grad(set_to_none=True)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    yield from _alone(net, optimizer, args)


def _alone(net: ScLong, optimizer: MasterWeights, args: argparse.Namespace) -> Iterator[Row]:
    """Yield times of what does not depend on the cells of a micro-batch."""

    def gene_encoder() -> None:
        genes = net.gene_encoder()
        genes.backward(torch.ones_like(genes))
        net.gene_encoder.zero_grad(set_to_none=True)

    def update() -> None:
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()

    for name, work in (("gene encoder", gene_encoder), ("optimizer", update)):
        yield {"case": f"{name} alone", "step_ms": 1e3 * _timed(work, args.device, steps=3)}


def _step(
    net: ScLong,
    optimizer: MasterWeights,
    case: Case,
    n_genes: int,
    graph: tuple[np.ndarray, np.ndarray],
    args: argparse.Namespace,
) -> Row:
    """Measure a training step: one micro-batch and the optimizer."""
    x, positions, hidden = random_cells(case.cells, n_genes, args.device)
    x, true = x.bfloat16(), x.gather(1, positions)
    n_expressed = round(EXPRESSED * n_genes)
    lengths = [min(n_expressed, net.config.top_seq_len)] * case.cells
    losses = []

    def gradients() -> None:
        if case.all_genes:
            predicted = net(x, hidden, lengths=lengths).gather(1, positions)
        else:
            predicted = net(x, hidden, positions=positions, lengths=lengths)
        loss = (predicted.float() - true).square().mean()
        loss.backward()
        losses.append(loss.detach())

    def step() -> None:
        gradients()
        optimizer.step()

    step()
    on_gpu = args.device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    gradients()
    kept = torch.cuda.max_memory_allocated() - before if on_gpu else 0
    optimizer.step()
    seconds = _timed(step, args.device, steps=2 if args.tiny else 5)
    flops = training_flops_per_cell(
        net.config,
        n_genes,
        graph[0].shape[1],
        micro_batch=case.cells,
        n_expressed=n_expressed,
        n_wanted=None if case.all_genes else positions.shape[1],
    )
    row: Row = {"cells_per_s": case.cells / seconds, "step_ms": 1e3 * seconds}
    row |= {"mfu": flops * case.cells / seconds / 1e12 / PEAK_TFLOPS}
    row |= {"first_loss": losses[0].item(), "last_loss": losses[-1].item()}
    row["correct"] = bool(torch.stack(losses).isfinite().all())
    row["published"] = case.backend == "triton" and case.routing == "top" and not case.all_genes
    if on_gpu:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        row["gb_per_cell"] = kept / 1e9 / case.cells
    return row


def reference(args: argparse.Namespace) -> Iterator[Row]:
    """Yield the same of the released model, fp32 weights under bf16 autocast."""
    config, n_genes = _sizes(args)
    edges, weights = (torch.from_numpy(a) for a in random_graph(n_genes))
    with tempfile.TemporaryDirectory() as folder:
        vectors = Path(folder) / "vectors.npy"
        np.save(vectors, np.zeros((n_genes, config.base_dim), dtype=np.float32))
        arguments = _released_arguments(config, n_genes + 1, args.device)
        arguments |= {"G_go": edges.to(args.device), "G_go_weight": weights.to(args.device)}
        found = _released_class(args.reference)
        net = found(**arguments, gene2vec_file=str(vectors)).to(args.device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=args.device == "cuda")
    for b in (1, 2) if args.tiny else (1, 4):
        x, _, hidden = random_cells(b, n_genes, args.device)
        x = nn.functional.pad(x.masked_fill(hidden, -10.0), (0, 1))

        def step(x: Tensor = x) -> None:
            with torch.autocast(args.device, dtype=torch.bfloat16):
                out = net(x)
            out = out[0] if isinstance(out, tuple) else out
            out.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        row: Row = {"case": f"released model micro-batch {b}"}
        try:
            seconds = _timed(step, args.device, steps=2 if args.tiny else 3)
            row |= {"cells_per_s": b / seconds, "step_ms": 1e3 * seconds}
        except torch.OutOfMemoryError:
            row["out_of_memory"] = True
        if args.device == "cuda":
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        yield row


def _released_class(checkout: Path) -> type[nn.Module]:
    """Import the released model's class from a checkout, wherever in it the class is."""
    for path in sorted(checkout.rglob("*.py")):
        if f"class {RELEASED_CLASS}" in path.read_text(errors="replace"):
            sys.path[:0] = [str(checkout), str(path.parent)]
            name = ".".join(path.relative_to(checkout).with_suffix("").parts)
            return getattr(importlib.import_module(name), RELEASED_CLASS)
    raise FileNotFoundError(f"{checkout}: holds no file with `class {RELEASED_CLASS}`")


def _released_arguments(config: ModelConfig, tokens: int, device: str) -> Row:
    """Return the released constructor's arguments for a configuration."""
    arguments: Row = {
        "max_seq_len": tokens,
        "top_seq_len": config.top_seq_len,
        "base_dim": config.base_dim,
        "large_dim": config.large_dim,
        "mask_token_thres": -1,
        "nb_features": config.large_encoder.nb_features,
        "qkv_bias": config.qkv_bias,
        "go_num_layers": config.gene_encoder_layers,
        "g2v_position_emb": True,
        "go_use_gene2vec": True,
        "device": device,
    }
    stacks = {"mini_enc": config.mini_encoder, "large_enc": config.large_encoder}
    for prefix, stack in (stacks | {"dec": config.decoder}).items():
        arguments |= {f"{prefix}_depth": stack.depth, f"{prefix}_heads": stack.heads}
        arguments |= {f"{prefix}_dim_head": stack.dim_head}
    return arguments

"""Figures in README.md and docs/ that benchmarks have written, and where they stand.

    python docs/write_figures.py

`SENTENCES` names for a piece of text the result in benchmarks/results/NAME.json that its figures
come from. The script puts the figures of the results into the pages; a test fails where they
differ. A benchmark writes its result with `--json`, commit and machine included; until it has been
run, its text keeps the figures that stand there.
"""

from __future__ import annotations

import json
import re
import string
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


class Sentence(NamedTuple):
    """A piece of text with figures."""

    page: str
    result: str
    text: str
    """Fields are paths into `result`, with a format, for instance {n_cells:,}; of a number another
    one may divide: {bytes/1e9:.1f}. {commit} is that of the result."""


README, MEASURED = "README.md", "docs/measured.md"
_DEMO = (
    "MSE of the hidden values of {n_held_out} held-out cells {mse:.4f} (one seed), {standing}; "
    "the 30 nearest training cells {baselines.nearest:.4f}, depth alone {baselines.linear:.4f} "
    "(linear) and {baselines.poisson:.4f} (Poisson), gene mean + offset {baselines.offset:.4f}, "
    "per-gene mean {baselines.gene_mean:.4f}; correlation per gene across cells {per_gene:.3f} "
    "(principal {baselines_per_gene.principal:.3f}). Before its first step {first_mse:.4f}:"
)
_KILLS = (
    "SIGKILL of a random rank at {kills} random moments: {starting} while starting, {training} "
    "while training, {saving} while saving"
)
_AGREEMENT = (
    "float64: outputs to {float64.output:.1e}, gradients to {float64.gradients:.1e}; "
    "float32: outputs to {float32.output:.1e}, gradients to {float32.gradients:.1e}"
)
_DEDUP = "duplicate search over {n_cells:,} cells |"


def _bounded(path: str) -> str:
    """Return a figure of a table with its bounds, as a text with fields."""
    return f"{{{path}:.3f}} [{{{path}_low:.3f}}, {{{path}_high:.3f}}]"


SENTENCES = [
    Sentence(README, "demo", "used model: about {minutes:.0f} minutes on 2 cores"),
    Sentence(README, "demo", _DEMO),
    Sentence(
        MEASURED,
        "demo",
        "{n_cells} cells, {steps} steps of {batch} | 2 CPU cores, {world_size} processes, "
        "{minutes:.1f} minutes | {commit:.7} | " + _DEMO,
    ),
    Sentence(README, "random_kills", _KILLS),
    Sentence(
        MEASURED,
        "random_kills",
        _KILLS + " (`python -m benchmarks.random_kills`) | `sclong_tiny` at {genes} genes, {steps} "
        "steps | {ranks} CPU processes | {commit:.7} |",
    ),
    Sentence(
        MEASURED,
        "elastic_runs",
        "`sclong_tiny` at {genes} genes, {steps} steps, fp32 | CPU | {commit:.7} | same cells, "
        "targets, learning rates; losses within {most.loss:.1e}, weights within {most.weights:.1e}",
    ),
    Sentence(
        MEASURED,
        "host_time",
        "{layers} layers of width 16: Python, autograd and hooks alone | one CPU core | "
        "{commit:.7} | CPU ms forward and backward: plain {cases.plain.total_ms:.0f}; "
        "ZeRO-1 {cases.zero1.total_ms:.0f}; ZeRO-2 {cases.zero2.total_ms:.0f}; ZeRO-3 "
        "{cases.zero3 by module.total_ms:.0f} where each module's weights are gathered by "
        "themselves, {cases.zero3.total_ms:.0f} as shipped ({cases.zero3.over_zero1:.2f} times "
        "ZeRO-1; "
        "{cases.zero3.forward_calls/46:,.0f} + {cases.zero3.backward_calls/46:,.0f} Python calls a "
        "layer), {cases.zero3 compiled.total_ms:.0f} compiled",
    ),
    Sentence(
        MEASURED,
        "compiled_cpu",
        "| {commit:.7} | not faster on a CPU, so off by default: eager over compiled "
        "{sclong_tiny.ratio:.2f} (quartiles {sclong_tiny.quartiles.0:.2f} to "
        "{sclong_tiny.quartiles.1:.2f}) and {sclong_100m.ratio:.2f} "
        "({sclong_100m.quartiles.0:.2f} to {sclong_100m.quartiles.1:.2f})",
    ),
    Sentence(
        MEASURED,
        "cpu_step",
        "| {commit:.7} | CPU seconds (peak GiB): literal {median.literal.total_s:.1f} "
        "({median.literal.peak_gib:.1f}); like for like {median.like for like.total_s:.1f} "
        "({median.like for like.peak_gib:.1f}), with `engine.linear_products=bf16` "
        "{median.like for like, bf16.total_s:.1f} ({median.like for like, bf16.peak_gib:.1f}), "
        "{median.like for like, bf16.ratio:.1f} times as fast; as trained, where hidden genes "
        "alone are predicted, {median.as trained.total_s:.1f} ({median.as trained.peak_gib:.1f}), "
        "with bf16 {median.as trained, bf16.total_s:.1f} ({median.as trained, bf16.peak_gib:.1f}), "
        "{median.as trained, bf16.ratio:.1f} times as fast; with `model.routing=expressed` too, as "
        "the recommended presets have it, {median.expressed, bf16.total_s:.1f} "
        "({median.expressed, bf16.peak_gib:.1f}), {median.expressed, bf16.ratio:.1f} times",
    ),
    Sentence(
        MEASURED,
        "fewer_bits",
        "{seeds} seeds, {steps} steps of 8 cells | one CPU core beside other work | {commit:.7} | "
        "MSE of hidden values in fp32 {mse.precision:.4f}; times that: bf16 {times.bf16.mean:.4f} "
        "[{times.bf16.low:.4f}, {times.bf16.high:.4f}], 8 bits {times.fp8.mean:.4f} "
        "[{times.fp8.low:.4f}, {times.fp8.high:.4f}]",
    ),
    Sentence(
        MEASURED,
        "rank_memory",
        "{runs} runs of small models: ZeRO-1, 2, 3, offload, bf16, recomputed | 2 CPU processes | "
        "{commit:.7} | measured {least:.2f} to {most:.2f} times the prediction",
    ),
    Sentence(
        MEASURED,
        "partitioned_build",
        "`sclong_1b` ({parameters:,} parameters) | built under ZeRO-3, fp32 "
        "(`python -m benchmarks.partitioned_build`) | {ranks} CPU processes | {commit:.7} | "
        "{own_pages.peak_bytes/1e9:.2f} GB a process at the peak ({default.peak_bytes/1e9:.2f} GB "
        "with glibc's default allocator), of {model_bytes/1e9:.2f} GB for the model",
    ),
    Sentence(README, "agreement", _AGREEMENT),
    Sentence(
        MEASURED,
        "agreement",
        "{goldens} models, {cases} batches, outputs, encodings, loss, gradients | CPU | "
        "{commit:.7} | " + _AGREEMENT,
    ),
    Sentence(
        MEASURED,
        "import_memory",
        "| {commit:.7} | {seconds:.0f} s, peak {peak_bytes/1e9:.1f} GB, {ratio:.2f} times the "
        "weights (`python -m benchmarks.import_memory`); the model then opens in "
        "{opened.opened_s:.1f} s, {opened.opened_cpu_s:.1f} CPU s, with every checksum compared",
    ),
    Sentence(
        MEASURED,
        "simulate_datasets",
        "data preparation, {n_datasets:,} made datasets of mixed formats, {statuses.excluded} not "
        "usable and {statuses.failed} broken on purpose | {tasks} array tasks | 2 CPU cores | "
        "{commit:.7} | convert {costs.convert.wall_s/1618:.2f} s a dataset, finalize "
        "{costs.finalize.wall_s:.0f} s",
    ),
    Sentence(
        MEASURED,
        "convert_pair",
        "| {commit:.7} | {1 x 10,000 cells.cpu_s.ratio:.2f} and "
        "{8 x 1,000 cells, 2 jobs.cpu_s.ratio:.2f} times (5 rounds, paired)",
    ),
    Sentence(
        MEASURED,
        "loader_pair",
        "| {commit:.7} | packed {packed.ratio:.2f} ({packed.here:.2f} µs a cell), csr "
        "{csr.ratio:.2f}, dense {dense.ratio:.2f}, dense_norm {dense_norm.ratio:.2f} times",
    ),
    Sentence(
        MEASURED,
        "use_model",
        "one CPU core | {commit:.7} | accuracy: frozen "
        + _bounded("finetune.frozen.rows.fine-tuned.accuracy")
        + ", head "
        + _bounded("finetune.head.rows.fine-tuned.accuracy")
        + ", LoRA (one seed, 3 passes) "
        + _bounded("finetune.lora.rows.fine-tuned.accuracy")
        + "; logistic regression on PCA "
        + _bounded("finetune.frozen.rows.logistic on PCA.accuracy")
        + ", on `X_sclong` "
        + _bounded("finetune.frozen.rows.logistic on X_sclong.accuracy"),
    ),
    Sentence(
        MEASURED,
        "use_model",
        "one CPU core | {commit:.7} | accuracy of the 15 nearest cells of other groups: `X_sclong` "
        + _bounded("evaluate.rows.sclong.knn_accuracy")
        + ", PCA "
        + _bounded("evaluate.rows.pca.knn_accuracy")
        + ", depth "
        + _bounded("evaluate.rows.depth.knn_accuracy")
        + ", untrained weights "
        + _bounded("evaluate.rows.untrained.knn_accuracy"),
    ),
    Sentence(
        MEASURED,
        "use_model",
        "one CPU core | {commit:.7} | GO, area under the ROC curve: the graph itself "
        "{genes.GO.gene_graph.auroc:.3f}, gene vectors {genes.GO.gene_vectors.auroc:.3f}, "
        "contextual {genes.GO.contextual.auroc:.3f}, SVD of the values "
        "{genes.GO.svd_of_values.auroc:.3f}, expression level "
        "{genes.GO.expression_level.auroc:.3f} (no term was held out); known sets: graph "
        "{genes.known sets.gene_graph.auroc:.3f}, contextual "
        "{genes.known sets.contextual.auroc:.3f} [{genes.known sets.contextual.low:.3f}, "
        "{genes.known sets.contextual.high:.3f}], SVD {genes.known sets.svd_of_values.auroc:.3f} "
        "[{genes.known sets.svd_of_values.low:.3f}, {genes.known sets.svd_of_values.high:.3f}], "
        "gene vectors {genes.known sets.gene_vectors.auroc:.3f}",
    ),
    Sentence(
        MEASURED,
        "use_model",
        "one CPU core | {commit:.7} | p of the embedding's shift against random genes of like "
        "expression: CD3E {perturb.rows.CD3E.p:.2f}, IL7R {perturb.rows.IL7R.p:.2f}, B2M "
        "{perturb.rows.B2M.p:.2f}, CD3E with CD3D {perturb.rows.CD3E,CD3D.p:.2f}",
    ),
    Sentence(
        MEASURED,
        "loader",
        "{n_cells:,} made cells, batches of {settings.batch}, {settings.rounds} rounds | 1 CPU "
        "core | {commit:.7} | model-ready in memory that is used again "
        "{race.14.cells_per_cpu_s:,.0f}, {gates.0.value:.1f} times the fastest other; that can be "
        "kept (`CellLoader(owned=True)`) {race.15.cells_per_cpu_s:,.0f}, {gates.1.value:.1f} "
        "times; sparse that can be kept {race.11.cells_per_cpu_s:,.0f}, {gates.2.value:.1f} times",
    ),
    Sentence(README, "dedup", _DEDUP),
    Sentence(README, "dedup", "{seconds:.0f} s, {peak_rss_mib:,.0f} MiB of memory"),
    Sentence(MEASURED, "dedup", _DEDUP),
    Sentence(
        MEASURED,
        "dedup",
        "| {commit:.7} | {seconds:.0f} s (`python -m benchmarks.dedup`); MiB of memory at the "
        "peak: {peak_rss_mib:,.0f}, of scratch files: {scratch_mib:,.0f}",
    ),
    Sentence(
        MEASURED,
        "tracking_outage",
        "{steps} steps, {counts.logged:,} values with the node's | 2 CPU cores | {commit:.7} | "
        "{counts.replayed} values replayed",
    ),
    Sentence(
        MEASURED,
        "atlas",
        "| {commit:.7} | {finalize, 1 tasks.n_cells:,} of the cells: convert {convert.cpu_s:.0f} "
        "CPU s; finalize with 1, 4, 16 tasks: the same "
        "bytes, {finalize, 1 tasks.cpu_s:.0f}, {finalize, 4 tasks.cpu_s:.0f}, "
        "{finalize, 16 tasks.cpu_s:.0f} CPU s in all, {finalize, 1 tasks.busiest_cpu_s:.0f}, "
        "{finalize, 4 tasks.busiest_cpu_s:.1f}, {finalize, 16 tasks.busiest_cpu_s:.1f} of the "
        "busiest task",
    ),
    Sentence(
        MEASURED,
        "atlas",
        "{finalize, 1 tasks.dropped} copies left out; grown to {grow.n_cells:,} cells, "
        "{grow.dropped} copies left out in all: {grow.cpu_s:.0f} CPU s, "
        "{grow.cells_rewritten_bytes} bytes of cells rewritten",
    ),
    Sentence(
        MEASURED,
        "atlas_tables",
        "| {commit:.7} | opened in {open_s:.1f} s; annotations of 1,000 random cells in ten "
        "columns {random_obs_s:.2f} s; a resume at a random position of ten epochs, order "
        "included: {resume.uniform.median_s:.2f} s uniform, "
        "{resume.dataset.median_s:.2f} balanced by dataset, "
        "{resume.cell_type.median_s:.2f} by cell type (medians of 20; slowest "
        "{resume.uniform.slowest_s:.1f}, {resume.dataset.slowest_s:.1f}, "
        "{resume.cell_type.slowest_s:.1f})",
    ),
    Sentence(
        MEASURED,
        "favor_cpu",
        "takes {median.ours.total_s:.1f} s against {median.literal.total_s:.1f} s of literal "
        "Performer code, in {median.ours.working_mib:.0f} MiB\nof working memory instead of "
        "{median.literal.working_mib:,.0f} (`python -m benchmarks.favor_cpu`)",
    ),
    Sentence(
        "docs/start/prepare-a-corpus.md",
        "corpus_start",
        "Opening {n_cells:,} cells takes {stages.open the corpus.seconds:.1f} s and "
        "{private_mib:.0f} MiB of a rank's own memory",
    ),
    Sentence(
        "docs/start/prepare-a-corpus.md",
        "corpus_start",
        "({n_cells:,} cells: {stages.checks of the tables of training.cpu_s:.1f} s of CPU",
    ),
    Sentence(
        "docs/start/prepare-a-corpus.md",
        "reader_memory",
        "{cells:,} cells of 27,874\n  genes convert in at most {most_mb/1e3:.1f} GB of memory",
    ),
    Sentence(
        "docs/start/train-on-one-gpu.md",
        "visits",
        "After {seconds:.0f} CPU seconds on the demo's cells, MSE of the hidden values of 64 "
        "held-out cells, two seeds: {hidden_mse.seed_0.zeros-256:.3f} and\n"
        "{hidden_mse.seed_1.zeros-256:.3f}, with all genes {hidden_mse.seed_0.all:.3f} and "
        "{hidden_mse.seed_1.all:.3f} (`python -m benchmarks.visits`)",
    ),
]
"""In the order of the pages. What stands in measured.md or README.md beside these was measured by a
test (Slurm), by a study that takes hours (docs/explain/recipe.md), or beside a commit of before."""


_NUMBER = r"-?\d[\d.,]*(?:e[+-]?\d+)?(?<![.,])"
_TEXTS = {"commit": r"[0-9a-f]{7,12}", "standing": r"[a-z ]+ \([^()]*\)"}
"""Fields that are no numbers."""


class _Paths(string.Formatter):
    """Takes `a.b` or `a.0` as an item of a, and `a/2` as half of it."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:
        path, _, divisor = field_name.partition("/")
        value: Any = kwargs
        for part in path.split("."):
            value = value[int(part) if isinstance(value, list) else part]
        return (value / float(divisor) if divisor else value), field_name

    def format_field(self, value: Any, format_spec: str) -> str:
        # As people write it: 3e-7, not 3e-07.
        return re.sub(r"e([+-])0(\d)$", r"e\1\2", str(super().format_field(value, format_spec)))


def read_result(name: str) -> dict[str, Any]:
    """Return a written result: the whole document."""
    document = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def expected(sentence: Sentence) -> str:
    """Return the text with the figures of its result.

    Raises:
        FileNotFoundError: There is no result yet.
    """
    document = read_result(sentence.result)
    return _Paths().vformat(sentence.text, (), {"commit": document["commit"], **document["result"]})


def pattern(sentence: Sentence) -> re.Pattern[str]:
    """Return what finds the text in its page, whatever its figures are."""
    parts = string.Formatter().parse(sentence.text)
    return re.compile(
        "".join(
            re.escape(literal) + ("" if field is None else _TEXTS.get(field, _NUMBER))
            for literal, field, _, _ in parts
        )
    )


def main() -> int:
    """Put the figures into the pages; return the exit status."""
    status = 0
    for sentence in SENTENCES:
        page = ROOT / sentence.page
        text = page.read_text(encoding="utf-8")
        new, count = pattern(sentence).subn(expected(sentence), text)
        if count != 1:
            sys.stderr.write(f"error: {sentence.page} has {count} times: {sentence.text}\n")
            status = 1
        elif new != text:
            page.write_text(new, encoding="utf-8")
            sys.stdout.write(f"{sentence.page}: {expected(sentence)}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())

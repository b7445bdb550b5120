"""`python -m sclong_ds COMMAND`: dispatch to the module of the command.

It is imported only then.
"""

from __future__ import annotations

import argparse
import logging
import os
import runpy
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from sclong_ds import __version__
from sclong_ds.command_line import add_example, missing_package, parse_arguments

COMMANDS = {
    "config": ("sclong_ds.config.show", "print all keys of a preset or file, as YAML to edit"),
    "plan": (
        "sclong_ds.planning.plan",
        "estimate memory, FLOPs and GPU-hours of a run before it is submitted",
    ),
    "bench-loader": (
        "sclong_ds.loader.bench",
        "measure how many cells a second this machine can read",
    ),
    "export": ("sclong_ds.exported.export", "write a checkpoint as a model folder (safetensors)"),
    "import-reference": (
        "sclong_ds.released.import_reference",
        "write a published scLong checkpoint as a model folder",
    ),
    "embed": ("sclong_ds.embedding.embed", "embed cells, into a new AnnData file"),
    "perturb": (
        "sclong_ds.embedding.perturb",
        "measure what moves in a model when genes of cells are changed",
    ),
    "perturb-bench": (
        "sclong_ds.perturb_bench.bench",
        "score predicted effects of unseen perturbations beside simple predictors",
    ),
    "genes": (
        "sclong_ds.gene_analysis.genes",
        "write vectors and networks of genes, with scores beside controls",
    ),
    "evaluate": (
        "sclong_ds.evaluation.evaluate",
        "score embeddings without training, against baselines",
    ),
    "finetune": (
        "sclong_ds.finetune.command",
        "train a model, or a head on it, on labelled cells, beside baselines",
    ),
    "verify": (
        "sclong_ds.exported.verify",
        "compare a run, checkpoint or model with its checksums",
    ),
    "status": ("sclong_ds.report.status", "print how a run is doing, from its files"),
    "report": ("sclong_ds.report.report", "write one HTML page about a run, or about several"),
    "compare": (
        "sclong_ds.report.compare",
        "print settings and figures of several runs, side by side",
    ),
    "slurm": ("sclong_ds.job.scripts", "write the batch scripts for Slurm into a folder"),
    "ui": ("sclong_ds.tracking.ui", "open MLflow's pages of the runs of a folder in the browser"),
    "sync": ("sclong_ds.tracking.sync", "send MLflow what it lacks of a run that is over"),
    "push": ("sclong_ds.hub.hub", "send an exported model to the Hugging Face hub"),
    "log-model": (
        "sclong_ds.embedding.mlflow_model",
        "log an exported model to MLflow, and to its registry",
    ),
    "completion": ("sclong_ds.completion", "print the completion of a shell for both programs"),
}
"""Command to module and help; a module has add_arguments(parser) and run(args)."""
EXAMPLES = {
    "config": "sclong_tiny > mine.yaml",
    "plan": "--config sclong_1b --nodes 16 --gpus-per-node 8",
    "bench-loader": "corpus --ranks 8 --json loader.json",
    "export": "runs/first --out model",
    "import-reference": "--checkpoint X.pth --hyper-params X.pkl --genes X.txt --out model",
    "embed": "model cells.h5ad --out embedded.h5ad",
    "perturb": "model cells.h5ad --genes GATA1 --mode delete --out effects.tsv",
    "perturb-bench": "model screen.h5ad --perturbation guide --control none --out scores.tsv",
    "genes": "model --out genes.h5ad --benchmark",
    "evaluate": "model cells.h5ad --label cell_type --out scores",
    "finetune": "model cells.h5ad --label cell_type --group donor --out typed",
    "verify": "runs/first",
    "status": "runs/first",
    "report": "runs/first --out report.html",
    "compare": "runs/first runs/second",
    "slurm": "jobs",
    "ui": "runs --open",
    "sync": "runs/first",
    "push": "model my-lab/my-model --private",
    "log-model": "model --run runs/first --register sclong",
    "completion": "bash >> ~/.bashrc",
}
"""Command to an example of its arguments."""
ARGUMENTS = {
    "plan": "sclong_ds.planning.arguments",
    "export": "sclong_ds.exported.arguments",
    "import-reference": "sclong_ds.released.arguments",
    "embed": "sclong_ds.embedding.embed_arguments",
    "perturb": "sclong_ds.embedding.perturb_arguments",
    "perturb-bench": "sclong_ds.perturb_bench.arguments",
    "genes": "sclong_ds.gene_analysis.arguments",
    "evaluate": "sclong_ds.evaluation.evaluate_arguments",
    "finetune": "sclong_ds.finetune.arguments",
    "report": "sclong_ds.report.arguments",
}
"""Modules that have the add_arguments of commands whose own take long to import."""


def prepare_data() -> int:
    """Run a command of `data_prep`; the installed program `sclong-prep`."""
    from data_prep.__main__ import main as data_prep

    return data_prep()


FORWARDED = {
    "train": (
        "sclong_ds.pretrain",
        "pretrain on one rank; for more: deepspeed --module sclong_ds.pretrain",
    ),
    "prep": ("data_prep.__main__", "prepare datasets for pretraining, as sclong-prep does"),
}
"""Commands that another program's module runs with the words behind them."""
_READ_FIRST = ("input", "checkpoint", "hyper_params", "genes")
"""Arguments that, where they are paths, name what a command reads before all else."""
_NO_RANKS = frozenset({"export", "plan"})
"""Commands that import DeepSpeed and train nothing: on import it looks for an accelerator, and it
warns where there is none."""
_JOINS_RANKS = {"finetune"}
"""Commands whose process ends as a rank must, see `sclong_ds.job.failures.run_to_end`."""


def parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser; only the command in `argv` is imported and has its arguments."""
    parser = argparse.ArgumentParser(
        prog="sclong" if Path(sys.argv[0]).name == "sclong" else "python -m sclong_ds",
        description="Pretrain, look into and use models of single cells.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in FORWARDED.items():
        commands.add_parser(name, help=text)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if list(argv[:1]) == [name]:
            import_module(ARGUMENTS.get(name, module)).add_arguments(command)
            add_example(command, EXAMPLES[name])
    return parser


def _refuse_missing(args: argparse.Namespace) -> None:
    """Refuse a model or an input that is not there, before seconds go by with the imports.

    Raises:
        FileNotFoundError: There is no such model folder or input.
    """
    if isinstance(folder := getattr(args, "model_dir", None), Path):
        import_module("sclong_ds.exported.manifest").refuse_other_folder(folder)
    for name in _READ_FIRST:
        if isinstance(path := getattr(args, name, None), Path) and not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 bad usage."""
    own_process = argv is None
    # The deepspeed launcher puts --local_rank=N in front; ranks read the environment.
    words = sys.argv[1:] if argv is None else argv
    argv = [word for word in words if not word.startswith("--local_rank=")]
    if own_process and argv and argv[0] in FORWARDED:
        sys.argv = [sys.argv[0], *argv[1:]]
        runpy.run_module(FORWARDED[argv[0]][0], run_name="__main__", alter_sys=True)
    args = parse_arguments(parser(argv), argv)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    try:
        _refuse_missing(args)
        if own_process and args.command in _NO_RANKS:
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        status = import_module(COMMANDS[args.command][0]).run(args)
        if own_process and args.command in _JOINS_RANKS:
            import_module("sclong_ds.job.failures").run_to_end(lambda: status)
        return int(status)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        line = missing_package(error, prefer=args.command)
        if line is None:
            raise  # not of an extra: a fault, to be seen whole
        print(f"error: {line}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

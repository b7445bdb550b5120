"""`python -m sclong_ds COMMAND`: dispatch to the module of the command.

It is imported only then.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from sclong_ds import __version__
from sclong_ds.command_line import missing_package, parse_arguments

COMMANDS = {
    "config": ("sclong_ds.config.show", "all keys of a preset or file, as YAML to edit"),
    "plan": (
        "sclong_ds.planning.plan",
        "memory, FLOPs and GPU-hours of a run, before submitting it",
    ),
    "bench-loader": ("sclong_ds.loader.bench", "cells a second that this machine can read"),
    "export": ("sclong_ds.exported.export", "checkpoint to a model folder (safetensors)"),
    "import-reference": (
        "sclong_ds.released.import_reference",
        "published scLong checkpoint to a model folder",
    ),
    "embed": ("sclong_ds.embedding.embed", "cells to embeddings, AnnData out"),
    "perturb": (
        "sclong_ds.embedding.perturb",
        "what moves in a model when genes of cells are changed",
    ),
    "perturb-bench": (
        "sclong_ds.perturb_bench.bench",
        "effects of unseen perturbations, predicted beside simple predictors",
    ),
    "genes": (
        "sclong_ds.gene_analysis.genes",
        "vectors of genes, networks of them, and scores beside controls",
    ),
    "evaluate": (
        "sclong_ds.evaluation.evaluate",
        "zero-shot scores of embeddings against baselines",
    ),
    "finetune": (
        "sclong_ds.finetune.command",
        "train a model, or a head on it, on labelled cells, beside baselines",
    ),
    "verify": ("sclong_ds.exported.verify", "a run, checkpoint or model against its checksums"),
    "status": ("sclong_ds.report.status", "how a run is doing, from its files"),
    "report": ("sclong_ds.report.report", "one HTML page about a run, or about several"),
    "compare": ("sclong_ds.report.compare", "settings and figures of several runs, side by side"),
    "slurm": ("sclong_ds.job.scripts", "the batch scripts for Slurm, into a folder"),
    "ui": ("sclong_ds.tracking.ui", "MLflow's pages of the runs of a folder, in the browser"),
    "sync": ("sclong_ds.tracking.sync", "what MLflow lacks of a run that is over"),
    "push": ("sclong_ds.hub.hub", "exported model to the Hugging Face hub"),
    "log-model": (
        "sclong_ds.embedding.mlflow_model",
        "exported model to MLflow, and to its registry",
    ),
}
"""Command to module and help; a module has add_arguments(parser) and run(args)."""
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


_JOINS_RANKS = {"finetune"}
"""Commands whose process ends as a rank must, see `sclong_ds.job.failures.run_to_end`."""


def parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser; only the command in `argv` is imported and has its arguments."""
    parser = argparse.ArgumentParser(
        prog="sclong" if Path(sys.argv[0]).name == "sclong" else "python -m sclong_ds",
        description="Train with `deepspeed --module sclong_ds.pretrain`; "
        "these commands go with it.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if list(argv[:1]) == [name]:
            import_module(ARGUMENTS.get(name, module)).add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1 failed, 2 bad usage."""
    own_process = argv is None
    # The deepspeed launcher puts --local_rank=N in front; ranks read the environment.
    words = sys.argv[1:] if argv is None else argv
    argv = [word for word in words if not word.startswith("--local_rank=")]
    args = parse_arguments(parser(argv), argv)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    try:
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

"""Arguments of `python -m sclong_ds finetune`, apart from its work: `--help` needs no library."""

from __future__ import annotations

import argparse

from sclong_ds.command_line import new_folder, positive_share, share, whole
from sclong_ds.embedding.embed_arguments import add_input_arguments

MODES = ("frozen", "head", "lora", "all")
STACKS = ("large_encoder", "mini_encoder", "decoder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m sclong_ds finetune`."""
    add_input_arguments(parser)
    add = parser.add_argument
    add("--label", required=True, metavar="KEY", help="obs column to learn: labels, or numbers")
    add(
        "--group",
        required=True,
        metavar="KEY",
        help="obs column with donors or datasets: folds are of whole groups",
    )
    add("--out", type=new_folder, required=True, metavar="DIR", help="folder to make or to resume")
    add(
        "--mode",
        choices=MODES,
        default="frozen",
        help="what is trained: a head on the model's embedding (frozen), a head on six pooled "
        "layers of it (head), that head and low-rank additions to the stacks (lora), or "
        "everything (all) (default %(default)s)",
    )
    add(
        "--regress",
        action="store_true",
        help="the column holds numbers (age, dose) to predict, not labels",
    )
    _add_fitting(parser)
    add("--no-counts", action="store_true", help="leave the counts out of predictions.h5ad")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings of the sections optim, engine, checkpoint and tracking of a training run, "
        "for instance optim.lr=1e-3 engine.train_batch_size=64 tracking.enabled=false",
    )


def _add_fitting(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of folds, seeds, stopping and LoRA."""
    add = parser.add_argument
    add("--folds", type=whole(3), default=5, metavar="N", help="folds (default %(default)s)")
    add("--seeds", type=whole(1), default=3, metavar="N", help="seeds (default %(default)s)")
    add("--seed", type=whole(0), default=0, metavar="N", help="first seed (default %(default)s)")
    add(
        "--balance",
        choices=("balanced", "none"),
        default="balanced",
        help="weight cells by how rare their label is (default %(default)s)",
    )
    add(
        "--max-epochs",
        type=whole(1),
        metavar="N",
        help="most passes over the training cells (default: frozen and head 200, lora and all 20)",
    )
    add(
        "--patience",
        type=whole(1),
        metavar="N",
        help="passes without a better loss on the held-out groups that end a fit (default: "
        "frozen and head 20, lora and all 3)",
    )
    _add_head(parser)


def _add_head(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of heads, unknown cells and LoRA."""
    add = parser.add_argument
    add(
        "--unknown-rate",
        type=share,
        default=0.05,
        metavar="SHARE",
        help="share of the held-out cells that are right which may be called unknown; 0 calls "
        "none (default %(default)s)",
    )
    add(
        "--hidden",
        type=whole(0),
        default=0,
        metavar="N",
        help="width of a hidden layer of the head; 0: the head is linear (default %(default)s)",
    )
    add(
        "--dropout",
        type=share,
        default=0.1,
        metavar="SHARE",
        help="of the hidden layer (default %(default)s)",
    )
    add(
        "--penalty",
        type=share,
        default=0.01,
        metavar="FACTOR",
        help="on the squared weights of the head (default %(default)s)",
    )
    add(
        "--stacks",
        default=",".join(STACKS),
        metavar="NAMES",
        help="stacks that lora adds to, with commas (default %(default)s)",
    )
    add("--rank", type=whole(1), default=8, metavar="N", help="rank of lora (default %(default)s)")
    add(
        "--lora-scale",
        type=positive_share,
        default=1.0,
        metavar="FACTOR",
        help="factor on what lora adds (default %(default)s)",
    )

"""`verify`: check a run, a checkpoint or an exported model against what was recorded of it.

    python -m sclong_ds verify RUN_DIR|CHECKPOINT_DIR|MODEL_DIR [--json]

Reads every byte, changes nothing. Prints which links of the chain were checked, and one line per
problem. Exit status: 0 sound, 1 problems or nothing to verify. The corpus has a command of its own,
`python -m data_prep verify`.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from sclong_ds.checkpoint import on_disk as checkpoint_files
from sclong_ds.checkpoint.state import read_state
from sclong_ds.command_line import local_path
from sclong_ds.config.strict_yaml import read_yaml
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.exported import manifest as model_manifest
from sclong_ds.files.atomic import file_sha256, is_partial, listed
from sclong_ds.files.json_lines import damaged_lines
from sclong_ds.files.sealed_json import CHECKSUM, read_object, read_sealed
from sclong_ds.page.words import counted
from sclong_ds.progress import count_progress
from sclong_ds.run_folder.files import EVENTS_FILE, METRICS_FILE, RUN_FILE, SYSTEM_DIR
from sclong_ds.run_folder.seal import changes

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Findings:
    """What was checked, and what is wrong."""

    path: str
    """What was verified."""
    kind: str
    """run, checkpoint or model."""
    checked: list[str] = field(default_factory=list)
    """Links that were checked."""
    unchecked: list[str] = field(default_factory=list)
    """Links that cannot be checked here, and files that are not part of it."""
    problems: list[str] = field(default_factory=list)
    """One line each."""


def verify(path: Path) -> Findings:
    """Check a run folder, a checkpoint or an exported model.

    Args:
        path: The folder.

    Raises:
        FileNotFoundError: It is none of these.
    """
    if not path.is_dir():
        fault = "is a file; give a model or run folder" if path.exists() else "no such folder"
        raise FileNotFoundError(f"{path}: {fault}")
    if (path / model_manifest.WEIGHTS).is_file() or (
        (path / model_manifest.MANIFEST).is_file() and (path / "provenance.json").is_file()
    ):
        findings = Findings(str(path), "model")
        _verify_model(path, findings)
    elif path.name.startswith("step_") or (path / "state.json").is_file():
        findings = Findings(str(path), "checkpoint")
        _verify_checkpoint(path, findings)
    elif (path / "checkpoints").is_dir() or (path / RUN_FILE).is_file():
        findings = Findings(str(path), "run")
        _verify_run(path, findings)
    else:
        raise FileNotFoundError(
            f"{path}: neither a run folder nor a checkpoint nor an exported model; "
            f"a corpus is checked by `python -m data_prep verify`"
        )
    return findings


def _verify_model(folder: Path, findings: Findings) -> None:
    try:
        manifest = model_manifest.read_manifest(folder)
        config = read_yaml(folder / "config.yaml")
    except (ValueError, FileNotFoundError) as error:
        findings.problems.append(str(error))
        return
    if manifest is None and config.get("version") != 2:
        findings.problems.append(f"{folder / model_manifest.MANIFEST}: missing")
    elif manifest is None:
        findings.unchecked.append("files: format version 2 has no manifest to compare with")
    else:
        total = sum(record["bytes"] for record in manifest["files"].values())
        with count_progress("verify", total, "B") as on_bytes:
            findings.problems += model_manifest.problems(folder, manifest, on_bytes=on_bytes)
        n_files = len(manifest["files"])
        findings.checked.append(
            f"manifest.json (its own checksum) -> {counted(n_files, 'file')}: size, "
            "CRC-32C, SHA-256"
        )
    findings.problems += _not_finite(folder / model_manifest.WEIGHTS)
    findings.checked.append(f"{model_manifest.WEIGHTS}: all weights are finite")
    _compare_genes(folder / "genes.tsv", config.get("genes_hash"), findings, source="config.yaml")
    findings.unchecked.append("the checkpoint and the corpus that provenance.json names")


def _not_finite(path: Path) -> list[str]:
    """Return the weights of a safetensors file that are not finite, a line each."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            # Two numbers a weight, NaN if any is.
            found = {
                name: (np.min(weight), np.max(weight))
                for name in file.keys()
                if (weight := file.get_tensor(name)).size
            }
    except (SafetensorError, OSError) as error:
        return [f"{path}: not read ({error})"]
    return [
        f"{path}: {name} holds NaN or inf"
        for name, bounds in found.items()
        if not all(map(math.isfinite, bounds))
    ]


def _compare_genes(path: Path, expected: object, findings: Findings, *, source: str) -> None:
    try:
        found = GeneVocabulary.read(path).hash
    except (ValueError, OSError) as error:
        findings.problems.append(str(error))
        return
    findings.checked.append(f"{source} -> genes.tsv: hash of the vocabulary")
    if found != expected:
        findings.problems.append(f"{path}: its hash {found[:12]} is not the one in {source}")


def _verify_checkpoint(folder: Path, findings: Findings) -> None:
    try:
        problem = checkpoint_files.damage(folder)
        if problem is not None:
            findings.problems.append(f"{folder}: {problem}")
            return
        manifest = checkpoint_files.read_manifest(folder)
        state = read_state(folder)
    except ValueError as error:
        findings.problems.append(str(error))
        return
    findings.checked.append(
        f"{folder.name}: manifest.json{' (its own checksum)' if manifest.digest else ''} -> "
        f"{counted(len(manifest.files), 'file')} of {counted(state.world_size, 'rank')}, "
        f"ZeRO stage {state.zero_stage}: "
        f"size, {manifest.crc}"
    )
    for name in checkpoint_files.extra_files(folder, manifest):
        findings.problems.append(f"{folder / name}: not in the manifest")
    _compare_genes(
        folder / "genes.tsv", state.genes_hash, findings, source=f"{folder.name}: state.json"
    )
    for name, expected in (
        ("gene_graph.npz", state.graph_hash),
        ("random_features.safetensors", state.features_hash),
    ):
        if expected is not None:
            findings.checked.append(f"{folder.name}: state.json -> {name}: SHA-256")
            if file_sha256(folder / name) != expected:
                findings.problems.append(f"{folder / name}: its SHA-256 is not that of state.json")
    from sclong_ds.checkpoint.torch_files import refuse_code

    findings.checked.append(f"{folder.name}: the *.pt files name tensors and plain values only")
    for path in (path for path in listed(folder) if path.suffix == ".pt"):
        try:
            refuse_code([path])
        except ValueError as error:
            findings.problems.append(str(error))
    findings.unchecked.append(f"{folder.name}: corpus {state.corpus_hash[:12]}, named by its hash")


def _verify_run(folder: Path, findings: Findings) -> None:
    checkpoints = folder / "checkpoints"
    found = checkpoint_files.complete_checkpoints(checkpoints)
    total = sum(p.stat().st_size for c in found for p in c.rglob("*") if p.is_file())
    with count_progress("verify", total, "B") as on_bytes:
        for checkpoint in reversed(found):
            _verify_checkpoint(checkpoint, findings)
            on_bytes(sum(p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()))
    known = {path.name for path in found} | {checkpoint_files.BEST, "latest"}
    for path in sorted(checkpoints.iterdir()) if checkpoints.is_dir() else []:
        if path.name not in known:
            findings.unchecked.append(f"{path}: {_what_else(path)}")
    _verify_best(checkpoints, findings)
    _verify_records(folder, findings)


def _what_else(path: Path) -> str:
    """Return what a name beside the checkpoints is."""
    if path.name.endswith(".partial") or is_partial(path):
        return "unfinished, removed by the next start"
    if path.name.endswith(".damaged"):
        return "set aside as damaged"
    return "not of this run"


def _verify_best(checkpoints: Path, findings: Findings) -> None:
    path = checkpoints / checkpoint_files.BEST
    if not path.is_file():
        return
    try:
        name, by = checkpoint_files.read_best(path)
    except ValueError as error:
        findings.problems.append(str(error))
        return
    findings.checked.append("best.json: its own checksum, and the checkpoint that it names")
    if not (checkpoints / name).is_dir():
        findings.problems.append(
            f"{path}: names {name} ({by.figure} {by.value:.4g}), which is not there"
        )


def _verify_records(folder: Path, findings: Findings) -> None:
    """Check the files that a run writes about itself."""
    try:
        if CHECKSUM in read_object(folder / RUN_FILE):
            read_sealed(folder / RUN_FILE)
            findings.checked.append(f"{RUN_FILE}: its own checksum")
        else:
            findings.unchecked.append(f"{RUN_FILE}: of a version without checksums")
    except (ValueError, OSError) as error:
        findings.problems.append(str(error))
    findings.checked.append(f"{RUN_FILE}: its seal -> size and CRC-32C of the run's other files")
    findings.problems += changes(folder)
    files = [folder / METRICS_FILE, folder / EVENTS_FILE]
    for path in [*files, *sorted((folder / SYSTEM_DIR).glob("*.jsonl"))]:
        if path.is_file():
            bad, unsealed = damaged_lines(path)
            findings.checked.append(f"{path.relative_to(folder)}: a checksum for every row")
            if unsealed:
                findings.unchecked.append(
                    f"{path.relative_to(folder)}: {unsealed} rows without one"
                )
            findings.problems += [f"{path}: line {number} is damaged" for number in bad]
    try:
        read_yaml(folder / "config.yaml")
    except (ValueError, OSError) as error:
        findings.problems.append(str(error))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `python -m sclong_ds verify`."""
    parser.add_argument(
        "path", type=local_path, metavar="RUN|CHECKPOINT|MODEL", help="folder to check"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.epilog = "Exit status: 0 sound, 1 problems."


def run(args: argparse.Namespace) -> int:
    """Run `python -m sclong_ds verify` and return the exit status."""
    findings = verify(args.path)
    if args.json:
        sys.stdout.write(json.dumps(asdict(findings), indent=2) + "\n")
    else:
        lines = [f"{findings.path}: {findings.kind}"]
        lines += [f"  checked      {text}" for text in findings.checked]
        lines += [f"  not checked  {text}" for text in findings.unchecked]
        lines += [f"  PROBLEM      {text}" for text in findings.problems]
        count = len(findings.problems)
        lines.append(f"  {count} problems" if count else "  sound")
        sys.stdout.write("\n".join(lines) + "\n")
    return 1 if findings.problems else 0

"""What MLflow is told about a run at its start: parameters, tags, datasets, note."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sclong_ds.config.sections import TrackingConfig
from sclong_ds.config.strict_yaml import flat_texts
from sclong_ds.page.words import counted
from sclong_ds.tracking.client import MAX_DIGEST_CHARS

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput


def restart_folder(run: Mapping[str, Any]) -> str:
    """Return the artifact folder of the files that the last restart of a run began with."""
    return f"restart_{run['restarts']:03d}"


def change_tags(events: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the tags that say what resumes changed: MLflow keeps a run's first parameters.

    Several starts may resume after the same step: their changes are lines of one tag, in order. A
    line that a killed start wrote already stands once, where it was said last.

    Args:
        events: Rows of events.jsonl in the order written.
    """
    lines: dict[str, dict[str, None]] = {}
    for event in events:
        if event["event"] == "settings_changed":
            step = event["step"]
            told = lines.setdefault(f"changed_after_step_{step}", {})
            for key in [k for k in event if k not in ("time", "event", "step")]:
                line = f"{key}: {event[key]}, from step {step + 1} on"
                told.pop(line, None)
                told[line] = None
    return {tag: "\n".join(told) for tag, told in lines.items()}


def describe(
    settings: TrackingConfig,
    run_dir: Path,
    run: Mapping[str, Any],
    *,
    params: Mapping[str, object],
    tags: Mapping[str, str],
) -> Description:
    """Return what MLflow is told about a run.

    Args:
        settings: Its section tracking.
        run_dir: Its folder.
        run: Its run.json.
        params: Nested parameters: the configuration, and what was counted.
        tags: Tags beside those of run.json and `tracking.tags`.
    """
    about = run.get("summary") or {}
    packages = {k: v for k, v in run["environment"].items() if k not in ("host", "cpu_cores")}
    name = settings.run_name or run_dir.resolve().name
    dataset = None
    if "corpus_hash" in tags and "corpus" in about:
        dataset = Dataset(
            name=str(about["corpus"]).rstrip("/").rpartition("/")[2],
            hash=tags["corpus_hash"],
            url=str(about["corpus"]),
            cells={
                "training": about["n_cells_train"],
                "validation": about["n_cells_validation"],
            },
            profile={"genes": about["n_genes"], "datasets": about["n_datasets"]},
        )
    return Description(
        experiment=settings.experiment,
        run_name=name,
        params=flat_texts({**params, "environment": packages}),
        tags={
            "mlflow.source.name": "sclong_ds.pretrain",
            **settings.tags,
            **tags,
            **_own_tags(settings.parent_run, run, run_dir),
        },
        note=_note(run, run_dir),
        dataset=dataset,
    )


def _own_tags(parent_run: str | None, run: Mapping[str, Any], run_dir: Path) -> dict[str, str]:
    """Return the tags that say which run it is, and one for every start but the first."""
    tags = {
        "run_id": run["run_id"],
        "run_dir": str(run_dir.resolve()),
        "restarts": str(run["restarts"]),
        "mlflow.source.type": "JOB" if run.get("slurm_job_id") else "LOCAL",
        "mlflow.source.git.commit": run["commit"],
        "host": run["environment"]["host"],
    }
    for number, start in enumerate(run["starts"][1:], start=1):
        job = f", Slurm job {start['slurm_job_id']}" if start["slurm_job_id"] else ""
        where = f"{counted(start['world_size'], 'rank')} from {start['host']}{job}"
        tags[f"restart_{number:03d}"] = f"after step {start['step']}, {start['time']}, {where}"
    user = os.environ.get("USER") or os.environ.get("LOGNAME")
    optional = {
        "mlflow.user": user,
        "mlflow.parentRunId": parent_run,
        "slurm_job_id": run.get("slurm_job_id"),
    }
    return tags | {k: v for k, v in optional.items() if v}


def _note(run: Mapping[str, Any], run_dir: Path) -> str:
    """Return the text that MLflow shows above the run's figures."""
    about = run.get("summary") or {}
    lines = [f"Run folder `{run_dir.resolve()}`, commit `{run['commit']}`."]
    if "corpus" in about:
        lines.append(
            f"\n{counted(about['n_cells_train'], 'training cell')} of "
            f"{counted(about['n_datasets'], 'dataset')}, "
            f"{counted(about['n_cells_validation'], 'cell')} in the validation split, "
            f"{about['n_genes']:,} genes, from "
            f"`{about['corpus']}`; {sum(about['parameters'].values()):,} parameters on "
            f"{about['world_size']} x {about['device']}."
        )
    lines.append(f"\n`python -m sclong_ds report {run_dir.resolve()}` writes a page about it.")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """The corpus of a run, for the dataset column of MLflow."""

    name: str
    """Its human-readable name."""
    hash: str
    """Content hash."""
    url: str
    """Where it is."""
    cells: Mapping[str, int]
    """Cells by split (training, validation)."""
    profile: Mapping[str, int]
    """Further counts, for instance of genes."""

    def inputs(self) -> list[DatasetInput]:
        """Return an MLflow dataset input for every split."""
        from mlflow.entities import Dataset as Entity
        from mlflow.entities import DatasetInput, InputTag

        kind = self.url.partition("://")[0] if "://" in self.url else "local"
        return [
            DatasetInput(
                Entity(
                    name=f"{self.name} ({split})",
                    digest=self.hash[:MAX_DIGEST_CHARS],
                    source_type=kind[:MAX_DIGEST_CHARS],
                    source=json.dumps({"uri": self.url}),
                    profile=json.dumps({"num_rows": n_cells, **self.profile}),
                ),
                tags=[InputTag("mlflow.data.context", split)],
            )
            for split, n_cells in self.cells.items()
        ]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What MLflow is told about a run when it is opened."""

    experiment: str
    run_name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    note: str
    """Markdown that the page of a new run begins with."""
    dataset: Dataset | None

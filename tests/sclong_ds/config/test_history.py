"""Tests of the keys that saved files of earlier versions lack."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from kernels.reference import EPS
from sclong_ds.config import history
from sclong_ds.config.load import load_config
from sclong_ds.config.sections import RunConfig
from sclong_ds.config.strict_yaml import section_from_dict, to_dict, to_yaml
from sclong_ds.corpus.transform import Transform

GOLDEN = Path(__file__).parents[2] / "golden"


def keys_of(cls: type, prefix: str = "") -> Iterator[str]:
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from keys_of(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


NOW = {*keys_of(RunConfig), *keys_of(Transform, "transform.")}
FIRST = set((GOLDEN / "config_keys_version_1.txt").read_text().split())
LATER = [key for keys in history.LATER_KEYS.values() for key in flat(keys)]


def test_every_key_is_of_version_1_or_has_a_value_for_the_files_that_lack_it() -> None:
    new = sorted(NOW - FIRST - set(LATER))
    assert not new, (
        f"{new}: new keys, which every saved configuration and model lacks. Add them to LATER_KEYS "
        f"in sclong_ds/config/history.py under version {history.VERSION + 1}, each with the value "
        f"that means what was done without it"
    )
    gone = sorted({*FIRST, *LATER} - NOW)
    assert not gone, (
        f"{gone}: saved configurations hold these keys, and an unknown key is an error. Keep them, "
        f"or let sclong_ds/config/history.py translate them"
    )


def test_a_key_comes_with_one_version_and_versions_are_numbered_on() -> None:
    assert len(LATER) == len(set(LATER))
    assert not FIRST & set(LATER)
    versions = list(history.LATER_KEYS)
    assert versions == list(range(2, history.VERSION + 1))


def test_a_configuration_of_version_1_opens_with_the_old_meaning_of_later_keys(
    tmp_path: Path,
) -> None:
    config = load_config("sclong_tiny")
    tree = to_dict(config)
    first = {s: {k: v for k, v in keys.items() if f"{s}.{k}" not in LATER}
             for s, keys in tree.items()}  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(first))
    opened = flat(to_dict(load_config(path)))
    wanted = {k: v for keys in history.LATER_KEYS.values() for k, v in flat(keys).items()}
    assert opened == flat(tree) | {k: v for k, v in wanted.items() if k in opened}
    assert opened["data.unmeasured"] == "zero"
    assert opened["model.favor_eps"] == EPS
    model = load_config(path).model
    assert {model.attention_of(model.large_encoder), model.attention_of(model.decoder)} == {"favor"}


def test_what_a_file_says_stays(tmp_path: Path) -> None:
    config = load_config("sclong_tiny", ["data.unmeasured=mask"])
    path = tmp_path / "config.yaml"
    path.write_text(f"version: {history.VERSION}\n{to_yaml(config)}")
    assert load_config(path) == config


def test_keys_of_a_stack_and_whole_sections_are_added_where_they_belong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    later = {2: {"a.stack.k": 3, "b": {"x": [1]}}, 3: {"b.y": 2, "gone.z": 1}}
    monkeypatch.setattr(history, "LATER_KEYS", later)
    tree = {"a": {"stack": {"j": 1}}, "c": None}
    completed = history.complete(tree)
    assert completed == {"a": {"stack": {"j": 1, "k": 3}}, "c": None, "b": {"x": [1], "y": 2}}
    assert tree == {"a": {"stack": {"j": 1}}, "c": None}
    assert later[2]["b"] == {"x": [1]}
    # A section that a damaged file has lost is not made up.
    assert history.complete({"a": None}) == {"a": None, "b": {"x": [1], "y": 2}}


@pytest.mark.parametrize("version", [history.VERSION + 1, 10**9])
def test_a_configuration_of_a_later_version_is_refused(tmp_path: Path, version: int) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"version: {version}\n{to_yaml(load_config('sclong_tiny'))}")
    with pytest.raises(ValueError, match=rf"config.yaml: written by a later .*version {version},"):
        load_config(path)


@pytest.mark.parametrize("version", ["0", "true", "'2'", "2.0", "null", "[1]"])
def test_a_version_that_is_none_is_refused(tmp_path: Path, version: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"version: {version}\n{to_yaml(load_config('sclong_tiny'))}")
    with pytest.raises(ValueError, match=r"configuration version .*must be 1 to"):
        load_config(path)


def test_the_transform_of_an_old_model_reads_absent_genes_as_zeros() -> None:
    tree = history.complete({"transform": {"name": "log1p_total", "target_sum": 1.0e4}})
    assert section_from_dict(Transform, tree["transform"], "f").unmeasured == "zero"
    assert history.complete({"data": None}) == {"data": None}

"""The model folder: what is written is read back, whole or not at all, in little memory.

Covers also `sclong_ds/exported/arguments.py`, `sclong_ds/exported/export.py`,
`sclong_ds/exported/manifest.py`, `sclong_ds/model/features_file.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from exported import write_model
from launching import ROOT, environment

from sclong_ds.config.load import load_config
from sclong_ds.corpus.genes import GeneVocabulary
from sclong_ds.exported.described.model_card import model_card
from sclong_ds.exported.export import last_validation
from sclong_ds.exported.initial_weights import InitialWeights
from sclong_ds.exported.manifest import model_digest, read_manifest, write_manifest
from sclong_ds.exported.model_dir import load_model, write_model_dir
from sclong_ds.files.json_lines import line_of
from sclong_ds.files.sealed_json import write_sealed
from sclong_ds.model.features_file import ALIGNMENT, read_features, write_features
from sclong_ds.model.random_features import drawn_features
from sclong_ds.model.sclong import ScLong

N_GENES = 40
IDS = tuple(f"E{i}" for i in range(N_GENES))
GENES = GeneVocabulary(IDS, tuple(f"S{i}" for i in range(N_GENES)), ("unknown",) * N_GENES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), GENES, seed=0)


def arguments(folder: Path, **changes: Any) -> dict[str, Any]:
    """Return what writes a loaded model again."""
    model = load_model(folder)
    given = {
        "weights": model.state_dict(), "model": model.config, "transform": model.transform,
        "genes": folder / "genes.tsv", "graph": None, "features": None,
        "provenance": {"step": 7},
    }  # fmt: skip
    return given | changes


def features_of(model: ScLong) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{i}": tensor
        for name, stack in model.performers().items()
        for i, tensor in enumerate(stack.features(torch.device("cpu")))
    }


def test_the_safetensors_library_reads_the_weights(folder: Path) -> None:
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        found = {name: file.get_tensor(name) for name in file.keys()}
    header_bytes = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert header_bytes % 8 == 0
    state = load_model(folder).state_dict()
    assert set(found) == set(state)
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[name])


def test_a_model_written_again_has_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_model_dir(tmp_path / "again", **arguments(folder))
    for name in ("model.safetensors", "genes.tsv", "config.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_weights_of_other_types_become_float32(folder: Path, tmp_path: Path) -> None:
    state = load_model(folder).state_dict()
    columns = {n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in state.items()}
    given = {n: t.double() if i % 2 else t for i, (n, t) in enumerate(columns.items())}
    assert any(not tensor.is_contiguous() for tensor in given.values())
    write_model_dir(tmp_path / "out", **arguments(folder, weights=given))
    loaded = load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_a_loaded_model_can_be_trained_without_touching_its_file(folder: Path) -> None:
    before = (folder / "model.safetensors").read_bytes()
    model = load_model(folder)
    assert not model.training
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model(torch.rand(2, N_GENES)) - 1.0).square().mean().backward()
    optimizer.step()
    assert (folder / "model.safetensors").read_bytes() == before
    assert not torch.equal(load_model(folder).head.bias, model.head.bias)


def test_given_random_features_are_kept_and_used(folder: Path, tmp_path: Path) -> None:
    model = load_model(folder)
    torch.manual_seed(0)
    drawn = features_of(model)
    features = {name: torch.randn_like(tensor) for name, tensor in drawn.items()}
    config = dataclasses.replace(model.config, random_features_file="/elsewhere/f.safetensors")
    given = arguments(folder, model=config, features=features)
    write_model_dir(tmp_path / "out", **given)
    loaded = load_model(tmp_path / "out")
    assert loaded.config.random_features_file == "random_features.safetensors"
    found = features_of(loaded)
    assert all(torch.equal(found[name], features[name]) for name in features)
    x = torch.rand(2, N_GENES)
    with torch.no_grad():
        assert not torch.allclose(loaded.encode(x, genes="all"), model.encode(x, genes="all"))
    loaded.redraw_features(1)
    assert not torch.equal(features_of(loaded)["decoder.0"], features["decoder.0"])


def test_without_features_they_are_drawn(folder: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(load_model(folder).config, random_features_file="/gone")
    write_model_dir(tmp_path / "out", **arguments(folder, model=config))
    loaded = load_model(tmp_path / "out")
    assert loaded.config.random_features_file is None
    drawn = drawn_features(loaded.config, 0)
    assert all(torch.equal(drawn[name], found) for name, found in features_of(loaded).items())


def test_features_are_kept_of_the_stacks_that_have_them(folder: Path, tmp_path: Path) -> None:
    """One stack is exact: its features are in no file, and the model is the same."""
    model = load_model(folder)
    exact = dataclasses.replace(model.config.large_encoder, attention="softmax")
    config = dataclasses.replace(model.config, large_encoder=exact)
    drawn = drawn_features(config, 1)
    assert sorted(drawn) == ["decoder.0", "mini_encoder.0"]
    write_model_dir(tmp_path / "out", **arguments(folder, model=config, features=drawn))
    loaded = load_model(tmp_path / "out")
    assert loaded.config.large_encoder.attention == "softmax"
    x = torch.rand(2, N_GENES)
    changed = ScLong(config, n_genes=N_GENES, graph=None).eval()
    changed.load_state_dict(model.state_dict())
    changed.redraw_features(1)
    with torch.no_grad():
        assert torch.equal(loaded.encode(x, genes="all"), changed.encode(x, genes="all"))
        assert not torch.allclose(loaded.encode(x, genes="all"), model.encode(x, genes="all"))


def test_weights_lie_where_those_of_training_do(folder: Path, tmp_path: Path) -> None:
    """At multiples of 64 bytes, by which products round; large ones without a copy."""
    model = load_model(folder)
    for weight in model.parameters():
        assert weight.data_ptr() % ALIGNMENT == 0
    content = (folder / "model.safetensors").read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    shares = [
        (begin + one["data_offsets"][0]) % ALIGNMENT == 0
        for name, one in header.items()
        if name != "__metadata__" and math.prod(one["shape"]) % 16 == 0
    ]
    assert shares
    assert all(shares)
    odd = shutil.copytree(folder, tmp_path / "odd")
    moved = content[8:begin] + b" " * 8
    (odd / "model.safetensors").write_bytes(
        len(moved).to_bytes(8, "little") + moved + content[begin:]
    )
    (odd / "manifest.json").unlink()
    write_manifest(odd)
    x = torch.rand(3, N_GENES)
    with torch.no_grad():
        assert torch.equal(load_model(odd)(x), model(x))


def wrong_weights(state: dict[str, torch.Tensor]) -> dict[str, tuple[dict, str]]:
    bias = state["norm.bias"]
    return {
        "missing": ({n: t for n, t in state.items() if n != "norm.bias"}, "norm.bias is missing"),
        "extra": (state | {"more": bias}, "more is unknown"),
        "shape": (state | {"norm.bias": bias[1:]}, r"norm.bias has the shape \(7,\), must be \(8"),
    }


@pytest.mark.parametrize("case", ["missing", "extra", "shape"])
def test_weights_that_do_not_fit_leave_nothing_behind(
    folder: Path, tmp_path: Path, case: str
) -> None:
    weights, reason = wrong_weights(load_model(folder).state_dict())[case]
    with pytest.raises(ValueError, match=reason):
        write_model_dir(tmp_path / "new" / "out", **arguments(folder, weights=weights))
    assert not list((tmp_path / "new").iterdir())


def test_features_of_another_model_leave_nothing_behind(folder: Path, tmp_path: Path) -> None:
    features = features_of(load_model(folder))
    features["decoder.0"] = features["decoder.0"][1:]
    given = arguments(folder, features=features)
    with pytest.raises(ValueError, match=r"decoder.0 has the shape \(7, 4\), must be \(8, 4\)"):
        write_model_dir(tmp_path / "new" / "out", **given)
    assert not list((tmp_path / "new").iterdir())


def test_an_existing_folder_is_not_replaced(folder: Path) -> None:
    before = (folder / "config.yaml").read_text()
    with pytest.raises(FileExistsError, match=r"exists: name another folder"):
        write_model_dir(folder, **arguments(folder))
    assert (folder / "config.yaml").read_text() == before


def without_manifest(path: Path, **changes: Any) -> None:
    """Make a folder one of version 2, which had no manifest, with other changes to its config."""
    config = yaml.safe_load((path / "config.yaml").read_text())
    (path / "config.yaml").write_text(yaml.safe_dump(config | {"version": 2} | changes))
    (path / "manifest.json").unlink()


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_a_changed_folder_is_refused(copy: Path) -> None:
    genes = (copy / "genes.tsv").read_text()
    (copy / "genes.tsv").write_text(genes.replace("E0\t", "X0\t"))
    with pytest.raises(ValueError, match=r"genes.tsv: damaged \(CRC-32C"):
        load_model(copy)
    without_manifest(copy)
    with pytest.raises(ValueError, match=r"genes.tsv was changed"):
        load_model(copy)
    (copy / "genes.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"genes.tsv is missing"):
        load_model(copy)


def test_another_version_is_refused(copy: Path) -> None:
    without_manifest(copy, version=1)
    with pytest.raises(ValueError, match=r"version 1; this version reads sclong_ds-model 3 and 2"):
        load_model(copy)


def test_a_folder_of_version_2_is_read_and_said_to_be_unchecked_once(
    copy: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without_manifest(copy)
    x = torch.rand(2, N_GENES)
    for _ in range(2):
        assert torch.equal(load_model(copy)(x), load_model(folder)(x))
    assert [r.message.partition(": ")[0] for r in caplog.records] == [str(copy)]
    assert "without checksums" in caplog.text


def refusal(folder: Path) -> str:
    """Return why a folder is not loaded, or an empty text."""
    try:
        load_model(folder)
    except ValueError as error:
        return str(error)
    return ""


def json_or_none(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_a_flipped_bit_in_any_file_is_an_error_that_names_it(copy: Path) -> None:
    rng = random.Random(0)
    load_model(copy)
    for path in sorted(copy.iterdir()):
        whole = path.read_bytes()
        for bit in {0, 8 * len(whole) - 1, *(rng.randrange(8 * len(whole)) for _ in range(12))}:
            content = bytearray(whole)
            content[bit // 8] ^= 1 << bit % 8
            # A new file: the weights of the models before are mapped from the old one.
            path.unlink()
            path.write_bytes(content)
            said = refusal(copy)
            # White space of the manifest, and the card, are not the model.
            same = path.name == "manifest.json" and json_or_none(content) == json.loads(whole)
            assert str(path) in said or (not said and (same or path.name == "README.md"))
        path.unlink()
        path.write_bytes(whole)


def test_a_manifest_that_does_not_name_the_model_checks_nothing(copy: Path) -> None:
    manifest = read_manifest(copy)
    assert manifest is not None
    del manifest["checksum"], manifest["files"]["model.safetensors"]
    write_sealed(copy / "manifest.json", manifest)
    with pytest.raises(ValueError, match=r"manifest.json: names no model.safetensors"):
        load_model(copy)


@pytest.mark.parametrize("harm", ["cut", "drop", "another"])
def test_a_cut_missing_or_other_file_is_an_error_that_names_it(
    copy: Path, tmp_path: Path, harm: str
) -> None:
    other = write_model(tmp_path, GENES, seed=1)
    for name in ("config.yaml", "genes.tsv", "manifest.json", "model.safetensors",
                 "provenance.json"):  # fmt: skip
        whole, theirs = (copy / name).read_bytes(), (other / name).read_bytes()
        if harm == "another" and theirs == whole:
            continue
        (copy / name).unlink()
        if harm != "drop":
            (copy / name).write_bytes(whole[: len(whole) // 2] if harm == "cut" else theirs)
        # Another model's manifest accuses the first file that differs.
        accused = "model.safetensors" if (name, harm) == ("manifest.json", "another") else name
        with pytest.raises((ValueError, FileNotFoundError), match=accused):
            load_model(copy)
        (copy / name).unlink(missing_ok=True)
        (copy / name).write_bytes(whole)
    load_model(copy)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_neither_written_nor_read(
    folder: Path, tmp_path: Path, copy: Path, value: float
) -> None:
    state = {name: t.clone() for name, t in load_model(folder).state_dict().items()}
    state["norm.bias"][3] = value
    with pytest.raises(ValueError, match=r"weight norm.bias holds NaN or inf"):
        write_model_dir(tmp_path / "new" / "out", **arguments(folder, weights=state))
    assert not list((tmp_path / "new").iterdir())
    without_manifest(copy)
    safetensors.torch.save_file(state, copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"norm.bias of .*model.safetensors holds NaN or inf"):
        load_model(copy)
    weights = InitialWeights(copy)
    assert weights("head.bias").isfinite().all()
    with pytest.raises(ValueError, match=r"norm.bias of .*model.safetensors holds NaN or inf"):
        weights("norm.bias")


def test_the_digest_names_a_model(folder: Path, copy: Path, tmp_path: Path) -> None:
    again = write_model(tmp_path, GENES, seed=0)
    assert model_digest(again) == model_digest(folder) == model_digest(copy)
    (tmp_path / "b").mkdir()
    assert model_digest(write_model(tmp_path / "b", GENES, seed=1)) != model_digest(folder)
    without_manifest(copy)
    assert model_digest(copy) is None


def test_damaged_weights_are_refused(copy: Path) -> None:
    without_manifest(copy)
    path = copy / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match=r"model.safetensors does not fit"):
        load_model(copy)
    state = safetensors.torch.load(whole)
    safetensors.torch.save_file({n: t for n, t in state.items() if n != "head.bias"}, path)
    with pytest.raises(ValueError, match=r"does not fit its config.yaml: .*head.bias"):
        load_model(copy)
    safetensors.torch.save_file(state | {"head.bias": state["head.bias"].half()}, path)
    with pytest.raises(ValueError, match=r"head.bias is torch.float16, not float32"):
        load_model(copy)


def test_the_card_says_who_trained_the_model(folder: Path, tmp_path: Path) -> None:
    figures = {"val/mse": 0.25, "val/n_cells": 32.0, "val/mae": 0.5}
    trained = {"step": 7, "validation": figures}
    file = {"file": "m.pth", "bytes": 12, "sha256": "abc"}
    for name, provenance in (("a", trained), ("b", {"imported_files": {"checkpoint": file}})):
        write_model_dir(tmp_path / name, **arguments(folder, provenance=provenance))
        assert json.loads((tmp_path / name / "provenance.json").read_text()) == provenance
    card = (tmp_path / "a" / "README.md").read_text()
    assert "trained with sclong_ds" in card
    assert "| step | 7 |" in card
    assert "of 32 held-out cells 0.2500; mae 0.5." in card
    assert "| val/mse | 0.2500 |" in card
    assert "| val/n_cells | 32 |" in card
    card = (tmp_path / "b" / "README.md").read_text()
    assert "trained with" not in card
    assert "imported" in card
    assert "| checkpoint | m.pth | 12 | abc |" in card


def test_the_card_says_of_which_step_the_validation_is(tmp_path: Path) -> None:
    """The figures of earlier weights are not shown as those of the exported ones."""
    rows = ({"step": 2, "val/mse": 0.25}, {"step": 3, "train/loss": 1.0}, {"step": 5, "val/mse": 9})
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(line_of(row | {"time": 1.0}) for row in rows))
    config = {
        "model": dataclasses.asdict(load_config("sclong_tiny").model),
        "transform": {"target_sum": 1e4},
        "n_genes": 5,
    }
    cards = {}
    for step in (1, 2, 3):
        found = last_validation(tmp_path / "checkpoints" / f"step_{step}", step)
        provenance = {"step": step, "validation": found}
        cards[step] = model_card(config, provenance, n_parameters=1)
    assert "## Validation" not in cards[1]
    assert "\nOf step 2: MSE of" in cards[2]
    assert "No validation at step 3, which these weights are of. The last one" in cards[3]
    assert "before it, of step 2, is of other weights: MSE of" in cards[3]
    assert "| step | 2 |\n| val/mse | 0.2500 |" in cards[3]


def test_export_prints_no_warning_of_a_missing_accelerator(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sclong_ds", "export", tmp_path, "--out", tmp_path / "x"]
    env = {k: v for k, v in environment().items() if k != "DS_ACCELERATOR"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert "holds no checkpoint" in done.stderr
    assert "accelerator" not in done.stdout + done.stderr


def test_feature_files_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no such file of random features"):
        read_features(path)
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"not a file of random features"):
        read_features(path)
    for wrong, reason in (
        (torch.ones(3), r"shape \(3,\)"),
        (torch.full((2, 2), torch.nan), "not finite"),
    ):
        with pytest.raises(ValueError, match=reason):
            write_features(path, {"decoder.0": wrong})
        safetensors.torch.save_file({"decoder.0": wrong}, path)
        with pytest.raises(ValueError, match=reason):
            read_features(path)
    write_features(path, {"decoder.0": torch.ones(2, 3, dtype=torch.float64).t()})
    assert read_features(path)["decoder.0"].shape == (3, 2)

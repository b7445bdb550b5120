"""Models that lie elsewhere: published to a hub and fetched again, from web servers, refusals.

Covers also `sclong_ds/model/pretrained.py`,
`sclong_ds/exported/described/changed.py`
and `sclong_ds/exported/described/model_card.py`.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from exported import named_genes, write_model
from own_authority import own_authority
from served_files import FileServer
from served_hub import Hub

import sclong_ds
from sclong_ds.__main__ import main
from sclong_ds.exported.described.model_card import front_matter, model_card
from sclong_ds.exported.manifest import check_files, model_digest, write_manifest
from sclong_ds.exported.recipe_file import ChosenRecipe
from sclong_ds.hub.hub import model_folder, push_to_hub
from sclong_ds.model.pooling import MEAN

GENES = named_genes(60)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), GENES, seed=0)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield hub
    hub.stop()


@pytest.fixture
def served(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[FileServer]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server = FileServer({f"m/{path.name}": path.read_bytes() for path in model_dir.iterdir()})
    yield server
    server.stop()


def test_a_published_model_is_loaded_by_its_address(hub, model_dir):
    url = push_to_hub(model_dir, "lab/blood", licence="cc-by-4.0", private=True)
    assert url.startswith(hub.url)
    assert hub.private == {"lab/blood"}
    files = hub.repositories["lab/blood"]
    assert json.loads(files["config.json"])["library_name"] == "sclong_ds"
    _, head, card = files["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "cc-by-4.0"
    own = yaml.safe_load((model_dir / "README.md").read_text().split("---\n", 2)[1])
    assert yaml.safe_load(head) == own | {"license": "cc-by-4.0"}
    assert (model_dir / "README.md").read_text().endswith(card)
    here, there = (sclong_ds.load_model(place) for place in (model_dir, "hf://lab/blood"))
    x = torch.rand(2, len(GENES))
    with torch.inference_mode():
        assert torch.equal(here.embed(x), there.embed(x))
    push_to_hub(model_dir, "lab/blood")  # a repository that is there takes another commit
    assert "license" not in yaml.safe_load(files["README.md"].decode().split("---\n", 2)[1])


def test_commands_take_addresses(served, tmp_path, capsys):
    var = pd.DataFrame(index=list(GENES.ids))
    counts = np.random.default_rng(0).poisson(1.0, (3, len(GENES))).astype(np.float32)
    anndata.AnnData(counts, var=var).write_h5ad(tmp_path / "cells.h5ad")
    words = ["embed", f"{served.url}/m", str(tmp_path / "cells.h5ad"), "--device", "cpu"]
    words += ["--min-genes-mapped", "1", "--out", str(tmp_path / "out.h5ad")]
    assert main(words) == 0, capsys.readouterr().err
    assert anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_sclong"].shape[0] == 3


def test_a_fetched_model_is_whole_and_fetched_once(served, model_dir):
    folder = model_folder(f"{served.url}/m/")
    assert check_files(folder)
    names = {path.name for path in model_dir.iterdir()}
    assert {path.name for path in folder.iterdir()} == names
    asked = served.requests
    assert model_folder(f"{served.url}/m") == folder
    assert served.requests == asked + 1  # the manifest, which names what is in the cache


def test_a_damaged_or_cut_file_is_named_and_nothing_stays(served, tmp_path):
    whole = served.files["m/model.safetensors"]
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), whole + b"more"):
        served.files["m/model.safetensors"] = damaged
        with pytest.raises((ValueError, OSError), match=r"m/model\.safetensors: .* the manifest"):
            model_folder(f"{served.url}/m")
    assert not list((tmp_path / "cache/sclong_ds/models").iterdir())


def test_an_address_with_nothing_behind_it(hub, served, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="hf://lab/none: no such model on the hub"):
        model_folder("hf://lab/none")
    with pytest.raises(ValueError, match="must be hf://ORG/NAME"):
        model_folder("hf://none")
    with pytest.raises(FileNotFoundError, match=r"/n/manifest\.json: no such file"):
        model_folder(f"{served.url}/n")
    served.stop()
    with pytest.raises(OSError, match=r"/m/manifest\.json: .*refused"):
        model_folder(f"{served.url}/m")
    assert main(["push", str(tmp_path), "lab/blood"]) == 1
    assert "is no exported model (config.yaml is missing)" in capsys.readouterr().err


def test_a_name_without_organisation_is_refused_before_the_hub_is_asked(hub, model_dir, capsys):
    hub.stop()
    for name in ("noorg", "a/b/c", "lab/"):
        assert main(["push", str(model_dir), name]) == 1
        assert capsys.readouterr().err == f"error: {name}: must be ORG/NAME\n"


def test_a_hub_that_does_not_answer_is_one_line(hub, model_dir, capsys):
    hub.stop()
    with pytest.raises(OSError, match=r"hf://lab/blood: \S"):
        push_to_hub(model_dir, "lab/blood")
    assert main(["push", str(model_dir), "lab/blood"]) == 1
    assert re.fullmatch(r"error: hf://lab/blood: \S.*\n", capsys.readouterr().err)
    with pytest.raises(OSError, match=r"hf://lab/blood: \S"):
        model_folder("hf://lab/blood")


def test_an_error_of_the_hub_without_words_is_named_by_its_kind(hub, model_dir, monkeypatch):
    import huggingface_hub

    def wait(*args, **kwargs):
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", wait)
    with pytest.raises(OSError, match=r"hf://lab/blood: TimeoutError; is the hub reachable"):
        model_folder("hf://lab/blood")


@pytest.mark.parametrize("kind", ["web", "hub"])
def test_over_tls_with_the_certificates_of_an_own_authority(
    kind, model_dir, monkeypatch, tmp_path, capsys
):
    import huggingface_hub
    from huggingface_hub import constants

    bundle, tls = own_authority(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    files = {path.name: path.read_bytes() for path in model_dir.iterdir()}
    server: Hub | FileServer
    if kind == "hub":
        server = Hub(tls)
        server.repositories["lab/blood"] = files
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        place = "hf://lab/blood"
    else:
        server = FileServer({f"m/{name}": data for name, data in files.items()}, tls)
        place = f"{server.url}/m"
    assert server.url.startswith("https://")
    try:
        huggingface_hub.close_session()  # the client keeps the certificates that it began with
        assert main(["genes", place, "--out", str(tmp_path / "genes.h5ad")]) != 0
        (line,) = [x for x in capsys.readouterr().err.splitlines() if "CERTIFICATE_VERIFY" in x]
        assert place in line
        huggingface_hub.close_session()
        monkeypatch.setenv("SSL_CERT_FILE", str(bundle))
        x = torch.rand(2, len(GENES))
        with torch.inference_mode():
            there = sclong_ds.load_model(place).embed(x)
            assert torch.equal(there, sclong_ds.load_model(model_dir).embed(x))
    finally:
        huggingface_hub.close_session()
        server.stop()


def test_a_damaged_model_is_not_published(hub, model_dir, tmp_path):
    shutil.copytree(model_dir, tmp_path / "m")
    path = tmp_path / "m/model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        push_to_hub(tmp_path / "m", "lab/blood")
    assert not hub.repositories


def test_front_matter_of_a_card_that_has_one_is_kept_and_gets_the_licence():
    card = front_matter("---\na: 1\n---\n# Mine\n", licence="mit")
    _, head, rest = card.split("---\n", 2)
    assert (yaml.safe_load(head), rest) == (
        {"library_name": "sclong_ds", "a": 1, "license": "mit"}, "# Mine\n"
    )  # fmt: skip
    assert front_matter(card, licence=None) == card


def test_a_model_is_saved_as_it_is_and_its_changes_are_said(hub, model_dir, tmp_path):
    model = sclong_ds.ScLong.from_pretrained(model_dir)
    model.save_pretrained(tmp_path / "same")
    for path in model_dir.iterdir():
        assert (tmp_path / "same" / path.name).read_bytes() == path.read_bytes()
    assert json.loads((model_dir / "config.json").read_text())["model_type"] == "sclong"
    with torch.no_grad():
        model.norm.weight *= 2
    model.push_to_hub("lab/changed")
    found = sclong_ds.load_model("hf://lab/changed")
    assert torch.equal(found.norm.weight, model.norm.weight)
    assert check_files(found.folder)
    record = json.loads((found.folder / "provenance.json").read_text())
    assert record["weights_changed_after"] == model_digest(model_dir)
    assert "were changed after export" in " ".join((found.folder / "README.md").read_text().split())
    assert "were changed after" not in (model_dir / "README.md").read_text()
    with pytest.raises(FileExistsError):
        model.save_pretrained(model_dir)
    by_hand = sclong_ds.ScLong(model.config, n_genes=60, graph=None)
    with pytest.raises(ValueError, match="made by hand"):
        by_hand.save_pretrained(tmp_path / "none")


def test_other_modules_than_those_that_were_loaded_are_refused_by_name(model_dir, tmp_path):
    class Adapted(torch.nn.Module):
        def __init__(self, inner: torch.nn.Linear) -> None:
            super().__init__()
            self.inner = inner

    wrapped, wider, more = (sclong_ds.load_model(model_dir) for _ in range(3))
    out = wrapped.decoder.layers[0].attention.to_out
    wrapped.decoder.layers[0].attention.to_out = Adapted(out)
    wider.norm = torch.nn.LayerNorm(9)
    more.extra = torch.nn.Linear(2, 2)
    for model, name in (
        (wrapped, "decoder.layers.0.attention.to_out.weight: no such weight"),
        (wider, r"norm.weight: the shape \(9,\), when it was loaded the shape \(8,\)"),
        (more, r"extra.weight: the shape \(2, 2\), when it was loaded no such weight"),
    ):
        with pytest.raises(ValueError, match=name) as refused:
            model.save_pretrained(tmp_path / "out")
        assert "merge adapters first" in str(refused.value).lower()
    assert not list(tmp_path.iterdir())


def test_the_card_of_changed_weights_shows_no_scores_of_those_before(tmp_path):
    rows = {"held out": 0.5}
    facts = {
        "criterion": "held out", "candidates": {MEAN.text(): rows}, "score": {"held out": 0.7654},
        "gene vectors alone": rows, "n_validation_cells": 9, "n_training_cells": 9,
    }  # fmt: skip
    chosen = ChosenRecipe(recipe=MEAN, control=MEAN, facts=facts, judged=np.zeros(0, np.uint64))
    config = yaml.safe_load((write_model(tmp_path, GENES, seed=0) / "config.yaml").read_text())
    before, after = (
        model_card(config, about, n_parameters=1, chosen=chosen)
        for about in ({"step": 2}, {"step": 2, "weights_changed_after": "abc"})
    )
    assert "0.7654" in before
    assert "0.7654" not in after
    assert "those of the weights before" in after.split("## Use")[0]


def test_a_folder_of_an_earlier_version_is_published_with_what_it_lacks(hub, tmp_path):
    old = write_model(tmp_path, GENES, seed=0)
    card = (old / "README.md").read_text()
    use = 'model.encode(x, genes=["CD3E", "CD19"])'
    assert use in card
    (old / "README.md").write_text(card.replace(use, "model.encode(x)"))
    push_to_hub(old, "lab/new")
    files = hub.repositories["lab/new"]
    assert files["config.json"] == (old / "config.json").read_bytes()
    assert 'model.encode(x, genes="all")' in files["README.md"].decode()
    for name in ("config.json", "manifest.json"):
        (old / name).unlink()
    write_manifest(old)
    push_to_hub(old, "lab/old")
    assert json.loads(hub.repositories["lab/old"]["config.json"])["model_type"] == "sclong"

"""The strict loader: complete files, exact types, named mistakes.

Covers also `sclong_ds/config/rules.py`, `sclong_ds/config/sections.py`,
`sclong_ds/config/show.py`.
"""

import argparse
import dataclasses
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from launching import ROOT

from sclong_ds.__main__ import main
from sclong_ds.command_line import local_path, new_folder, parse_arguments
from sclong_ds.config import load as c
from sclong_ds.config import sections
from sclong_ds.config.load import PRESETS_DIR, load_config, preset_names, preset_tree
from sclong_ds.config.strict_yaml import read_yaml, to_dict, to_yaml

GOLDEN = ROOT / "tests" / "golden"


PAIRS = {"sclong_tiny": "sclong_tiny_published", "sclong_1b_recommended": "sclong_1b"}
"""Presets with the recommended recipe, and the published configuration of their widths."""
WIDTHS = {
    "base_dim", "large_dim", "top_seq_len", "expression_hidden", "large_encoder", "mini_encoder",
    "decoder", "feature_redraw_interval",
}  # fmt: skip
"""Keys of the model in which a smaller one differs from the published configuration."""


def test_presets_are_these_and_a_renamed_one_is_named():
    assert preset_names() == sorted(
        [*PAIRS, *PAIRS.values(), "sclong_100m", "sclong_1gpu", "sclong_reference"]
    )
    for name in ("sclong_tiny", "sclong_100m"):
        with pytest.raises(FileNotFoundError, match=f"it is {name} now; presets are sclong_100m, "):
            load_config(f"{name}_recommended")
    with pytest.raises(FileNotFoundError, match="no such preset or file; presets are "):
        load_config("sclong_tine")


def test_the_published_configuration_at_small_width_is_that_of_sclong_1b():
    small, published = (
        {key: value for key, value in to_dict(load_config(n))["model"].items() if key not in WIDTHS}
        for n in ("sclong_tiny_published", "sclong_1b")
    )
    assert small == published
    objective = [load_config(n).objective for n in ("sclong_tiny_published", "sclong_1b")]
    assert objective[0] == objective[1]


def test_the_recommended_recipe_is_one_at_all_widths():
    models = [
        {key: value for key, value in to_dict(load_config(n))["model"].items()
         if key not in WIDTHS | {"zero_genes"}}
        for n in ("sclong_tiny", "sclong_100m", "sclong_1b_recommended")
    ]  # fmt: skip
    assert models[0] == models[1] == models[2]


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_and_survives_a_round_trip(name, tmp_path):
    config = load_config(name)
    copy = tmp_path / "copy.yaml"
    copy.write_text(to_yaml(config))
    assert load_config(copy) == config


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("sclong_1b_recommended", {"lr", "train_micro_batch_size_per_gpu"}),
        ("sclong_tiny", {"lr", "train_batch_size", "max_steps", "validate_every_n_steps"}),
    ],
)
def test_a_recommended_preset_is_the_published_one_except_for_what_its_comment_argues(name, own):
    recommended, published = (to_yaml(load_config(n)).splitlines() for n in (name, PAIRS[name]))
    changed = {line.split(":")[0].strip() for line in set(recommended) - set(published)}
    recipe = {"gene_bias", "routing", "zero_genes", "cell_offset", "cell_vector"}
    assert changed >= own | {"cell_offset", "cell_vector"}
    assert changed <= own | recipe
    model = load_config(name).model
    assert (model.routing, model.gene_bias, model.cell_vector) == ("expressed", True, "residuals")


SINCE_CHANGED = {
    "sclong_tiny": (
        "sclong_tiny_published",
        ["model.routing=expressed", "model.zero_genes=256", "model.gene_bias=true"],
    ),
    "sclong_1b_recommended": ("sclong_1b_recommended", ["model.cell_vector=svd"]),
    "sclong_100m": (
        "sclong_100m",
        ["model.routing=top", "model.zero_genes=null", "model.cell_offset=none",
         "model.cell_vector=none"],
    ),
}  # fmt: skip
"""Presets whose recipe is another one now, and how to have what they meant."""


@pytest.mark.parametrize("name", sorted(p.stem for p in (GOLDEN / "presets").glob("*.yaml")))
def test_a_preset_means_what_it_meant_when_it_listed_every_key(name):
    """Its keys of then; one that came later is free, and one of speed and memory alone."""
    before = yaml.safe_load((GOLDEN / "presets" / f"{name}.yaml").read_text())
    now = to_dict(load_config(*SINCE_CHANGED.get(name, (name,))))
    if now["data"]["order"] == "lanes":
        # It counts something else in the order that came later.
        before["data"]["shuffle_group_chunks"] = 256

    for key in ("activation_checkpointing", "train_micro_batch_size_per_gpu"):
        del before["engine"][key]

    def kept(was, found):
        return {
            key: kept(value, found[key]) if isinstance(value, dict) else found[key]
            for key, value in was.items()
        }

    assert kept(before, now) == before


def test_a_preset_has_only_keys_in_which_it_differs_from_its_base():
    for name in preset_names():
        own = read_yaml(PRESETS_DIR / f"{name}.yaml")
        if "base" in own:
            base = preset_tree(own.pop("base"))
            same = [
                f"{section}.{key}"
                for section, keys in own.items()
                for key, value in keys.items()
                if base[section].get(key) == value
            ]
            assert not same, name


def test_a_file_of_ones_own_is_complete_and_config_writes_one(tmp_path, capsys):
    short = tmp_path / "short.yaml"
    short.write_text("base: sclong_tiny\nrun: {seed: 3}\n")
    with pytest.raises(ValueError, match=r"every key: `python -m sclong_ds config sclong_tiny`"):
        load_config(short)
    assert main(["config", "sclong_tiny", "run.seed=3"]) == 0
    short.write_text(capsys.readouterr().out)
    assert load_config(short) == load_config("sclong_tiny", ["run.seed=3"])
    assert load_config(PRESETS_DIR / "sclong_tiny.yaml") == load_config("sclong_tiny")


def test_overrides_are_typed():
    config = load_config(
        "sclong_tiny",
        ["run.max_steps=7", "optim.betas=[0.8, 0.9]", "run.dir=2024-01-01", "optim.lr=1"],
    )
    assert config.run.max_steps == 7
    assert config.optim.betas == (0.8, 0.9)
    assert config.run.dir == "2024-01-01"
    assert config.optim.lr == 1.0
    assert load_config("sclong_tiny", ["run.dir=null"]).run.dir is None
    # Quotes are part of a text, as a shell's are gone by then.
    assert load_config("sclong_tiny", ["run.dir='a'"]).run.dir == "'a'"


def test_the_home_folder_stands_for_its_sign_in_overrides_and_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/who")
    config = load_config("sclong_tiny", ["run.dir=~/runs/a", "data.corpus=/data/~/b"])
    assert (config.run.dir, config.data.corpus) == ("/home/who/runs/a", "/data/~/b")
    path = tmp_path / "own.yaml"
    path.write_text(to_yaml(config).replace("/home/who/", "~/"))
    assert load_config(path).run.dir == "/home/who/runs/a"
    assert local_path("~/x.h5ad") == Path("/home/who/x.h5ad")
    assert new_folder(f"{tmp_path}/~") == tmp_path / "~"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.large_encoder.dept=3", r"dept: unknown key \(did you mean 'depth'\?\)"),
        ("modell.base_dim=3", r"modell: unknown key \(did you mean 'model'\?\)"),
        ("run.max_steps=1.5", "run.max_steps: expected int, got 1.5"),
        ("run.max_steps=true", "run.max_steps: expected int, got True"),
        ("run.max_steps=1.5e0", "run.max_steps: expected int, got '1.5e0'"),
        ("run.max_steps=e5", "run.max_steps: expected int, got 'e5'"),
        ("optim.lr=1e999", "finite"),
        ("model.head=tree", "got 'tree' .*allowed: mlp, linear"),
        ("objective.mask_prob=1.5", "allowed: 0 < p <= 1"),
        ("objective.mask_prob_range=[0.5, 0.2]", "allowed: 0 < low <= high <= 1"),
        ("objective.mask_prob_range=[0.0, 0.2]", "allowed: 0 < low <= high <= 1"),
        ("objective.replace_prob=0", "objective.replace_prob: got 0.0, allowed: above 0 to 1"),
        ("objective.zero_mask_prob=-0.1", "objective.zero_mask_prob: got -0.1, allowed: 0 to 1"),
        ("run.max_steps", "write section.key=value"),
        ("optim.betas=[0.9]", "expected a list of 2 values"),
        ("engine.train_batch_size=0", "engine.train_batch_size: got 0, must be >= 1"),
        ("optim.lr=.nan", "finite"),
        ("model=3", "override"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_config("sclong_tiny", [override])


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "0.1e-3", ".1e-3", "+1e-04"])
def test_powers_of_ten_are_numbers(text):
    assert load_config("sclong_tiny", [f"optim.lr={text}"]).optim.lr == 1e-4


@pytest.mark.parametrize("key", ["run.max_steps", "run.seed", "optim.warmup_steps", "optim.lr"])
@pytest.mark.parametrize("text", ["1e19", "1e400", "1" + 400 * "0", "-1" + 30 * "0"])
def test_a_whole_number_has_64_bits(key: str, text: str) -> None:
    if (key, text) == ("optim.lr", "1e19"):
        assert load_config("sclong_tiny", [f"{key}={text}"]).optim.lr == 1e19
        return
    with pytest.raises(ValueError, match=f"{key}: (got|expected)"):
        load_config("sclong_tiny", [f"{key}={text}"])


@pytest.mark.parametrize("text", ["1e5", "1E+5", "10e4", "1.5e5"])
def test_whole_powers_of_ten_are_integers(text):
    expected = int(float(text))
    assert load_config("sclong_tiny", [f"run.max_steps={text}"]).run.max_steps == expected


@pytest.mark.thorough
@given(st.floats(1e-300, 1e300), st.sampled_from([".17e", ".17E", "r"]))
def test_any_positive_number_is_read_as_it_is_written(number, form):
    text = repr(number) if form == "r" else format(number, form)
    assert load_config("sclong_tiny", [f"optim.eps={text}"]).optim.eps == number


def test_overrides_stand_anywhere_and_what_is_no_override_is_refused(capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--config")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("overrides", nargs="*")
    args = parse_arguments(parser, ["a.b=1", "--config", "x", "a.c=2", "--dry-run", "a.d=3"])
    assert (args.config, args.dry_run) == ("x", True)
    assert args.overrides == ["a.b=1", "a.c=2", "a.d=3"]
    for wrong in (["a.b=1", "--config", "x", "plain"], ["--cells=9"]):
        with pytest.raises(SystemExit):
            parse_arguments(parser, wrong)
        assert f"unrecognized arguments: {wrong[-1]}" in capsys.readouterr().err


def test_contradictions_are_refused():
    with pytest.raises(ValueError, match="would be ignored"):
        load_config("sclong_tiny", ["optim.name=adam"])
    with pytest.raises(ValueError, match=r"must be 1 unless optim\.schedule=warm_restarts"):
        load_config("sclong_tiny", ["optim.cycle_mult=2"])
    with pytest.raises(ValueError, match=r"needs model\.head_init=mean"):
        load_config("sclong_tiny", ["model.head_init=random"])
    with pytest.raises(ValueError, match="could not tell genes apart"):
        load_config("sclong_tiny", ["model.gene_encoder=none", "model.use_gene_vectors=false"])
    with pytest.raises(ValueError, match="gene_encoder=none would ignore it"):
        load_config("sclong_tiny", ["model.gene_encoder=none", "model.gene_graph=g.npz"])
    with pytest.raises(ValueError, match="attention=softmax would ignore it"):
        load_config("sclong_tiny", ["model.attention=softmax", "model.random_features_file=f"])
    with pytest.raises(ValueError, match="must be a multiple"):
        load_config("sclong_tiny", ["engine.train_micro_batch_size_per_gpu=3"])


def test_each_stack_has_its_own_attention_or_that_of_the_model():
    for model, stack, wanted in (
        ("favor", "null", "favor"), ("favor", "softmax", "softmax"),
        ("softmax", "null", "softmax"), ("softmax", "favor", "favor"),
    ):  # fmt: skip
        keys = [f"model.attention={model}", f"model.large_encoder.attention={stack}"]
        found = load_config("sclong_tiny", keys).model
        assert found.attention_of(found.large_encoder) == wanted
        assert found.attention_of(found.decoder) == model
    keys = ["model.attention=softmax", "model.decoder.attention=favor"]
    assert load_config("sclong_tiny", [*keys, "model.random_features_file=f"])
    with pytest.raises(ValueError, match=r"decoder\.attention: got 'flash'.*favor, softmax"):
        load_config("sclong_tiny", ["model.decoder.attention=flash"])
    for eps in ("0", "1e-13", "2", "-1e-4"):
        with pytest.raises(ValueError, match=r"model\.favor_eps: got .*, allowed: 1e-12 to 1"):
            load_config("sclong_tiny", [f"model.favor_eps={eps}"])


def test_a_stack_given_whole_may_lack_the_keys_that_came_later():
    """Commands of earlier versions stay valid."""
    sizes = "{depth: 3, heads: 2, dim_head: 8, nb_features: null, ff_mult: 2}"
    found = load_config("sclong_tiny", [f"model.decoder={sizes}"]).model.decoder
    assert (found.depth, found.attention) == (3, None)
    with pytest.raises(ValueError, match=r"missing model\.decoder\.nb_features"):
        load_config("sclong_tiny", ["model.decoder={depth: 3, heads: 2, dim_head: 8}"])


def test_file_mistakes_are_named(tmp_path):
    tree = to_dict(load_config("sclong_tiny"))
    missing = tmp_path / "missing.yaml"
    del tree["optim"]["lr"]
    missing.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match=r"missing.yaml: missing optim.lr"):
        load_config(missing)
    twice = tmp_path / "twice.yaml"
    twice.write_text("run:\n  seed: 1\n  seed: 2\n")
    with pytest.raises(ValueError, match=r"twice.yaml: line 3: key 'seed' is given twice"):
        load_config(twice)
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: [1\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(broken)
    with pytest.raises(FileNotFoundError, match="presets are"):
        load_config(tmp_path / "absent.yaml")


def test_every_field_is_documented():
    """A string under each field says what it means."""
    import ast
    import inspect

    for node in ast.parse(inspect.getsource(sections)).body:
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Config", "Section")):
            body = node.body
            for i, statement in enumerate(body):
                if isinstance(statement, ast.AnnAssign):
                    assert i + 1 < len(body), f"{node.name}.{statement.target.id}"
                    after = body[i + 1]
                    assert isinstance(after, ast.Expr), f"{node.name}.{statement.target.id}"
                    assert isinstance(after.value, ast.Constant), (
                        f"{node.name}.{statement.target.id}"
                    )


def test_config_is_frozen_and_has_no_defaults():
    sections = typing.get_type_hints(c.RunConfig).values()
    for cls in [c.RunConfig, c.PerformerConfig, *sections]:
        assert cls.__dataclass_params__.frozen
        assert all(f.default is dataclasses.MISSING for f in dataclasses.fields(cls)), cls


def test_a_configuration_of_an_earlier_version_has_the_keys_that_came_later(tmp_path):
    tree = to_dict(load_config("sclong_tiny"))
    assert tree["data"].pop("unmeasured") == "zero"
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(tree))
    assert load_config(tmp_path / "old.yaml") == load_config("sclong_tiny")
    changed = load_config(tmp_path / "old.yaml", ["data.unmeasured=mask"])
    assert changed.data.unmeasured == "mask"
    with pytest.raises(ValueError, match=r"data\.unmeasured"):
        load_config(tmp_path / "old.yaml", ["data.unmeasured=none"])

"""What lies on disk: checkpoints are atomic, checked and pruned by rule; the best one is found."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import random
import shutil
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sclong_ds.checkpoint import save as checkpoint
from sclong_ds.checkpoint.on_disk import (
    best_checkpoint,
    complete_checkpoints,
    damage,
    extra_files,
    fingerprint,
    name_of,
    prune,
    read_manifest,
    record_best,
    remove_unfinished,
    restore_best,
    write_manifest,
)
from sclong_ds.checkpoint.state import TrainState
from sclong_ds.checkpoint.writer import ChecksummedFile
from sclong_ds.config.load import load_config
from sclong_ds.files import sealed_json
from sclong_ds.files.sealed_json import write_sealed
from sclong_ds.run_folder.files import RunFolder
from sclong_ds.run_folder.rows import Judged


def by(error: float | None) -> Judged | None:
    """Return what rows with nothing but `val/mse` are judged by."""
    return None if error is None else Judged("val/mse (hidden and shown)", error)


def files_of(*, world_size: int, zero_stage: int, **hashes: str | None) -> dict[str, bytes]:
    """Return small stand-ins for the files of a checkpoint."""
    ranks = [f"zero_pp_rank_{rank}_mp_rank_00" for rank in range(world_size)]
    models = ranks if zero_stage == 3 else ["mp_rank_00"]
    names = [f"{n}_model_states.pt" for n in models] + [f"{n}_optim_states.pt" for n in ranks]
    state = {"world_size": world_size, "zero_stage": zero_stage, "graph_hash": None,
             "features_hash": None} | hashes  # fmt: skip
    files = {name: bytes(range(i, 40 + i)) for i, name in enumerate(names)}
    return files | {
        "state.json": json.dumps(state).encode(), "config.yaml": b"a: 1\n", "genes.tsv": b"g\n"
    }  # fmt: skip


def make_checkpoint(folder: Path, step: int, files: dict[str, bytes] | None = None) -> Path:
    path = folder / name_of(step)
    path.mkdir(parents=True)
    for name, content in (files or FILES).items():
        (path / name).write_bytes(content)
    write_manifest(path, {})
    return path


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


FILES = files_of(world_size=3, zero_stage=3)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("victim", [*FILES, "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_any_harm_to_any_file_is_found_by_some_rank(tmp_path, parts, victim, harm):
    path = make_checkpoint(tmp_path, 1, FILES)
    assert [damage(path, part=i, parts=parts) for i in range(parts)] == [None] * parts
    content = bytearray((path / victim).read_bytes())
    content[len(content) // 2] ^= 1
    if harm == "remove":
        (path / victim).unlink()
    else:
        (path / victim).write_bytes(content if harm == "flip" else content[:-1])
    found = [damage(path, part=i, parts=parts) for i in range(parts)]
    # Of the manifest's end a line break alone was cut off.
    assert any(found) or (victim, harm) == ("manifest.json", "truncate")
    if victim == "manifest.json" and any(found):
        assert None not in found
    elif victim != "manifest.json":
        # Rank 0 reads state.json as well.
        assert sum(problem is not None for problem in found) <= 1 + (victim == "state.json")
        assert victim in next(filter(None, found))


def seal(path: Path, **changes: object) -> None:
    """Write a checkpoint's manifest with changes, its checksum right."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    write_sealed(path / "manifest.json", manifest)


@pytest.mark.parametrize(("stage", "prefix"), [(1, ""), (2, "bf16_"), (3, ""), (3, "bf16_")])
def test_a_manifest_names_every_file_that_its_ranks_and_stage_need(tmp_path, stage, prefix):
    files = files_of(world_size=2, zero_stage=stage, graph_hash="a", features_hash="b")
    files = {prefix * name.endswith("optim_states.pt") + name: c for name, c in files.items()}
    files |= {"gene_graph.npz": b"g", "random_features.safetensors": b"f"}
    path = make_checkpoint(tmp_path, 1, files)
    assert damage(path) is None
    listed = json.loads((path / "manifest.json").read_text())
    assert (listed["version"], listed["world_size"], listed["zero_stage"]) == (2, 2, stage)
    assert listed["files"].keys() == files.keys()
    for name in files:
        fewer = {n: value for n, value in listed["files"].items() if n != name}
        seal(path, files=fewer)
        assert name.removeprefix("bf16_") in str(damage(path)), name
        (path / name).unlink()
        assert name.removeprefix("bf16_") in str(damage(path)), name
        # A checkpoint that lacks it is not finished in the first place.
        (path / "manifest.json").unlink()
        with pytest.raises(OSError, match=r"is not whole|state\.json"):
            write_manifest(path, {})
        assert damage(path) == "manifest.json is missing"
        (path / name).write_bytes(files[name])
        seal_whole(path)
    assert damage(path) is None


def seal_whole(path: Path) -> None:
    (path / "manifest.json").unlink(missing_ok=True)
    write_manifest(path, {})


@pytest.mark.parametrize(
    "text", ["{}", "[]", "", '{"state.json": [1, 2]}', '{"files": {}}', "null"]
)
def test_an_empty_manifest_is_not_a_whole_checkpoint(tmp_path, text):
    path = make_checkpoint(tmp_path, 1)
    (path / "manifest.json").write_text(text)
    assert "manifest.json" in str(damage(path)) or "state.json" in str(damage(path))


def test_a_manifest_of_version_1_is_still_read(tmp_path):
    path = make_checkpoint(tmp_path, 1)
    flat = {n: [len(c), zlib.crc32(c)] for n, c in FILES.items()}
    (path / "manifest.json").write_text(json.dumps(flat))
    assert damage(path) is None
    victim = path / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    victim.write_bytes(victim.read_bytes()[::-1])
    assert f"{victim.name} does not have the size and CRC-32 it" in str(damage(path))
    del flat[victim.name]
    (path / "manifest.json").write_text(json.dumps(flat))
    assert damage(path) == f"manifest.json lacks {victim.name}"


def test_files_that_a_manifest_does_not_name_are_named(tmp_path):
    path = make_checkpoint(tmp_path, 1)
    (path / "notes.txt").write_text("mine")
    assert damage(path) is None
    assert extra_files(path, read_manifest(path)) == ["notes.txt"]
    # DeepSpeed takes files by their ending.
    (path / "zero_pp_rank_9_mp_rank_00_optim_states.pt").write_bytes(b"")
    assert "zero_pp_rank_9_mp_rank_00_optim_states.pt is not in its" in str(damage(path))


def test_a_manifest_names_nothing_outside_its_checkpoint(tmp_path):
    path = make_checkpoint(tmp_path, 1)
    files = json.loads((path / "manifest.json").read_text())["files"]
    for name in ("../best.json", "/etc/hostname", ".."):
        seal(path, files=files | {name: [1, 1]})
        assert "manifest.json is unreadable" in str(damage(path))


def test_every_rank_checks_the_files_that_it_loads(tmp_path):
    path = make_checkpoint(tmp_path, 1, FILES)
    for rank in range(3):
        victim = path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        whole = victim.read_bytes()
        victim.write_bytes(b"")
        assert [damage(path, part=i, parts=3) is not None for i in range(3)] == [
            i == rank for i in range(3)
        ]
        victim.write_bytes(whole)


def test_a_file_that_another_node_wrote_elsewhere_is_missed(tmp_path):
    path = tmp_path / name_of(1)
    path.mkdir()
    with pytest.raises(OSError, match="a file system that all nodes share"):
        write_manifest(path, {"zero_pp_rank_1_mp_rank_00_optim_states.pt": [40, 1]})
    (path / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(bytes(39))
    with pytest.raises(OSError, match="40 bytes"):
        write_manifest(path, {"zero_pp_rank_1_mp_rank_00_optim_states.pt": [40, 1]})


@settings(deadline=None, max_examples=50)
@given(st.lists(st.binary(max_size=300), max_size=8))
def test_checksum_of_what_is_written_is_that_of_the_file(tmp_path_factory, blocks):
    path = tmp_path_factory.mktemp("sum") / "file"
    with path.open("wb") as raw:
        file = ChecksummedFile(raw)
        for block in blocks:
            file.write(block)
    assert [file.size, file.crc] == fingerprint(path)


def test_a_failed_write_is_kept():
    class Full(io.BytesIO):
        def write(self, _):
            raise OSError(28, "No space left on device")

    file = ChecksummedFile(Full())
    with pytest.raises(OSError, match="No space left"):
        file.write(b"x")
    assert file.error is not None
    assert file.size == 0


@settings(deadline=None, max_examples=40)
@given(
    steps=st.lists(st.integers(1, 60), min_size=1, max_size=9, unique=True).map(sorted),
    errors=st.lists(st.floats(0, 1) | st.none() | st.just(float("nan")), min_size=9, max_size=9),
    keep_last=st.integers(1, 3),
    every=st.none() | st.integers(1, 20),
    keep_best=st.booleans(),
)
def test_pruning_keeps_what_the_rules_name_and_nothing_else(
    tmp_path_factory, steps, errors, keep_last, every, keep_best
):
    folder = tmp_path_factory.mktemp("prune")
    scores: dict[int, float] = {}
    for step, error in zip(steps, errors, strict=False):
        make_checkpoint(folder, step)
        record_best(folder, name_of(step), by(error))
        prune(folder, keep_last=keep_last, keep_every_n_steps=every, keep_best=keep_best)
        if error is not None and error == error:
            scores[step] = error
        expected = {s for s in steps if s <= step and every and s % every == 0}
        expected |= set([s for s in steps if s <= step][-keep_last:])
        if keep_best and scores:
            # Of equals the first; later ones do not replace it.
            best = min(scores, key=lambda s: (scores[s], s))
            expected.add(best)
            assert best_checkpoint(folder) == (name_of(best), by(scores[best]))
        kept = [p.name for p in complete_checkpoints(folder)]
        assert kept == [name_of(s) for s in sorted(expected, reverse=True)]
        scores = {s: e for s, e in scores.items() if (folder / name_of(s)).is_dir()}
        assert not list(folder.glob("*.partial"))


def test_damaged_ones_go_when_a_newer_good_one_is_there(tmp_path):
    for step in (2, 4):
        make_checkpoint(tmp_path, step)
    (tmp_path / "step_00000003.damaged").mkdir()
    (tmp_path / "step_00000009.damaged").mkdir()
    (tmp_path / "step_00000006.partial").mkdir()
    assert [p.name for p in complete_checkpoints(tmp_path)] == [name_of(4), name_of(2)]
    prune(tmp_path, keep_last=2, keep_every_n_steps=None, keep_best=False)
    remove_unfinished(tmp_path)
    assert names(tmp_path) == [name_of(2), name_of(4), "step_00000009.damaged"]


def test_a_new_checkpoint_is_good_without_what_stands_beside_it(tmp_path, monkeypatch, caplog):
    for step in (1, 2, 3):
        make_checkpoint(tmp_path, step, FILES)

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    for module in (checkpoint, sealed_json):
        monkeypatch.setattr(module, "write_atomic", full)
    settings = load_config("sclong_tiny", ["checkpoint.keep_last=1"]).checkpoint
    checkpoint._tidy(tmp_path, name_of(3), by(0.5), settings)
    assert [p.name for p in complete_checkpoints(tmp_path)] == [name_of(3)]
    assert [record.message.partition(", but")[0] for record in caplog.records] == [
        f"{name_of(3)} is saved"
    ] * 2


@pytest.fixture
def validated(tmp_path):
    """The checkpoints of a run whose second of three was the best."""
    folder = tmp_path / "checkpoints"
    with RunFolder(tmp_path) as run:
        for step, error in ((2, 0.5), (4, 0.25), (6, 0.75)):
            make_checkpoint(folder, step, FILES)
            run.append_metrics(step, {"val/mse": error})
            record_best(folder, name_of(step), by(error))
    return folder


def flips(content, n):
    rng = random.Random(1)
    for bit in (rng.randrange(8 * len(content)) for _ in range(n)):
        data = bytearray(content)
        data[bit // 8] ^= 1 << bit % 8
        yield bytes(data)


@pytest.mark.thorough
def test_a_damaged_best_json_is_made_again_from_the_metrics(validated):
    path = validated / "best.json"
    whole = path.read_bytes()
    others = [b"", b"{", b"[]", b"\xff\x00", b'{"checkpoint": "../x", "step": 4, "val_mse": 0.1}',
              b'{"checkpoint": "step_00000004", "step": 4, "val_mse": "0.1"}',
              b'{"checkpoint": "step_\\u0000", "step": 4, "val_mse": 0.1}']  # fmt: skip
    for content in (*flips(whole, 200), *others):
        path.write_bytes(content)
        assert best_checkpoint(validated) == (name_of(4), by(0.25))
        restore_best(validated)
        assert json.loads(path.read_bytes()) == json.loads(whole)
        assert (validated / "best.json.damaged").is_file() or content.strip() == whole.strip()
    path.unlink()
    assert best_checkpoint(validated) is None
    restore_best(validated)
    assert path.read_bytes() == whole


def test_the_best_is_chosen_among_figures_that_measure_the_same(validated):
    """From step 6 on validation measures something else, of which step 10 has the least."""
    settings = load_config("sclong_tiny", ["checkpoint.keep_last=1"]).checkpoint
    with RunFolder(validated.parent) as run:
        for step, error in ((6, 7.0), (8, None), (10, 8.0), (12, 9.0)):
            run.append_metrics(step, {} if error is None else {"val/mse": error})
            if step == 6:
                record_best(validated, name_of(6), by(error), compared_after=6)
                continue
            state = TrainState(
                step=step, cells_seen=0, world_size=3, seed=0, precision="fp32", zero_stage=3,
                corpus_hash="", genes_hash="", graph_hash=None, features_hash=None,
                compared_after=6,
            )  # fmt: skip
            changed = {"state.json": json.dumps(dataclasses.asdict(state)).encode()}
            make_checkpoint(validated, step, FILES | changed)
            checkpoint._tidy(
                validated,
                name_of(step),
                by(error),
                settings,
                compared_after=6,
            )
            kept = [p.name for p in complete_checkpoints(validated)]
            # As long as no later one was validated, the best one before stays.
            best = {8: (name_of(4), by(0.25))}.get(step, (name_of(10), by(8.0)))
            assert best_checkpoint(validated) == best
            assert kept == sorted({name_of(step), best[0]}, reverse=True)
    (validated / "best.json").unlink()
    restore_best(validated)
    assert best_checkpoint(validated) == (name_of(10), by(8.0))


def test_a_best_json_of_another_run_does_not_count(validated, tmp_path, caplog):
    """Its checkpoint has the same name and other content."""
    other = tmp_path / "other" / "checkpoints"
    make_checkpoint(other, 4, FILES | {"zero_pp_rank_0_mp_rank_00_optim_states.pt": b"other"})
    record_best(other, name_of(4), by(0.0625))
    (validated / "best.json").write_bytes((other / "best.json").read_bytes())
    assert best_checkpoint(validated) == (name_of(4), by(0.25))
    assert "best.json: of another run" in caplog.text


def test_a_folder_that_cannot_be_listed_is_no_folder_without_checkpoints(validated, monkeypatch):
    def fail(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.listdir", fail)
    with pytest.raises(PermissionError, match=r"Permission denied: '.*/checkpoints'"):
        complete_checkpoints(validated)


def test_saving_goes_on_beside_a_damaged_best_json(validated, caplog):
    """It keeps the best checkpoint, which the file does not name any more."""
    settings = load_config("sclong_tiny", ["checkpoint.keep_last=1"]).checkpoint
    for content in flips((validated / "best.json").read_bytes(), 20):
        (validated / "best.json").write_bytes(content)
        checkpoint._tidy(validated, name_of(6), None, settings)
        assert best_checkpoint(validated) == (name_of(4), by(0.25))
    assert [p.name for p in complete_checkpoints(validated)] == [name_of(6), name_of(4)]
    assert "set aside as best.json.damaged" in caplog.text


def test_without_metrics_a_damaged_best_json_is_written_by_the_next_validation(tmp_path):
    make_checkpoint(tmp_path, 1, FILES)
    (tmp_path / "best.json").write_text('{"checkpoint": "st')
    assert best_checkpoint(tmp_path) is None
    record_best(tmp_path, name_of(1), by(0.5))
    assert best_checkpoint(tmp_path) == (name_of(1), by(0.5))


def test_figures_of_another_kind_are_not_compared(tmp_path, caplog):
    """An earlier version's error is lower than any relative one; it does not stay the best."""
    caplog.set_level("INFO")
    folder = tmp_path / "checkpoints"
    hidden = {"val/n_hidden": 9.0, "val/mse": 0.3, "val/linear/mse": 0.25}
    with RunFolder(tmp_path) as run:
        for step, row in enumerate(
            ({"val/mse": 0.1}, hidden | {"val/relative_mse": 1.2}, hidden,
             hidden | {"val/relative_mse": 1.1}, hidden | {"val/relative_mse": 1.4}), start=1,
        ):  # fmt: skip
            make_checkpoint(folder, step, FILES)
            run.append_metrics(step, row)
    write_sealed(folder / "best.json", {"checkpoint": name_of(1), "step": 1, "val_mse": 0.1})
    assert best_checkpoint(folder) == (name_of(1), Judged("val/mse", 0.1))
    relative = "val/relative_mse (linear)"
    for step, value in ((2, 1.2), (4, 1.1), (5, 1.4)):
        record_best(folder, name_of(step), Judged(relative, value))
    assert best_checkpoint(folder) == (name_of(4), Judged(relative, 1.1))
    assert caplog.text.count("which does not compare") == 1
    (folder / "best.json").unlink()
    restore_best(folder)
    assert best_checkpoint(folder) == (name_of(4), Judged(relative, 1.1))


def test_what_others_put_beside_the_checkpoints_is_ignored_and_stays(tmp_path):
    for step in (2, 4):
        make_checkpoint(tmp_path, step)
    foreign = ["step_abc", "step_00000004 (copy)", "step_12", "step_abc.damaged", "step_x.partial",
               "step_\u0663", "step_", "notes"]  # fmt: skip
    for name in foreign:
        (tmp_path / name).mkdir()
    files = [name_of(16), "step_00000003.damaged.txt", "latest"]
    for name in files:
        (tmp_path / name).write_text("?")
    assert [p.name for p in complete_checkpoints(tmp_path)] == [name_of(4), name_of(2)]
    remove_unfinished(tmp_path)
    prune(tmp_path, keep_last=1, keep_every_n_steps=None, keep_best=True)
    assert names(tmp_path) == sorted([*foreign, *files, name_of(4)])
    # A checkpoint of that step takes the name; the file stays under another.
    (tmp_path / f"{name_of(16)}.partial").mkdir()
    checkpoint._rename(tmp_path / f"{name_of(16)}.partial")
    assert (tmp_path / name_of(16)).is_dir()
    assert (tmp_path / f"{name_of(16)}.foreign").read_text() == "?"


def test_more_than_eight_digits_are_still_the_newest(tmp_path):
    for step in (99_999_999, 100_000_000):
        make_checkpoint(tmp_path, step)
    assert complete_checkpoints(tmp_path)[0].name == "step_100000000"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("keep_every_n_steps", 75, "must be a multiple of checkpoint.every_n_steps 50"),
        ("keep_every_n_steps", 0, "or null"),
        ("max_failed_saves", 0, "must be >= 1"),
    ],
)
def test_wrong_settings_are_named(key, value, message):
    with pytest.raises(ValueError, match=message):
        load_config("sclong_tiny", [f"checkpoint.{key}={value}"])
    kept = load_config("sclong_tiny", ["checkpoint.keep_every_n_steps=100"])
    assert kept.checkpoint.keep_every_n_steps == 100


def test_export_refuses_what_is_no_whole_checkpoint(tmp_path, capsys):
    from sclong_ds.__main__ import main
    from sclong_ds.exported.export import resolve

    good = make_checkpoint(tmp_path / "run" / "checkpoints", 5)
    copy = tmp_path / "kept for the paper"
    shutil.copytree(good, copy)
    for path in (good, good.parent, tmp_path / "run"):
        assert resolve(path) == good
    assert resolve(copy) == copy
    partial = good.parent / "step_00000006.partial"
    shutil.copytree(good, partial)
    (partial / "manifest.json").unlink()
    with pytest.raises(ValueError, match="damaged or unfinished"):
        resolve(partial)
    universal = tmp_path / "step_00000005_universal"
    (universal / "zero").mkdir(parents=True)
    with pytest.raises(ValueError, match="export the checkpoint that it was made from"):
        resolve(universal)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        resolve(tmp_path / "empty")
    for path, message in {partial: "damaged or unfinished", universal: "universal"}.items():
        assert main(["export", str(path), "--out", str(tmp_path / "out")]) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert message in said
        assert said.count("\n") == 1

"""The pictures of a validation are compared with what was drawn before they are shown."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from sclong_ds.run_folder.pending_pictures import (
    PICTURES_FILE,
    Artist,
    pending,
    seal_pictures,
    sound_pictures,
)


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    for name in "ab":
        (tmp_path / f"{name}.png").write_bytes(name.encode() * 9)
    seal_pictures(tmp_path)
    return tmp_path


@pytest.mark.parametrize("content", [b"aaaaaaaac", b"aaa", b"", b"bbbbbbbbb", None])
def test_a_picture_that_was_not_drawn_is_named_and_left_out(
    drawn: Path, content: bytes | None
) -> None:
    first, second = drawn / "a.png", drawn / "b.png"
    assert sound_pictures(drawn) == ((first, second), ())
    first.unlink() if content is None else first.write_bytes(content)
    sound, problems = sound_pictures(drawn)
    assert sound == (second,)
    assert [line.split(": ")[0] for line in problems] == [str(first)]


def test_a_picture_of_elsewhere_is_named(drawn: Path) -> None:
    (drawn / "c.png").write_bytes(b"x")
    assert [line.split(": ")[0] for line in sound_pictures(drawn)[1]] == [str(drawn / "c.png")]


def test_without_a_record_that_can_be_read_pictures_are_taken(
    drawn: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = drawn / PICTURES_FILE
    path.write_text(path.read_text().replace("a.png", "d.png"))
    assert sound_pictures(drawn) == ((drawn / "a.png", drawn / "b.png"), ())
    assert "pictures.json: damaged" in caplog.text
    path.unlink()
    assert len(sound_pictures(drawn)[0]) == 2


def test_what_is_drawn_when_the_wait_is_over_waits_again(tmp_path: Path) -> None:
    artist = Artist(tmp_path, step=0)
    artist.draw(5, {"predicted_true": np.ones((2, 1_000_000))})
    plots = tmp_path / "plots"
    deadline = time.monotonic() + 240
    while not (plots / "step_00000005.drawing.npz").exists():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    artist.finish(wait_s=0)
    assert pending(tmp_path) == [plots / "step_00000005.npz"]
    assert not list(plots.glob("*.drawing.npz"))

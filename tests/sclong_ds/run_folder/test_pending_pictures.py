"""The pictures of a validation are compared with what was drawn before they are shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from sclong_ds.run_folder.pending_pictures import PICTURES_FILE, seal_pictures, sound_pictures


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

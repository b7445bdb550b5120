import gzip
import zipfile

import pytest

from data_prep.fetch.soundness import check_sound


@pytest.fixture
def whole(tmp_path, hdf5):
    (tmp_path / "a.h5ad").write_bytes(hdf5())
    (tmp_path / "a.csv").write_text("gene,c1\nTP53,1\n")
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(bytes(range(256)) * 50))
    with zipfile.ZipFile(tmp_path / "a.zarr.zip", "w") as file:
        file.writestr("zarr.json", "{}" * 5000)
    return tmp_path


NAMES = ("a.h5ad", "a.csv.gz", "a.zarr.zip")


@pytest.mark.parametrize("name", [*NAMES, "a.csv"])
def test_whole_files(whole, name):
    check_sound(whole / name, name=name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_cut_files(whole, name, share):
    data = (whole / name).read_bytes()
    (whole / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match="damaged or not whole"):
        check_sound(whole / name, name=name)


@pytest.mark.parametrize("name", ["a.csv.gz", "a.zarr.zip"])
def test_changed_byte_in_formats_with_sums(whole, name):
    data = bytearray((whole / name).read_bytes())
    data[60] ^= 255
    (whole / name).write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        check_sound(whole / name, name=name)


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><p>", b"\n <html>", b"<?xml v?><Error>SlowDown"])
@pytest.mark.parametrize("name", [*NAMES, "a.csv"])
def test_web_pages(tmp_path, page, name):
    (tmp_path / name).write_bytes(page)
    with pytest.raises(ValueError, match="web page"):
        check_sound(tmp_path / name, name=name)


def test_empty_and_other_files(tmp_path, whole):
    (tmp_path / "e.h5ad").write_bytes(b"")
    with pytest.raises(ValueError, match="empty"):
        check_sound(tmp_path / "e.h5ad", name="e.h5ad")
    with pytest.raises(ValueError, match="binary"):
        check_sound(whole / "a.h5ad", name="a.csv")
    with pytest.raises(ValueError, match="damaged or not whole"):
        check_sound(whole / "a.csv", name="a.h5ad")

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sclong_ds.files.checksums import check_file, file_crc32c


@given(data=st.binary(min_size=1, max_size=500), place=st.integers(0, 10**6))
def test_every_flipped_bit_is_found(tmp_path_factory, data, place):
    path = tmp_path_factory.mktemp("checksums") / "file"
    path.write_bytes(data)
    expected = len(data), file_crc32c(path)
    check_file(path, expected, cure="copy it again")
    changed = bytearray(data)
    changed[place // 8 % len(data)] ^= 1 << place % 8
    path.write_bytes(changed)
    with pytest.raises(ValueError, match=r"file: damaged \(CRC-32C .* copy it again"):
        check_file(path, expected, cure="copy it again")


def test_known_value_size_and_absence(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"123456789")
    assert file_crc32c(path) == 0xE3069283  # the check value of CRC-32C
    with pytest.raises(ValueError, match=r"9 bytes, 8 on record"):
        check_file(path, (8, 0xE3069283), cure="copy it again")
    with pytest.raises(FileNotFoundError, match="missing; copy it again"):
        check_file(tmp_path / "none", (0, 0), cure="copy it again")

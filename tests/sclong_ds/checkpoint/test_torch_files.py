"""Files of torch.save: what names code is refused by name, and is not run whatever reads it."""

from __future__ import annotations

import collections
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from sclong_ds.checkpoint.torch_files import RECORDS, plain_values_only, refuse_code


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_tensors_plain_values_and_the_records_of_deepspeed_pass(tmp_path: Path) -> None:
    content = {
        "tensor": torch.ones(3), "size": torch.Size([3]), "order": collections.OrderedDict(a=1),
        "plain": [1, 2.5, None, True, "text", (1,), {"a"}], "stage": RECORDS[1](2),
    }  # fmt: skip
    torch.save(content, tmp_path / "x.pt")
    refuse_code([tmp_path / "x.pt"])
    with plain_values_only():
        found = torch.load(tmp_path / "x.pt", weights_only=False)
    assert torch.equal(found.pop("tensor"), content.pop("tensor"))
    assert found == content


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused_before_and_while_a_file_is_read(tmp_path: Path, zipped: bool) -> None:
    path, made = tmp_path / "x.pt", tmp_path / "made"
    torch.save({"a": Touch(made)}, path, _use_new_zipfile_serialization=zipped)
    reason = r"names \w+\.mkdir, which could run code" if zipped else "no file of tensors and plain"
    with pytest.raises(ValueError, match=rf"x\.pt: {reason}"):
        refuse_code([path])
    with pytest.raises(ValueError, match=r"names \w+\.mkdir: only plain"), plain_values_only():
        torch.load(path, weights_only=False)
    assert not made.exists()
    torch.load(path, weights_only=False)  # what this test guards against
    assert made.exists()


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    whole = tmp_path / "whole.pt"
    torch.save({"a": torch.ones(9)}, whole)
    for content in (b"", b"hello", pickle.dumps(1), whole.read_bytes()[:-30]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.pt: no file of tensors and plain values"):
            refuse_code([whole, path])
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(ValueError, match=r"x\.pt: no file .* torchscript"):
        refuse_code([path])


def test_the_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    before = dict(os.environ)
    with plain_values_only():
        assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"
        assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ
    assert dict(os.environ) == before

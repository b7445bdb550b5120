"""The manifest of an exported model: size and checksums of every file, compared at every load.

    MODEL_DIR/manifest.json   files {name: {bytes, crc32c, sha256}}, and a checksum of itself

Loading compares size and CRC-32C of all files except the model card, which people edit: 4 GB of
weights cost about a second. `python -m sclong_ds verify MODEL_DIR` compares the SHA-256, too. The
manifest's checksum is the digest of the model: it covers every byte of it. Folders of format
version 2 have no manifest; they are read, and a log line states that nothing is compared.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c

from sclong_ds.files.atomic import file_sha256, named_errors
from sclong_ds.files.checksums import check_file
from sclong_ds.files.sealed_json import CHECKSUM, read_sealed, write_sealed
from sclong_ds.files.versions import refuse_later

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
CARD = "README.md"
REQUIRED = frozenset({"config.yaml", "genes.tsv", WEIGHTS})
"""Without these a folder is no model."""
CURE = "copy the model folder again, or export it again"

_FORMAT, _VERSION = "sclong_ds-model-manifest", 1
_BLOCK_BYTES = 2**22
_log = logging.getLogger(__name__)


def write_manifest(folder: Path) -> str:
    """Write the manifest of a complete model folder; returns the model's digest.

    Args:
        folder: Flat folder of the model's files, without a manifest.
    """
    files = {path.name: _record(path) for path in sorted(folder.iterdir())}
    content = {"format": _FORMAT, "version": _VERSION, "files": files}
    return write_sealed(folder / MANIFEST, content)


def refuse_other_folder(folder: Path) -> None:
    """Refuse a folder that is no exported model.

    Args:
        folder: MODEL_DIR.

    Raises:
        FileNotFoundError: A file that every model has is missing.
    """
    for name in sorted(REQUIRED):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is no exported model ({name} is missing): make one with "
                f"`python -m sclong_ds export CHECKPOINT_DIR --out MODEL_DIR`"
            )


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a model folder; None: it has none, as in format version 2.

    Args:
        folder: MODEL_DIR.

    Raises:
        LaterVersionError: It is of a later version.
        ValueError: It is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = read_sealed(path)
    except ValueError as error:
        raise ValueError(f"{error}; {CURE}") from None
    form, version = manifest.get("format"), manifest.get("version")
    if form == _FORMAT:
        refuse_later(version, newest=_VERSION, what=_FORMAT, where=path)
    if (form, version) != (_FORMAT, _VERSION):
        raise ValueError(f"{path}: damaged (format {form} version {version}); {CURE}")
    return manifest


def check_files(folder: Path) -> bool:
    """Compare what a model is made of with its manifest, by size and CRC-32C.

    Args:
        folder: MODEL_DIR.

    Returns:
        Whether there was a manifest to compare with.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file, or the manifest, is damaged.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        _log_unchecked(folder.resolve())
        return False
    missing = REQUIRED - manifest["files"].keys()
    if missing:
        raise ValueError(f"{folder / MANIFEST}: names no {', '.join(sorted(missing))}; {CURE}")
    for name, record in manifest["files"].items():
        if name != CARD:
            check_file(folder / name, (record["bytes"], record["crc32c"]), cure=CURE)
    return True


def model_digest(folder: Path) -> str | None:
    """Return what names a model, all of its files: SHA-256 (hex); None for format version 2.

    Args:
        folder: MODEL_DIR.
    """
    manifest = read_manifest(folder)
    return None if manifest is None else str(manifest[CHECKSUM])


def weights_hash(folder: Path) -> str:
    """Return the SHA-256 (hex) of a model's weights file: it tells two models apart.

    Args:
        folder: MODEL_DIR.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return file_sha256(folder / WEIGHTS)
    return str(manifest["files"][WEIGHTS]["sha256"])


def problems(
    folder: Path, manifest: dict[str, Any], *, on_bytes: Callable[[int], object]
) -> list[str]:
    """Compare every file of a model with its manifest, SHA-256 included; one line per problem.

    Args:
        folder: MODEL_DIR.
        manifest: From `read_manifest`.
        on_bytes: Called with the number of bytes of each file that was read.
    """
    found = []
    for name, record in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path}: missing")
        elif (now := _record(path)) != record:
            what = next(key for key in record if now[key] != record[key])
            found.append(f"{path}: damaged ({what} {now[what]}, {record[what]} on record)")
        on_bytes(record["bytes"])
    extra = sorted({p.name for p in folder.iterdir()} - {MANIFEST, *manifest["files"]})
    return found + [f"{folder / name}: not in the manifest" for name in extra]


def _record(path: Path) -> dict[str, Any]:
    """Return size, CRC-32C and SHA-256 of a file, read once."""
    size, crc, sha256 = 0, 0, hashlib.sha256()
    with named_errors(path), path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            size += len(block)
            crc = google_crc32c.extend(crc, block)
            sha256.update(block)
    return {"bytes": size, "crc32c": crc, "sha256": sha256.hexdigest()}


@functools.cache
def _log_unchecked(folder: Path) -> None:
    """Log once per process that a folder has nothing to compare with."""
    _log.warning(
        "%s: of format version 2, without checksums: nothing tells whether its files are what was "
        "exported; export it again for a manifest",
        folder,
    )

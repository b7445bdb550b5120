"""Damage one file of a product and judge what its readers say.

A product is a folder and its readers. Each reader is called after each damage; it must return what
it returned before, or raise a ValueError or OSError whose text names the damaged file.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Damage = Literal["flip", "cut", "drop", "other", "swap"]
DAMAGES: tuple[Damage, ...] = ("flip", "cut", "drop", "other", "swap")
Outcome = Literal["harmless", "named", "silent", "unnamed", "crash"]
OUTCOMES: tuple[Outcome, ...] = ("harmless", "named", "silent", "unnamed", "crash")


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A folder of files that belong together, and what reads it."""

    name: str
    """For instance corpus."""
    folder: Path
    """Where it is."""
    files: tuple[str, ...]
    """Its files, relative to the folder."""
    other: Path
    """A folder with another version of it."""
    readers: Mapping[str, Callable[[Path], Any]]
    """Name to function of the folder; results are compared by `==`."""
    must_fail: tuple[str, ...] = ()
    """Readers that must reject every change, whether or not it matters to others."""
    alone: bool = False
    """Whether its files belong together with nothing, so that another version is as good."""
    kind_of: Callable[[str], str] = lambda name: name
    """Gives the kind of a file, for the table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What one reader made of one damage."""

    product: str
    """Name of the product."""
    file: str
    """The damaged file."""
    kind: str
    """Its kind."""
    damage: str
    """What was done to it."""
    reader: str
    """Who read it."""
    outcome: Outcome
    """harmless and named are right."""
    text: str
    """The message, or what differs."""


def damaged(
    product: Product, file: str, damage: Damage, rng: random.Random
) -> Iterator[tuple[str, ...]]:
    """Damage a file, yield the files that were changed, and repair it; nothing where it cannot be.

    Args:
        product: The product.
        file: One of its files.
        damage: What to do.
        rng: Chooses bits, lengths and partners.
    """
    path = product.folder / file
    content = path.read_bytes()
    partner = None
    if damage == "flip" and content:
        changed = bytearray(content)
        bit = rng.randrange(8 * len(content))
        changed[bit // 8] ^= 1 << bit % 8
        _put(path, bytes(changed))
    elif damage == "cut" and content:
        _put(path, content[: rng.randrange(len(content))])
    elif damage == "drop":
        path.unlink()
    elif damage == "other":
        source = product.other / file
        if product.alone or not source.is_file() or source.read_bytes() == content:
            return
        _put(path, source.read_bytes())
    elif damage == "swap":
        partner = _partner(product, file, content, rng)
        if partner is None:
            return
        theirs = (product.folder / partner).read_bytes()
        _put(path, theirs)
        _put(product.folder / partner, content)
    else:
        return
    try:
        yield (file,) if partner is None else (file, partner)
    finally:
        if partner is not None:
            _put(product.folder / partner, theirs)
        _put(path, content)


def _partner(product: Product, file: str, content: bytes, rng: random.Random) -> str | None:
    """Return a file of other content to swap with, one of the same kind or name if there is one."""
    others = [name for name in product.files if name != file]
    others = [name for name in others if (product.folder / name).read_bytes() != content]
    kind, base = product.kind_of(file), Path(file).name
    alike = [name for name in others if product.kind_of(name) == kind or Path(name).name == base]
    return rng.choice(alike or others) if others else None


def _put(path: Path, content: bytes) -> None:
    """Replace a file; who has mapped the old one keeps it."""
    part = path.with_name(f"{path.name}.new")
    part.write_bytes(content)
    os.replace(part, path)


def judge(
    product: Product, changed: tuple[str, ...], damage: Damage, error: BaseException
) -> tuple[Outcome, str]:
    """Tell whether an error is one that a user can act on.

    Args:
        product: The product.
        changed: Its damaged files.
        damage: What was done to them.
        error: What a reader raised.

    Returns:
        The outcome and the text.
    """
    text = " ".join(str(error).split())
    if not isinstance(error, ValueError | OSError):
        return "crash", f"{type(error).__name__}: {text}"
    if any(_names(product, file, text) for file in changed):
        return "named", text
    if damage == "drop" and str(product.folder) in text:
        return "named", text
    # Of two files that do not belong together, either may be called wrong.
    if damage in ("other", "swap") and any(_names(product, file, text) for file in product.files):
        return "named", text
    return "unnamed", f"{type(error).__name__}: {text}"


def _names(product: Product, file: str, text: str) -> bool:
    """Whether a text names a file; inside a Zarr store the array, or the store, is enough."""
    parts = Path(file).parts
    if Path(file).name in text and len(Path(file).name) > 2:
        return True
    stores = [n for n, part in enumerate(parts) if part.endswith(".zarr")]
    return bool(stores) and "/".join(parts[: stores[0] + 1]) in text


def fresh_copy(source: Path, target: Path) -> Path:
    """Replace a folder by a copy of another and return it."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)
    return target

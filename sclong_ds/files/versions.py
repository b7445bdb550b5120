"""Refuses files of later versions of the program, which may mean what nothing here knows."""

from __future__ import annotations


class LaterVersionError(ValueError):
    """A file is sound, and of a later version of sclong_ds."""


def refuse_later(version: object, *, newest: int, what: str, where: object) -> None:
    """Refuse a file of a later version.

    Args:
        version: What the file states; what is no number is left to the caller.
        newest: The last version that this program reads.
        what: What has this version, for the message.
        where: The file, for the message.

    Raises:
        LaterVersionError: It is of a later version.
    """
    if type(version) is int and version > newest:
        raise LaterVersionError(
            f"{where}: written by a later version of sclong_ds ({what} version {version}, this one "
            f"reads 1 to {newest}): update sclong_ds"
        )

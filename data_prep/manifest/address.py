"""Which addresses stand for a file that can be fetched. Standard library only."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit

SCHEMES = ("http", "https", "s3", "gs", "ftp", "file")
_PARTS = re.compile(r"(?i)(\.mtx|\.npz|barcodes\.tsv|features\.tsv|genes\.tsv)(\.gz)?$")


def check_address(url: str) -> None:
    """Refuse an address that cannot be fetched as one file.

    Args:
        url: The address.

    Raises:
        ValueError: No scheme of SCHEMES, or a file that needs others beside it.
    """
    parts = urlsplit(url)
    if parts.scheme.lower() not in SCHEMES or not parts.path.strip("/"):
        raise ValueError(f"{url[:200]}: not the address of a file; allowed: {', '.join(SCHEMES)}")
    if _PARTS.search(unquote(parts.path)):
        raise ValueError(
            f"{url[:200]}: one of several files of a dataset; fetch them together into a folder of "
            "your own and list the folder in a manifest"
        )

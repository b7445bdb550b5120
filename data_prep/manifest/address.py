"""Which addresses stand for a file that can be fetched, and what of them may be written down.

A signed address (of S3, Google, Azure, CloudFront ...) opens its file to whoever reads it. What is
recorded anywhere is the address without that: `Item` and `Dataset` hold it as `url`, and what was
given as `address`, which no file of ours keeps. Standard library only.
"""

from __future__ import annotations

import re
from urllib.parse import unquote, unquote_plus, urlsplit

SCHEMES = ("http", "https", "s3", "gs", "ftp", "file")
_PARTS = re.compile(r"(?i)(\.mtx|\.npz|barcodes\.tsv|features\.tsv|genes\.tsv)(\.gz)?$")

_USER = re.compile(r"(?<=://)[^/\s?#'\"@]*@")
_QUERY = re.compile(r"\?[^\s'\"<>#]*")
_SECRET = re.compile(
    r"x-(amz|goog|oss|cos|ms)-.*|.*(signature|token|secret|passw|credential).*|sig|auth|"
    r"authorization|api[-_]?key|policy|key-pair-id|(aws|oss)?accesskeyid|googleaccessid"
)
"""Names of parameters of a query, in lower case."""
_BESIDE_SECRET = re.compile(r"expires?|s[eprtvs]|spr|sip|srt|sdd|skoid|sktid|sk[tesv]|s[acu]o?id")
"""Those that belong to a signature, where there is one; `se` and the like are Azure's."""


def without_secrets(text: str) -> str:
    """Return an address, or a text with addresses in it, without users, passwords and signatures.

    Args:
        text: The address or text; other parameters of a query stay.
    """
    return _QUERY.sub(_public_query, _USER.sub("", text))


def _public_query(match: re.Match[str]) -> str:
    parts = match[0][1:].split("&")
    names = [unquote_plus(part.partition("=")[0]).lower() for part in parts]
    secret = [_SECRET.fullmatch(name) is not None for name in names]
    if not any(secret):
        return match[0]
    kept = [
        part
        for part, name, hidden in zip(parts, names, secret, strict=True)
        if not hidden and not _BESIDE_SECRET.fullmatch(name)
    ]
    return f"?{'&'.join(kept)}" if kept else ""


def public_and_full(url: str, address: str) -> tuple[str, str]:
    """Return an address as it may be recorded, and as it is asked for.

    Args:
        url: The address; one with secrets is asked for.
        address: The same with its secrets, where `url` has none; another one gives way to `url`.
    """
    public = without_secrets(url)
    same = url == public and without_secrets(address) == public
    return public, address if same else url


def check_address(url: str) -> None:
    """Refuse an address that cannot be fetched as one file.

    Args:
        url: The address.

    Raises:
        ValueError: No scheme of SCHEMES, or a file that needs others beside it.
    """
    parts = urlsplit(url)
    if parts.scheme.lower() not in SCHEMES or not parts.path.strip("/"):
        shown = without_secrets(url)[:200]
        raise ValueError(f"{shown}: not the address of a file; allowed: {', '.join(SCHEMES)}")
    if _PARTS.search(unquote(parts.path)):
        raise ValueError(
            f"{without_secrets(url)[:200]}: one of several files of a dataset; fetch them together "
            "into a folder of your own and list the folder in a manifest"
        )

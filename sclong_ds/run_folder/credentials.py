"""Removes credentials from URLs before they are stored or shown."""

from __future__ import annotations

import re

# USER:PASSWORD@ of a URI; SQLAlchemy takes a password with a slash in it, too.
_CREDENTIALS = re.compile(r"""(?<=://)(?:[^/\s"']*@|[^:/\s"'@]+:[^\s"'@]*@)""")


def without_credentials(text: str) -> str:
    """Return a URI, or a text with URIs in it, without their users and passwords."""
    return _CREDENTIALS.sub("", text)

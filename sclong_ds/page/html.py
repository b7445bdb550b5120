"""Pages and their parts, from the templates beside this module; jinja2 escapes every text.

    body = html.section("Figures", html.table(["", "MSE"], [["model", "0.2"]]))
    text = html.document("run 1", status="done", body=body, footer="written today")

What a function here returns is `Markup`, which other parts take as it is; a plain string is text.
A page holds its styles and pictures: it needs no other file and no network.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"


def document(
    title: str, *, status: str, body: Markup, footer: str, kind: str = "training report"
) -> str:
    """Return a whole page.

    Args:
        title: The heading and the window title.
        status: The line under the heading.
        body: The sections.
        footer: Text at the end.
        kind: What the page is.
    """
    page = _environment().get_template("page.html")
    return page.render(title=title, status=status, body=body, footer=footer, kind=kind)


def render(template: Path, **values: Any) -> str:
    """Return the page of a template that extends `page.html`.

    Args:
        template: The file.
        values: What it names; text is escaped.
    """
    source = template.read_text(encoding="utf-8")
    return _environment().from_string(source).render(**values)


def join(parts: Iterable[Markup]) -> Markup:
    """Return parts one after the other."""
    return Markup("").join(parts)


def section(title: str, content: Markup) -> Markup:
    """Return a titled section; nothing if it has no content."""
    return _part("section", title, content) if content else Markup("")


def verdict(text: str) -> Markup:
    """Return the sentence that a page begins with."""
    return _part("verdict", text)


def paragraph(text: str) -> Markup:
    """Return a paragraph."""
    return _part("paragraph", text)


def note(text: str) -> Markup:
    """Return a paragraph in smaller type."""
    return _part("note", text)


def bullets(text: str, lines: Sequence[str]) -> Markup:
    """Return a paragraph and the points below it."""
    return _part("bullets", text, lines)


def badge(kind: str, text: str) -> Markup:
    """Return a word on a coloured ground.

    Args:
        kind: good, warn, bad or live.
        text: The word.
    """
    return _part("badge", kind, text)


def cards(values: Sequence[tuple[str, str, str]]) -> Markup:
    """Return the main figures: name, value, and what to compare it with."""
    return _part("cards", values)


def grid(parts: Sequence[Markup]) -> Markup:
    """Return pictures side by side where the window is wide; nothing if there are none."""
    return _part("grid", join(parts)) if parts else Markup("")


def pair(parts: Sequence[Markup]) -> Markup:
    """Return two blocks side by side where the window is wide."""
    return _part("pair", parts)


def folded(title: str, content: Markup, *, unfolded: bool = False) -> Markup:
    """Return content that a click on its title shows or hides."""
    return _part("folded", title, content, unfolded)


def code(text: str) -> Markup:
    """Return text as it is in a file."""
    return _part("code", text)


def image(data: bytes, kind: str, title: str, text: str, *, seen: str = "") -> Markup:
    """Return a captioned figure that holds its image; a click shows it in its full size.

    Args:
        data: File content of the image.
        kind: MIME type, for instance image/png.
        title: First words of the caption.
        text: Rest of the caption, may be empty.
        seen: What the picture shows, for who does not see it; empty: the caption tells.
    """
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    alt = f"{title}. {seen or text}".strip()
    return _part("image", source, alt, title, text)


def key_table(rows: Sequence[tuple[str, str]]) -> Markup:
    """Return a table of names and values without a head; nothing if there are no rows."""
    return _part("key_table", rows) if rows else Markup("")


def table(head: Sequence[str], body: Sequence[Sequence[str]], *, numeric: bool = False) -> Markup:
    """Return a table with a head; numeric aligns all columns but the first right."""
    return _part("table", head, body, numeric)


def _part(name: str, *values: Any) -> Markup:
    """Return what a macro of `parts.html` makes of values."""
    return Markup(getattr(_environment().get_template("parts.html").module, name)(*values))


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

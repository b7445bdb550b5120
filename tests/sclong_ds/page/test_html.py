"""Parts of a page escape every text, and no page is put together outside of the templates.

Covers also `sclong_ds/page/words.py`.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from sclong_ds.page import html, words

ROOT = Path(__file__).parents[3]
NASTY = '<b a="1">&'
SAFE = "&lt;b a=&#34;1&#34;&gt;&amp;"


def test_text_is_escaped_and_parts_are_not_escaped_again() -> None:
    parts = [
        html.verdict(NASTY), html.paragraph(NASTY), html.note(NASTY), html.badge("good", NASTY),
        html.bullets(NASTY, [NASTY]), html.cards([(NASTY, NASTY, NASTY)]), html.code(NASTY),
        html.key_table([(NASTY, NASTY)]), html.table([NASTY], [[NASTY]]),
        html.image(b"x", "image/png", NASTY, NASTY), html.folded(NASTY, html.code(NASTY)),
    ]  # fmt: skip
    content = html.section(NASTY, html.join([html.grid(parts), html.pair(parts)]))
    page = html.document(NASTY, status=NASTY, body=content, footer=NASTY)
    assert NASTY not in page
    assert page.count(SAFE) == 2 * sum(part.count(SAFE) for part in parts) + 5
    assert "&amp;lt;" not in page


def test_a_template_that_names_what_it_is_not_given_fails(tmp_path: Path) -> None:
    template = tmp_path / "page.html"
    template.write_text("{{ absent }}")
    with pytest.raises(UndefinedError, match="absent"):
        html.render(template)


def test_an_image_tells_what_is_seen_and_grows_at_a_click() -> None:
    text = html.image(b"x", "image/png", "A <b>", "What it means.", seen="Falls from 2 to 1.")
    assert 'alt="A &lt;b&gt;. Falls from 2 to 1."' in text
    assert text.count('<input type="checkbox"') == 1
    assert "What it means." in text
    assert 'alt="A. What it means."' in html.image(b"x", "image/png", "A", "What it means.")


def test_parts_without_content_are_left_out() -> None:
    assert html.section("title", html.grid([])) == html.key_table([]) == ""


def test_html_is_written_by_templates_only() -> None:
    for package in ("sclong_ds", "data_prep"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                text = node.value if isinstance(node, ast.Constant) else None
                tags = ("</p>", "</div>", "</td>", "</li>", "</h2>", "<br>", "</table>", "</span>")
                assert not (isinstance(text, str) and any(tag in text for tag in tags)), (
                    f"{path}:{node.lineno}: {text}"
                )


def test_one_and_many() -> None:
    assert [words.counted(n, "cell") for n in (0, 1, 1200)] == ["0 cells", "1 cell", "1,200 cells"]

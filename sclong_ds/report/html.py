"""HTML building blocks of the report: the style sheet and the elements, all text escaped.

Imported by `sclong_ds.report.report`. `document` wraps a body into a page that needs no other file.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

_STYLE = """
:root{--ink:#1f2937;--muted:#5b6472;--line:#e3e7ed;--tint:#f6f8fa;--accent:#0072b2;
--page:#fff;color-scheme:light dark}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 system-ui,-apple-system,
"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif}
main,header>div{max-width:1080px;margin:0 auto;padding:0 28px}
header{background:var(--tint);border-bottom:1px solid var(--line);padding:34px 0 26px}
h1{font-size:30px;line-height:1.2;margin:2px 0 10px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:19px;margin:40px 0 12px;padding-bottom:6px;border-bottom:1px solid var(--line)}
h3{font-size:15px;margin:0 0 8px}
.eyebrow,.card b{color:var(--muted);font-size:12px;letter-spacing:.06em;text-transform:uppercase;
font-weight:600}
.status{color:var(--muted);margin:0}
.badge{display:inline-block;border-radius:99px;padding:1px 11px;font-size:13px;font-weight:600;
margin-right:8px;background:#e0edf6;color:#00517f}
.badge.good{background:#dcf3e4;color:#14653a}.badge.warn{background:#fdeed3;color:#7c4a03}
.badge.bad{background:#fbe0e0;color:#8f1d1d}
.verdict{font-size:18px;line-height:1.45;margin:24px 0 0;max-width:72ch}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(215px,1fr));gap:14px;
margin:26px 0 0}
.card{border:1px solid var(--line);border-radius:10px;padding:13px 16px}
.card b{display:block}.card strong{display:block;font-size:27px;line-height:1.35;
letter-spacing:-.01em}.card span{color:var(--muted);font-size:13px}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;padding:6px 10px;border-bottom:1px solid var(--line);vertical-align:top;
overflow-wrap:anywhere}
th{font-weight:600;color:var(--muted)}thead th{background:var(--tint);
overflow-wrap:normal}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:26px}tbody th{width:44%;font-weight:400}
.pair td{font-variant-numeric:tabular-nums}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(420px,100%),1fr));gap:16px;
align-items:start}
figure{margin:0 0 16px;border:1px solid var(--line);border-radius:10px;padding:14px}
figure img{display:block;width:100%;max-height:560px;object-fit:contain}
figure label{display:block;overflow:auto;cursor:zoom-in}
figure input{position:absolute;opacity:0}figure input:focus-visible+img{outline:2px solid
var(--accent)}
figure input:checked+img{width:auto;min-width:100%;max-width:none;max-height:none;cursor:zoom-out}
figcaption{color:var(--muted);font-size:13px;margin-top:8px}figcaption b{color:var(--ink)}
.note{color:var(--muted);font-size:13.5px;max-width:78ch}
details{border:1px solid var(--line);border-radius:10px;margin:0 0 10px}
summary{cursor:pointer;padding:9px 14px;font-weight:600}
details>*:not(summary){margin:0 14px 12px;width:calc(100% - 28px)}
pre{overflow:auto;background:var(--tint);padding:12px;border-radius:6px;
font:12.5px/1.5 ui-monospace,"Liberation Mono",Menlo,Consolas,monospace}
footer{color:var(--muted);font-size:13px;margin:44px 0 36px}
@media (max-width:720px){.pair{grid-template-columns:1fr}}
@media (prefers-color-scheme:dark){:root{--ink:#e5e9f0;--muted:#a3adbb;--line:#343c48;
--tint:#1d232c;--accent:#5cb3e6;--page:#14181f}figure img{background:#fff;border-radius:6px}
.badge{background:#123a56;color:#bfe0f5}.badge.good{background:#143d26;color:#b7ebcb}
.badge.warn{background:#4a3310;color:#f8dca6}.badge.bad{background:#4f1b1b;color:#f6c6c6}}
@media print{:root{--ink:#1f2937;--muted:#5b6472;--line:#e3e7ed;--tint:#f6f8fa;--page:#fff}
body{font-size:11pt}header{background:none;padding-top:0}figure,.card,tr{
break-inside:avoid}h2{break-after:avoid}main,header>div{max-width:none;padding:0}}
"""


def document(
    title: str, *, status: str, body: str, footer: str, kind: str = "training report"
) -> str:
    """Return a whole page.

    Args:
        title: Text of the heading and the window title.
        status: HTML of the line under the heading.
        body: HTML of the sections.
        footer: Text at the end.
        kind: What the page is.
    """
    title = html.escape(title)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · {kind}</title><style>{_STYLE}</style></head><body>
<header><div><div class="eyebrow">sclong_ds {kind}</div><h1>{title}</h1>
<p class="status">{status}</p></div></header>
<main>{body}
<footer>{html.escape(footer)}</footer>
</main></body></html>
"""


def section(title: str, content: str) -> str:
    """Return a titled section; nothing if it has no content."""
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>" if content else ""


def image(data: bytes, kind: str, title: str, text: str) -> str:
    """Return a captioned figure that holds its image; a click shows it in its full size.

    Args:
        data: File content of the image.
        kind: MIME type, for instance image/png.
        title: Text of the caption's first words.
        text: Rest of the caption, may be empty.
    """
    alt = html.escape(f"{title}. {text}".strip())
    title = html.escape(title)
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    caption = f"<b>{title}.</b> {html.escape(text)}" if text else f"<b>{title}</b>"
    # A box that is ticked, since the page has no scripts.
    zoom = f'<input type="checkbox" aria-label="full size: {title}">'
    picture = f'<label>{zoom}<img alt="{alt}" src="{source}"></label>'
    return f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"


def key_table(rows: Sequence[tuple[str, str]]) -> str:
    """Return a table of names and values without a head; nothing if there are no rows."""
    cells = (f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in rows)
    return f"<table><tbody>{''.join(cells)}</tbody></table>" if rows else ""


def table(head: Sequence[str], body: Sequence[Sequence[str]], *, numeric: bool = False) -> str:
    """Return a table with a head; numeric aligns all columns but the first right."""

    def row(tag: str, cells: Sequence[str]) -> str:
        kinds = ["", *([' class="n"' if numeric else ""] * (len(cells) - 1))]
        return "".join(
            f"<{tag}{kind}>{html.escape(cell)}</{tag}>"
            for kind, cell in zip(kinds, cells, strict=True)
        )

    top, lines = row("th", head), (f"<tr>{row('td', cells)}</tr>" for cells in body)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(lines)}</tbody></table>"

"""One self-contained HTML file a run: no script, nothing fetched, light or dark as the reader's system is.

Built with the standard library: a handful of elements does not need a template engine, and every string goes
through `html.escape` in one of five short functions.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from crossgate.evaluation import style
from crossgate.evaluation.tables import Table

_LARGE = 400_000  # an SVG above this (a confusion matrix of hundreds of classes) goes in as PNG


@dataclass
class Section:
    """A part of a report, shown in this order: text, tables, figures with captions, preformatted text.

    Attributes:
        title: heading.
        text: paragraphs.
        tables: each with its caption.
        figures: pairs of a figure and one sentence on how to read it.
        code: preformatted text, folded away.
    """

    title: str
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[tuple[Figure, str]] = field(default_factory=list)
    code: str = ""


def write_report(
    path: str | Path,
    title: str,
    sections: Sequence[Section],
    *,
    summary: str = "",
    recipe: str = "",
    provenance: Mapping[str, object] | None = None,
) -> Path:
    """Writes the report beside and renames it.

    Args:
        path: of the HTML file.
        title: heading and window title.
        sections: the body.
        summary: the result in a sentence or two, with intervals and chance; blank lines part paragraphs.
        recipe: resolved recipe as YAML.
        provenance: run id, code version, index digest and the like.
    """
    path = Path(path)
    page = render(title, sections, summary=summary, recipe=recipe, provenance=provenance)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(page, encoding="utf-8")
    os.replace(beside, path)
    return path


def render(
    title: str,
    sections: Sequence[Section],
    *,
    summary: str = "",
    recipe: str = "",
    provenance: Mapping[str, object] | None = None,
) -> str:
    """Returns the report's HTML; arguments as in `write_report`."""
    body = list(sections)
    if recipe:
        body.append(Section("Recipe", ["Every setting of the run, resolved."], code=recipe))
    if provenance:
        rows = [[str(name), str(value)] for name, value in provenance.items()]
        body.append(Section("Provenance", tables=[Table(["what", "value"], rows)]))
    links = "".join(f'<a href="#s{i}">{escape(section.title)}</a>' for i, section in enumerate(body))
    lead = "".join(f"<p>{escape(part)}</p>" for part in summary.split("\n\n") if part.strip())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_CSS}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1></header>"
        + (f'<div class="summary">{lead}</div>' if lead else "")
        + (f"<nav>{links}</nav>" if len(body) > 1 else "")
        + "".join(_section(i, section) for i, section in enumerate(body))
        + "</main></body></html>\n"
    )


def _section(number: int, section: Section) -> str:
    parts = [f"<p>{escape(text)}</p>" for text in section.text]
    parts += [_table(table) for table in section.tables]
    parts += [_figure(figure, caption) for figure, caption in section.figures]
    if section.code:
        lines = section.code.count("\n") + 1
        parts.append(f"<details><summary>{lines} lines</summary><pre>{escape(section.code)}</pre></details>")
    return f'<section id="s{number}"><h2>{escape(section.title)}</h2>{"".join(parts)}</section>'


def _table(table: Table) -> str:
    kind = [' class="n"' if table.numeric(i) else "" for i in range(len(table.columns))]
    head = "".join(f"<th{k}>{escape(name)}</th>" for name, k in zip(table.columns, kind))
    rows = "".join(
        "<tr>" + "".join(f"<td{k}>{escape(cell)}</td>" for cell, k in zip(row, kind)) + "</tr>" for row in table.rows
    )
    caption = f'<p class="note">{escape(table.caption)}</p>' if table.caption else ""
    loose = " loose" if any(len(word) > 40 for row in table.rows for cell in row for word in cell.split()) else ""
    return f'<div class="wide{loose}"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>{caption}'


def _figure(figure: Figure, caption: str) -> str:
    drawing = style.svg(figure).encode()
    kind = "svg+xml"
    if len(drawing) > _LARGE:
        drawing, kind = style.png(figure), "png"
    data = base64.b64encode(drawing).decode()
    width = round(figure.get_figwidth() * 110)
    return (
        f'<figure><img class="{kind[:3]}" style="width:{width}px" alt="{escape(caption)}" '
        f'src="data:image/{kind};base64,{data}"><figcaption>{escape(caption)}</figcaption></figure>'
    )


_CSS = """
:root{--ink:#24292f;--soft:#59636e;--line:#d0d7de;--page:#ffffff;--card:#f6f8fa;--accent:#0072b2}
@media (prefers-color-scheme:dark){
:root{--ink:#e6edf3;--soft:#9198a1;--line:#3d444d;--page:#0d1117;--card:#161b22;--accent:#58a6d8}
img.png{background:#fff;border-radius:6px}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:880px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:1.7rem;line-height:1.25;margin:0 0 16px;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:44px 0 8px;padding-top:14px;border-top:1px solid var(--line)}
p{margin:8px 0}
.summary{background:var(--card);border-left:4px solid var(--accent);border-radius:4px;padding:10px 18px}
nav{margin:18px 0 0;display:flex;flex-wrap:wrap;gap:4px 18px;font-size:.92rem}
a{color:var(--accent);text-decoration:none}a:hover{text-decoration:underline}
.wide{overflow-x:auto;margin:14px 0 4px}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:5px 14px 5px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--soft);vertical-align:bottom}
th.n,td.n{text-align:right;padding:5px 0 5px 20px}td.n{white-space:nowrap}
th.n+th:not(.n),td.n+td:not(.n){padding-left:20px}
.loose td{overflow-wrap:anywhere}
.note,figcaption{color:var(--soft);font-size:.88rem}
figure{margin:22px 0}figure img{max-width:100%;height:auto;display:block}
figcaption{margin-top:6px;max-width:720px}
details summary{cursor:pointer;color:var(--soft);font-size:.92rem}
pre{background:var(--card);border-radius:4px;padding:12px 16px;overflow-x:auto;font:.82rem/1.5 ui-monospace,
"SFMono-Regular",Menlo,"DejaVu Sans Mono",monospace}
@media print{nav{display:none}figure,table{break-inside:avoid}}
""".strip()

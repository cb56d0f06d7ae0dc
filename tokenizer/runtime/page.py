"""Reports: one HTML page that needs no network and no script, and its tables as Markdown."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ENLARGED_BELOW = 500  # pixels, about the width of a picture on the page
CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #ffffff; --line: #d5dae0; --band: #f5f7f9;
  --accent: #2667a8; --warn: #fff6e0; --warn-line: #e0b040; --good: #eaf6ee; --good-line: #4c9f6b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa5b1; --paper: #14171b; --line: #353c45;
  --band: #1c2127; --accent: #7db4ea; --warn: #2c2615; --warn-line: #8f7430;
  --good: #16281d; --good-line: #3f7d57; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0 auto; max-width: 1280px; padding: 2.2rem 1.6rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .7rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p, ul, dl { margin: .5rem 0; }
p, li, dd { overflow-wrap: anywhere; }
main p, figcaption { max-width: 78ch; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.soft, figcaption, .footnotes { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .9rem 0 0; font-size: .92rem; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
p.caption { font-size: .87rem; margin: .9rem 0 -.1rem; }
p.caption b { margin-right: .35rem; }
th, td { padding: .34rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 1.5px solid var(--ink); font-weight: 600; vertical-align: bottom; }
thead tr { border-top: 1.5px solid var(--ink); }
tbody tr:last-child td { border-bottom: 1.5px solid var(--ink); }
tbody tr:nth-child(even) { background: var(--band); }
.left { text-align: left; }
td.left { white-space: normal; min-width: 9.5rem; }
td.missing { color: var(--soft); font-size: .85em; line-height: 1.25; white-space: normal; }
.footnotes { font-size: .84rem; padding-left: 1.3rem; margin-top: .2rem; }
.note { background: var(--warn); border-left: 4px solid var(--warn-line); padding: .55rem .9rem; margin: .7rem 0;
  border-radius: 0 4px 4px 0; }
.note.good { background: var(--good); border-left-color: var(--good-line); }
.verdict { font-size: 1.08rem; }
.note p { margin: .15rem 0; } .note ul { margin: .2rem 0; padding-left: 1.2rem; }
figure { margin: 1.1rem 0; }
figure > .scroll { margin: 0; }
figcaption { font-size: .88rem; margin-top: .35rem; }
figure svg { display: block; width: 100%; height: auto; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 285px), 1fr)); gap: .9rem 1.2rem; }
.single { max-width: 760px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); gap: 1rem 1.4rem; }
.grid figure { margin: 0; }
.grid img { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 3px;
  background: #fff; display: block; }
.grid img.small { image-rendering: pixelated; }
.legend { display: flex; flex-wrap: wrap; gap: .15rem 1.2rem; list-style: none; padding: 0; margin: .4rem 0;
  font-size: .9rem; }
.swatch { display: inline-block; width: 1.15em; height: .3em; margin-right: .4em; vertical-align: middle;
  border-radius: 1px; }
.swatch.dot { width: .62em; height: .62em; border-radius: 50%; }
pre, code { font: .84rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { background: var(--band); border: 1px solid var(--line); border-radius: 4px; padding: .7rem .9rem;
  overflow-x: auto; margin: .4rem 0; }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .15rem 1.2rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; }
details { margin: .6rem 0; } summary { cursor: pointer; color: var(--accent); }
@media (max-width: 620px) { body { padding: 1.2rem .9rem 3rem; } dl { grid-template-columns: 1fr; } }
@media print {
  :root { color-scheme: light; --ink: #000; --soft: #444; --paper: #fff; --line: #bbb; --band: #f4f4f4; --accent: #000;
    --warn: #faf5e6; --warn-line: #999;
    --good: #f1f6f2; --good-line: #999; }
  @page { size: A4; margin: 14mm 13mm; }
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  nav, details { display: none; }
  h2 { margin-top: 1.4rem; } h2, h3, .caption, .legend { break-after: avoid; }
  figure, tr, .note, pre, dl > div, .footnotes li { break-inside: avoid; }
  .scroll, pre { overflow: visible; } pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: 7.5pt; }
  table { font-size: 7.8pt; } th, td { padding: .22rem .4rem; } thead th, td.left { white-space: normal; }
  .panels { grid-template-columns: 1fr 1fr 1fr; }
  .grid { grid-template-columns: 1fr 1fr; }
}
"""


@dataclass(frozen=True)
class Cell:
    """Text of a table cell. footnote: why a number is missing, or what to know about it."""

    text: str
    bold: bool = False
    footnote: str = ""
    missing: bool = False


@dataclass
class Table:
    """title and caption above, header, rows of as many cells; the first `left` columns are words, the rest numbers."""

    title: str
    caption: str
    header: Sequence[str]
    left: int = 1
    rows: list[Sequence[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # below the table

    def footnotes(self) -> list[str]:
        """Each text once, in the order of the cells that refer to it."""
        return list(dict.fromkeys(cell.footnote for row in self.rows for cell in row if cell.footnote))


def escape(text: object) -> str:
    """Anything that came from a file, for HTML text and attributes."""
    return html.escape(str(text), quote=True)


def html_table(table: Table) -> str:
    numbers = {text: i for i, text in enumerate(table.footnotes(), 1)}
    sides = [' class="left"' if i < table.left else "" for i in range(len(table.header))]
    head = "".join(f'<th scope="col"{side}>{escape(name)}</th>' for name, side in zip(table.header, sides, strict=True))
    body = "".join(
        "<tr>" + "".join(_html_cell(cell, i < table.left, numbers) for i, cell in enumerate(row)) + "</tr>\n"
        for row in table.rows
    )
    title = f"<b>{escape(table.title)}</b>" if table.title else ""
    # Not the table's own element: on a narrow screen it would be as wide as the table, and cut.
    caption = f'<p class="caption">{title}{escape(table.caption)}</p>\n'
    out = f'{caption}<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n'
    if numbers:
        out += f'<ol class="footnotes">{"".join(f"<li>{escape(text)}</li>" for text in numbers)}</ol>\n'
    return out + "".join(f'<p class="soft">{escape(note)}</p>\n' for note in table.notes)


def _html_cell(cell: Cell, left: bool, numbers: Mapping[str, int]) -> str:
    text = escape(cell.text)
    text = f"<strong>{text}</strong>" if cell.bold else text
    text += f"<sup>{numbers[cell.footnote]}</sup>" if cell.footnote else ""
    classes = " ".join(name for name, on in (("left", left), ("missing", cell.missing)) if on)
    return f'<td class="{classes}">{text}</td>' if classes else f"<td>{text}</td>"


def markdown_table(table: Table) -> str:
    numbers = {text: i for i, text in enumerate(table.footnotes(), 1)}
    rule = ["---" if i < table.left else "---:" for i in range(len(table.header))]
    title = f"**{markdown(table.title)}** " if table.title else ""
    lines = [title + markdown(table.caption), "", _markdown_row(map(markdown, table.header)),
             _markdown_row(rule)]
    for row in table.rows:
        cells = []
        for cell in row:
            text = markdown(cell.text)
            text = f"**{text}**" if cell.bold else text
            cells.append(text + (f" [{numbers[cell.footnote]}]" if cell.footnote else ""))
        lines.append(_markdown_row(cells))
    lines += ["", *(f"{i}. {markdown(text)}" for text, i in numbers.items())]
    lines += [line for note in table.notes for line in ("", markdown(note))]
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def markdown(text: object) -> str:
    """Anything that came from a file, on one line of Markdown and inside a table."""
    plain = html.escape(" ".join(str(text).split()), quote=False)
    return "".join(f"\\{c}" if c in "\\|`*_[]" else c for c in plain)


def data_uri(path: Path) -> str:
    """A PNG file as the address of an image."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def figure(content: str, caption: str) -> str:
    """content: HTML. caption: text."""
    return (f'<figure><div class="scroll" role="img" aria-label="{escape(caption)}">{content}</div>'
            f"<figcaption>{escape(caption)}</figcaption></figure>\n")


def image(path: Path, caption: str) -> str:
    """A complete PNG file. Small ones are enlarged without blurring."""
    width = int.from_bytes(path.read_bytes()[16:20], "big")  # of the header chunk
    kind = ' class="small"' if width < ENLARGED_BELOW else ""
    return (f'<figure><img{kind} src="{data_uri(path)}" alt="{escape(caption)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>\n")


def legend(entries: Iterable[tuple[str, str]], dot: bool = False) -> str:
    """entries: (colour, text)."""
    kind = "swatch dot" if dot else "swatch"
    items = (f'<li><span class="{kind}" style="background:{escape(hue)}"></span>{escape(text)}</li>'
             for hue, text in entries)
    return f'<ul class="legend">{"".join(items)}</ul>\n'


def note(title: str, items: Sequence[str], good: bool = False) -> str:
    """A box that nobody overlooks; good: it is no warning. Texts."""
    rows = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f'<div class="note{" good" if good else ""}"><p><b>{escape(title)}</b></p><ul>{rows}</ul></div>\n'


def definitions(entries: Mapping[str, object]) -> str:
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries.items())
    return f"<dl>{rows}</dl>\n"


def page(title: str, subtitle: str, sections: Mapping[str, str]) -> str:
    """The whole file. sections: heading -> HTML; empty ones are left out. title, subtitle, headings: text."""
    shown = {heading: body for heading, body in sections.items() if body}
    names = {heading: f"section-{i}" for i, heading in enumerate(shown, 1)}
    links = "".join(f'<a href="#{name}">{escape(heading)}</a>' for heading, name in names.items())
    bodies = "".join(f'<section><h2 id="{names[heading]}">{escape(heading)}</h2>\n{body}</section>\n'
                     for heading, body in shown.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{CSS}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>
<p class="soft">{escape(subtitle)}</p>
<nav>{links}</nav></header>
<main>
{bodies}</main>
</body>
</html>
"""

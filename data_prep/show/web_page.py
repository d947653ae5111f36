"""One self-contained HTML page: no network, no framework, and corpus text never becomes markup.

:func:`el` builds elements and escapes every child that it did not build itself, so escaping cannot be forgotten. The
``Content-Security-Policy`` of the page lets the browser run its one script and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

THUMBNAIL_PX = 160
"""Longest side of an image on a page."""
_VOID = {"img", "input", "meta"}
_COLOURS = {"given": "#4e79a7", "generated": "#59a14f", "image": "#b07aa1", "special": "#9a9a9a", "padding": "#e4e4e4"}
"""Colours by kind of token, as in mask pictures."""
_STYLE = (
    ":root{"
    + "".join(f"--{name}:{colour};" for name, colour in _COLOURS.items())
    + """
--ink:#222;--quiet:#6b6b6b;--paper:#f6f6f4;--card:#fff;--edge:#e2e2de;--rule:#efefec;--control:#c9c9c4;
--c0:#4e79a7;--c1:#f28e2b;--c2:#59a14f;--c3:#e15759;--c4:#b07aa1;--c5:#9c755f;
--bad:#a2321f;--bad-back:#fbe9e7;--good:#2c6e31;--good-back:#e6f3e6;--mark:#8a3f7b;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--ink:#e4e4e0;--quiet:#a3a39e;--paper:#181817;--card:#222221;--edge:#3a3a38;
--rule:#30302e;--control:#55554f;--padding:#3d3d3b;--c0:#7fa8d6;--c1:#f7b267;--c2:#86c67c;--c3:#f08a8c;--c4:#cfa5c5;
--c5:#c7a58f;--bad:#ff9d8a;--bad-back:#47221c;--good:#9bd69b;--good-back:#1d3a20;--mark:#d79acb}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:24px 20px 60px;font:14px/1.5 system-ui,"DejaVu Sans",sans-serif;
color:var(--ink);background:var(--paper)}
h1{font-size:21px;margin:0}h2{font-size:16px;margin:28px 0 8px}
.quiet,figcaption,th{color:var(--quiet)}.quiet{margin:2px 0 14px}
.tiles{display:flex;flex-wrap:wrap;gap:10px}
.tile{background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:8px 14px;min-width:118px}
.tile b{display:block;font-size:18px}
.tile span{color:var(--quiet);font-size:12px}
.columns{display:flex;flex-wrap:wrap;gap:24px}.columns>*{flex:1 1 420px;min-width:0}
.columns>:first-child{flex:1 1 600px}
.wide{overflow-x:auto}
table{border-collapse:collapse;background:var(--card);border:1px solid var(--edge);width:100%}
th{font-weight:500;font-size:12px}th,td{padding:4px 10px;text-align:right;border-bottom:1px solid var(--rule)}
th.word,td.word{text-align:left}td{white-space:nowrap}
svg{background:var(--card);border:1px solid var(--edge);width:100%;height:auto}
svg text{font-size:11px;fill:var(--quiet)}
nav{position:sticky;top:0;z-index:1;display:flex;flex-wrap:wrap;gap:8px;align-items:center;padding:10px 0;
background:var(--paper)}
button,input,select{font:inherit;padding:3px 10px;border:1px solid var(--control);border-radius:6px;
background:var(--card)}
input{width:90px}
.key{display:inline-block;padding:0 6px;border-radius:3px;margin-left:6px}
.card{background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:14px 18px;margin-bottom:14px}
.beside{display:grid;grid-template-columns:minmax(0,1fr) auto;gap:22px;align-items:start}
.mask{position:sticky;top:60px;margin:8px 0 0}.mask{width:250px}.mask img{width:250px;border:1px solid var(--edge)}
.ribbon{display:flex;height:18px;margin:8px 0;border-radius:3px;overflow:hidden}
.ribbon i{display:block;min-width:0}.ribbon i.starts{border-left:2px solid var(--card)}
.segment{border-top:1px solid var(--rule);padding:10px 0}
.source{font-size:12px;color:var(--quiet)}.source b{color:var(--ink)}
.content{display:flex;flex-wrap:wrap;gap:4px 12px;margin-top:4px}.content figure{margin:4px 0;max-width:170px}
.text{white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate}.text.long{flex:1 1 300px}
figure img{display:block;border-radius:4px}figcaption{font-size:11px;line-height:1.35}
img.small{image-rendering:pixelated;width:112px}
.generated{background:color-mix(in srgb,var(--generated) 22%,var(--card))}
.special{color:var(--mark);font-size:12px}
.bar-given{background:var(--given)}.bar-generated{background:var(--generated)}.bar-image{background:var(--image)}
.bar-special{background:var(--special)}.bar-padding{background:var(--padding)}
.examples{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:10px}
.example{display:flex;gap:12px;background:var(--card);border:1px solid var(--edge);border-radius:8px;padding:10px 12px}
.example img{align-self:start}.example>div{min-width:0;overflow-wrap:anywhere}.example figure{margin:0;flex:none}
.raw{white-space:pre-wrap;font:12px/1.45 ui-monospace,"DejaVu Sans Mono",monospace;color:var(--ink);margin-top:4px;
max-height:132px;overflow:auto}
.code{display:inline-block;background:var(--bad-back);color:var(--bad);border-radius:4px;padding:0 7px;font-size:12px}
.code.right{background:var(--good-back);color:var(--good)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(420px,100%),1fr));gap:10px 20px}
.charts p{margin:0 0 4px}
svg .line{fill:none;stroke-width:1.6}svg .faint{opacity:.28;stroke-width:1}svg .grid{stroke:var(--rule)}
.c0{stroke:var(--c0)}.k0{background:var(--c0);color:#fff}.c1{stroke:var(--c1)}.k1{background:var(--c1);color:#fff}.c2{stroke:var(--c2)}.k2{background:var(--c2);color:#fff}.c3{stroke:var(--c3)}.k3{background:var(--c3);color:#fff}.c4{stroke:var(--c4)}.k4{background:var(--c4);color:#fff}.c5{stroke:var(--c5)}.k5{background:var(--c5);color:#fff}
@media (max-width:640px){body{padding:14px 10px 40px}.columns>*,.columns>:first-child{flex-basis:100%}
.beside{grid-template-columns:minmax(0,1fr)}.mask{position:static}.examples{grid-template-columns:minmax(0,1fr)}}
"""
)


class Html(str):
    """Markup built by :func:`el`: safe to embed in other markup."""

    __slots__ = ()


def el(name: str, /, *children: str, **attributes: str | int) -> Html:
    """Return an element; plain-text children and values are escaped.

    Attribute names lose a trailing ``_`` and write ``_`` as ``-``: ``class_``, ``data_row``.
    """
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"' for key, value in attributes.items()
    )
    return Html(f"<{name}{words}>" if name in _VOID else f"<{name}{words}>{join(children)}</{name}>")


def join(parts: Iterable[str]) -> Html:
    """Return concatenated parts, each escaped unless it is markup."""
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in parts))


def page(title: str, body: Iterable[str], script: str = "") -> bytes:
    """Return a complete document."""
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", title),
        el("style", Html(_STYLE)),
    )
    whole = el("html", head, el("body", *body, el("script", Html(script))), lang="en")
    return f"<!DOCTYPE html>\n{whole}\n".encode(errors="backslashreplace")


def tiles(numbers: Sequence[tuple[str, str]]) -> Html:
    """Return key figures, given as (number, description)."""
    return el("div", *(el("div", el("b", value), el("span", what), class_="tile") for value, what in numbers),
              class_="tiles")  # fmt: skip


def table(header: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> Html:
    """Return a table; the first ``texts`` columns hold text, the others numbers."""

    def line(kind: str, cells: Sequence[str]) -> Html:
        shown = (el(kind, cell, **({"class_": "word"} if at < texts else {})) for at, cell in enumerate(cells))
        return el("tr", *shown)

    return el("div", el("table", line("th", header), *(line("td", row) for row in rows)), class_="wide")


def histogram_svg(
    counts: npt.NDArray[np.int64], edges: npt.NDArray[np.float64], heights: Sequence[float], note: str
) -> Html:
    """Return bars of heights 0 to 1 with the edges of the first, middle and last bin and the highest count.

    ``note`` names the scale.
    """
    width, height, floor = 560, 170, 146
    step, top = (width - 20) / len(counts), max(1, int(counts.max()))
    bars = [
        el("rect", el("title", f"{low:.0f} to {high:.0f}: {count:,}"), x=f"{10 + step * at:.1f}",
           y=f"{floor - height_share * 120:.1f}", width=f"{step * 0.88:.1f}", height=f"{height_share * 120:.1f}",
           fill="var(--given)")
        for at, (count, height_share, low, high) in enumerate(
            zip(counts.tolist(), heights, edges[:-1], edges[1:], strict=True)
        )
    ]  # fmt: skip
    places = ((0, 10, "start"), (len(counts) // 2, 10 + step * (len(counts) // 2), "middle"), (-1, width - 10, "end"))
    labels = [el("text", f"{edges[at]:.0f}", x=f"{x:.0f}", y=floor + 17, text_anchor=side) for at, x, side in places]
    most = el("text", f"{top:,} samples in the highest bar; {note}", x=10, y=16)
    return el("svg", *bars, *labels, most, viewBox=f"0 0 {width} {height}")


def picture(image: Image.Image, **attributes: str | int) -> Html:
    """Return an embedded image of at most ``THUMBNAIL_PX``; tiny drawings stay sharp."""
    image = image.copy()
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    small = max(image.size) < THUMBNAIL_PX // 2
    stream = io.BytesIO()
    image.save(stream, "PNG" if small else "JPEG", quality=82)
    if small:
        attributes = {"class_": "small", **attributes}
    return embedded(stream.getvalue(), "png" if small else "jpeg", **attributes)


def embedded(data: bytes, kind: str, **attributes: str | int) -> Html:
    """Return an image from encoded bytes of ``image/KIND``."""
    return el("img", src=f"data:image/{kind};base64,{base64.b64encode(data).decode()}", **attributes)

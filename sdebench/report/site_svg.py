"""Figures as SVG inside a page: real text, and colors that follow the page's theme."""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING

from sdebench.report.style import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_READABLE = 0.22  # relative luminance that stands out 4.5 to 1 from the dark page
_DARK_PAGE, _DARK_INK = 0.09, 0.95  # grays that stand for white and black
_HEX = re.compile(r"#([0-9a-f]{6})\b")
_PIXELS = 1.5  # widest a figure is shown, in pixels per point


def themed(color: str) -> str:
    """Return a CSS color for both themes from the one drawn on white.

    Grays are mirrored, so that white is the page and black is the text; a hue is mixed
    with white until it can be read on the dark page.
    """
    r, g, b = (int(color[i : i + 2], 16) / 255.0 for i in (1, 3, 5))
    dark: tuple[float, ...]
    if max(r, g, b) - min(r, g, b) < 0.02:
        dark = (_DARK_INK + (_DARK_PAGE - _DARK_INK) * r,) * 3
    else:
        white = 0.0
        while _luminance(dark := _mix((r, g, b), white)) < _READABLE:
            white += 0.02
    other = "".join(f"{round(255.0 * v):02x}" for v in dark)
    return f"light-dark({color},#{other})"


def _mix(color: tuple[float, ...], white: float) -> tuple[float, ...]:
    return tuple(v + white * (1.0 - v) for v in color)


def _luminance(color: tuple[float, ...]) -> float:
    """Return the relative luminance of sRGB, as the contrast rules define it."""
    linear = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in color
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def inline(figure: Figure, name: str, alternative: str) -> str:
    """Return a figure as an ``<svg>`` element.

    Parameters
    ----------
    figure : drawn on white.
    name : unique on the page; the prefix of all ids inside.
    alternative : what is to be seen, for those who do not see it.
    """
    import matplotlib as mpl

    out = io.StringIO()
    with style(), mpl.rc_context({"svg.fonttype": "none"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.S)
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.S)
    body = _own_ids(body, name)
    body = re.sub(r"(\d\.\d\d)\d+", r"\1", body)  # hundredths of a point are enough
    body = _HEX.sub(lambda found: themed(found[0]), body)
    # Its style sheet would hold for the whole page.
    body = body.replace('<style type="text/css">*{', "<style>.ink *{")
    width, height = (72.0 * v for v in figure.get_size_inches())
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="ink" role="img" '
        f'aria-label="{html.escape(alternative)}" fill="currentColor" '
        f'viewBox="0 0 {width:.1f} {height:.1f}" '
        f'style="max-width:{_PIXELS * width:.0f}px">{body}'
    )


def _own_ids(body: str, name: str) -> str:
    """Prefix the ids that are referred to, and drop all others."""
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', body))

    def rename(found: re.Match[str]) -> str:
        return f' id="{name}-{found[1]}"' if found[1] in used else ""

    body = re.sub(r' id="([^"]+)"', rename, body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    return re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', body)

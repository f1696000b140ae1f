"""Numbers, names and text of the report, as plain Unicode and as LaTeX.

A number is never shown without its uncertainty, and its digits follow it: the last
digit shown is the leading digit of the standard error.  ``0.51 [0.48, 0.54]`` is an
estimate with its confidence interval; the ends are rounded outwards, so that two
intervals that look separate are separate.  ``< 0.54`` is an interval that reaches zero.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Decimal
from typing import Any

MISSING = "–"
_MOST_POWERS = 4
"""Powers of ten between a number and the ends of its interval that share one power."""
_MOST_DIGITS = 7
"""Significant digits of an estimate with an interval, however narrow."""
_NO_BOUND = 1e12
"""An interval's end that is so many times the estimate says nothing."""
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_NORMAL = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": r"\textbar{}",
    "×": r"$\times$",
    "≥": r"$\ge$",
    "≤": r"$\le$",
    "∞": r"$\infty$",
    "∇": r"$\nabla$",
    "θ": r"$\theta$",
    "σ": r"$\sigma$",
    "λ": r"$\lambda$",
    "²": "$^2$",
    "‖": r"$\Vert$",
    "–": "--",
    "…": r"\dots{}",
    "−": "$-$",
    "·": r"$\cdot$",
    "†": r"$\dagger$",
}


def finite(x: Any) -> float:
    """Return ``x`` as a float; NaN for None, text and everything that is no number."""
    try:
        return float(x)
    except (TypeError, ValueError):
        return math.nan


def _exponent(x: float) -> int:
    """Return the decimal exponent of ``x`` (0 for 0 and for numbers not finite)."""
    return math.floor(math.log10(abs(x))) if x and math.isfinite(x) else 0


def _fixed(x: float, decimals: int, rounding: str = ROUND_HALF_EVEN) -> str:
    """Round the shortest decimal representation of ``x``: 0.29 stays 0.29."""
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    # A negative number of decimals rounds whole digits away; they are shown as zeros.
    rounded = Decimal(repr(float(x))).quantize(Decimal(1).scaleb(-decimals), rounding)
    return f"{rounded:.{max(decimals, 0)}f}"


def _scaled(x: float, power: int) -> float:
    """Return ``x`` times a power of ten without the rounding of a product."""
    return float(Decimal(repr(float(x))).scaleb(power))


def _power(text: str, exponent: int) -> str:
    power = str(exponent).translate(_SUPERSCRIPT)
    return f"{text} × 10{power}" if exponent else text


def plain(x: float, digits: int = 3) -> str:
    """Return ``x`` with ``digits`` significant digits; counts are shown in full."""
    if math.isnan(x):
        return MISSING
    if math.isinf(x):
        return _fixed(x, 0)
    exponent = _exponent(x)
    if x == round(x) and exponent < 5:
        return f"{x:.0f}"
    if -3 <= exponent < 5:
        # At least zero decimals: integer digits are never replaced by zeros.
        return _fixed(x, max(digits - 1 - exponent, 0))
    exponent = _exponent(float(f"{x:.{digits - 1}e}"))  # 9.99 may become 10
    return _power(_fixed(x / 10.0**exponent, digits - 1), exponent)


def interval(value: float, low: float, high: float, unit: str = "") -> str:
    """Return an estimate with its confidence interval, digits set by its width.

    Parameters
    ----------
    value, low, high : the estimate and the ends of its interval; ends may be infinite.
    unit : set behind the number, such as ``"%"``.

    Returns
    -------
    str
        ``0.51 [0.48, 0.54] %``; ``< 0.54 %`` where the interval starts at zero;
        ``0 (exact)`` for an interval that is the number zero; ``–`` without a value,
        and the bare value marked ``(no interval)`` where the ends are not known.
    """
    unit = f" {unit}" if unit else ""
    if math.isnan(value) and (math.isnan(low) or math.isnan(high)):
        return MISSING
    if math.isnan(low) or math.isnan(high):
        return f"{plain(value)}{unit} (no interval)"
    if low == high == 0.0:
        return "0 (exact)"
    if low == high:
        return f"{plain(value)}{unit}"
    if low <= 0.0 and math.isfinite(high):
        return f"< {_two_digits(high, ROUND_CEILING)}{unit}"
    if math.isinf(high) or high > _NO_BOUND * abs(value):
        return f"> {plain(low, 2)}{unit}" if low > 0.0 else "not resolved"
    if math.isnan(value):
        value = 0.5 * (low + high)
    exponent = _exponent(value)
    if max(_exponent(high) - exponent, exponent - _exponent(low)) > _MOST_POWERS:
        ends = f"{_two_digits(low, ROUND_FLOOR)}, {_two_digits(high, ROUND_CEILING)}"
        return f"{plain(value, 1)} [{ends}]{unit}"
    shift = exponent if exponent < -2 or exponent >= 4 else 0
    value, low, high = (_scaled(x, -shift) for x in (value, low, high))
    error = 0.25 * (high - low)  # a 95 % interval is four standard errors wide
    # An interval wider than the number still shows the number's leading digit, and a
    # lower end that is not zero is not shown as zero.
    decimals = max(-_exponent(error), -_exponent(value))
    decimals = min(decimals, _MOST_DIGITS - 1 - _exponent(value))
    a = _fixed(low, max(decimals, -_exponent(low)), ROUND_FLOOR)
    v = _fixed(value, decimals)
    b = _fixed(high, decimals, ROUND_CEILING)
    return f"{_power(f'{v} [{a}, {b}]', shift)}{unit}"


def _two_digits(x: float, rounding: str) -> str:
    """Return the end of an interval with two significant digits, rounded outwards."""
    exponent = _exponent(x)
    shift = exponent if exponent < -2 or exponent >= 4 else 0
    decimals = 1 - exponent + shift
    return _power(_fixed(_scaled(x, -shift), decimals, rounding), shift)


def latex(text: str) -> str:
    """Return plain text of the report as LaTeX: escaped, powers of ten in maths."""
    out, i = [], 0
    while i < len(text):
        j = i + 1
        if text.startswith("× 10", i):
            j = i + 4
            while j < len(text) and text[j] in "⁻⁰¹²³⁴⁵⁶⁷⁸⁹":
                j += 1
            power = text[i + 4 : j].translate(_NORMAL)
            out.append(rf"$\times 10^{{{power}}}$" if power else r"$\times$ 10")
        elif text[i] == "%" and out and out[-1] == " ":
            out[-1] = r"\,\%"
        else:
            out.append(_LATEX.get(text[i], text[i]))
        i = j
    return "".join(out)


def markdown(text: str) -> str:
    """Return plain text with the characters escaped that would break a table row."""
    flat = " ".join(text.split())
    for character in "\\|*`":
        flat = flat.replace(character, f"\\{character}")
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", flat)  # an HTML tag would vanish


def parameters(value: Any) -> dict[str, Any]:
    """Return the parameters stored in a row as JSON text or mapping; {} if neither."""
    if isinstance(value, Mapping):
        return dict(value)
    try:
        decoded = json.loads(value)
    except (TypeError, ValueError):
        return {}
    return decoded if isinstance(decoded, dict) else {}


def labels(names: Iterable[str], options: Iterable[Any], most: int = 3) -> list[str]:
    """Return names with their parameters, as typed: ``reinforce:baseline=mean``.

    A row with more than ``most`` scalar parameters shows those that differ between the
    rows of that name; a name that already carries parameters is left as it is.
    """
    rows = list(zip(names, map(parameters, options), strict=True))
    seen: dict[tuple[str, str], set[str]] = {}
    for name, given in rows:
        for key, v in given.items():
            seen.setdefault((name, key), set()).add(json.dumps(v, default=str))
    counts: dict[str, int] = {}
    present: dict[tuple[str, str], int] = {}
    for name, given in rows:
        counts[name] = counts.get(name, 0) + 1
        for key in given:
            present[name, key] = present.get((name, key), 0) + 1
    out = []
    for name, given in rows:
        varying = [
            k
            for k in given
            if len(seen[name, k]) > 1 or present[name, k] < counts[name]
        ]
        scalar = [k for k, v in given.items() if isinstance(v, str | int | float)]
        keys = scalar if len(given) <= most else [k for k in scalar if k in varying]
        text = ",".join(
            f"{k}={v if isinstance(v, str) else json.dumps(v)}"
            for k, v in ((k, given[k]) for k in keys)
        )
        out.append(f"{name}:{text}" if text and ":" not in name else name)
    return out


def fold(label: str) -> str:
    """Break a label at its options, one to a line: for ticks and panel titles."""
    name, _, rest = label.partition(":")
    return "\n".join([name, *rest.split(",")]) if rest else name


def short_labels(full: Iterable[str]) -> dict[str, str]:
    """Map each label to the shortest one that still tells its variants apart.

    Options that all variants of a name share are dropped; for figures.
    """
    full = list(dict.fromkeys(full))
    split = {}
    for text in full:
        name, _, rest = text.partition(":")
        split[text] = (name, rest.split(",") if rest else [])
    out = {}
    for text, (name, items) in split.items():
        others = [set(v) for n, v in split.values() if n == name]
        shared = set.intersection(*others)
        kept = [i for i in items if i not in shared]
        out[text] = f"{name}:{','.join(kept)}" if kept else name
    return out

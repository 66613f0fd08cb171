"""What surrounds the content of the page: templates, style sheet, script, and the hashes that let only these two in."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from dpguard.report import text
from dpguard.report.style import BANDS


def template(name: str, *, escape: bool) -> Template:
    """A template of this package; ``escape`` for HTML."""
    environment = Environment(
        loader=PackageLoader("dpguard.report", "templates"),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "visible": text.visible,
        "name": text.name,
        "number": text.number,
        "span": text.span,
        "apart": text.apart,
        "signed": text.signed,
        "epsilon": text.epsilon,
        "percent": text.percent,
        "metric": text.metric_name,
        "at": text.at_name,
        "plain": text.plain,
        "unbroken": text.unbroken,
        "md": text.markdown,
        "along": along,
    }
    environment.globals |= {"count": text.count}
    return environment.get_template(name)


def along(value: float) -> str:
    """Where a value from 0 to 1 stands on a gauge 200 wide; values outside stand at its ends.

    >>> along(0.5), along(-0.2)
    ('100', '4')
    """
    return f"{4 + 192 * min(max(value, 0.0), 1.0):.4g}"


def dress(name: str, points: Iterable[int], choices: int, looks: str = "") -> dict[str, Any]:
    """Style sheet and script of one page, with the hashes that its security policy names.

    Args:
        name: of the study, for the foot of every printed page.
        points: numbers of the policies that can be pointed at.
        choices: how many leakage metrics can be picked.
        looks: rules of the pictures.
    """
    style = "\n".join([_read("style.css"), looks, _bands(), _readouts(list(points)), _picks(choices), _paper(name)])
    script = _read("page.js")
    return {
        "css": Markup(style),
        "style_hash": digest(style),
        "script": Markup(script),
        "script_hash": digest(script),
    }


def digest(content: str) -> str:
    """The source expression of a style sheet or script in a content security policy.

    >>> digest("")
    'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU='
    """
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _read(name: str) -> str:
    return (files("dpguard.report") / "templates" / name).read_text("utf-8")


def _bands() -> str:
    """The steps of the epsilon scale by day and by night."""
    day = "".join(f"--eps-{n}:{step.colour};" for n, step in enumerate(BANDS))
    night = "".join(f"--eps-{n}:{step.night};" for n, step in enumerate(BANDS))
    return f":root {{ {day} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {night} }} }}"


def _readouts(points: list[int]) -> str:
    """Pointing at a policy, or reaching it with the keyboard, shows its table."""
    if not points:
        return ""
    pointed = ",\n".join(
        f'figure:has(.mark[data-policy="{number}"]:is(:hover, :focus)) .readout > .p{number}' for number in points
    )
    return (
        f"{pointed} {{ display: block; }}\nfigure:has(.mark:is(:hover, :focus)) .readout > .hint {{ display: none; }}"
    )


def _picks(choices: int) -> str:
    """Only the picture of the metric that is picked is shown."""
    return "\n".join(
        f".tradeoff:has(#metric-{number}:not(:checked)) .alt-{number} {{ display: none; }}"
        for number in range(1, choices + 1)
    )


def _paper(name: str) -> str:
    """Page size and numbers of the printed report."""
    foot = f"font: 8pt {_FONT}; color: #535d6c;"
    return (
        "@page { size: A4; margin: 16mm 16mm 20mm;"
        f' @bottom-left {{ content: "dpguard report: {_css_text(text.visible(name, limit=60))}"; {foot} }}'
        f' @bottom-right {{ content: counter(page) " / " counter(pages); {foot} }} }}'
    )


_FONT = '"Liberation Sans", Arial, sans-serif'


def _css_text(words: str) -> str:
    """Text inside the quotes of a style sheet: everything but plain letters and digits by its code.

    >>> _css_text('a"</').split()
    ['a\\\\22', '\\\\3c', '\\\\2f']
    """
    return "".join(c if c.isascii() and (c.isalnum() or c in " -_.") else f"\\{ord(c):x} " for c in words)

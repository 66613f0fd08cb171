"""Figures as SVG: files that are the same bytes on every build, and elements that live inside the page."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpguard.report.style import BANDS, INK, LINE, MUTED, OPEN, PAPER, RED, styled

SVG = "http://www.w3.org/2000/svg"
XLINK = "http://www.w3.org/1999/xlink"
_NO_METADATA = {"Creator": None, "Date": None, "Format": None, "Type": None}
_ON_PAGE = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    LINE: "var(--line)",
    PAPER: "var(--card)",
    OPEN: "var(--open)",
    RED: "var(--bad)",
    **{step.colour: f"var(--eps-{number})" for number, step in enumerate(BANDS)},
}

_WORDS = {f"{{{SVG}}}{tag}" for tag in ("text", "tspan", "title", "desc")}
_NUMBERS = ("d", "x", "y", "transform", "width", "height", "x1", "x2", "y1", "y2")


@dataclass(frozen=True)
class Mark:
    """What a point of a figure says and where it leads.

    Attributes:
        href: where following it leads, ``#policy-3``.
        label: what it is called and its figures, for the tooltip and the screen reader.
        number: of the policy, so that the page can show its particulars.
    """

    href: str
    label: str
    number: int


def to_svg(figure: Figure) -> str:
    """The figure as a file of its own, without dates, versions or anything random."""
    buffer = io.StringIO()
    with styled():
        figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


KINDS = ("png", "pdf")
"""Kinds of files beside SVG."""


def to_bytes(axes: Axes, kind: str) -> bytes:
    """The figure as a PNG or PDF file, without dates or versions."""
    figure = axes.get_figure(root=True)
    if figure is None:
        raise ValueError("these axes were removed from their figure")
    buffer = io.BytesIO()
    names = {"png": ("Software",), "pdf": ("Creator", "Producer", "CreationDate")}[kind]
    with styled():
        figure.savefig(buffer, format=kind, dpi=200, metadata=dict.fromkeys(names))
    return buffer.getvalue()


def inline(
    svg: str, *, prefix: str, title: str, css_class: str, about: str = "", marks: Mapping[str, Mark] | None = None
) -> str:
    """The figure as an element of the page: the page's colours, ids of its own, points that can be focused.

    Its style attributes become plain attributes, so that the page's security policy can forbid them.

    Args:
        svg: from `to_svg`.
        prefix: put before every id, since several figures share the page.
        title: what the figure shows, for screen readers.
        css_class: classes of the element.
        about: a longer description, for screen readers.
        marks: group id -> what the point says; those groups become links.
    """
    for colour, variable in _ON_PAGE.items():
        svg = re.sub(re.escape(colour), variable, svg, flags=re.IGNORECASE)
    ET.register_namespace("", SVG)
    ET.register_namespace("xlink", XLINK)
    root = ET.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                parent.remove(child)
    for group, mark in (marks or {}).items():
        _link(root, group, mark)
    _own_ids(root, prefix)
    for element in root.iter():
        _plain(element)
    _said_once(root)
    _unwrap(root)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.set("class", css_class)
    # a picture with links in it is a group: as an image it would hide them
    root.set("role", "group" if marks else "img")
    _describe(root, prefix, title, about)
    return ET.tostring(root, encoding="unicode")


def _describe(root: ET.Element, prefix: str, title: str, about: str) -> None:
    named = [("title", title), ("desc", about)] if about else [("title", title)]
    for place, (tag, words) in enumerate(named):
        element = ET.Element(f"{{{SVG}}}{tag}", {"id": f"{prefix}{tag}"})
        element.text = words
        root.insert(place, element)
    root.set("aria-labelledby", f"{prefix}title")
    if about:
        root.set("aria-describedby", f"{prefix}desc")


def _plain(element: ET.Element) -> None:
    """Style as attributes, coordinates to a tenth of a point, no spaces for the eye: half of the bytes go."""
    element.tail = None
    if element.tag not in _WORDS:
        element.text = None
    for part in element.attrib.pop("style", "").split(";"):
        name, _, value = (text.strip() for text in part.partition(":"))
        if name and name != "font-family":  # the page's own font
            element.set(name, value)
    for name, value in list(element.attrib.items()):
        if name in _NUMBERS:
            element.set(name, re.sub(r"-?\d+\.\d+", _tenth, " ".join(value.split())))
    if element.attrib.get("transform", "").startswith("rotate(-0 "):
        del element.attrib["transform"]


def _tenth(found: re.Match[str]) -> str:
    return f"{round(float(found.group()), 1) + 0.0:g}"


def _unwrap(parent: ET.Element) -> None:
    """Put the children of groups without attributes in their place, and drop empty groups."""
    children = []
    for child in list(parent):
        _unwrap(child)
        if child.tag == f"{{{SVG}}}g" and not child.attrib:
            children += list(child)
        else:
            children.append(child)
    parent[:] = children


def _link(root: ET.Element, group: str, mark: Mark) -> None:
    found = root.find(f".//{{{SVG}}}g[@id='{group}']")
    if found is None:
        raise KeyError(f"the figure has no group {group!r}")
    found.tag = f"{{{SVG}}}a"
    found.set("href", mark.href)
    found.set("class", "mark")
    found.set("data-policy", str(mark.number))
    title = ET.Element(f"{{{SVG}}}title")
    title.text = mark.label
    found.insert(0, title)


def _own_ids(root: ET.Element, prefix: str) -> None:
    """Give short ids of this figure's own to what something refers to, and drop the others."""
    text = ET.tostring(root, encoding="unicode")
    used = re.findall(r'url\(#([^)]+)\)|xlink:href="#([^"]+)"', text)
    short = {name: f"{prefix}{n}" for n, name in enumerate(dict.fromkeys(one or two for one, two in used))}
    for element in root.iter():
        name = element.attrib.pop("id", None)
        if name in short:
            element.set("id", short[name])
        for key, value in list(element.attrib.items()):
            if key == f"{{{XLINK}}}href":
                del element.attrib[key]
                element.set("href", f"#{short[value[1:]]}")
            elif "url(#" in value:
                element.set(key, re.sub(r"url\(#([^)]+)\)", lambda found: f"url(#{short[found.group(1)]})", value))


def _said_once(root: ET.Element) -> None:
    """Drop from each use of a shape what the shape says itself; what has no area needs no colour to fill it."""
    shapes = {element.get("id"): element for element in root.iter(f"{{{SVG}}}path") if element.get("id")}
    for element in root.iter(f"{{{SVG}}}use"):
        shape = shapes.get((element.get("href") or "#")[1:])
        if shape is None:
            continue
        for name in ("fill", "stroke", "stroke-width"):
            flat = name == "fill" and "z" not in shape.get("d", "")
            if name in element.attrib and (flat or element.get(name) == shape.get(name)):
                del element.attrib[name]


_LOOK = ("fill", "fill-opacity", "stroke", "stroke-opacity", "stroke-width", "stroke-linecap", "stroke-linejoin",
         "stroke-dasharray", "stroke-dashoffset", "font-size", "font-weight", "text-anchor", "opacity")  # fmt: skip
_TAG = re.compile(r"<(path|use|text|rect|circle|line)\b([^>]*?)(\s*/?)>")
_ATTRIBUTE = re.compile(r'\s([\w:-]+)="([^"]*)"')


class Looks:
    """Gives a class to every look that elements of the page's pictures share: it is then written once, in the style.

    >>> looks = Looks()
    >>> looks.apply('<path d="M 0 0" fill="none" stroke="red" />'), looks.style()
    ('<path d="M 0 0" class="k0"/>', '.k0{fill:none;stroke:red}')
    """

    def __init__(self) -> None:
        self._classes: dict[str, str] = {}

    def apply(self, svg: str) -> str:
        """The picture with classes in place of its presentation attributes."""
        return _TAG.sub(self._shorter, svg)

    def style(self) -> str:
        """The rules of all classes that were given."""
        return "\n".join(f".{name}{{{look}}}" for look, name in self._classes.items())

    def _shorter(self, tag: re.Match[str]) -> str:
        found = _ATTRIBUTE.findall(tag[2])
        look = ";".join(f"{name}:{value}" for name, value in found if name in _LOOK)
        if not look or any(name == "class" for name, _ in found):
            return tag[0]
        name = self._classes.setdefault(look, f"k{len(self._classes)}")
        rest = "".join(f' {key}="{value}"' for key, value in found if key not in _LOOK)
        return f'<{tag[1]}{rest} class="{name}"{tag[3].strip()}>'

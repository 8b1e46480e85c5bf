"""Turns a figure into an `<svg>` element with the page's colours and fonts, whose marks follow the pointer.

matplotlib's SVG is read and written anew, element by element, so that it holds only elements known here.
"""

import io
import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

from matplotlib.figure import Figure

from longmix.reporting.markup import Markup, joined, tag
from longmix.reporting.plots import drawing, lay_out
from longmix.reporting.style import INK, PAPER, RULE, SOFT

ELEMENTS = frozenset({"g", "path", "use", "text", "defs"})
ATTRIBUTES = frozenset({"d", "x", "y", "transform"})
STYLES = frozenset(
    {"fill", "stroke", "stroke-width", "stroke-dasharray", "opacity", "fill-opacity", "stroke-opacity"}
    | {"font-size", "font-weight", "text-anchor"}
)
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))

PAGE = {INK: "var(--ink)", SOFT: "var(--soft)", RULE: "var(--rule)", PAPER: "var(--page)"}
"""Colours of pictures that change with the page's."""

MARK = re.compile(r"mark-(\d+)-\d+")
"""Ids of what belongs to a mixer, by its colour's number: `mark-COLOUR-LINE`."""


def mark_id(colour: int, line: int) -> str:
    """The id of a line, of its name and all else that belongs to it."""
    return f"mark-{colour}-{line}"


def svg(figure: Figure, label: str, key: str, told: Mapping[str, Sequence[str]]) -> Markup:
    """The figure as an element.

    Args:
        figure: made by `new_figure`.
        label: what it shows, for those who do not see it.
        key: begins all of its ids, which no other picture of the page has.
        told: what the points of a line tell when they are pointed at, by the line's id.
    """
    stream = io.StringIO()
    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    with drawing():
        lay_out(figure)
        figure.savefig(stream, format="svg", metadata=NO_METADATA)
    root = ElementTree.fromstring(stream.getvalue())
    parts = [_element(child, key, told, None) for child in root]
    return tag("svg", joined(parts, ""), viewBox=root.get("viewBox"), role="img", aria_label=label)


def _element(element: ElementTree.Element, key: str, told: Mapping[str, Sequence[str]], mark: str | None) -> Markup:
    """One element with all that is in it; `mark` is the id of the line it belongs to."""
    name, own = _local(element.tag), element.get("id", "")
    if name not in ELEMENTS:
        return Markup("")
    found = MARK.fullmatch(own)
    mark = own if found else mark
    uses = [child for child in element if _local(child.tag) == "use"]
    titles = told.get(mark or "", ())
    texts = dict(zip(map(id, uses), titles, strict=True)) if len(titles) == len(uses) else {}
    content = [element.text if name == "text" else None]
    for child in element:
        inner = _element(child, key, told, mark)
        title = texts.get(id(child))
        content.append(inner if title is None else _titled(inner, title))
    if name in ("g", "defs") and not any(content):
        return Markup("")
    if name == "g" and not found:
        return joined(content, "")
    attributes: dict[str, str] = {k: _rounded(v) for k, v in element.items() if k in ATTRIBUTES and "(-0 " not in v}
    if name == "path" and own:
        attributes["id"] = f"{key}-{own}"
    if name == "use":
        attributes["href"] = f"#{key}-{_link(element)}"
    if found:
        attributes["class"] = f"mark c{found[1]}"
    if style := _style(element.get("style", ""), mark is not None):
        attributes["style"] = style
    return tag(name, *content, **attributes)


def _titled(element: Markup, title: str) -> Markup:
    return tag("g", tag("title", title), element)


def _local(name: str) -> str:
    return name.rpartition("}")[2]


def _link(element: ElementTree.Element) -> str:
    return next(value for name, value in element.items() if _local(name) == "href").removeprefix("#")


def _rounded(text: str) -> str:
    """Numbers with two digits; a path in one line."""
    shorter = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), text)
    return " ".join(shorter.split())


def _style(text: str, marked: bool) -> str:
    """The parts of a style that the page needs: size and weight of a font, not its family."""
    pairs = (part.partition(":")[::2] for part in text.split(";") if ":" in part)
    found = {name.strip(): value.strip() for name, value in pairs}
    if font := re.match(r"(?:(\d+|bold) )?([\d.]+px)", found.pop("font", "")):  # as matplotlib before 3.10 writes it
        found |= {"font-size": font[2]} | ({"font-weight": font[1]} if font[1] else {})
    kept = {name: _colour(value, marked) for name, value in found.items() if name in STYLES}
    return ";".join(f"{name}:{value}" for name, value in kept.items())


def _colour(value: str, marked: bool) -> str:
    if not value.startswith("#"):
        return value
    return "var(--colour)" if marked else PAGE.get(value, value)

"""HTML and SVG from elements that escape by themselves: text from a run's files can never become markup."""

from collections.abc import Iterable
from html import escape
from string import Template
from typing import Union

from longmix.printable import LINES, printable

VOID = frozenset({"meta", "br", "path", "use", "input"})
"""Elements without content."""


class Markup(str):
    """Text that is markup already; made by `tag`, `joined` and `filled` alone."""

    __slots__ = ()


Content = Union[str, Markup, int, float, None, Iterable["Content"]]  # noqa: UP007
Attribute = str | int | float | bool | None


def markup(content: Content) -> Markup:
    """Any content as markup: text is escaped, its control characters are shown, None is nothing, a list its parts."""
    if isinstance(content, Markup):
        return content
    if content is None:
        return Markup("")
    if isinstance(content, str | int | float):
        return Markup(escape(printable(content, keep=LINES), quote=True))
    return Markup("".join(markup(part) for part in content))


def tag(name: str, *content: Content, **attributes: Attribute) -> Markup:
    """One element.

    Args:
        name: of the element.
        content: what is in it; see `markup`.
        attributes: `class_` is `class`, `data_mixer` is `data-mixer`; None and False are left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{markup(value)}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID and not content:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{markup(content)}</{name}>")


def joined(parts: Iterable[Content], between: str = "\n") -> Markup:
    """Parts as markup with some text between them."""
    return Markup(str(markup(between)).join(markup(part) for part in parts))


def filled(template: str, **parts: Content) -> Markup:
    """A template of ours with its `$places` filled; text is escaped."""
    return Markup(Template(template).substitute({name: str(markup(part)) for name, part in parts.items()}))

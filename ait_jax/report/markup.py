"""Small parts of HTML: everything that goes in is escaped, every picture has words beside it."""

import base64
from collections.abc import Iterable, Sequence
from html import escape

from ait_jax.report.figures import Picture

__all__ = ["Markup", "data_uri", "figure", "figures", "image", "table", "tag"]


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str | None) -> Markup:
    """An element.

    Args:
        name: of the element.
        *children: `Markup`, or text, which is escaped.
        **attributes: of the element, None for none; `class_` is `class`, and `_` else `-`.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in ("img", "source", "meta"):
        return Markup(f"<{name}{written}>")
    inner = "".join(c if isinstance(c, Markup) else escape(c) for c in children)
    return Markup(f"<{name}{written}>{inner}</{name}>")


def data_uri(content: bytes, kind: str) -> str:
    """A picture of a media type (`image/png`) as an address that needs no network."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def figure(picture: Picture, caption: str) -> Markup:
    """A drawn figure, the variant for dark pages included."""
    light, dark = (data_uri(svg.encode(), "image/svg+xml") for svg in (picture.light, picture.dark))
    both = tag(
        "picture",
        tag("source", media="(prefers-color-scheme: dark)", srcset=dark),
        tag("img", src=light, alt=picture.alt),
    )
    return tag("figure", both, tag("figcaption", caption))


def image(content: bytes, kind: str, alt: str, caption: str) -> Markup:
    """A picture of pixels.

    Args:
        content: of the picture's file.
        kind: media type of the file.
        alt: what it shows, for those who do not see it.
        caption: below it.
    """
    pixels = tag("img", src=data_uri(content, kind), alt=alt, class_="pixels")
    return tag("figure", pixels, tag("figcaption", caption))


def figures(parts: Iterable[Markup | None]) -> Markup:
    """Figures side by side, as far as there is room; nothing if there are none."""
    found = [part for part in parts if part is not None]
    return tag("div", *found, class_="figures") if found else Markup("")


def table(
    label: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    marked: Iterable[int] = (),
) -> Markup:
    """A table that scrolls where it is too wide; the first cell of a row is its heading.

    Args:
        label: what the table shows.
        head: headings of the columns.
        rows: of `Markup` or text.
        marked: numbers of the rows that stand out.
    """
    marked = set(marked)
    columns = tag("tr", *(tag("th", text, scope="col") for text in head))
    body = [
        tag(
            "tr",
            tag("th", first, scope="row"),
            *(tag("td", cell) for cell in cells),
            class_="differs" if i in marked else None,
        )
        for i, (first, *cells) in enumerate(rows)
    ]
    inner = tag("table", tag("thead", columns), tag("tbody", *body))
    return tag("div", inner, class_="scroll", role="region", aria_label=label, tabindex="0")

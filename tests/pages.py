"""A page as a strict reader finds it: well-formed, and referring to nothing but itself."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = frozenset({"meta", "wbr"})  # elements without an end
Attributes = dict[str, str | None]


class Page(HTMLParser):
    """A strict reader: every element is closed in order; keeps tags, attributes, and text by element."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, Attributes]] = []
        self.parents: list[tuple[str, ...]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in <{tag}>"
        self.tags.append((tag, dict(attrs)))
        self.parents.append(tuple(self.open))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert "svg" in self.open, f"<{tag}/> is no HTML"
        self.tags.append((tag, dict(attrs)))
        self.parents.append(tuple(self.open))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def all(self, *names: str) -> list[Attributes]:
        return [attributes for tag, attributes in self.tags if tag in names]


def assert_self_contained(text: str) -> None:
    """Assert that a page is well-formed, has no script and no outside reference, and that each of its links ends."""
    page = Page(text)
    assert not page.all("script", "link", "img", "iframe", "object", "embed", "form", "base", "foreignobject")
    for tag, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on") or key == "src"], tag
        for key in ("href", "xlink:href"):
            assert (attributes.get(key) or "#").startswith("#"), tag
        assert re.sub(r"url\(#\w+\)", "", attributes.get("style") or "").count("url") == 0
    assert "url(" not in (style := text[text.index("<style>") : text.index("</style>")])
    assert "@import" not in style
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    inner = {(attributes["href"] or "")[1:] for _, attributes in page.tags if "href" in attributes}
    assert inner <= set(ids)

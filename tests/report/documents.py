"""What an HTML document asks for and holds, read with the standard library's parser."""

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Document(HTMLParser):
    """Parses at once; `text` is what a reader sees, `loads` every address that a browser would fetch."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.text = ""
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        self._see(attrs)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self._see(attrs)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            raise AssertionError(f"</{tag}> closes nothing")

    def handle_data(self, data):
        if "style" in self.open:
            self.loads += [part for part in ("@import", "url(") if part in data]
        else:
            self.text += data + "\n"

    def _see(self, attrs):
        self.loads += [value for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]


def check_self_contained(source: str) -> Document:
    """Parse a document, and refuse one that is not whole or loads anything."""
    document = Document(source)
    assert document.open == [], "every element is closed"
    assert document.loads == []
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & set(document.tags)
    return document

"""What a page of HTML shows."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects what the page shows, and checks that its tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.text, self.links, self.tags = [], [], "", [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            assert attrs["alt"]
            self.images.append(attrs["src"])
        self.links += [attrs[name] for name in ("href", "src", "srcset") if name in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

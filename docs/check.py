"""Follow every link within the built pages, and look for mathematics left as TeX and for what is loaded from elsewhere.

``python docs/check.py FOLDER``; the exit code is 1 where something is wrong.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Pages that Sphinx makes, and whose links are those of the other pages.
MADE = {"genindex.html", "py-modindex.html", "search.html"}
TEX = re.compile(
    r"\$\$|\\(begin|frac|mathcal|mathrm|text|theta|sigma|mu|sum|sim)\b|(?<![\w$])\$[^\s$][^$\n]{0,60}\\[a-z]+[^$\n]*\$"
)


class Page(HTMLParser):
    """The links, anchors and text of a page; text in code, scripts and mathematics is not kept."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []  # with the page, from other hosts
        self.anchors: set[str] = set()
        self.text: list[str] = []
        self.within: list[tuple[str, bool]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.links += [value for name in ("href", "src") if (value := found.get(name))]
        source = found.get("href") if tag == "link" and found.get("rel") == "stylesheet" else found.get("src")
        self.loaded += [source] if source and urlsplit(source).netloc else []
        self.anchors |= {value for name in ("id", "name") if (value := found.get(name))}
        if tag not in ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "wbr"):
            classes = (found.get("class") or "").split()
            self.within.append((tag, tag in ("code", "pre", "script", "style") or "math" in classes))

    def handle_endtag(self, tag: str) -> None:
        while self.within and self.within.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not any(hidden for _, hidden in self.within):
            self.text.append(data)


def faults(folder: Path) -> list[str]:
    """Return what is wrong with the pages of a folder, one line each."""
    pages = {path: Page(path.read_text()) for path in sorted(folder.rglob("*.html")) if "_static" not in path.parts}
    found = []
    for path, page in pages.items():
        name = path.relative_to(folder)
        for link in [] if path.name in MADE else page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                found.append(f"{name}: {link} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{name}: {link}: there is no such place on that page")
        found += [f"{name}: {link} is loaded from elsewhere, and is missing offline" for link in page.loaded]
        if left := TEX.search("".join(page.text)):
            found.append(f"{name}: mathematics was left as it was written: {left.group()!r}")
    return found or ([] if pages else [f"There are no pages in {folder}."])


if __name__ == "__main__":
    wrong = faults(Path(sys.argv[1]).resolve())
    print("\n".join(wrong) if wrong else "every link within the pages leads somewhere")
    sys.exit(bool(wrong))

"""What `zensical build --strict` lets pass in the built site: `python docs/check_site.py mkdocs.yml build/site`.

Zensical reports links to missing pages and headings. It does not report a page that the navigation leaves out, an
entry of the navigation without a page, a missing picture or file, or anything that a page fetches from another host.
"""

import posixpath
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

FETCHED = {"script": "src", "img": "src", "source": "src", "iframe": "src", "link": "href"}
NEIGHBOURS = ("prev", "next", "canonical")  # a `link` that names a page, and fetches nothing
GENERATED = {"404.html"}  # Zensical's own; its links start from the root of the host


class Links(HTMLParser):
    """`links` and `fetched` hold the addresses on a page, `anchors` the names that a link may end with after `#`."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.anchors = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if "href" in values and (tag == "a" or (tag == "link" and values.get("rel") in NEIGHBOURS)):
            self.links.append(values["href"])
        elif tag in FETCHED and FETCHED[tag] in values:
            self.fetched.append(values[FETCHED[tag]])


def nav_pages(nav: object) -> Iterator[str]:
    """The pages that mkdocs.yml's `nav` names, in order."""
    if isinstance(nav, str):
        yield nav
    else:
        for entry in nav.values() if isinstance(nav, dict) else nav or []:
            yield from nav_pages(entry)


def nav_problems(config: Path) -> list[str]:
    """Pages below docs/ that the navigation leaves out, and entries of the navigation without a page."""
    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    docs = config.parent / settings.get("docs_dir", "docs")
    ignored = [line.rstrip("/") for line in settings.get("exclude_docs", "").split() if line.endswith("/")]
    pages = {
        page.relative_to(docs).as_posix()
        for page in docs.rglob("*.md")
        if not any(folder.match(pattern) for pattern in ignored for folder in page.relative_to(docs).parents)
    }
    listed = list(nav_pages(settings["nav"]))
    named = {page for page in listed if "://" not in page}
    return [
        *(f"docs/{page} is missing from nav in {config.name}" for page in sorted(pages - named)),
        *(f"{config.name}: nav names {page}, which is not in docs/" for page in sorted(named - pages)),
        *(
            f"{config.name}: nav names {page} twice"
            for page in sorted({page for page in listed if listed.count(page) > 1})
        ),
    ]


def link_problems(site: Path) -> list[str]:
    """Addresses on the built pages that lead to nothing in `site`, and files that a page fetches from another host."""
    pages = {
        file.relative_to(site).as_posix(): Links(file.read_text(encoding="utf-8")) for file in site.rglob("*.html")
    }
    problems = []
    for name, page in sorted(pages.items()):
        if name in GENERATED:
            continue
        problems += [f"{name}: fetches {url}" for url in page.fetched if urlsplit(url).netloc]
        for url in [*page.links, *page.fetched]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = (
                posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(parts.path))) if parts.path else name
            )
            if (site / target).is_dir():
                target = posixpath.normpath(f"{target}/index.html")
            if not (site / target).is_file():
                problems.append(f"{name}: {url} leads to nothing")
            elif target in pages and unquote(parts.fragment) not in pages[target].anchors:
                problems.append(f"{name}: {url}: there is no such heading")
    return problems


def main(config: Path, site: Path) -> int:
    """Prints every problem; 1 if there is any."""
    problems = [*nav_problems(config), *link_problems(site)]
    print(*problems or [f"{config.name} and {site}: no broken link, no page outside nav"], sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))

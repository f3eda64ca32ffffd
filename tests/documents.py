"""Markdown pages as tests see them: their blocks of code with the marks before them, their links and their headings."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

__all__ = ["ROOT", "Block", "blocks_of", "chapter_pages", "links_of", "lost_links"]

ROOT = Path(__file__).parent.parent

_MARK = re.compile(r"<!-- (ranks|shown by|not run|continues)(?:: (.+?))? -->\s*")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: where it stands, relative to the repository.
        line: its first line there.
        language: what the fence says.
        text: what stands in it; with what it continues, if it does.
        mark: what the comment right before it says of it, or "".
        value: what follows that.
    """

    page: str
    line: int
    language: str
    text: str
    mark: str = ""
    value: str = ""

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def chapter_pages() -> list[Path]:
    """README and the pages of docs/, whose blocks of code are executed."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _tokens(page: Path) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found: list[Block] = []
    before: Token | None = None
    for token in _tokens(page):
        if token.type == "fence":
            assert token.map is not None
            marked = _MARK.fullmatch(before.content) if before is not None and before.type == "html_block" else None
            mark, value = (marked[1], marked[2] or "") if marked else ("", "")
            text = token.content
            if mark == "continues":
                assert found, f"{page.name}:{token.map[0] + 1}: nothing to continue"
                text = f"{found[-1].text}\n{text}"
            name = page.relative_to(ROOT).as_posix()
            found.append(Block(name, token.map[0] + 1, token.info.strip(), text, mark, value))
        before = token
    return found


def links_of(page: Path) -> list[tuple[int, str]]:
    """Line and target of every link and image."""
    found = []
    for token in _tokens(page):
        line = token.map[0] + 1 if token.map else 0
        for child in token.children or ():
            target = child.attrGet("href") or child.attrGet("src")
            if target is not None:
                found.append((line, str(target)))
    return found


def lost_links(page: Path) -> list[str]:
    """Links to files or headings that do not exist, each with its line; links to other places are not followed."""
    lost = []
    for line, target in links_of(page):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not re.match(r"https?://", target) and (not path.exists() or (anchor and anchor not in anchors_of(path))):
            lost.append(f"{page.name}:{line}: {target}")
    return lost


def anchors_of(page: Path) -> set[str]:
    """What GitHub and the documentation call the headings of a page."""
    tokens = _tokens(page)
    found: set[str] = set()
    seen: Counter[str] = Counter()
    for heading, content in itertools.pairwise(tokens):
        if heading.type == "heading_open":
            words = "".join(child.content for child in content.children or ())
            slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
            found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
            seen[slug] += 1
    return found

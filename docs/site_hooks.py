"""What MkDocs does with a page beyond Markdown: equations become MathML, links out of docs/ become plain words.

GitHub shows the same pages, where `$$` equations and links to files of the repository work by themselves.
"""

import re
from typing import Any

from latex2mathml.converter import convert

DISPLAY = re.compile(r"^\$\$\n(.+?)\n\$\$$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"\$`(.+?)`\$")  # GitHub's inline form that no other Markdown takes for something else
LEAVES_DOCS = re.compile(r"\[([^\]]+)\]\(\.\./([^)]+)\)")


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Return a page's Markdown as the site needs it."""
    markdown = DISPLAY.sub(_equation, markdown)
    markdown = INLINE.sub(lambda match: convert(match[1]), markdown)
    return LEAVES_DOCS.sub(lambda match: f"{match[1]} (`{match[2]}`)", markdown)


def _equation(match: re.Match[str]) -> str:
    """A line of its own, which is scrolled where it is wider than a phone."""
    return f'<div style="overflow-x: auto">{convert(match[1], display="block")}</div>'

"""Texts of data and models as a terminal may show them: what would move its cursor or change its state is spelled."""

import re

# Control characters but for the end of a line and the tabulator, marks that turn the direction of writing, and halves
# of a pair of surrogates, which can't be written at all.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""The text with each such character written as Python writes it, such as \x1b."""
    return _HIDDEN.sub(lambda match: ascii(match[0])[1:-1], text)

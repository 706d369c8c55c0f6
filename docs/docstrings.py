"""What the API reference changes in a docstring before it is rendered.

A griffe extension, which mkdocs.yml names. Docstrings here have sections that no docstring style knows: the block under
"Equivalent to:" is Python, "Source:" starts a paragraph, "Returns:" holds a text or an entry for each named result, and
an entry of "Args:" may describe several names.
They stay plain text in the sources, for `help()`.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_BLOCK = re.compile(r"^(Equivalent to|Returns):\n((?:(?: {4}.*)?\n)*(?: {4}.*))", re.MULTILINE)
_LABEL = re.compile(r"^(Source|Memory): ", re.MULTILINE)
_SHARED = re.compile(r"^    (\w+(?:, \w+)+):((?:.*)(?:\n {8}.*)*)", re.MULTILINE)
_RESULT = re.compile(r"^(\w+): ", re.MULTILINE)


def rendered(text: str) -> str:
    """The docstring in Markdown, where it is not in Google's style."""
    text = _BLOCK.sub(_block, text)
    text = _SHARED.sub(lambda m: "\n".join(f"    {n}:{m[2]}" for n in m[1].split(", ")), text)
    return _LABEL.sub(r"**\1:** ", text)


def _block(match: re.Match[str]) -> str:
    body = "\n".join(line[4:] for line in match[2].rstrip().splitlines())
    if match[1] == "Returns":
        named = _RESULT.sub(r"\n* `\1`: ", body)
        return f"**Returns:**\n\n{named.lstrip() if named != body else '* ' + body}\n"
    return f"**Equivalent to:**\n\n```python\n{body}\n```\n"


class Docstrings(Extension):
    """Rewrites each docstring when griffe has read it."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rendered(obj.docstring.value)

"""What the API reference changes in a docstring before it is rendered: code is shown as code.

A griffe extension, named in mkdocs.yml. Our docstrings have two sections that no docstring style knows: the block under
"Equivalent to:" is Python, and "Source:" starts a paragraph. Both stay plain text in the sources, for `help()`.
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_EQUIVALENT = re.compile(r"^Equivalent to:\n((?:(?: {4}.*)?\n)*(?: {4}.*))", re.MULTILINE)
_LABEL = re.compile(r"^(Source|Memory): ", re.MULTILINE)


def rendered(text: str) -> str:
    """The docstring with its "Equivalent to" block fenced and the labels of single paragraphs in bold."""
    text = _EQUIVALENT.sub(
        lambda m: f"**Equivalent to**\n\n```python\n{_dedent(m[1])}\n```\n", text
    )
    return _LABEL.sub(r"**\1:** ", text)


def _dedent(block: str) -> str:
    return "\n".join(line[4:] for line in block.rstrip().splitlines())


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = rendered(obj.docstring.value)

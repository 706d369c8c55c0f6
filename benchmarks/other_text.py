"""English text of another kind than the one that this package's settings were chosen on: news.

    pip install --no-deps gensim==4.4.0      # 28 MB; nothing of it is imported

300 short articles of the Australian Broadcasting Corporation (Lee, Pincombe and Welsh, 2005, "An empirical evaluation
of models of text document similarity"), which gensim carries as data for its tests.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

NAME = "news"
INSTALL = "pip install --no-deps gensim==4.4.0"
_FILE = Path("test", "test_data", "lee_background.cor")  # one article a line


def news() -> list[str] | None:
    """The articles, in the order of the file; None if the package that carries them is not installed."""
    spec = find_spec("gensim")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / _FILE
        if path.is_file():
            return [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    return None

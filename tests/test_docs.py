"""The documentation: links and paths exist, the site builds, and a browser shows it whole at two widths."""

from __future__ import annotations

import functools
import html
import http.server
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import smoothquant_kernels
from smoothquant_kernels import ops
from tests.support.browser import find_browser
from tools.build.plan import ROOT

DOCS = ROOT / "docs"
SHOWN = ["index", "reference/python", "reference/ops", "reference/families"]
WIDTHS = [1280, 400]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("**/*.md"))]
REFERENCE = (DOCS / "reference" / "python.md").read_text() + (
    DOCS / "reference" / "ops.md"
).read_text()

# Headless Chromium has windows of 500 pixels at least; a frame may be narrower.
_FRAME = '<iframe src="{page}.html" style="width: {width}px; height: 900px; border: 0"></iframe>'
# What a reader would miss: text that reaches beyond the window, unless a box around it scrolls.
_SCRIPT = r"""
addEventListener("load", () => {
  const scrolls = (e) => { for (; e; e = e.parentElement)
    if (["auto", "scroll"].includes(getComputedStyle(e).overflowX)) return true; return false; };
  const clipped = [];
  const walk = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT);
  for (let node; (node = walk.nextNode()); ) {
    const range = document.createRange(); range.selectNodeContents(node);
    for (const box of range.getClientRects())
      if (node.data.trim() && (box.right > innerWidth + 1 || box.left < -1) && !scrolls(node.parentElement))
        clipped.push(node.data.slice(0, 60));
  }
  const images = [...document.images].map((i) => i.naturalWidth);
  const out = { inner: innerWidth, width: document.documentElement.scrollWidth, clipped, images,
    headings: [...document.querySelectorAll("article h2, article h3")].map((h) => h.id) };
  const pre = document.createElement("pre"); pre.id = "measured"; pre.textContent = JSON.stringify(out);
  parent.document.body.append(pre);
});
"""


def test_every_link_to_a_file_of_this_project_leads_somewhere() -> None:
    links = [
        (page, target)
        for page in PAGES
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if not target.startswith("http")
    ]
    assert len(links) > 50
    assert not [(page.name, link) for page, link in links if not (page.parent / link).exists()]


def test_paths_of_documents_in_the_sources_exist() -> None:
    folders = ("smoothquant_kernels", "csrc", "benchmarks", "tests", "tools")
    named = {
        name
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sh", ".h", ".cuh", ".cu", ".cpp")
        for name in re.findall(r"\bdocs/[\w/]+\.md", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 5
    assert not sorted(name for name in named if not (ROOT / name).is_file())


def test_the_readme_is_short_and_shows_code_early() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 90
    before, code = text.split("```python\n", 1)[0], text.split("```")[1]
    assert len(before.split()) <= 100
    assert len([line for line in code.splitlines()[1:] if line and not line.startswith("#")]) <= 6
    assert all(command in text for command in ("make demo", "make test ", "make test-kernels"))
    assert (DOCS / "images" / "smoothing.png").stat().st_size < 100_000


def test_the_reference_has_every_public_name() -> None:
    shown = {name.rsplit(".", 1)[1] for name in re.findall(r"^::: (\S+)", REFERENCE, re.MULTILINE)}
    public = {*smoothquant_kernels.__all__, *ops.__all__} - {"ops", "OPS"}
    assert shown == public


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the built site; the measuring script is added to each page that is served."""
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package, reason="the site needs `pip install -e .[docs]`")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in folder.glob("**/*.html"):
        text = page.read_text(encoding="utf-8")
        # Nothing is fetched from elsewhere when a page is shown.
        assert not re.findall(r'(?:src|<link[^>]*href)="(?:https?:)?//', text), page.name
        page.write_text(text.replace("</body>", f"<script>{_SCRIPT}</script></body>"))

    for page in SHOWN:
        for width in WIDTHS:
            (folder / f"{page.replace('/', '_')}_{width}.html").write_text(
                f"<body>{_FRAME.format(page=page, width=width)}</body>"
            )

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.xdist_group("site")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", SHOWN)
def test_a_browser_shows_the_page_whole(site: str, page: str, width: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            find_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000",
            "--enable-logging=stderr", "--dump-dom", f"{site}/{page.replace('/', '_')}_{width}.html",
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    seen = json.loads(html.unescape(found[1]))
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert seen["inner"] == width and seen["width"] <= width
    assert seen["clipped"] == []
    assert all(size > 0 for size in seen["images"])
    assert len(seen["images"]) == (page == "index")
    if page == "reference/ops":
        assert {
            f"smoothquant_kernels.ops.{name}" for name in ("gemm.gemm_s8", "linear.linear_s8")
        } <= {*seen["headings"]}
    if page == "reference/python":
        assert "smoothquant_kernels.smooth_lm" in seen["headings"]

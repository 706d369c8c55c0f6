"""Measures a page in headless Chromium, without a driver.

A script in a copy of the page writes its measurements into the page's text, and `--dump-dom` prints that text.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_BUNDLED = "ms-playwright/chromium*/chrome-linux*/chrome"

# The script checks text nodes: an element without text of its own has no font size that anyone reads.
_SCRIPT = r"""
addEventListener("load", () => {
  const root = document.documentElement, out = {};
  const name = (e) => e.tagName.toLowerCase() + "." + e.className + ": " + e.textContent.slice(0, 40);
  const linear = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const luminance = (c) => { const [r, g, b] = c.map(linear);
                             return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const color = (text) => text.match(/[\d.]+/g).map(Number);
  const background = (e) => { for (; e; e = e.parentElement) { const c = color(getComputedStyle(e).backgroundColor);
                              if (c.length < 4 || c[3] > 0) return c.slice(0, 3); } return [255, 255, 255]; };
  out.inner = innerWidth; out.width = root.scrollWidth; out.lang = root.lang; out.title = document.title;
  out.scripts = document.querySelectorAll("script").length - 1;
  out.images = [...document.images].map((i) => ({ complete: i.complete, width: i.naturalWidth, alt: i.alt,
    shown: i.getBoundingClientRect().width }));
  out.headings = [...document.querySelectorAll("h1,h2,h3,h4,h5,h6")].map((h) => Number(h.tagName[1]));
  out.small = []; out.clipped = []; out.faint = []; out.texts = 0;
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walk.nextNode()); ) {
    const e = node.parentElement, style = getComputedStyle(e);
    if (!node.data.trim() || e.tagName == "SCRIPT") continue;
    out.texts++;
    if (parseFloat(style.fontSize) < 12) out.small.push(name(e));
    const a = luminance(color(style.color).slice(0, 3)), b = luminance(background(e));
    if ((Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5) out.faint.push(name(e));
    const range = document.createRange(); range.selectNodeContents(node);
    for (const box of range.getClientRects()) {
      if (e.closest(".scroll")) continue;  // the box scrolls
      for (let p = e; p; p = p.parentElement) {
        const outer = p.getBoundingClientRect(), cut = getComputedStyle(p);
        const beyond = box.right > outer.right + 1 || box.left < outer.left - 1;
        if (getComputedStyle(p).display != "inline" && beyond) { out.clipped.push(name(e)); break; }
        if (cut.overflowY != "visible" && box.bottom > outer.bottom + 1) { out.clipped.push(name(e)); break; }
      }
    }
  }
  out.boxes = [...document.querySelectorAll(".scroll")].map((e) => {
    const r = e.getBoundingClientRect();
    return { right: r.right, focus: e.tabIndex, label: e.getAttribute("aria-label"),
             reach: getComputedStyle(e).overflowX }; });
  const pre = document.createElement("pre"); pre.id = "measured"; pre.textContent = JSON.stringify(out);
  document.body.append(pre);
});
"""


def find_browser() -> str:
    """The path of a Chromium. Skips the test without one."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    found = found or next((str(p) for p in sorted(cache.glob(_BUNDLED))), None)
    if found is None:
        pytest.skip("no Chromium: run `apt-get install chromium` to check the page in a browser")
    return found


def look_at(page: Path, folder: Path, *, width: int = 1280) -> tuple[dict[str, Any], str]:
    """The script's measurements, and the browser's console. The browser keeps its own files in `folder`."""
    copy = folder / "page.html"
    text = page.read_text(encoding="utf-8")
    copy.write_text(text.replace("</body>", f"<script>{_SCRIPT}</script></body>"), encoding="utf-8")
    done = subprocess.run(
        [
            find_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            f"--user-data-dir={folder / 'profile'}", f"--window-size={width},900",
            "--enable-logging=stderr", "--dump-dom", copy.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    match = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match is not None, done.stderr[-2000:]
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(html.unescape(match[1])), console

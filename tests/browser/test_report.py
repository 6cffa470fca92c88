"""The report in a real browser: nothing is wider than a phone's screen, and both colour schemes are readable."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from string import Template
from typing import Any

import pytest

from tests.compare.made_results import whole_run
from userspace_proxy.compare.page import page

pytestmark = pytest.mark.browser

SCHEMES = {"dark": 0, "light": 1}  # of Blink
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
_LEAST_LETTER_PX = 9.5
_LEAST_CONTRAST = 4.5  # WCAG 2.1, AA

# The report in a frame as wide as the screen (a window of chromium itself is never as narrow as a phone), and what the
# browser made of it, put where --dump-dom shows it.
_FRAME = """
<!doctype html><meta name="color-scheme" content="light dark"><body style="margin: 0">
<iframe style="border: 0; width: ${width}px; height: ${height}px" srcdoc="$report"></iframe>
<script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, look = frame.contentWindow, texts = [...page.querySelectorAll("svg text")];
  const letters = texts.map(text => {
    const svg = text.ownerSVGElement, scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
    return parseFloat(look.getComputedStyle(text).fontSize) * scale;
  });
  const out = texts.filter(text => {
    const panel = text.closest(".panel").getBoundingClientRect(), box = text.getBoundingClientRect();
    return box.left < panel.left || box.right > panel.right;
  });
  const body = look.getComputedStyle(page.body), quote = look.getComputedStyle(page.querySelector("blockquote"));
  document.body.innerHTML = "<pre>" + JSON.stringify({
    window: look.innerWidth, page: page.documentElement.scrollWidth, letter: Math.min(...letters),
    out: out.map(text => text.textContent), background: body.backgroundColor, ink: body.color, quote: quote.color,
    loaded: look.performance.getEntriesByType("resource").map(entry => entry.name),
  }) + "</pre>";
};
</script>
"""


@pytest.fixture(scope="module")
def report() -> str:
    return page(whole_run()).decode()


def seen_in_chromium(report: str, folder: Path, size: tuple[int, int], scheme: str) -> dict[str, Any]:
    return in_chromium(
        Template(_FRAME).substitute(width=size[0], height=size[1], report=escape(report)), folder, scheme
    )


def in_chromium(page: str, folder: Path, scheme: str) -> dict[str, Any]:
    """Return the JSON that *page* leaves in its only <pre>."""
    if shutil.which("chromium") is None:
        pytest.fail("chromium is not installed; `make test-report` installs it")
    framed = folder / "framed.html"
    framed.write_text(page)
    quiet = ["quic", "background-networking", "component-update", "sync", "gpu"]
    command = ["chromium", "--headless", "--no-sandbox", "--no-first-run", *(f"--disable-{what}" for what in quiet)]
    command += [f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}"]
    command += ["--window-size=1400,1000", "--hide-scrollbars", "--dump-dom", f"file://{framed}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=40, check=True).stdout
    found = re.search(r"<pre>(.*)</pre>", dom, re.DOTALL)
    assert found, dom[:2000]
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    return seen


def luminance(colour: str) -> float:
    red, green, blue = (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    darker, lighter = sorted((luminance(one), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", SIZES)
def test_the_report_fits_the_screen_and_can_be_read(report: str, tmp_path: Path, size: str, scheme: str) -> None:
    seen = seen_in_chromium(report, tmp_path, SIZES[size], scheme)

    assert seen["window"] == SIZES[size][0]
    assert seen["page"] <= seen["window"]
    assert seen["out"] == []
    assert seen["letter"] >= _LEAST_LETTER_PX
    assert (luminance(seen["background"]) < 0.1) is (scheme == "dark")
    assert contrast(seen["background"], seen["ink"]) >= _LEAST_CONTRAST
    assert contrast(seen["background"], seen["quote"]) >= _LEAST_CONTRAST
    assert seen["loaded"] == []

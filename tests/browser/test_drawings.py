"""The drawings of a packet's way in a real browser: no word exceeds its box, and both colour schemes are readable."""

from __future__ import annotations

from pathlib import Path
from string import Template

import pytest

from tests.browser.test_report import SCHEMES, contrast, in_chromium, luminance
from tests.trace.recordings import MODES, trace
from userspace_proxy.trace.svg import drawing

pytestmark = pytest.mark.browser

_LEAST_CONTRAST = 4.5  # WCAG 2.1, AA
_PAGE = """
<!doctype html><meta name="color-scheme" content="light dark"><body style="margin: 0">$svg
<script>
const svg = document.querySelector("svg"), look = element => getComputedStyle(element).fill;
const boxes = [...svg.querySelectorAll("rect")].map(rect => [rect, rect.getBoundingClientRect()]);
const around = box => boxes.filter(([, b]) => b.top <= box.top + 2 && b.bottom >= box.bottom - 2 && b.left <= box.left
  && b.right > box.left).sort((a, b) => a[1].width * a[1].height - b[1].width * b[1].height)[0];
const texts = [...svg.querySelectorAll("text")].map(text => {
  const box = text.getBoundingClientRect(), [rect, edge] = around(box);
  return {words: text.textContent, over: Math.round(box.right - edge.right), ink: look(text), ground: look(rect)};
});
document.body.innerHTML = "<pre>" + JSON.stringify({texts, paper: look(svg.querySelector(".paper"))}) + "</pre>";
</script>
"""


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("wide", [False, True], ids=["column", "side by side"])
@pytest.mark.parametrize("mode", MODES)
def test_the_text_of_a_drawing_is_inside_its_box_and_readable(
    tmp_path: Path, mode: str, scheme: str, *, wide: bool
) -> None:
    svg = drawing(trace(mode), wide=wide)

    seen = in_chromium(Template(_PAGE).substitute(svg=svg), tmp_path, scheme)

    assert seen["texts"]
    assert [text for text in seen["texts"] if text["over"] > 0] == []
    grounds = {text["ground"] if text["ground"] != "none" else seen["paper"] for text in seen["texts"]}
    assert len(grounds) > 1
    for text in seen["texts"]:
        ground = text["ground"] if text["ground"] != "none" else seen["paper"]
        assert contrast(ground, text["ink"]) >= _LEAST_CONTRAST, text
    assert (luminance(seen["paper"]) < 0.1) is (scheme == "dark")

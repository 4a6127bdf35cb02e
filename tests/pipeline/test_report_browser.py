"""The page in a real browser: light, dark, and as wide as a phone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pipeline.specs import ReportSpec
from pipeline.stages.report import run_report
from pipeline.storage import Location
from tests.pipeline.test_report import write_figures, write_run
from tests.pipeline.test_report_comparison import write_evaluations
from tests.pipeline.test_report_studies import of_two

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None, reason="no Chromium on this machine: apt-get install chromium"
    ),
]
PHONE, DESKTOP = 360, 1280
DARK, LIGHT = 0, 1  # Chromium's own numbers
_OF_RUNS = {"figures", "training", "latents", "samples", "versions"}
SECTIONS = {
    "one": _OF_RUNS,
    "several": _OF_RUNS,
    "studies": {"against-1", "against-2", "reading", "versions"},
}

# Runs in the page's parent, over the page in a frame of the width asked for.
MEASURE = """
const view = document.querySelector('iframe').contentWindow;
const page = view.document;
const shown = [...page.querySelectorAll('body *')].filter(e => e.getClientRects().length);
const style = e => view.getComputedStyle(e);
const ground = e => {
  for (; e; e = e.parentElement) {
    const color = style(e).backgroundColor;
    if (color !== 'rgba(0, 0, 0, 0)' && color !== 'transparent') return color;
  }
  return 'rgb(255, 255, 255)';
};
const texts = shown.filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()));
const result = {
  width: page.documentElement.clientWidth,
  needed: page.documentElement.scrollWidth,
  outside: shown.filter(e => !e.closest('.scroll') && !e.closest('svg')
    && e.getBoundingClientRect().right > page.documentElement.clientWidth + 1)
    .map(e => e.tagName + '.' + e.className),
  background: style(page.body).backgroundColor,
  texts: texts.filter(e => !e.closest('svg')).map(e => [style(e).color, ground(e)]),
  smallest: Math.min(...texts.filter(e => !e.closest('svg'))
    .map(e => parseFloat(style(e).fontSize))),
  plotText: Math.min(...[...page.querySelectorAll('svg text')]
    .map(e => e.getBoundingClientRect()).filter(r => r.width > r.height).map(r => r.height)),
  plots: [...page.querySelectorAll('svg')].map(e => e.getBoundingClientRect().height),
  sections: [...page.querySelectorAll('section')].map(e => e.id),
};
const out = document.createElement('pre');
out.id = 'measured';
out.textContent = JSON.stringify(result);
document.body.append(out);
"""


def look(page: Path, width: int, scheme: int, folder: Path) -> dict[str, Any]:
    """What the browser says of a page that is `width` wide."""
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        f'<!doctype html><meta name="color-scheme" content="light dark"><body>'
        f'<iframe width="{width}" height="900" style="border:0" '
        f'srcdoc="{html.escape(page.read_text())}"></iframe>'
        f"<script>addEventListener('load', () => {{ {MEASURE} }})</script>"
    )
    assert BROWSER is not None
    done = subprocess.run(
        [
            BROWSER,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={folder / 'profile'}",
            f"--blink-settings=preferredColorScheme={scheme}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            wrapper.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    measured: dict[str, Any] = json.loads(html.unescape(found[1]))
    return measured


def luminance(color: str) -> float:
    """WCAG's relative luminance of `rgb(r, g, b)`."""
    channels = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(colors: list[str]) -> float:
    lower, higher = sorted(map(luminance, colors))
    return (higher + 0.05) / (lower + 0.05)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    run = {"training": write_run(folder), "figures": write_figures(folder, whole=True)}
    run_report(ReportSpec(), run, Location.parse(folder / "one"))
    runs = {f"runs.{i}": one for i, one in enumerate(write_evaluations(folder, 3))}
    run_report(ReportSpec(paper="ptb"), runs, Location.parse(folder / "several"))
    studies, _, _ = of_two(folder)
    found = {name: folder / name / "report.html" for name in ("one", "several")}
    return found | {"studies": studies / "report.html"}


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize(
    ("width", "scheme"), [(PHONE, LIGHT), (PHONE, DARK), (DESKTOP, LIGHT), (DESKTOP, DARK)]
)
def test_page_fits_and_reads(
    pages: dict[str, Path], tmp_path: Path, name: str, width: int, scheme: int
) -> None:
    seen = look(pages[name], width, scheme, tmp_path)
    assert seen["needed"] <= seen["width"] <= width
    assert seen["outside"] == []
    assert (luminance(seen["background"]) < 0.1) == (scheme == DARK)
    assert min(map(contrast, seen["texts"])) >= 4.5  # WCAG AA
    assert seen["smallest"] >= 12
    assert seen["plotText"] >= 8
    assert min(seen["plots"]) > 80
    assert set(seen["sections"]) >= SECTIONS[name]

from __future__ import annotations

import json
import re
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from pipeline.artifact import Artifact
from pipeline.errors import UserError
from pipeline.report.page import MAX_POINTS, thin
from pipeline.report.plots import curve_panel, layer_color, layers_panel
from pipeline.report.render import escaped_markdown
from pipeline.specs import ReportSpec
from pipeline.stages.report import run_report
from pipeline.storage import Location

TRICKY = '<script>alert("x")</script> & <img src=http://evil.example/a.png> **bold** | pipe'
RUN = "ab" * 32
SECTIONS = {
    "figures",
    "training",
    "latents",
    "samples",
    "reconstructions",
    "throughput",
    "data",
    "config",
    "versions",
}
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """What stands in an HTML page: ids, references, texts; and that its tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.references.append(str(value))
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def row(step: int, kind: str) -> dict[str, Any]:
    kl = [1.0 + 1 / step, 0.5]
    return {
        "kind": kind,
        "step": step,
        "epoch": 0,
        "loss": 90 / step,
        "reconstruction_nll": 80 / step,
        "kl": sum(kl),
        "kl_per_layer": kl,
        "negative_elbo": 80 / step + sum(kl),
        "beta": 0.5,
        "learning_rate": 1e-3,
        "tokens_per_s": 1000.0 + step,
        "step_s": 0.5,
        "data_wait_s": 0.01,
    }


def write_run(folder: Path, rows: int = 12) -> Location:
    run = Location.parse(folder / "run")
    lines = [row(step, "train") for step in range(1, rows + 1)]
    lines += [row(step, "valid") for step in range(4, rows + 1, 4)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_bytes(text.encode())
    data = Location.parse(folder / "data")
    split = {"documents": 1234, "tokens": 9, "words": 8, "max_length": 7, "parts": []}
    (data / "manifest.json").write_json(
        {
            "splits": {"train": split},
            "tokenizer": {"kind": "bpe", "vocab_size": 300},
            "rejected": {"invalid UTF-8": 3},
            "blank": 2,
            "inputs": [{"path": "a.txt"}],
        }
    )
    Artifact(
        run,
        "train",
        RUN,
        {"model": {"size": "tiny", "latent_layers": None}, "train": {"note": TRICKY}},
        {"dataset": "cd" * 32},
        "done",
        "2026-01-02T03:04:05+00:00",
        took_s=75.0,
        versions={"torch": "1.2.3"},
        figures={"num_parameters": 1_234_567},
        input_folders={"dataset": str(data)},
    ).save()
    return run


FIGURES: dict[str, Any] = {
    "reconstruction_nll": 38.7712,
    "kl": 1.5,
    "negative_elbo": 40.2712,
    "iw_nll": 39.5,
    "ppl_token": 12.25,
    "ppl_word": None,
    "ppl_token_elbo": 13.5,
    "kl_per_layer": [1.0, 0.5],
    "active_units": {"0.01": [3, 1], "0.2": [2, 0]},
    "latent_size": 5,
    "iw_samples": 20,
    "num_documents": 100,
    "num_tokens": 1500,
    "num_words": 0,
    "standard_errors": {"reconstruction_nll": 0.2134, "kl": 0.01, "kl_per_layer": [0.1, 0.1]},
    "samples": [TRICKY, "", "a plain sentence"],
    "reconstructions": [{"source": TRICKY, "reconstruction": "the dog"}],
}
_OF_TEXTS = {
    "bleu": 21.5,
    "self_bleu": 30.25,
    "distinct_1": 0.4,
    "divergence_2": 0.31,
    "standard_errors": {"bleu": 1.25, "self_bleu": 2.0, "distinct_1": None, "divergence_2": None},
}
_PROBED = {"token_kl": 0.25, "token_kl_error": 0.02, "logit_change": 0.5, "nll": 1.0}
_REBUILT = {"bleu": 50.0, "exact_match": 0.125, "edit_distance": 0.5}
# What an evaluation with all its measurements has beside these.
WHOLE: dict[str, Any] = FIGURES | {
    "elbo_gap": 0.77,
    "mutual_information": 1.25,
    "aggregate_posterior": {"log_documents": 4.6, "saturated": False, "sentence": "Beware <MI>."},
    "kl_per_dimension": [[0.2] * 5, [0.1] * 5],
    "posterior_mean_variance": [[0.5, 0.3, 0.02, 0.001, 0.0], [0.05, 0.001, 0.0, 0.0, 0.0]],
    "iw_curve": {
        "num_documents": 50,
        "negative_elbo": 40.0,
        "points": [
            {"samples": k, "iw_nll": 40 - k / 500, "error": 0.5, "gap": k / 500, "gap_error": 0.01}
            for k in (1, 10, 100, 1000)
        ],
    },
    "probe": {"num_documents": 9, "layers": [_PROBED, _PROBED], "all_layers": _PROBED},
    "projection": {
        "points": [[0.1 * i, (-1) ** i * 0.2 * i, 5 + i % 7] for i in range(60)],
        "shares": [0.6, 0.2],
    },
    "paper_convention": {
        "kl": 0.75,
        "negative_elbo": 39.5,
        "ppl": 11.5,
        "standard_errors": {"kl": 0.01, "negative_elbo": 0.2, "ppl": 0.3},
        "sentence": "These are no bounds.",
    },
    "generation": {
        "num_samples": 50,
        "num_references": 50,
        "samples": _OF_TEXTS,
        "real": _OF_TEXTS,
    },
    "reconstruction": {
        "num_documents": 60,
        **_REBUILT,
        "standard_errors": dict.fromkeys(_REBUILT, 0.03),
    },
    "interpolations": [
        {"from": TRICKY, "to": "the end", "texts": [f"{TRICKY} {i}" for i in range(7)]}
    ],
}


def write_figures(
    folder: Path, weights: str = RUN, *, whole: bool = False, **values: Any
) -> Location:
    figures = WHOLE if whole else FIGURES
    location = Location.parse(folder / "figures")
    inputs = {"weights": weights, "dataset": "cd" * 32}
    started = "2026-01-02T05:00:00+00:00"
    record = Artifact(location, "evaluate", "ef" * 32, {"split": "test"}, inputs, "done", started)
    Artifact(**{**record.__dict__, "figures": figures | values}).save()
    return location


def report(inputs: dict[str, Location], output: Path) -> tuple[dict[str, Any], Page, str, Any]:
    figures = run_report(ReportSpec(title="Run <1>"), inputs, Location.parse(output))
    html = (output / "report.html").read_text()
    page = Page(html)
    assert not page.open
    return (
        figures,
        page,
        (output / "report.md").read_text(),
        json.loads((output / "report.json").read_text()),
    )


@pytest.fixture
def made(tmp_path: Path) -> tuple[dict[str, Any], Page, str, Any]:
    inputs = {"training": write_run(tmp_path), "figures": write_figures(tmp_path)}
    return report(inputs, tmp_path / "out")


def test_page_refers_to_nothing_outside_of_it(made: Any, tmp_path: Path) -> None:
    _, page, _, _ = made
    assert page.references
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert "@import" not in (tmp_path / "out" / "report.html").read_text()


def test_page_has_all_sections_and_plots_with_ids_of_their_own(made: Any) -> None:
    _, page, _, _ = made
    assert set(page.ids) >= SECTIONS
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == 10


def test_texts_are_shown_as_they_are(made: Any) -> None:
    _, page, _, _ = made
    texts = "".join(page.texts)
    assert texts.count(TRICKY) == 3  # sample, source, setting
    assert "Run <1>" in texts
    assert "(empty)" in texts


def test_page_shows_figures_with_errors(made: Any) -> None:
    _, page, _, content = made
    texts = " ".join(" ".join(page.texts).split())
    for shown in ("38.77 ± 0.21", "1,234,567 parameters", "1,234", "3 invalid UTF-8", "1.2.3"):
        assert shown in texts
    assert "The latents live: they carry 1.5 nats a document, and 4 of 10" in texts
    assert "2.00% of a step" in texts
    assert content["curves"]["kl"]["valid"][0] == [4.0, 1.75]
    assert content["throughput"]["median_tokens_per_s"] == 1007


def test_forms_have_the_same_content(made: Any) -> None:
    figures, _, markdown, content = made
    assert figures["headline"]["iw_nll"] == 39.5
    assert figures["collapsed"] is False
    assert content["samples"][0] == TRICKY
    assert "| Reconstruction NLL | 38.77 | 0.21 |" in markdown
    assert "<script>" not in markdown
    assert "\\<script\\>" in markdown
    assert "| 1 | 0.50 | 0.10 | 1 | 0 |" in markdown
    assert "invalid UTF-8: 3" in markdown


@pytest.mark.parametrize(
    "text",
    [
        "della, none", "train.free_bits_per", "__init__ _a_ b_", "a*b* **c**", "-0.5", "- a", "+ b",
        "12. c", "3) d", "# e", "---", "===", "`f` \\`", "[g](h) ![i](j)", "<UNK> &amp; & ~~k~~",
        " l  m",
    ],
)  # fmt: skip
def test_markdown_shows_any_text_as_it_is(text: str) -> None:
    """Read by an independent reader of Markdown: on a line of its own, and in a table's cell."""
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    shown = " ".join(text.split())
    paragraph = unescape(re.sub(r"<[^>]+>", "", reader.render(escaped_markdown(text))))
    assert paragraph.strip() == shown
    table = reader.render(f"| a |\n| --- |\n| {escaped_markdown(text)}|b |\n")
    assert f"<td>{escape(shown)}</td>" in table


def test_page_can_be_light_and_dark(made: Any, tmp_path: Path) -> None:
    html = (tmp_path / "out" / "report.html").read_text()
    assert 'name="color-scheme" content="light dark"' in html
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
    svg = curve_panel("Loss", {"train": [[1, 2.0], [2, 1.0]], "valid": [[2, 1.5]]}, "nats")
    assert not re.search(r"#0[0-9a-f]{5}\b", svg)
    assert "currentColor" in svg
    assert "font-family" not in svg


def test_collapsed_run_is_said_to_be_collapsed(tmp_path: Path) -> None:
    figures = write_figures(tmp_path, kl=0.01)
    inputs = {"training": write_run(tmp_path), "figures": figures}
    summary, page, _, _ = report(inputs, tmp_path / "out")
    assert summary["collapsed"] is True
    assert "The latents are collapsed" in "".join(page.texts)


def test_run_without_evaluation_shows_its_last_validation(tmp_path: Path) -> None:
    figures, page, markdown, _ = report({"training": write_run(tmp_path)}, tmp_path / "out")
    texts = " ".join(" ".join(page.texts).split())
    assert "was not evaluated" in texts
    assert "−ELBO, valid" in texts
    assert figures["collapsed"] is None
    assert set(page.ids) >= SECTIONS
    assert "was not evaluated" in markdown


def test_run_without_rows_or_data_makes_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path, rows=0)
    (Location.parse(tmp_path / "data") / "manifest.json").delete()
    _, page, _, _ = report({"training": run}, tmp_path / "out")
    assert "left no records" in "".join(page.texts)
    assert "cannot be reached" in "".join(page.texts)


def test_evaluation_of_other_weights_is_refused(tmp_path: Path) -> None:
    inputs = {"training": write_run(tmp_path), "figures": write_figures(tmp_path, "99" * 32)}
    with pytest.raises(UserError, match="evaluation of other weights"):
        run_report(ReportSpec(), inputs, Location.parse(tmp_path / "out"))


def test_artifact_of_another_stage_is_refused(tmp_path: Path) -> None:
    figures = write_figures(tmp_path)
    with pytest.raises(UserError, match="artifact of the stage evaluate: expected one of train"):
        run_report(ReportSpec(), {"training": figures}, Location.parse(tmp_path / "out"))


def test_damaged_metrics_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "metrics.jsonl").write_bytes(b'{"kind": "train"\n{}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl should hold a JSON object a line"):
        run_report(ReportSpec(), {"training": run}, Location.parse(tmp_path / "out"))


def test_thinned_curve_keeps_its_mean() -> None:
    points = [[float(step), step * 2.0] for step in range(960)]
    thinned = thin(points)
    assert len(thinned) == MAX_POINTS
    assert sum(y for _, y in thinned) / len(thinned) == pytest.approx(959)
    assert thin(points[:5]) == points[:5]


@pytest.mark.parametrize("num_layers", [1, 2, 12, 48])
def test_layers_of_any_number_are_drawn(num_layers: int) -> None:
    colors = [layer_color(layer, num_layers) for layer in range(num_layers)]
    assert len(set(colors)) == num_layers
    curves = [[[1.0, 2.0], [2.0, 1.0 + layer]] for layer in range(num_layers)]
    svg = layers_panel("KL", curves, "nats")
    assert svg.count("layer ") == (0 if num_layers == 1 else min(num_layers, 4))


def test_whole_evaluation_is_shown(tmp_path: Path) -> None:
    inputs = {"training": write_run(tmp_path), "figures": write_figures(tmp_path, whole=True)}
    _, page, markdown, content = report(inputs, tmp_path / "out")
    assert set(page.ids) >= {*SECTIONS, "interpolations"}
    assert page.tags.count("svg") == 14
    assert page.tags.count("circle") >= 60
    texts = " ".join(" ".join(page.texts).split())
    for shown in ("Beware <MI>.", "21.5 ± 1.2", "real documents", "In the paper's convention"):
        assert shown in texts
    assert "layer 0, dimension 1: 0.3" in texts  # what a cell of the heat map tells
    assert texts.count(TRICKY) == 3 + 1 + 7
    for row in ("| 1,000 | 38.00 | 0.50 | 2.000 | 0.010 |", "| Self-BLEU | 30.25 | 30.25 |"):
        assert row in markdown
    assert "| all | 0.250 | 0.020 | 0.5 |" in markdown
    assert content["projection"]["shares"] == [0.6, 0.2]
    assert all(reference.startswith("#") for reference in page.references)


def test_answers_are_shown_in_every_form(tmp_path: Path) -> None:
    answers = [{"source": TRICKY, "reference": "the end", "texts": ["an answer", ""]}]
    responses = {"num_sources": 5, "per_source": 2, "bleu": 12.5, "standard_errors": {"bleu": 1.5}}
    figures = write_figures(tmp_path, whole=True, answers=answers, responses=responses)
    inputs = {"training": write_run(tmp_path), "figures": figures}
    _, page, markdown, content = report(inputs, tmp_path / "out")
    assert "answers" in page.ids
    texts = " ".join(" ".join(page.texts).split())
    assert "2 texts for each of 5 sources" in texts
    for part in ("## For sources", "2 texts for each of 5 sources", "12.5", "1. an answer",
                 "2. (empty)", "60.0% and 20.0% of their variance"):  # fmt: skip
        assert part in markdown
    assert content["answers"] == answers


def test_page_links_to_its_sections(made: Any) -> None:
    _, page, _, _ = made
    linked = {reference[1:] for reference in page.references if reference[1:] in SECTIONS}
    assert linked == SECTIONS

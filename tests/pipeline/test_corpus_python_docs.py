"""The corpus that every machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.corpora import python_docs


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("Return :class:`int` or :func:`the sum <sum>`.", "Return int or the sum."),
        ("* Use ``x`` and *very* **bold** `names`_ [1].", "Use x and very bold names."),
        ('The "len()" of  two   spaces.', 'The "len()" of two spaces.'),
    ],
)
def test_clean_takes_markup_out(raw: str, expected: str) -> None:
    assert python_docs.clean(raw) == expected


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Return the number of items in a container.", True),
        ("The file must be opened before it's read (see below).", True),
        ("Too short here.", False),
        ("x = compute(a, b) and then some more words follow.", False),
        ("no capital at the beginning of this line.", False),
        ("This one has no end mark", False),
        ("Call a1b2 c3d4 e5f6 g7h8 now.", False),
        ("Word " * 61 + "end.", False),
    ],
)
def test_is_prose_keeps_sentences(sentence: str, expected: bool) -> None:
    assert python_docs.is_prose(sentence) is expected


@pytest.mark.slow
def test_python_docs_are_many_distinct_sentences_and_the_same_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(python_docs, "scratch_folder", lambda: tmp_path)
    file = python_docs.text_file()
    first = file.read_bytes()
    file.unlink()
    assert python_docs.text_file().read_bytes() == first
    sentences = first.decode().splitlines()
    assert len(sentences) > 5_000
    assert len(set(sentences)) == len(sentences)
    assert all(map(python_docs.is_prose, sentences))

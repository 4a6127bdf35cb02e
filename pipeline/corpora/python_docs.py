"""A corpus that every machine has: the English prose of Python's own documentation.

Sentences of the language reference's topics (`pydoc_data.topics`) and of docstrings in the
standard library, read from source without importing it. The same for one version of Python.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import platform
import re
import sys
import sysconfig
import textwrap
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

from pipeline.cluster import scratch_folder

MIN_WORDS, MAX_WORDS = 4, 60
_LEAST_SHARE_OF_LETTERS = 0.75
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__",
             "lib2to3", "idlelib", "turtledemo", "pydoc_data"}  # fmt: skip
_CODE = re.compile(r"[={}<>|\\@#%$^~\[\]]|://|->|\w\(\w*\)\.|^Changed in|^New in|^Copyright")
_ABBREVIATIONS = ("e.g.", "i.e.", "etc.", "cf.", "vs.", "resp.", "approx.", "Mr.", "Dr.", "St.")


def text_file() -> Path:
    """The corpus as a file, a sentence a line; built once for a version of Python."""
    recipe = hashlib.sha256(inspect.getsource(sys.modules[__name__]).encode()).hexdigest()[:12]
    name = f"python-docs-{platform.python_version()}-{recipe}.txt"
    file = scratch_folder() / name
    if not file.is_file():
        partial = file.with_suffix(f".{uuid.uuid4().hex[:8]}.tmp")
        partial.write_text("\n".join(sentences()) + "\n", encoding="utf-8")
        partial.replace(file)
    return file


def sentences() -> list[str]:
    """All sentences of prose, without repetitions, in a stable order."""
    found: dict[str, None] = {}
    for text in _texts():
        for paragraph in _paragraphs(text):
            for sentence in _split(paragraph):
                if is_prose(sentence):
                    found.setdefault(sentence)
    return list(found)


def _texts() -> Iterator[str]:
    from pydoc_data.topics import topics  # type: ignore[import-not-found, unused-ignore]

    for name in sorted(topics):
        yield topics[name]
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if _LEFT_OUT.isdisjoint(file.relative_to(root).parts):
            yield from _docstrings(file)


def _docstrings(file: Path) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in sources are not ours to mend
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return  # templates and samples of broken code
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def _paragraphs(text: str) -> Iterator[str]:
    """Blocks of running text; code, tables and lists of options are indented or marked."""
    for block in re.split(r"\n\s*\n", textwrap.dedent(text)):
        lines = block.strip("\n").splitlines()
        if not lines or any(re.search(r">>>|::=|^\s*[-=~^*+|]{3,}|\s{3,}\S", li.strip())
                            for li in lines):  # fmt: skip
            continue
        yield clean(" ".join(line.strip() for line in lines))


def clean(text: str) -> str:
    """Take the markup out of reStructuredText as pydoc shows it."""
    text = re.sub(r"^(?:[*\-•+]|\d+\.|\(\w\)|\[\w+\])\s+", "", text)
    text = re.sub(r":[a-z:]+:`([^`<]*)(?:<[^>]*>)?`", r"\1", text)  # :func:`name`
    text = re.sub(r"`+([^`]*)`+_*", r"\1", text)
    text = re.sub(r"\*\*([^*]+)\*\*", r"\1", text)
    text = re.sub(r"(?<!\w)\*([^*\s][^*]*)\*(?!\w)", r"\1", text)
    text = re.sub(r"(?<!\w)_([^_\s]+)_(?!\w)", r"\1", text)
    text = re.sub(r"\[\d+\]", "", text).replace("::", ":").replace('""', '"')
    return re.sub(r"\s+([.,;:!?](?:\s|$))", r"\1", re.sub(r"\s+", " ", text)).strip()


def _split(paragraph: str) -> Iterator[str]:
    start = 0
    for match in re.finditer(r"[.!?][\"')]*\s+(?=[A-Z\"'(])", paragraph):
        candidate = paragraph[start : match.end()].strip()
        if candidate.endswith(_ABBREVIATIONS):
            continue
        yield candidate
        start = match.end()
    yield paragraph[start:].strip()


def is_prose(sentence: str) -> bool:
    """Whether this is a sentence in English words, not code or a heading."""
    words = sentence.split()
    if not MIN_WORDS <= len(words) <= MAX_WORDS or not sentence.isprintable():
        return False
    if not sentence[0].isupper() or sentence.rstrip("\"')")[-1:] not in (".", "!", "?"):
        return False
    if _CODE.search(sentence):
        return False
    letters = sum(character.isalpha() or character == " " for character in sentence)
    plain = sum(bool(re.fullmatch(r"[\"'(]*[A-Za-z][a-z'\-]*[\"').,;:!?]*", w)) for w in words)
    return letters >= _LEAST_SHARE_OF_LETTERS * len(sentence) and plain >= 0.75 * len(words)

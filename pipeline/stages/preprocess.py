"""The preprocess stage: a corpus into tokenised Parquet shards, by Ray Data.

Each unit of work is written by one actor, and leaves a record when it is finished. The manifest,
written last, commits the dataset; an interrupted run goes on from the records that it finds.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict
from itertools import compress
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.artifact import digest, versions
from pipeline.cluster import connected, require_shared_storage
from pipeline.corpora import CorpusIndex, Unit, index_corpus
from pipeline.corpora.commit import clear_leftovers, commit, figures_of, print_table
from pipeline.corpora.index import local_source, relocated
from pipeline.corpora.reading import read_unit
from pipeline.corpora.tally import Tally
from pipeline.corpora.units import Limits
from pipeline.corpora.writing import (
    REJECTED,
    UNITS,
    HashSplit,
    Recipe,
    UnitRecord,
    document_id,
    one_arrow_thread,
    process_unit,
)
from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.shards import MANIFEST, Dataset
from pipeline.specs import CorpusSpec, PreprocessSpec, TokenizerSpec
from pipeline.storage import Location
from pipeline.tokenization import (
    fingerprint_tokenizer,
    load_gpt2,
    load_hf,
    load_tokenizer,
    special_ids,
    train_bpe,
    vocabulary_size,
)

_SOURCE = "source"  # a generated corpus, copied to where all nodes can read it
_CHATTY = ("ray.data", "ray.data._internal.progress")
_THREADS = 16  # for many small files
_UNITS_IN_FLIGHT = 4  # units that an actor has, those that wait included


def run_preprocess(
    spec: PreprocessSpec, inputs: dict[str, Location], output: Location
) -> dict[str, Any]:
    """Write the dataset into `output`; return its figures.

    Figures: per split `documents`, `tokens`, `words` and `max_length` (tokens); `rejected` by
    reason, `blank` lines; `rows_per_s` and `tokens_per_s` over the shards made by this call, None
    when all were there.

    Raises:
        UserError: if the corpus or the tokenizer cannot be read, too much of it is rejected, a
            split is left without documents, or the storage is not shared by all nodes.
    """
    del inputs  # nothing but raw files, which the spec names
    console = Console()
    if (output / MANIFEST).is_file():
        manifest = Dataset.open(output).manifest
        clear_leftovers(manifest, output)  # if the run that wrote it ended right after
        return figures_of(manifest, None, None)
    index = index_corpus(spec.corpus, spec.shard_bytes)
    _say_what_is_left_out(console, index)
    with connected(spec.cluster):
        require_shared_storage(output)
        index = _within_reach(spec.corpus, index, output)
        recipe, about_tokenizer = recipe_of(spec, index, output, console)
        records, rates = _write_shards(spec, index, recipe, console)
    manifest = commit(index, recipe, about_tokenizer, records)
    print_table(console, manifest)
    return figures_of(manifest, *rates)


def _say_what_is_left_out(console: Console, index: CorpusIndex) -> None:
    if index.skipped:
        names = ", ".join(index.skipped[:5]) + (", …" if len(index.skipped) > 5 else "")
        console.print(f"left out, by name: {names}", markup=False, highlight=False)
    trained = {file.sha256 for file in index.files if file.split == "train"}
    for file in index.files:
        if file.split not in ("train", None) and file.sha256 in trained:
            console.print(
                f"note: {file.split}'s {file.name} is also a file of train, so figures on "
                f"{file.split} will say nothing about unseen text",
                markup=False, highlight=False,
            )  # fmt: skip


def _within_reach(corpus: CorpusSpec, index: CorpusIndex, output: Location) -> CorpusIndex:
    """Copy a corpus that was generated on this machine to where every node can read it."""
    if corpus.kind != "python_docs":
        return index
    source = local_source(index)
    target = output / _SOURCE / source.name
    target.write_bytes(source.read_bytes())
    return relocated(index, target)


def recipe_of(
    spec: PreprocessSpec, index: CorpusIndex, output: Location, console: Console
) -> tuple[Recipe, dict[str, Any]]:
    """Settle what turns units into shards, and what the manifest says of the tokenizer.

    Raises:
        UserError: if the tokenizer cannot be loaded, or there is nothing to train it on.
    """
    corpus = spec.corpus
    limits = Limits(corpus.text_field, corpus.max_document_bytes, corpus.source_field)
    shares = HashSplit(corpus.valid_fraction, corpus.test_fraction) if index.by_hash else None
    tokenizer = _tokenizer(spec.tokenizer, index, limits, shares, output / "tokenizer", console)
    special, fingerprint = special_ids(tokenizer), fingerprint_tokenizer(tokenizer)
    recipe = Recipe(
        output=output,
        tokenizer=output / "tokenizer" / "tokenizer.json",
        tokenizer_fingerprint=fingerprint,
        special=special,
        limits=limits,
        max_tokens=corpus.max_tokens,
        max_source_tokens=corpus.max_source_tokens,
        hash_split=shares,
        versions={k: v for k, v in versions().items() if k in ("python", "tokenizers", "pyarrow")},
    )
    return recipe, {
        "fingerprint": fingerprint,
        "kind": spec.tokenizer.kind,
        "vocab_size": vocabulary_size(tokenizer),
        "bos_id": special.bos,
        "eos_id": special.eos,
        "pad_id": special.pad,
    }


def _tokenizer(
    spec: TokenizerSpec,
    index: CorpusIndex,
    limits: Limits,
    shares: HashSplit | None,
    folder: Location,
    console: Console,
) -> Any:
    """Load or train the tokenizer, and save it; one trained before by a run cut short is kept."""
    marker = folder.parent / UNITS / "tokenizer.json"
    made_by = versions().get("tokenizers", "")
    wanted = digest({"kind": spec.kind, "special": spec.special_tokens, "versions": made_by})
    if (kept := _kept_tokenizer(marker, wanted, folder)) is not None:
        return kept
    if spec.kind == "gpt2":
        tokenizer = load_gpt2(Location.parse(str(spec.path)), spec.special_tokens)
    elif spec.kind == "hf":
        tokenizer = load_hf(str(spec.path), spec.special_tokens, spec.trust_remote_code)
    else:
        assert spec.vocab_size is not None
        texts = _training_texts(index, limits, shares, console)
        tokenizer = train_bpe(texts, spec.vocab_size)
        if vocabulary_size(tokenizer) < spec.vocab_size:
            console.print(
                f"note: the training split has pairs for {vocabulary_size(tokenizer):,} tokens "
                f"only; tokenizer.vocab_size={spec.vocab_size} was asked for", highlight=False,
            )  # fmt: skip
    _save(tokenizer, folder)
    marker.write_json({"key": wanted, "fingerprint": fingerprint_tokenizer(tokenizer)})
    return tokenizer


def _kept_tokenizer(marker: Location, wanted: str, folder: Location) -> Any | None:
    """The tokenizer that a run cut short has made, if it is the one wanted and whole."""
    try:
        made = marker.read_json() if marker.is_file() else {}
        if made.get("key") != wanted:
            return None
        kept = load_tokenizer(folder)
    except UserError:  # damaged since: it is made again
        return None
    return kept if fingerprint_tokenizer(kept) == made["fingerprint"] else None


def _save(tokenizer: Any, folder: Location) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for file in Path(scratch).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())


def _training_texts(
    index: CorpusIndex, limits: Limits, shares: HashSplit | None, console: Console
) -> Iterator[list[str]]:
    """The training split's documents, streamed in order; what is rejected is met again later."""
    units = [unit for unit in index.units if unit.split in (None, "train")]
    done = documents = 0
    with Progress("train tokenizer", sum(u.bytes for u in units), "bytes", console) as progress:
        for unit in units:
            for batch in read_unit(unit, limits):
                # Of conditional data, a pair goes where the hash of its source says.
                keys = batch.texts if batch.sources is None else batch.sources
                chosen = [shares is None or shares.of(document_id(key)) == "train" for key in keys]
                texts = list(compress(batch.texts, chosen))
                documents += len(texts)
                yield texts + list(compress(batch.sources or (), chosen))
            done += unit.bytes
            progress.update(done, documents=documents)


def _write_shards(
    spec: PreprocessSpec, index: CorpusIndex, recipe: Recipe, console: Console
) -> tuple[list[UnitRecord], tuple[float | None, float | None]]:
    """Have all units written; return their records, and rows/s and tokens/s of this call."""
    finished = _finished_units(index.units, recipe)
    tally = Tally(index.units, spec.corpus.max_rejected)
    for record in finished.values():
        tally.add(record)
    resumed_bytes = tally.bytes_done
    if finished:
        console.print(f"{len(finished)} of {len(index.units)} shards are there", highlight=False)
    todo = [unit for unit in index.units if unit.number not in finished]
    before = (tally.documents, tally.tokens)
    started = time.monotonic()
    with (
        Progress("tokenise", index.bytes, "bytes", console) as progress,
        closing(_tokenised(todo, recipe)) as finishing,
    ):
        if resumed_bytes:
            progress.update(resumed_bytes, resumed=resumed_bytes)
        for record in finishing:
            tally.add(record)
            took = max(time.monotonic() - started, 1e-9)
            rates = ((tally.documents - before[0]) / took, (tally.tokens - before[1]) / took)
            progress.update(
                tally.bytes_done,
                resumed=resumed_bytes,
                **{"rows/s": rates[0], "tokens/s": rates[1], "rejected": tally.num_rejected},
            )
            tally.refuse_too_many_rejected(recipe.output / REJECTED)
    tally.refuse_too_many_rejected(recipe.output / REJECTED)
    tally.refuse_empty_split(index)
    records = sorted(tally.records, key=lambda record: record.number)
    return records, (rates[0], rates[1]) if todo else (None, None)


def _tokenised(units: list[Unit], recipe: Recipe) -> Generator[UnitRecord]:
    """The records of units as Ray Data's actors finish them, in any order.

    Only the records travel: the actors write the shards themselves.

    Raises:
        UserError: the first that an actor met.
    """
    import ray
    import ray.data

    if not units:
        return
    cpus = int(ray.cluster_resources().get("CPU", 1))
    # Actors rather than tasks: with units waiting at each, none is idle while the driver looks.
    pool = ray.data.ActorPoolStrategy(
        size=max(1, min(cpus, len(units))), max_tasks_in_flight_per_actor=_UNITS_IN_FLIGHT
    )
    with _quiet_ray_data():
        # One block a unit, so that each is a call of its own.
        dataset = ray.data.from_items(
            [{"unit": number} for number in range(len(units))], override_num_blocks=len(units)
        ).map(_UnitWriter, fn_constructor_args=(ray.put(units), recipe), compute=pool, num_cpus=1)
        # Closing the iterator stops the units that still wait, when we stop early.
        with closing(iter(dataset.iter_batches(batch_size=None, prefetch_batches=0))) as batches:
            for rows in batches:
                for answer in map(json.loads, rows["answer"]):
                    if "error" in answer:
                        raise UserError(answer["error"])
                    yield UnitRecord(**answer)


class _UnitWriter:
    """Writes units, one after another, in an actor."""

    def __init__(self, units: Any, recipe: Recipe) -> None:
        import ray

        self._units: list[Unit] = ray.get(units)
        self._recipe = recipe

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """One unit's record. The answer is text: its form differs from row to row."""
        unit = self._units[int(row["unit"])]
        try:
            with one_arrow_thread():
                answer = asdict(process_unit(unit, self._recipe))
        except UserError as error:  # as a value, so that Ray neither logs nor retries it
            answer = {"error": error.message}
        return {"answer": json.dumps(answer)}


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """Keep Ray Data's own progress and plan off the screen: the stage shows progress itself."""
    from ray.data import DataContext

    context = DataContext.get_current()
    bars = context.enable_progress_bars
    context.enable_progress_bars = False
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _finished_units(units: list[Unit], recipe: Recipe) -> dict[int, UnitRecord]:
    """Records of an earlier attempt whose work is the same and whose parts are whole.

    By their checksums: a power cut may leave a file of the right size with other content, and
    reading a part costs far less than making it.
    """
    by_number = {unit.number: unit for unit in units}
    files = [f for f in (recipe.output / UNITS).children() if f.name[:-5].isdigit()]
    with ThreadPoolExecutor(_THREADS) as pool:
        records = [record for record in pool.map(_record_in, files) if record is not None]

    def is_whole(record: UnitRecord) -> bool:
        unit = by_number.get(record.number)
        return (
            unit is not None
            and record.key == recipe.key(unit)
            and all(_is_whole(recipe.output / part["file"], part) for part in record.parts.values())
            and (record.rejected_file is None or (recipe.output / record.rejected_file).is_file())
        )

    with ThreadPoolExecutor(_THREADS) as pool:
        whole = list(pool.map(is_whole, records))
    return {r.number: r for r, good in zip(records, whole, strict=True) if good}


def _record_in(file: Location) -> UnitRecord | None:
    """A unit's record; None where it was damaged: the unit is done again."""
    try:
        return UnitRecord(**file.read_json())
    except (UserError, TypeError):
        return None


def _is_whole(file: Location, part: dict[str, Any]) -> bool:
    return bool(file.info().size == part["bytes"] and file.sha256() == part["sha256"])

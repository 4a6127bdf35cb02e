"""What a spec names outside of any artifact, by content: raw files, a tokenizer, a backbone.

Light to import: a plan of many stages asks for these, and must not load torch for it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.artifact import digest
from pipeline.specs import EvaluateSpec, PreprocessSpec, Spec, TrainSpec, TuneSpec
from pipeline.storage import Location

# Settings of an evaluation that name a further model, which judges texts.
_JUDGES = ("reference_model", "mauve_model", "bertscore_model")
_CONTENT = (".safetensors", ".bin", ".json", ".txt", ".py")


@dataclass(frozen=True)
class External:
    """One such input: its fingerprint, and the files that it comes from."""

    fingerprint: str
    files: dict[str, str] = field(default_factory=dict)  # name -> sha256 of the content


def external_inputs(spec: Spec) -> dict[str, External]:
    """The external inputs of a stage's spec, by name; without Ray.

    Raises:
        UserError: if a file is missing, empty or damaged.
    """
    if isinstance(spec, PreprocessSpec):
        return _corpus_and_tokenizer(spec)
    if isinstance(spec, TuneSpec):
        return _backbone(spec.trial.model.backbone)
    if isinstance(spec, TrainSpec):
        return _backbone(spec.model.backbone)
    if isinstance(spec, EvaluateSpec):
        return _judges(spec)
    return {}


def fingerprints(spec: Spec) -> dict[str, str]:
    """The fingerprints alone."""
    return {name: external.fingerprint for name, external in external_inputs(spec).items()}


def _corpus_and_tokenizer(spec: PreprocessSpec) -> dict[str, External]:
    from pipeline.corpora import index_corpus
    from pipeline.tokenization import fingerprint_source

    index = index_corpus(spec.corpus, spec.shard_bytes)
    only = len(index.fingerprints) == 1
    found = {
        name: External(
            fingerprint,
            {
                file.name: file.sha256
                for file in index.files
                if only or f"corpus.{file.split}" == name
            },
        )
        for name, fingerprint in index.fingerprints.items()
    }
    if spec.tokenizer.path is not None:
        found["tokenizer"] = External(fingerprint_source(spec.tokenizer))
    return found


def _backbone(name: str | None) -> dict[str, External]:
    """A pretrained backbone: by its files, or by its hub id."""
    if name is None:
        return {}
    folder = Location.parse(name)
    if folder.is_local and not folder.exists():
        return {"backbone": External(digest({"hub_id": name}))}
    files = {
        file.name: _sha256(file)
        for file in folder.children()
        if file.is_file() and file.name.endswith(_CONTENT)
    }
    return {"backbone": External(digest(files), files)}


def _judges(spec: EvaluateSpec) -> dict[str, External]:
    from pipeline.weights import fingerprint_weights

    folders = {name: getattr(spec.evaluate, name) for name in _JUDGES}
    return {
        name: External(fingerprint_weights(Location.parse(folder)))
        for name, folder in folders.items()
        if folder is not None
    }


_seen: dict[tuple[str, int, int], str] = {}


def _sha256(file: Location) -> str:
    """Checksum of a file, computed once as long as it does not change."""
    info = file.info()
    key = (str(file), info.size, info.mtime_ns or 0)
    if key not in _seen:
        _seen[key] = file.sha256()
    return _seen[key]

"""Raw corpora: finding their files, cutting them into units of work, reading documents."""

from pipeline.corpora.index import CorpusIndex, index_corpus
from pipeline.corpora.units import HubSlice, InputFile, Unit

__all__ = ["CorpusIndex", "HubSlice", "InputFile", "Unit", "index_corpus"]

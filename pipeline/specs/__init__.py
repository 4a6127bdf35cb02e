"""The typed specs of all stages; importing them starts neither Ray nor torch."""

from pipeline.specs.base import NotIdentity, Spec
from pipeline.specs.cluster import ClusterSpec
from pipeline.specs.evaluate import EvaluateSpec, EvaluationSpec
from pipeline.specs.preprocess import CorpusSpec, PreprocessSpec, TokenizerSpec
from pipeline.specs.report import ReportSpec
from pipeline.specs.train import (
    BetaSpec,
    DeepSpeedSpec,
    ModelSpec,
    OptimizationSpec,
    TrainSpec,
)
from pipeline.specs.tune import Range, SearchSpec, TuneSpec

__all__ = [
    "BetaSpec",
    "ClusterSpec",
    "CorpusSpec",
    "DeepSpeedSpec",
    "EvaluateSpec",
    "EvaluationSpec",
    "ModelSpec",
    "NotIdentity",
    "OptimizationSpec",
    "PreprocessSpec",
    "Range",
    "ReportSpec",
    "SearchSpec",
    "Spec",
    "TokenizerSpec",
    "TrainSpec",
    "TuneSpec",
]

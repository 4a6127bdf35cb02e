"""DELLA, a variational Transformer for text with a latent in every layer.

Hu, Yi, Li, Sun, Xie: "Fuse It More Deeply! A Variational Transformer with Layer-Wise Latent
Variable Inference for Text Generation", NAACL 2022, arXiv 2207.06130. `docs/model.md` maps its
equations to the functions here.
"""

from della_model.aggregate import log_aggregate_posterior
from della_model.condition import Condition, Reading
from della_model.config import LATENTS, DellaConfig
from della_model.errors import ConfigError, InputError
from della_model.estimators import (
    ImportanceSamples,
    importance_samples,
    iw_log_weights,
    iw_nll,
    iw_nll_of_weights,
)
from della_model.fusion import FUSIONS, Fusion, LowRankTensorFusion
from della_model.gaussian import DiagonalGaussian
from della_model.latents import LatentChain, LatentSample
from della_model.model import Della
from della_model.objective import Objective
from della_model.outputs import DellaOutput, ElboTerms
from della_model.probe import SwapEffect, swap_effect
from della_model.schedules import BetaSchedule, LearningRateSchedule
from della_model.sizes import SIZES, backbone_config, gpt2_config
from della_model.texts import EncodedTexts

__all__ = [
    "FUSIONS",
    "LATENTS",
    "SIZES",
    "BetaSchedule",
    "Condition",
    "ConfigError",
    "Della",
    "DellaConfig",
    "DellaOutput",
    "DiagonalGaussian",
    "ElboTerms",
    "EncodedTexts",
    "Fusion",
    "ImportanceSamples",
    "InputError",
    "LatentChain",
    "LatentSample",
    "LearningRateSchedule",
    "LowRankTensorFusion",
    "Objective",
    "Reading",
    "SwapEffect",
    "backbone_config",
    "gpt2_config",
    "importance_samples",
    "iw_log_weights",
    "iw_nll",
    "iw_nll_of_weights",
    "log_aggregate_posterior",
    "swap_effect",
]

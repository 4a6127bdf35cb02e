"""Schedules as pure functions of the optimizer step, so that a resumed run is exact.

`step` is the number of updates already made: the first update asks for `schedule(0)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from della_model.errors import ConfigError, unknown_name

BetaKind = Literal["constant", "linear", "cyclical", "logistic"]
DecayKind = Literal["constant", "linear", "cosine"]


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)


@dataclass(frozen=True)
class BetaSchedule:
    """The weight β of the KL at each step, between 0 and `value`.

    All start with `delay_steps` at 0, an autoencoder start: the decoder learns to use the latents
    before they cost anything. Then:

    - constant: `value`.
    - linear: a ramp of `warmup_steps` up to `value`.
    - logistic: the same ramp, along the middle of a logistic curve (σ from −6 to 6, stretched so
      that it starts at 0 and ends at `value`): slow, fast, slow.
    - cyclical: periods of `period_steps`; within each, its first `low_fraction` at 0, a ramp over
      the next `ramp_fraction`, then `value` to its end. After `num_cycles` periods (0: no end) it
      stays at `value`.
    """

    kind: BetaKind = "constant"
    value: float = 1.0
    delay_steps: int = 0
    warmup_steps: int = 0
    period_steps: int = 0
    low_fraction: float = 0.0
    ramp_fraction: float = 0.5
    num_cycles: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(BetaKind):
            raise ConfigError(unknown_name("beta_schedule.kind", self.kind, get_args(BetaKind)))
        _require(
            math.isfinite(self.value) and self.value >= 0,
            f"beta_schedule.value: expected a number ≥ 0, got {self.value}: a negative β would "
            "reward a KL without end; give 0 for an autoencoder, 1 for the ELBO.",
        )
        for name in ("delay_steps", "warmup_steps", "period_steps", "num_cycles"):
            _require(
                getattr(self, name) >= 0,
                f"beta_schedule.{name}: expected a whole number ≥ 0, got {getattr(self, name)}.",
            )
        _require(
            self.kind != "cyclical" or self.period_steps > 0,
            f"beta_schedule.period_steps: expected ≥ 1 for kind 'cyclical', got "
            f"{self.period_steps}: a cycle needs a length; set period_steps.",
        )
        for name in ("low_fraction", "ramp_fraction"):
            _require(
                0 <= getattr(self, name) <= 1,
                f"beta_schedule.{name}: expected a number in [0, 1], got {getattr(self, name)}: "
                "it is a share of a period.",
            )

    def __call__(self, step: int) -> float:
        """β at a step."""
        elapsed = step - self.delay_steps
        if elapsed < 0:
            return 0.0
        if self.kind == "linear":
            return self.value * _ramp(elapsed, self.warmup_steps)
        if self.kind == "logistic":
            return self.value * _logistic(_ramp(elapsed, self.warmup_steps))
        if self.kind == "cyclical" and not self._cycles_are_over(elapsed):
            rising = elapsed % self.period_steps - self.low_fraction * self.period_steps
            ramp_steps = self.ramp_fraction * self.period_steps
            return self.value * _ramp(rising, ramp_steps) if rising >= 0 else 0.0
        return self.value

    def _cycles_are_over(self, elapsed: int) -> bool:
        return self.num_cycles > 0 and elapsed >= self.num_cycles * self.period_steps


@dataclass(frozen=True)
class LearningRateSchedule:
    """A linear warm-up to `peak`, then a decay to `floor` at `total_steps`, then `floor`.

    The first step has `peak / warmup_steps`, not 0: no update is wasted.
    """

    peak: float
    warmup_steps: int = 0
    total_steps: int | None = None
    decay: DecayKind = "constant"
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.decay not in get_args(DecayKind):
            known = get_args(DecayKind)
            raise ConfigError(unknown_name("learning_rate_schedule.decay", self.decay, known))
        _require(
            math.isfinite(self.peak) and self.peak > 0,
            f"learning_rate_schedule.peak: expected a number > 0, got {self.peak}: nothing would "
            "be learnt; 1e-3 suits a small model from scratch, 5e-5 a pretrained one.",
        )
        _require(
            0 <= self.floor <= self.peak,
            f"learning_rate_schedule.floor: expected a number from 0 to peak ({self.peak}), got "
            f"{self.floor}: the rate decays from the peak down to the floor.",
        )
        _require(
            self.warmup_steps >= 0,
            f"learning_rate_schedule.warmup_steps: expected ≥ 0, got {self.warmup_steps}.",
        )
        _require(
            self.decay == "constant" or self.total_steps is not None,
            f"learning_rate_schedule.total_steps: expected a number of steps for decay "
            f"{self.decay!r}, got None: a decay needs an end; set total_steps or decay='constant'.",
        )
        _require(
            self.total_steps is None or self.total_steps >= max(1, self.warmup_steps),
            f"learning_rate_schedule.total_steps: expected ≥ 1 and ≥ warmup_steps "
            f"({self.warmup_steps}), got {self.total_steps}: the warm-up would never end; "
            "lower warmup_steps or train longer.",
        )

    def __call__(self, step: int) -> float:
        """The learning rate at a step."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.decay == "constant" or self.total_steps is None:
            return self.peak
        progress = _ramp(step - self.warmup_steps, self.total_steps - self.warmup_steps)
        remaining = 1 - progress
        if self.decay == "cosine":
            remaining = 0.5 * (1 + math.cos(math.pi * progress))
        return self.floor + (self.peak - self.floor) * remaining


def _logistic(progress: float) -> float:
    """σ from −6 to 6 while `progress` goes from 0 to 1, stretched to [0, 1]."""
    # σ(x) = ½ + ½ tanh(x/2)
    return 0.5 + 0.5 * math.tanh(6 * progress - 3) / math.tanh(3)


def _ramp(elapsed: float, length: float) -> float:
    """From 0 at `elapsed` = 0 to 1 at `length`, then 1; 1 throughout where there is no length."""
    return 1.0 if elapsed >= length else elapsed / length

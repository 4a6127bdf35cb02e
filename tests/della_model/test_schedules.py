import math

import pytest

from della_model import BetaSchedule, ConfigError, LearningRateSchedule


def values(schedule, *steps):
    return [schedule(step) for step in steps]


def test_beta_constant_is_its_value():
    assert values(BetaSchedule(value=0.3), 0, 7, 10**9) == [0.3] * 3


def test_beta_constant_delayed_starts_as_an_autoencoder():
    assert values(BetaSchedule(delay_steps=5), 0, 4, 5, 6) == [0, 0, 1, 1]


def test_beta_linear_rises_after_its_delay():
    schedule = BetaSchedule("linear", value=2.0, delay_steps=3, warmup_steps=4)
    assert values(schedule, 0, 2, 3, 4, 5, 7, 8) == [0, 0, 0, 0.5, 1.0, 2.0, 2.0]


def test_beta_linear_without_warmup_is_a_step():
    assert values(BetaSchedule("linear", delay_steps=3), 2, 3) == [0, 1]


def test_beta_logistic_follows_its_curve_between_exact_ends():
    schedule = BetaSchedule("logistic", value=2.0, delay_steps=3, warmup_steps=8)

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    low, high = sigmoid(-6), sigmoid(6)
    expected = [2 * (sigmoid(12 * s / 8 - 6) - low) / (high - low) for s in range(9)]
    assert values(schedule, *range(3, 12)) == pytest.approx(expected)
    assert values(schedule, 0, 2, 3, 7, 11, 99) == pytest.approx([0, 0, 0, 1, 2, 2])


def test_beta_cyclical_repeats_and_stops():
    schedule = BetaSchedule("cyclical", delay_steps=1, period_steps=10, num_cycles=2)
    assert values(schedule, 0, 1, 3, 6, 10, 11, 13, 20, 21, 99) == [
        0,
        0,
        0.4,
        1,
        1,
        0,
        0.4,
        1,
        1,
        1,
    ]
    endless = BetaSchedule("cyclical", period_steps=10)
    assert values(endless, 0, 10, 1000, 1005) == [0, 0, 0, 1]


def test_beta_cyclical_stays_low_before_it_rises():
    schedule = BetaSchedule("cyclical", period_steps=8, low_fraction=0.5, ramp_fraction=0.25)
    assert values(schedule, 0, 4, 5, 6, 7, 8, 13) == [0, 0, 0.5, 1, 1, 0, 0.5]


def test_learning_rate_warms_up_from_the_first_step():
    schedule = LearningRateSchedule(peak=1.0, warmup_steps=4)
    assert values(schedule, 0, 1, 3, 4, 1000) == [0.25, 0.5, 1.0, 1.0, 1.0]


def test_learning_rate_linear_decays_to_the_floor_and_stays():
    schedule = LearningRateSchedule(1.0, 2, total_steps=12, decay="linear", floor=0.2)
    assert values(schedule, 2, 7, 12, 50) == pytest.approx([1.0, 0.6, 0.2, 0.2])


def test_learning_rate_cosine_passes_through_the_middle():
    schedule = LearningRateSchedule(1.0, 0, total_steps=8, decay="cosine")
    expected = [0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(9)]
    assert values(schedule, *range(9)) == pytest.approx(expected)
    assert schedule(4) == pytest.approx(0.5)


def test_learning_rate_with_warmup_to_the_end_is_defined():
    schedule = LearningRateSchedule(1.0, 5, total_steps=5, decay="linear")
    assert values(schedule, 4, 5) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BetaSchedule("linaer"), "Did you mean 'linear'"),
        (lambda: BetaSchedule(value=-1), "beta_schedule.value: expected a number ≥ 0, got -1"),
        (lambda: BetaSchedule(value=math.nan), "beta_schedule.value"),
        (lambda: BetaSchedule("cyclical"), "period_steps: expected ≥ 1"),
        (lambda: BetaSchedule(delay_steps=-2), "delay_steps: expected a whole number ≥ 0, got -2"),
        (lambda: BetaSchedule(ramp_fraction=1.1), "ramp_fraction"),
        (lambda: LearningRateSchedule(0.0), "peak: expected a number > 0"),
        (lambda: LearningRateSchedule(1.0, floor=2.0), "floor"),
        (lambda: LearningRateSchedule(1.0, -1), "warmup_steps"),
        (lambda: LearningRateSchedule(1.0, decay="cosine"), "a decay needs an end"),
        (lambda: LearningRateSchedule(1.0, 9, total_steps=5), "warm-up would never end"),
        (lambda: LearningRateSchedule(1.0, decay="cosin", total_steps=5), "Did you mean 'cosine'"),
    ],
)
def test_schedule_that_cannot_be_says_so(build, message):
    with pytest.raises(ConfigError, match=message):
        build()

"""The parts of a search: ranges, goals, budgets, what is shown of the trials."""

from __future__ import annotations

import itertools
import json
import pickle
import random
from types import SimpleNamespace

import pytest

from pipeline.errors import UserError
from pipeline.specs import Range, TrainSpec, TuneSpec
from pipeline.storage import Location
from pipeline.training.metrics import VALID_KEYS
from pipeline.training.setup import batch_order
from pipeline.tuning.budget import Budget
from pipeline.tuning.importance import importances
from pipeline.tuning.page import position, search_page
from pipeline.tuning.results import TrialResult, judged, pareto_front
from pipeline.tuning.space import check_search, reported_metrics, with_settings
from tests.pipeline.train_data import small_dataset, train_spec

TRIAL = {"model": {"size": "tiny"}, "train": {"max_steps": 3}}
SPACE = {
    "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
    "train.free_bits": {"uniform": [0.0, 1.0]},
}


def spec(num_trials=4, **search):
    values = {"search": {"space": SPACE, **search}, "trial": TrainSpec.build(TRIAL)}
    return TuneSpec.build({"num_trials": num_trials, **values})


def trial(number, settings=None, state="done", **values):
    return TrialResult(f"t_{number:05d}", settings or {}, state, 3, values, [[1.0, 2.0]])


def test_range_takes_int_as_the_configs_call_it_and_survives_json():
    bounds = Range.build({"int": [2, 8]})
    assert bounds.integer == (2, 8)
    assert Range.build(bounds.model_dump(mode="json")) == bounds


def test_a_grid_has_as_many_trials_as_points():
    space = {
        "train.learning_rate": {"choice": [1e-3, 2e-3, 4e-3]},
        "train.free_bits": {"choice": [5.0, 7.0]},
    }
    assert spec(num_trials=9, space=space, sampler="grid").planned_trials == 6
    assert spec(num_trials=9, space=space, sampler="random").planned_trials == 9
    check_search(spec(num_trials=6, space=space, sampler="grid"))
    with pytest.raises(UserError, match="6 points, but num_trials=5"):
        check_search(spec(num_trials=5, space=space, sampler="grid"))


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        ({"train.warmup_steps": {"uniform": [1, 9]}}, "train.warmup_steps"),
        ({"train.learning_rate": {"choice": [0.1, "high"]}}, "train.learning_rate"),
        ({"train.learning_rate": {"uniform": [-1, 1]}}, "train.learning_rate"),
        ({"model.fusion_ranks": {"choice": [1]}}, "did you mean 'fusion_rank'"),
        ({"fusion_rank": {"choice": [1]}}, "unknown key 'fusion_rank'"),
    ],
)
def test_space_that_the_train_spec_refuses_is_named(space, expected):
    with pytest.raises(UserError, match=r"^search\.space: ") as caught:
        check_search(spec(space=space))
    assert expected in caught.value.message


def test_space_with_a_whole_range_of_the_right_type_is_taken():
    check_search(spec(space={"train.warmup_steps": {"int": [1, 9]}, **SPACE}))
    changed = with_settings(TrainSpec.build(TRIAL), {"train.beta.value": 0.5})
    assert changed.train.beta.value == 0.5


def test_metrics_that_may_be_searched_by_are_those_that_workers_report():
    from pipeline.training.reporter import reported_to_ray

    valid = dict.fromkeys(VALID_KEYS, 1.0)
    assert set(reported_metrics()) <= set(reported_to_ray({}, valid))


def test_pareto_front_is_what_no_pair_comparison_beats():
    random.seed(0)
    trials = [
        trial(i, nll=random.randint(0, 6), mi=random.randint(0, 6)) for i in range(40)
    ]  # ties and doubles among them
    front = pareto_front(trials, {"nll": 1.0, "mi": -1.0})
    for mine in trials:
        beaten = any(
            other.values["nll"] <= mine.values["nll"]
            and other.values["mi"] >= mine.values["mi"]
            and other.values != mine.values
            for other in trials
        )
        assert (mine in front) is not beaten


def test_judged_puts_failures_last_and_the_best_by_the_first_goal_first():
    trials = [
        trial(0, nll=3.0, mi=1.0),
        trial(1, nll=None, mi=None, state="failed"),
        trial(2, nll=2.0, mi=0.5),
        trial(3, nll=4.0, mi=0.7),
    ]
    ordered = judged(trials, {"nll": "min", "mi": "max"})
    assert [t.trial[-1] for t in ordered] == ["2", "0", "3", "1"]
    assert [t.on_front for t in ordered] == [True, True, False, False]


def test_budget_counts_what_ran_before_a_kill(tmp_path):
    output = Location.parse(tmp_path)
    row = {"kind": "valid", "step": 6}
    (output / "trials" / "a" / "metrics.jsonl").write_bytes(json.dumps(row).encode() + b"\n")
    budget = Budget(output, 10, None)
    assert not budget.stop_all()
    budget("b", {"step": 3})
    assert not budget.stop_all()
    budget("b", {"step": 4})
    assert budget.stop_all()
    assert json.loads((tmp_path / "spent.json").read_text())["steps"] == 10
    restored = pickle.loads(pickle.dumps(budget))
    assert not restored.stop_all()  # counted anew from the folders: b's rows never came
    (output / "spent.json").write_json({"time_s": 99.0})
    assert Budget(output, None, 100.0).stop_all() is False
    assert Budget(output, None, 98.0).stop_all() is True


@pytest.mark.parametrize("rule", ["asha", "median"])
@pytest.mark.parametrize(("max_steps", "decision"), [(30, "STOP"), (10, "CONTINUE")])
def test_scheduler_stops_the_worse_unless_it_is_at_its_end(tmp_path, rule, max_steps, decision):
    from ray.tune.experiment import Trial

    from pipeline.tuning.schedulers import scheduler

    searched = spec(scheduler=rule, median_trials=2, reduction_factor=2)
    train = searched.trial.train.model_copy(update={"max_steps": max_steps, "eval_every": 10})
    searched = searched.model_copy(
        update={"trial": searched.trial.model_copy(update={"train": train})}
    )
    judge = scheduler(searched, Location.parse(tmp_path))
    trials = {name: Trial("training", trial_id=name, stub=True) for name in "abc"}
    running = SimpleNamespace(get_live_trials=lambda: list(trials.values()))  # the others wait
    decisions = []
    for trial, value in zip(trials.values(), (1.0, 1.1, 9.0), strict=True):
        judge.on_trial_add(running, trial)
        row = {"training_iteration": 1, "valid_negative_elbo": value}
        decisions.append(judge.on_trial_result(running, trial, row))
        judge.on_trial_complete(running, trial, row)
    assert decisions[0] == "CONTINUE"
    assert decisions[2] == decision


def test_scheduler_knows_the_end_of_a_trial_that_is_given_in_epochs(tmp_path):
    from pipeline.tuning.schedulers import num_validations

    dataset = small_dataset(tmp_path)
    trial = train_spec(train__max_steps=None, train__max_epochs=2, train__eval_every=3)
    order = batch_order(trial, dataset.split("train"))
    steps = order.num_batches(0) + order.num_batches(1)
    assert num_validations(trial, dataset.folder) == -(-steps // 3)


def test_importance_finds_the_setting_that_decides():
    random.seed(1)
    trials = []
    for number in range(40):
        settings = {
            "train.learning_rate": 10 ** random.uniform(-4, -2),
            "train.free_bits": random.uniform(0, 1),
        }
        trials.append(trial(number, settings, nll=(settings["train.free_bits"] - 0.7) ** 2))
    shares = importances(spec(), trials, "nll", "min")
    assert next(iter(shares)) == "train.free_bits"
    assert shares["train.free_bits"] > 0.7
    assert sum(shares.values()) == pytest.approx(1.0)
    assert importances(spec(), trials[:3], "nll", "min") == {}


def test_position_of_a_value_follows_the_scale_of_its_range():
    assert position(Range.build({"loguniform": [1e-4, 1e-2]}), 1e-3) == pytest.approx(0.5)
    assert position(Range.build({"uniform": [2.0, 4.0]}), 3.0) == pytest.approx(0.5)
    assert position(Range.build({"int": [2, 6]}), 6) == 1.0
    assert position(Range.build({"choice": ["a", "b", "c"]}), "b") == 0.5


def test_page_of_failed_and_stopped_trials_shows_reasons_and_hides_markup():
    goals = {"valid_negative_elbo": "min"}
    settings = {"train.learning_rate": 1e-3, "train.free_bits": 0.5}
    trials = [
        trial(n, settings, state, valid_negative_elbo=value)
        for n, (state, value) in enumerate(
            itertools.chain([("done", 3.0), ("stopped", 5.0)], [("done", 4.0)])
        )
    ]
    broken = trial(9, settings, "failed", valid_negative_elbo=None)
    broken = TrialResult(**{**vars(broken), "error": "<b>NaN</b> & more", "curve": []})
    text = search_page(spec(), judged([*trials, broken], goals))
    assert "&lt;b&gt;NaN&lt;/b&gt; &amp; more" in text
    assert text.count("<svg") == 2  # too few trials to tell what mattered
    assert "1 were stopped early" in text

"""One trial: a whole training run, and where it is asked for, an evaluation of its weights.

A trial is a function that Ray Tune calls in an actor of its own. It builds a `TorchTrainer` and
waits for it, so a trial may have many workers and GPUs while its driver takes no CPU
(Ray's "Tune over Train").
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from pipeline.errors import user_error_within
from pipeline.specs import EvaluateSpec, TuneSpec
from pipeline.stages import evaluate as evaluate_stage
from pipeline.stages import train as train_stage
from pipeline.storage import Location
from pipeline.training.identity import claim_run
from pipeline.training.metrics import SUMMARY, VALID_KEYS, read_rows
from pipeline.tuning.space import EVALUATED, EVALUATED_PREFIX, with_settings

EVALUATED_FILE = "evaluated.json"


def trainable(spec: TuneSpec, dataset: Location, output: Location) -> Callable[..., None]:
    """The function that Ray Tune calls for each trial."""

    def trial(settings: dict[str, Any]) -> None:
        from ray import tune
        from ray.tune.integration.ray_train import TuneReportCallback

        _let_ray_train_find_its_ray()
        folder = output / "trials" / tune.get_context().get_trial_id()
        trained = with_settings(spec.trial, settings)
        was_done = (folder / SUMMARY).is_file()  # just before the search was killed
        try:
            if not was_done:
                claim_run(trained, dataset, folder)
                callbacks = [TuneReportCallback()]
                train_stage.build_trainer(trained, dataset, folder, callbacks=callbacks).fit()
            figures = _evaluated(spec, dataset, folder) if spec_needs_evaluation(spec) else {}
            if was_done or figures:
                tune.report(_last_validation(folder) | figures)
        except Exception as error:
            reason = user_error_within(error)
            if reason is not None:
                raise reason from None
            raise

    return trial


def _last_validation(folder: Location) -> dict[str, Any]:
    """What a trial that is done reported last."""
    last = [row for row in read_rows(folder) if row["kind"] == "valid"][-1]
    return {"step": last["step"]} | {f"valid_{key}": last[key] for key in VALID_KEYS}


def spec_needs_evaluation(spec: TuneSpec) -> bool:
    """Whether an objective is measured at a trial's end."""
    return any(name.startswith(EVALUATED_PREFIX) for name in spec.search.goals)


def _evaluated(spec: TuneSpec, dataset: Location, folder: Location) -> dict[str, float]:
    """Figures of a trial's best weights on the validation split, by the name that goals have."""
    file = folder / EVALUATED_FILE
    if file.is_file():
        known: dict[str, float] = file.read_json()
        return known
    search, train = spec.search, spec.trial.train
    settings = {
        "max_documents": search.evaluate_documents,
        "iw_samples": search.evaluate_iw_samples,
        "num_workers": train.max_workers,
        "use_gpu": train.use_gpu,
        **dict.fromkeys(
            ("iw_curve_documents", "probe_documents", "num_samples", "num_reconstructions"), 0
        ),
        **dict.fromkeys(("num_interpolations", "responses_per_source"), 0),
    }
    figures = evaluate_stage.run_evaluate(
        EvaluateSpec.build({"split": "valid", "evaluate": settings}, "evaluate"),
        {"weights": folder / "weights" / "best", "dataset": dataset},
        folder / "evaluation",
    )
    found = {f"{EVALUATED_PREFIX}{n}": float(figures[n]) for n in EVALUATED if n in figures}
    file.write_json(found)
    return found


def _let_ray_train_find_its_ray() -> None:
    """Name this Ray to the helper of Ray Train that frees a stopped trial's CPUs.

    That helper asks the state API, which looks for the one Ray of the machine unless RAY_ADDRESS
    names it; beside a second Ray it gives up, and the next trial waits for ever (Ray 2.60). Its
    environment is the one that Ray Train hands to the controller of a run.
    """
    import ray
    from ray.train.v2._internal import constants

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    constants.ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")

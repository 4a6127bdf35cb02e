"""The tune stage: Ray Tune over real training runs."""

from __future__ import annotations

import math
import os
from typing import Any

import yaml
from rich.console import Console

from pipeline.cluster import connected, num_gpus, require_cpus, require_shared_storage
from pipeline.errors import UserError
from pipeline.progress import Progress
from pipeline.specs import TrainSpec, TuneSpec
from pipeline.specs.tune import DRIVER_MEMORY
from pipeline.stages import train as train_stage
from pipeline.storage import Location
from pipeline.training.export import copy_weights
from pipeline.tuning.page import search_page
from pipeline.tuning.results import TrialResult, as_json, judged, print_trials, trial_result
from pipeline.tuning.space import check_search, tune_domains
from pipeline.tuning.trial import spec_needs_evaluation, trainable

BEST, TRIALS, PAGE = "best.yaml", "trials.json", "report.html"


def run_tune(spec: TuneSpec, inputs: dict[str, Location], output: Location) -> dict[str, Any]:
    """Search; leave the best trial's settings and weights, all trials, and a page.

    Writes `best.yaml` (which a training takes as `from_trial`), `weights/best`, `trials.json`,
    `front/<trial>.yaml` for each trial that no other beats when there are several goals, and
    `report.html`. A search that was killed goes on: finished trials are kept, running ones resume
    from their checkpoints. A trial that fails is recorded with its reason.

    Returns:
        The best trial's settings and values, how many trials ended in which way, and the steps
        that were made and that stopping saved.

    Raises:
        UserError: if the search cannot be as it is asked for (see `check_search`), if the cluster
            has no room for one trial, or if no trial reached a value.
    """
    check_search(spec)
    with connected(spec.cluster):
        require_shared_storage(output)
        workers = spec.trial.train.max_workers
        require_cpus(workers, spec.trial.train.cpus_per_worker, "train.num_workers")
        train_stage.check_inputs(spec.trial, inputs["dataset"])
        concurrent = min(spec.max_concurrent or room_for_trials(spec.trial), spec.planned_trials)
        results = _search(spec, inputs["dataset"], output, concurrent)
    trials = judged([trial_result(r, spec, output) for r in results], spec.search.goals)
    return _conclude(spec, trials, output)


def room_for_trials(trial: TrainSpec) -> int:
    """How many trials the connected cluster can run at once, at least one."""
    import ray

    total = float(ray.cluster_resources().get("CPU", 0))
    each = trial.train.max_workers * trial.train.cpus_per_worker
    by_cpu = math.floor(total / each)
    if trial.train.use_gpu is False or num_gpus() == 0:
        return max(by_cpu, 1)
    return max(min(by_cpu, num_gpus() // trial.train.max_workers), 1)


def _search(spec: TuneSpec, dataset: Location, output: Location, concurrent: int) -> Any:
    from ray import tune

    from pipeline.tuning.progress import SearchProgress

    # Interrupted, we leave at once: Tune's own handler would return as if the search were over.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # its tables come even with verbose=0
    if spec_needs_evaluation(spec):  # its figures come with a trial's last report alone
        os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    trial = tune.with_resources(trainable(spec, dataset, output), {"memory": DRIVER_MEMORY})
    folder = output / "search"
    console = Console()
    console.print(
        f"search: {spec.planned_trials} trials, {concurrent} at once, each with "
        f"{spec.trial.train.max_workers} workers",
        highlight=False,
    )
    with Progress("search", spec.planned_trials, "trials", console) as SearchProgress.shown:
        if tune.Tuner.can_restore(folder.path, storage_filesystem=folder.filesystem):
            tuner = tune.Tuner.restore(
                folder.path,
                trainable=trial,
                resume_unfinished=True,
                storage_filesystem=folder.filesystem,
            )
        else:
            tuner = _new_tuner(spec, trial, dataset, output, concurrent)
        return tuner.fit()


def _new_tuner(
    spec: TuneSpec, trial: Any, dataset: Location, output: Location, concurrent: int
) -> Any:
    from ray import tune

    from pipeline.tuning.budget import Budget
    from pipeline.tuning.progress import SearchProgress
    from pipeline.tuning.schedulers import scheduler

    search = spec.search
    grid = search.sampler == "grid"
    return tune.Tuner(
        trial,
        param_space=tune_domains(search.space, grid),
        tune_config=tune.TuneConfig(
            num_samples=1 if grid else spec.num_trials,
            search_alg=_sampler(spec, concurrent),
            scheduler=scheduler(spec, dataset),
            max_concurrent_trials=concurrent,
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=output.path,
            storage_filesystem=output.filesystem,
            callbacks=[SearchProgress(search.metric)],
            stop=Budget(output, spec.max_total_steps, spec.max_time_s),
            verbose=0,
        ),
    )


def _sampler(spec: TuneSpec, concurrent: int) -> Any:
    from ray.tune.search import BasicVariantGenerator
    from ray.tune.search.optuna import OptunaSearch

    search = spec.search
    if search.sampler != "optuna":
        # It keeps to a number of its own; that of TuneConfig does not reach it (Ray 2.60).
        return BasicVariantGenerator(random_state=search.seed, max_concurrent=concurrent)
    if search.goals == {search.metric: search.mode}:
        return OptunaSearch(metric=search.metric, mode=search.mode, seed=search.seed)
    # A list, even of one: only then a goal may come with the last report alone.
    goals = search.goals
    return OptunaSearch(metric=list(goals), mode=list(goals.values()), seed=search.seed)


def _conclude(spec: TuneSpec, trials: list[TrialResult], output: Location) -> dict[str, Any]:
    """Show all trials, and write what is kept of them."""
    print_trials(spec, trials)
    goals = ", ".join(spec.search.goals)
    best = trials[0] if trials and trials[0].is_comparable() else None
    (output / TRIALS).write_json(as_json(trials))
    if best is None:
        reasons = sorted({trial.error for trial in trials if trial.error})
        raise UserError(
            f"no trial reached a value of {goals}, so there is no best one"
            + (f": the trials failed with: {'; '.join(reasons)}" if reasons else "")
            + "; change the search, or run this one anew with force=."
        )
    (output / BEST).write_bytes(_settings_file(best, len(trials)).encode())
    if len(spec.search.goals) > 1:
        for trial in (each for each in trials if each.on_front):
            text = _settings_file(trial, len(trials)).encode()
            (output / "front" / f"{trial.trial}.yaml").write_bytes(text)
    copy_weights(output / "trials" / best.trial / "weights" / "best", output / "weights" / "best")
    (output / PAGE).write_bytes(search_page(spec, trials).encode())
    for name in (BEST, PAGE):
        Console().print(f"{name}: {output / name}", soft_wrap=True, highlight=False)
    steps = sum(trial.step for trial in trials)
    most = max(trial.step for trial in trials)
    return {
        "best_value": next(iter(best.values.values())),
        "best_trial": best.trial,
        "best_values": best.values,
        "best_settings": best.settings,
        "metric": next(iter(spec.search.goals)),
        "num_trials": len(trials),
        "num_stopped": sum(trial.state == "stopped" for trial in trials),
        "num_failed": sum(trial.state == "failed" for trial in trials),
        "front": [trial.trial for trial in trials if trial.on_front],
        "trial_steps": steps,
        # Of those that all trials would have made; one that failed would have made none.
        "trial_steps_saved": most * sum(trial.state != "failed" for trial in trials)
        - sum(trial.step for trial in trials if trial.state != "failed"),
    }


def _settings_file(trial: TrialResult, count: int) -> str:
    values = ", ".join(f"{goal} = {value:.6g}" for goal, value in trial.values.items())
    header = f"# Trial {trial.trial} of {count}: {values}\n"
    return header + yaml.safe_dump(dict(trial.settings), sort_keys=True)

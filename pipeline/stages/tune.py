"""The tune stage: Ray Tune over real training runs.

Each trial is a function trainable that builds a `TorchTrainer` and waits for it, so a trial may
have many workers and GPUs while its driver takes a fraction of a CPU (Ray's "Tune over Train").
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import yaml
from rich.console import Console

from pipeline.cluster import connected, num_gpus, require_cpus, require_shared_storage
from pipeline.errors import UserError, user_error_within
from pipeline.progress import Progress
from pipeline.specs import TrainSpec, TuneSpec
from pipeline.stages import train as train_stage
from pipeline.storage import Location
from pipeline.tuning.results import print_trials, trial_row
from pipeline.tuning.space import check_space, tune_domains, with_settings

_DRIVER_CPUS = 0.1


def run_tune(spec: TuneSpec, inputs: dict[str, Location], output: Location) -> dict[str, Any]:
    """Search, and leave the best trial's settings in `best.yaml`.

    A search that was killed goes on: finished trials are kept, the others run on.

    Returns:
        The best trial's settings and figures, and how many trials ended in which way.

    Raises:
        UserError: if a key of the space is unknown or a bound is refused by the train spec, if the
            cluster has no room for one trial, or if no trial reported the metric.
    """
    check_space(spec)
    with connected(spec.cluster):
        require_shared_storage(output)
        workers = spec.trial.train.num_workers
        require_cpus(workers, spec.trial.train.cpus_per_worker, 1, "train.num_workers")
        train_stage.check_inputs(spec.trial, inputs["dataset"])
        concurrent = spec.max_concurrent or room_for_trials(spec.trial)
        results = _search(spec, inputs["dataset"], output, concurrent)
    return _conclude(spec, results, output)


def room_for_trials(trial: TrainSpec) -> int:
    """How many trials the connected cluster can run at once, at least one."""
    import ray

    total = float(ray.cluster_resources().get("CPU", 0))
    each = trial.train.num_workers * trial.train.cpus_per_worker + _DRIVER_CPUS
    by_cpu = math.floor(total / each)
    if trial.train.use_gpu is False or num_gpus() == 0:
        return max(by_cpu, 1)
    return max(min(by_cpu, num_gpus() // trial.train.num_workers), 1)


def _trainable(spec: TuneSpec, dataset: Location, output: Location) -> Callable[..., None]:
    """The function that Ray Tune calls in an actor of its own for each trial."""

    def trial(settings: dict[str, Any]) -> None:
        from ray import tune
        from ray.tune.integration.ray_train import TuneReportCallback

        trial_id = tune.get_context().get_trial_id()
        train_spec = with_settings(spec.trial, settings)
        trainer = train_stage.build_trainer(
            train_spec,
            dataset,
            output / "trials" / trial_id,
            mailbox=None,
            callbacks=[TuneReportCallback()],
        )
        try:
            trainer.fit()
        except Exception as error:
            reason = user_error_within(error)
            if reason is not None:
                raise reason from None
            raise

    return trial


def _search(spec: TuneSpec, dataset: Location, output: Location, concurrent: int) -> Any:
    from ray import tune

    from pipeline.tuning.progress import SearchProgress

    trainable = tune.with_resources(_trainable(spec, dataset, output), {"CPU": _DRIVER_CPUS})
    folder = output / "search"
    console = Console()
    console.print(
        f"search: {spec.num_trials} trials, {concurrent} at once, each with "
        f"{spec.trial.train.num_workers} workers",
        highlight=False,
    )
    with Progress("search", spec.num_trials, "trials", console) as SearchProgress.shown:
        if tune.Tuner.can_restore(folder.path, storage_filesystem=folder.filesystem):
            tuner = tune.Tuner.restore(
                folder.path,
                trainable=trainable,
                resume_unfinished=True,
                restart_errored=True,
                storage_filesystem=folder.filesystem,
            )
        else:
            tuner = _new_tuner(spec, trainable, output, concurrent)
        return tuner.fit()


def _new_tuner(spec: TuneSpec, trainable: Any, output: Location, concurrent: int) -> Any:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
    from ray.tune.search import BasicVariantGenerator
    from ray.tune.search.optuna import OptunaSearch

    from pipeline.tuning.progress import SearchProgress

    search = spec.search
    space = tune_domains(search.space)
    if search.sampler == "optuna":
        sampler = OptunaSearch(metric=search.metric, mode=search.mode, seed=search.seed)
    else:
        sampler = BasicVariantGenerator(random_state=search.seed)
    if search.scheduler == "asha":
        scheduler = ASHAScheduler(
            time_attr="training_iteration",
            metric=search.metric,
            mode=search.mode,
            # One more than there are: a trial that reaches its end is left to end by itself.
            max_t=num_evaluations(spec.trial) + 1,
            grace_period=min(search.grace_evaluations, num_evaluations(spec.trial)),
            reduction_factor=search.reduction_factor,
        )
    else:
        scheduler = FIFOScheduler()
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            num_samples=spec.num_trials,
            search_alg=sampler,
            scheduler=scheduler,
            max_concurrent_trials=concurrent,
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=output.path,
            storage_filesystem=output.filesystem,
            callbacks=[SearchProgress()],
            verbose=0,
        ),
    )


def num_evaluations(trial: TrainSpec) -> int:
    """How many validations a whole trial reports; a large number when only epochs are given."""
    if trial.train.max_steps is None:
        return 10_000
    return max(math.ceil(trial.train.max_steps / trial.train.eval_every), 1)


def _conclude(spec: TuneSpec, results: Any, output: Location) -> dict[str, Any]:
    """Show all trials, and write the best one's settings."""
    metric, sign = spec.search.metric, 1 if spec.search.mode == "min" else -1
    trials = sorted(
        (trial_row(result, metric) for result in results),
        key=lambda row: (row["value"] is None, sign * (row["value"] or 0.0)),
    )
    print_trials(spec, trials)
    best = trials[0] if trials else None
    if best is None or best["value"] is None:
        reasons = {row["error"] for row in trials if row["error"]}
        raise UserError(
            f"no trial reported '{metric}', so there is no best one: "
            + (f"the trials failed with: {'; '.join(sorted(reasons))}." if reasons else "")
        )
    settings = dict(best["settings"])
    header = f"# The best of {len(trials)} trials: {metric} = {best['value']:.6g}\n"
    text = header + yaml.safe_dump(settings, sort_keys=True)
    (output / "best.yaml").write_bytes(text.encode())
    (output / "trials.json").write_json(trials)
    Console().print(f"best settings: {output / 'best.yaml'}", soft_wrap=True, highlight=False)
    return {
        "best_value": best["value"],
        "best_trial": best["trial"],
        "best_settings": settings,
        "metric": metric,
        "num_trials": len(trials),
        "num_failed": sum(row["error"] is not None for row in trials),
    }

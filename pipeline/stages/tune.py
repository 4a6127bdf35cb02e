"""The tune stage: Ray Tune over real training runs.

Each trial is a function trainable that builds a `TorchTrainer` and waits for it, so a trial may
have many workers and GPUs while its driver takes a fraction of a CPU (Ray's "Tune over Train").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from pipeline.cluster import connected, num_gpus, require_cpus, require_shared_storage
from pipeline.errors import UserError, nearest, user_error_within
from pipeline.progress import Progress
from pipeline.specs import Range, TrainSpec, TuneSpec
from pipeline.stages import train as train_stage
from pipeline.storage import Location

_DRIVER_CPUS = 0.1


def external_inputs(spec: TuneSpec) -> dict[str, str]:
    """Fingerprints of what the trials read beside the dataset."""
    return train_stage.external_inputs(spec.trial)


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


def check_space(spec: TuneSpec) -> None:
    """Build the train spec at every end of every range, before the first trial starts.

    Raises:
        UserError: naming the key, and the nearest right one when it is unknown.
    """
    for key, bounds in spec.search.space.items():
        for value in _ends(bounds):
            try:
                with_settings(spec.trial, {key: value})
            except UserError as error:
                raise UserError(f"search.space: {error.message}") from None


def _ends(bounds: Range) -> list[Any]:
    return list(bounds.choice or bounds.uniform or bounds.loguniform or bounds.integer or ())


def with_settings(trial: TrainSpec, settings: Mapping[str, Any]) -> TrainSpec:
    """The train spec with dotted keys replaced.

    Raises:
        UserError: if a key is not one of the spec's, or its value is refused.
    """
    values = trial.model_dump(mode="python")
    for key, value in settings.items():
        node = values
        *sections, last = key.split(".")
        for section in sections:
            if not isinstance(node.get(section), dict):
                raise UserError(f"unknown key '{key}'{nearest(section, node)}.")
            node = node[section]
        if last not in node:
            raise UserError(
                f"unknown key '{key}'{nearest(last, node)}; the keys there are: {', '.join(node)}."
            )
        node[last] = value
    return TrainSpec.build(values, "trial")


def room_for_trials(trial: TrainSpec) -> int:
    """How many trials the connected cluster can run at once, at least one."""
    import ray

    total = float(ray.cluster_resources().get("CPU", 0))
    each = trial.train.num_workers * trial.train.cpus_per_worker + _DRIVER_CPUS
    by_cpu = math.floor(total / each)
    if trial.train.use_gpu is False or num_gpus() == 0:
        return max(by_cpu, 1)
    return max(min(by_cpu, num_gpus() // trial.train.num_workers), 1)


def _tune_space(space: Mapping[str, Range]) -> dict[str, Any]:
    from ray import tune

    def domain(bounds: Range) -> Any:
        if bounds.uniform:
            return tune.uniform(*bounds.uniform)
        if bounds.loguniform:
            return tune.loguniform(*bounds.loguniform)
        if bounds.integer:
            low, high = bounds.integer
            return tune.randint(low, high + 1)
        return tune.choice(bounds.choice or [])

    return {key: domain(bounds) for key, bounds in space.items()}


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

    trainable = tune.with_resources(_trainable(spec, dataset, output), {"CPU": _DRIVER_CPUS})
    folder = output / "search"
    console = Console()
    console.print(
        f"search: {spec.num_trials} trials, {concurrent} at once, each with "
        f"{spec.trial.train.num_workers} workers",
        highlight=False,
    )
    with Progress("search", spec.num_trials, "trials", console) as progress:
        if tune.Tuner.can_restore(folder.path, storage_filesystem=folder.filesystem):
            tuner = tune.Tuner.restore(
                folder.path,
                trainable=trainable,
                resume_unfinished=True,
                restart_errored=True,
                storage_filesystem=folder.filesystem,
            )
        else:
            tuner = _new_tuner(spec, trainable, output, concurrent, _SearchProgress(progress))
        return tuner.fit()


def _new_tuner(
    spec: TuneSpec, trainable: Any, output: Location, concurrent: int, callback: Any
) -> Any:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
    from ray.tune.search import BasicVariantGenerator
    from ray.tune.search.optuna import OptunaSearch

    search = spec.search
    space = _tune_space(search.space)
    if search.sampler == "optuna":
        sampler = OptunaSearch(metric=search.metric, mode=search.mode, seed=search.seed)
    else:
        sampler = BasicVariantGenerator(random_state=search.seed)
    if search.scheduler == "asha":
        scheduler = ASHAScheduler(
            time_attr="training_iteration",
            metric=search.metric,
            mode=search.mode,
            max_t=num_evaluations(spec.trial),
            grace_period=min(search.grace_evaluations, num_evaluations(spec.trial)),
            reduction_factor=search.reduction_factor,
        )
    else:
        scheduler = FIFOScheduler()
    no_sorting = {} if search.scheduler == "asha" else {"metric": search.metric}
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            num_samples=spec.num_trials,
            search_alg=sampler,
            scheduler=scheduler,
            max_concurrent_trials=concurrent,
            **({**no_sorting, "mode": search.mode} if no_sorting else {}),
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=output.path,
            storage_filesystem=output.filesystem,
            callbacks=[callback],
            verbose=0,
        ),
    )


def num_evaluations(trial: TrainSpec) -> int:
    """How many validations a whole trial reports; a large number when only epochs are given."""
    if trial.train.max_steps is None:
        return 10_000
    return max(math.ceil(trial.train.max_steps / trial.train.eval_every), 1)


def _SearchProgress(progress: Progress) -> Any:  # noqa: N802 (a class made where ray is imported)
    from ray.tune import Callback

    class SearchProgress(Callback):
        """Counts ended trials, and shows the newest figure of the running ones."""

        def __init__(self) -> None:
            self.ended = 0

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
        ) -> None:
            del iteration, trials
            figure = result.get("valid_negative_elbo")
            progress.update(
                self.ended, trial=trial.trial_id, step=result.get("step"), negative_elbo=figure
            )

        def on_trial_complete(self, **_: Any) -> None:
            self.ended += 1
            progress.update(self.ended)

        def on_trial_error(self, **_: Any) -> None:
            self.ended += 1
            progress.update(self.ended)

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Tune pickles callbacks with its state; a live bar is not part of that

    return SearchProgress()


def _conclude(spec: TuneSpec, results: Any, output: Location) -> dict[str, Any]:
    """Show all trials, and write the best one's settings."""
    metric, sign = spec.search.metric, 1 if spec.search.mode == "min" else -1
    trials = sorted(
        (_trial_row(result, metric) for result in results),
        key=lambda row: (row["value"] is None, sign * (row["value"] or 0.0)),
    )
    _print_table(spec, trials)
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


def _trial_row(result: Any, metric: str) -> dict[str, Any]:
    metrics = result.metrics or {}
    value = metrics.get(metric)
    if result.metrics_dataframe is not None and metric in result.metrics_dataframe:
        value = float(result.metrics_dataframe[metric].dropna().iloc[-1])
    error = result.error
    lines = str(error).strip().splitlines() if error else []
    return {
        "trial": metrics.get("trial_id", ""),
        "settings": dict(result.config or {}),
        "value": None if value is None or not math.isfinite(value) else float(value),
        "step": metrics.get("step"),
        "took_s": metrics.get("time_total_s"),
        "error": lines[-1] if lines else None,
    }


def _print_table(spec: TuneSpec, trials: list[dict[str, Any]]) -> None:
    keys = list(spec.search.space)
    table = Table("trial", *keys, "step", spec.search.metric, "took", "problem", title="trials")
    for row in trials:
        value = "" if row["value"] is None else f"{row['value']:.4f}"
        took = "" if row["took_s"] is None else f"{row['took_s']:.0f} s"
        settings = [_shown(row["settings"].get(key)) for key in keys]
        step = "" if row["step"] is None else str(row["step"])
        table.add_row(row["trial"], *settings, step, value, took, row["error"] or "")
    Console().print(table)


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

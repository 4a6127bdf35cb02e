"""The train stage: Ray Train workers, each with a DeepSpeed engine over its share of the data."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from pipeline.cluster import connected, require_cpus, require_shared_storage, wants_gpu
from pipeline.errors import UserError, user_error_within
from pipeline.progress import Progress, ProgressMailbox, duration, followed
from pipeline.shards import Dataset, Split
from pipeline.specs import TrainSpec
from pipeline.storage import Location
from pipeline.training.deepspeed_config import check_extra
from pipeline.training.identity import claim_run
from pipeline.training.metrics import SUMMARY, read_rows
from pipeline.training.model import (
    Vocabulary,
    check_backbone_tokenizer,
    check_objective,
    della_config,
)

if TYPE_CHECKING:
    from della_model import DellaConfig

# Ray's own name for a run. It keeps nothing there: its list of checkpoints is written in place,
# so that a kill at the wrong moment would leave a run that no longer starts.
RUN_NAME = "ray"


def run_train(spec: TrainSpec, inputs: dict[str, Location], output: Location) -> dict[str, Any]:
    """Train; the same call again goes on from the last checkpoint in `output`.

    Leaves `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `weights/last` and `weights/best` (the
    validation with the lowest negative ELBO; without a validation split, the last).

    Returns:
        Steps, epochs, documents and tokens seen, parameters, workers, tokens/s, and the last and
        best validation's figures.

    Raises:
        UserError: if spec, dataset and cluster do not fit each other, or training diverges.
    """
    console = Console()
    dataset = inputs["dataset"]
    with connected(spec.cluster):
        require_shared_storage(output)
        train = spec.train
        require_cpus(train.min_workers, train.cpus_per_worker, "train.num_workers")
        check_inputs(spec, dataset)
        claim_run(spec, dataset, output)
        if "valid" not in Dataset.open(dataset).split_names:
            console.print(
                "the dataset has no split 'valid': training goes without validation, and "
                "weights/best will be the last weights.",
                highlight=False,
            )
        mailbox = ProgressMailbox.create()
        trainer = build_trainer(spec, dataset, output, mailbox)
        with followed(mailbox, Progress("train", _total_steps(spec, dataset), "steps", console)):
            _fit(trainer, mailbox, train.grace_s)
    figures = _figures(output)
    _print_table(console, figures)
    return figures


def check_inputs(spec: TrainSpec, dataset_folder: Location) -> None:
    """Check, without starting anything, that model, dataset and DeepSpeed's settings fit.

    Raises:
        UserError: naming the first thing that does not.
    """
    from pipeline.training.setup import batch_order

    check_extra(spec.deepspeed)
    dataset = Dataset.open(dataset_folder)
    splits = [dataset.split("train")]
    splits += [dataset.split("valid")] if "valid" in dataset.split_names else []
    check_backbone_tokenizer(spec, dataset)
    config = della_config(spec, Vocabulary.of(dataset), splits[0].is_conditional)
    check_objective(spec, config)
    for split in splits:
        check_context(split, config, from_scratch=spec.model.backbone is None)
    batch_order(spec, splits[0])


def check_context(split: Split, config: DellaConfig, from_scratch: bool) -> None:
    """Check that the model can read every document of a split whole, and its source.

    Raises:
        UserError: naming the longest, and what to do.
    """
    wanted = {"document": (split.max_length, "corpus.max_tokens={}")}
    if split.is_conditional and config.adapter.is_encoder_decoder:
        wanted["source"] = (split.max_condition_length, "corpus.max_source_tokens={}")
    elif split.is_conditional:
        limits = "corpus.max_source_tokens and corpus.max_tokens that add up to {}"
        wanted = {"document with its source": (split.max_pair_length, limits)}
    for what, (longest, limit) in wanted.items():
        if longest > config.context:
            remedy = (
                f"set model.context={longest}"
                if from_scratch
                else "use a backbone with a longer context"
            )
            raise UserError(
                f"the longest {what} of the split '{split.name}' has {longest:,} tokens, but the "
                f"model's context is {config.context:,}: it cannot be read whole; {remedy}, or "
                f"preprocess with {limit.format(config.context)}."
            )


def build_trainer(
    spec: TrainSpec,
    dataset: Location,
    output: Location,
    mailbox: ProgressMailbox | None = None,
    callbacks: Sequence[Any] = (),
) -> Any:
    """Make the `ray.train.torch.TorchTrainer` of a run, whose `fit` trains; Ray must be connected.

    Args:
        spec: the run.
        dataset: the dataset's folder.
        output: where the run keeps its state; the same folder again goes on from there.
        mailbox: where the workers send their progress.
        callbacks: `ray.train.UserCallback`s; their `after_report` sees the validations alone, each
            with `valid_negative_elbo`, `valid_kl`, `step` and so on.

    Raises:
        UserError: if GPUs are asked for that the cluster does not have.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from pipeline.training.callbacks import (
        Budgets,
        CheckpointBeforeResize,
        OnValidation,
        SigtermIsNotice,
    )
    from pipeline.training.worker import train_loop_per_worker
    from pipeline.training.worker_config import WorkerConfig

    train = spec.train
    use_gpu = wants_gpu(train.use_gpu, train.min_workers, "train.num_workers")
    guards: list[Any] = [
        Budgets(train.max_failures, train.max_preemptions, mailbox),
        SigtermIsNotice(),
    ]
    if train.is_elastic and mailbox is not None:
        guards.append(CheckpointBeforeResize(mailbox, train.grace_s))
    return TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"worker": WorkerConfig(spec, dataset, output, use_gpu, mailbox)},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=use_gpu,
            elastic_resize_monitor_interval_s=train.resize_every_s,
            resources_per_worker={"CPU": train.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=RunConfig(
            name=RUN_NAME,
            storage_path=output.path,
            storage_filesystem=None if output.is_local else output.filesystem,
            # `Budgets` counts: Ray takes no worker for preempted that was told by a signal.
            failure_config=FailureConfig(max_failures=-1, max_preemption_failures=-1),
            callbacks=[*guards, *(OnValidation(callback) for callback in callbacks)],
        ),
    )


def _fit(trainer: Any, mailbox: ProgressMailbox, grace_s: float) -> None:
    """Train to the end.

    Raises:
        KeyboardInterrupt: if a SIGTERM came; the workers have left a checkpoint if they could.
    """
    stopped = threading.Event()
    with _sigterm_stops(mailbox, grace_s, stopped):
        try:
            trainer.fit()
        except Exception as error:
            if stopped.is_set():
                raise KeyboardInterrupt from None
            reason = user_error_within(error)
            if reason is not None:
                raise reason from None
            raise


@contextmanager
def _sigterm_stops(
    mailbox: ProgressMailbox, grace_s: float, stopped: threading.Event
) -> Iterator[None]:
    """While the body runs, a SIGTERM asks the workers to leave a checkpoint and end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask() -> None:
        mailbox.ask("STOPPED")
        if not over.wait(grace_s):
            os.kill(os.getpid(), signal.SIGINT)  # Ray Train then ends the workers as they are

    def on_signal(number: int, frame: Any) -> None:
        del number, frame
        if not stopped.is_set():
            stopped.set()
            threading.Thread(target=ask, daemon=True, name="stop").start()

    over = threading.Event()
    before = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        over.set()
        signal.signal(signal.SIGTERM, before)


def _total_steps(spec: TrainSpec, dataset: Location) -> int:
    from pipeline.training.model import count_steps
    from pipeline.training.setup import batch_order

    return count_steps(spec, batch_order(spec, Dataset.open(dataset).split("train")))


def _figures(output: Location) -> dict[str, Any]:
    """What the workers left in `summary.json`, and the steady speed from the rows."""
    figures: dict[str, Any] = (output / SUMMARY).read_json()
    rates = [row["tokens_per_s"] for row in read_rows(output) if row["kind"] == "train"]
    steady = sorted(rates[1:] or rates)  # the first row holds the warm-up
    return figures | {"tokens_per_s": steady[len(steady) // 2] if steady else None}


def _print_table(console: Console, figures: dict[str, Any]) -> None:
    table = Table("training", "", title=None)
    table.add_row("steps, epochs", f"{figures['steps']:,}, {figures['epochs']:,}")
    if figures["steps_skipped"]:
        table.add_row(
            "steps without an update", f"{figures['steps_skipped']:,}: gradient not finite"
        )
    table.add_row("documents seen", f"{figures['documents_seen']:,}")
    table.add_row("tokens seen", f"{figures['tokens_seen']:,}")
    table.add_row(
        "parameters",
        f"{figures['num_parameters']:,}, of these for the latents "
        f"{figures['num_latent_parameters']:,}",
    )
    table.add_row("parameters trained", f"{figures['num_trained_parameters']:,}")
    workers = f"{figures['num_workers']} on {figures['num_nodes']} node(s)"
    table.add_row("workers", workers)
    if figures["tokens_per_s"] is not None:
        table.add_row("tokens/s", f"{figures['tokens_per_s']:,.0f}")
    table.add_row("time", duration(figures["time_s"]))
    for name in ("last", "best"):
        row = figures[name]
        if row is not None:
            table.add_row(
                f"{name} validation (step {row['step']})",
                f"−ELBO {row['negative_elbo']:.3f}, reconstruction {row['reconstruction_nll']:.3f}"
                f", KL {row['kl']:.3f}, perplexity ≤ {row['ppl_token']:.2f}",
            )
    console.print(table)

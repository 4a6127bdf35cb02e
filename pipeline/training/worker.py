"""What each Ray Train worker runs: the whole loop, and the one step inside it."""

from __future__ import annotations

import math
import resource
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray.train
import torch

from pipeline.batches import dropout_seed
from pipeline.errors import UserError
from pipeline.progress import ProgressMailbox
from pipeline.specs import TrainSpec
from pipeline.storage import Location
from pipeline.training.checkpoint import (
    RunState,
    checkpoint_name,
    load_checkpoint,
    written_checkpoint,
)
from pipeline.training.engine import grad_norm, made_update, set_learning_rate
from pipeline.training.export import copy_weights, export_weights
from pipeline.training.loader import StepBatch, TrainLoader
from pipeline.training.meter import Meter, perplexity
from pipeline.training.metrics import SUMMARY, VALID_KEYS, MetricsLog
from pipeline.training.setup import Run, start_run

_PROGRESS_EVERY_S = 0.5


@dataclass(frozen=True)
class WorkerConfig:
    """What the driver tells every worker."""

    spec: TrainSpec
    dataset: Location
    output: Location
    use_gpu: bool
    mailbox: ProgressMailbox | None


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """Train from the last checkpoint, or from the start, to the end."""
    worker: WorkerConfig = config["worker"]
    context = ray.train.get_context()
    run = start_run(
        worker.spec,
        worker.dataset,
        rank=context.get_world_rank(),
        num_workers=context.get_world_size(),
        use_gpu=worker.use_gpu,
    )
    state = _resumed(run)
    with closing(Reporter(run, worker.output, worker.mailbox, state.step)) as reporter:
        train(run, state, reporter)


def _resumed(run: Run) -> RunState:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return RunState()
    with checkpoint.as_directory() as folder:
        return load_checkpoint(run.engine, run.spec, Path(folder), run.share.num_workers)


def train(run: Run, state: RunState, reporter: Reporter) -> None:
    """The loop: step by step to the last, with rows, validations and checkpoints on the way."""
    options = run.spec.train
    started = time.monotonic() - state.time_s
    meter = StepMeter(run)
    with closing(run.loader(state.position)) as loader:
        while state.step < run.total_steps:
            batch = meter.timed(loader)
            updated = train_step(run, state.step, batch, meter.sums)
            state = _advanced(state, batch, updated, time.monotonic() - started)
            reporter.require_updates(state)
            reporter.progress(state)

            is_last = state.step == run.total_steps
            validates = bool(run.validation) and (state.step % options.eval_every == 0 or is_last)
            checkpoints = state.step % options.checkpoint_every == 0 or is_last
            if validates or checkpoints or state.step % options.log_every == 0:
                reporter.write(meter.row(state))
            if validates:
                state = reporter.validated(validate(run, state), state)
                meter.restart_clock()
            if validates or checkpoints:
                reporter.report(state, checkpoints, validates)
                meter.restart_clock()
    reporter.export_last(state)


def train_step(run: Run, step: int, batch: StepBatch, sums: Meter) -> bool:
    """One optimizer step: forward and backward for each micro-batch, then the update.

    Where the gradient of any worker is not finite, no worker updates, and the step's sums do not
    count. Returns whether there was an update: the same on every worker.
    """
    set_learning_rate(run.engine, run.learning_rate(step))
    parts = run.share.num_workers * run.share.accumulation
    found: list[dict[str, torch.Tensor]] = []
    for micro, micro_batch in enumerate(batch.micro_batches):
        torch.manual_seed(dropout_seed(run.spec.train.seed, step, run.share.rank, micro))
        loss, summed = run.engine(**micro_batch.arguments(run.device), beta=run.beta(step))
        run.engine.backward(loss)
        run.engine.step()  # updates after the last micro-batch
        found.append(summed)
    if not made_update(run.engine):
        return False
    for summed in found:
        sums.add(summed, loss_scale=batch.num_documents / parts)
    return True


@torch.no_grad()
def validate(run: Run, state: RunState) -> dict[str, Any]:
    """Figures over the validation documents; the noise is the same every time."""
    started = time.monotonic()
    meter = Meter(run.num_layers, run.device)
    run.engine.eval()
    for micro_batch in run.validation:
        beta = run.beta(state.step)
        _, summed = run.engine(**micro_batch.arguments(run.device), beta=beta)
        meter.add(summed)
    run.engine.train()
    row = meter.reduced()
    head = {"kind": "valid", "step": state.step, "epoch": state.position.epoch}
    tail = {"beta": run.beta(state.step), "ppl_token": perplexity(row), "time_s": state.time_s}
    return head | row | tail | {"took_s": time.monotonic() - started}


def _advanced(state: RunState, batch: StepBatch, updated: bool, time_s: float) -> RunState:
    return replace(
        state,
        skipped=state.skipped + (not updated),
        skipped_in_a_row=0 if updated else state.skipped_in_a_row + 1,
        step=state.step + 1,
        position=batch.next_position,
        documents=state.documents + batch.num_documents,
        tokens=state.tokens + batch.num_tokens,
        time_s=time_s,
    )


class StepMeter:
    """Sums and times of the steps since the last row."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.sums = Meter(run.num_layers, run.device)
        self._steps = 0
        self._took_s = self._waited_s = 0.0
        self._loader_waited_s = 0.0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out the time since the last step ended: it was no training."""
        self._clock = time.perf_counter()

    def timed(self, loader: TrainLoader) -> StepBatch:
        """The next batch; counts the time that passes until the row as this step's."""
        batch = loader.next()
        self._waited_s += loader.waited_s - self._loader_waited_s
        self._loader_waited_s = loader.waited_s
        self._steps += 1
        return batch

    def row(self, state: RunState) -> dict[str, Any] | None:
        """The row of metrics of the steps since the last one. A collective call.

        None where none of them made an update: they have no figures.
        """
        means = self.sums.reduced()
        took_s = max(time.perf_counter() - self._clock, 1e-9)
        last = state.step - 1  # the step that was made last
        row: dict[str, Any] = {
            "kind": "train",
            "step": state.step,
            "epoch": state.position.epoch,
            **means,
            "beta": self._run.beta(last),
            "learning_rate": self._run.learning_rate(last),
            "grad_norm": grad_norm(self._run.engine),
            "tokens_per_s": means["num_tokens"] / took_s,
            "step_s": took_s / self._steps,
            "data_wait_s": self._waited_s / self._steps,
            "time_s": state.time_s,
            "documents_seen": state.documents,
            "tokens_seen": state.tokens,
            "steps_skipped": state.skipped,
        }
        self._steps, self._waited_s = 0, 0.0
        self.restart_clock()
        return row if means["num_documents"] else None


class Reporter:
    """Where figures, checkpoints and weights go; rank 0 writes what all ranks agree on."""

    def __init__(
        self, run: Run, output: Location, mailbox: ProgressMailbox | None, resume_step: int
    ) -> None:
        self._run, self._output = run, output
        self._is_first = run.share.rank == 0
        self._mailbox = mailbox if self._is_first else None
        self._log = MetricsLog(output, resume_step) if self._is_first else None
        self._resumed, self._sent_at = resume_step, 0.0
        self._checkpoint_step = resume_step  # of the last checkpoint; 0: there is none
        self._num_nodes = count_nodes()
        self._notes: dict[str, Any] = {}
        self._row: dict[str, Any] = {}

    def progress(self, state: RunState) -> None:
        """Tell the driver how far the run is, now and then."""
        now = time.monotonic()
        due = state.step == self._run.total_steps or now - self._sent_at >= _PROGRESS_EVERY_S
        if self._mailbox is None or not due:
            return
        self._sent_at = now
        resumed = {"resumed": self._resumed} if self._resumed else {}
        self._mailbox.send(state.step, **self._notes, **resumed)

    def require_updates(self, state: RunState) -> None:
        """Stop a run whose gradients stay infinite or NaN.

        Raises:
            UserError: naming the last good checkpoint.
        """
        options = self._run.spec.train
        if state.skipped_in_a_row <= options.max_skipped_steps:
            return
        kept = "there is no checkpoint yet"
        if self._checkpoint_step:
            runs = self._output / ray.train.get_context().get_experiment_name()
            kept = f"the last good checkpoint is {runs / checkpoint_name(self._checkpoint_step)}"
        raise UserError(
            f"the gradient was not finite in {state.skipped_in_a_row} steps in a row, up to step "
            f"{state.step} (train.max_skipped_steps={options.max_skipped_steps}): training has "
            f"diverged; lower train.learning_rate (now {options.learning_rate:g}) or raise "
            f"train.warmup_steps; {kept}."
        )

    def write(self, row: dict[str, Any] | None) -> None:
        """Add a row to the record, where there is one."""
        if row is None:
            return
        if self._log is not None:
            self._log.write(row)
        self._row = row if row["kind"] == "train" else self._row
        self._notes = {
            "tokens/s": self._row.get("tokens_per_s", 0.0),
            "loss": self._row.get("loss", math.nan),
            "KL": self._row.get("kl", math.nan),
            "β": self._row.get("beta", math.nan),
        }
        if self._row.get("steps_skipped"):
            self._notes["skipped"] = self._row["steps_skipped"]

    def validated(self, row: dict[str, Any], state: RunState) -> RunState:
        """Add a validation's row; the best weights so far are kept. A collective call."""
        self.write(row)
        if not math.isfinite(row["negative_elbo"]):
            raise UserError(
                f"the validation's negative ELBO is {row['negative_elbo']} at step {state.step}: "
                "training has diverged; lower train.learning_rate."
            )
        state = replace(state, last_valid=row)
        if state.best is not None and row["negative_elbo"] >= state.best["negative_elbo"]:
            return state
        self._export("best")
        return replace(state, best=row)

    def report(self, state: RunState, with_checkpoint: bool, validated: bool) -> None:
        """Report to Ray Train, with a checkpoint where one is due. A collective call."""
        if self._log is not None:
            self._log.flush()
        metrics = _reported(self._row, state.last_valid if validated else None)
        if not with_checkpoint:
            ray.train.report(metrics)
            return
        share = self._run.share
        with written_checkpoint(
            self._run.engine, self._run.spec, state, share.rank, share.num_workers
        ) as folder:
            ray.train.report(
                metrics,
                checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
                checkpoint_dir_name=checkpoint_name(state.step),
            )
        self._checkpoint_step = state.step

    def export_last(self, state: RunState) -> None:
        """Leave the final weights and figures. A collective call."""
        self._export("last")
        if not self._is_first:
            return
        if state.best is None:  # nothing was validated: the last are the best known
            copy_weights(self._output / "weights" / "last", self._output / "weights" / "best")
        (self._output / SUMMARY).write_json(self._summary(state))

    def close(self) -> None:
        """Bring the record to the storage."""
        if self._log is not None:
            self._log.close()

    def _export(self, name: str) -> None:
        target = self._output / "weights" / name
        run = self._run
        export_weights(run.engine, run.spec, run.tokenizer_folder, target, self._is_first)

    def _summary(self, state: RunState) -> dict[str, Any]:
        return {
            "steps": state.step,
            "epochs": state.position.epoch,
            "documents_seen": state.documents,
            "tokens_seen": state.tokens,
            "time_s": state.time_s,
            "steps_skipped": state.skipped,
            "num_parameters": self._run.parameters.total,
            "num_latent_parameters": self._run.parameters.latent,
            "num_trained_parameters": self._run.parameters.trained,
            "num_workers": self._run.share.num_workers,
            "num_nodes": self._num_nodes,
            "peak_memory_bytes": peak_memory_bytes(),
            "best": state.best,
            "last": state.last_valid,
        }


def peak_memory_bytes() -> int:
    """The most that this worker has held: of its GPU's memory, else of main memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def count_nodes() -> int:
    """How many nodes the workers are on. A collective call."""
    nodes: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
    return len(set(nodes))


def _reported(row: dict[str, Any], valid: dict[str, Any] | None) -> dict[str, Any]:
    """Ray's metrics are flat: the train row, and the validation's figures as `valid_*`."""
    metrics = {key: value for key, value in row.items() if isinstance(value, int | float)}
    if valid is not None:
        metrics |= {f"valid_{key}": valid[key] for key in VALID_KEYS}
    return metrics

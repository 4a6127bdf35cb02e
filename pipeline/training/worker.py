"""What each Ray Train worker runs: the whole loop, and the one step inside it."""

from __future__ import annotations

import math
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray.train
import torch

from pipeline.artifact import digest
from pipeline.batches import dropout_seed
from pipeline.cluster import scratch_folder
from pipeline.errors import UserError
from pipeline.progress import ProgressMailbox
from pipeline.specs import TrainSpec
from pipeline.storage import Location
from pipeline.training.checkpoint import (
    MeterState,
    RunState,
    agreed_name,
    find_newest,
    write_checkpoint,
)
from pipeline.training.disk import full_disk_explained
from pipeline.training.engine import grad_norm, made_update, set_learning_rate
from pipeline.training.export import copy_weights, export_weights
from pipeline.training.loader import StepBatch, TrainLoader
from pipeline.training.meter import Meter, perplexity
from pipeline.training.metrics import SUMMARY, VALID_KEYS, MetricsLog
from pipeline.training.notice import InterruptedRunError, Notice, Notices
from pipeline.training.process import prepare_process
from pipeline.training.setup import Run, start_run
from pipeline.training.store import CHECKPOINTS, CheckpointStore
from pipeline.training.upload import Uploader
from pipeline.training.watchdog import Watchdog

_PROGRESS_EVERY_S = 0.5


@dataclass(frozen=True)
class WorkerConfig:
    """What the driver tells every worker."""

    spec: TrainSpec
    dataset: Location
    output: Location
    use_gpu: bool
    mailbox: ProgressMailbox | None

    def say(self, text: str) -> None:
        """Have the driver print a sentence."""
        if self.mailbox is not None:
            self.mailbox.say(text)


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """Train from the last whole checkpoint, or from the start, to the end."""
    worker: WorkerConfig = config["worker"]
    context = ray.train.get_context()
    rank, num_workers = context.get_world_rank(), context.get_world_size()
    spec = worker.spec
    prepare_process(spec.train.cpus_per_worker, worker.use_gpu)
    store = CheckpointStore(worker.output / CHECKPOINTS, spec.train.keep_checkpoints)
    with tempfile.TemporaryDirectory(prefix="checkpoint-") as cache:
        found = find_newest(store, spec, rank, num_workers, Path(cache), worker.say)
        run = start_run(
            spec,
            worker.dataset,
            rank=rank,
            num_workers=num_workers,
            use_gpu=worker.use_gpu,
            load_universal=found is not None and found.is_universal,
        )
        if found is not None:
            found.load(run.engine)
    state, meter_state = (found.state, found.meter) if found else (RunState(), MeterState())
    with closing(Reporter(run, worker, store, state.step)) as reporter:
        train(run, state, StepMeter(run, meter_state), reporter)


def train(run: Run, state: RunState, meter: StepMeter, reporter: Reporter) -> None:
    """The loop: step by step to the last, with rows, validations and checkpoints on the way.

    Raises:
        InterruptedRunError: on notice, when there is a checkpoint of the step.
    """
    options = run.spec.train
    started = time.monotonic() - state.time_s
    with closing(run.loader(state.position)) as loader:
        while state.step < run.total_steps:
            batch = meter.timed(loader)
            updated = train_step(run, state.step, batch, meter.sums)
            state = _advanced(state, batch, updated, time.monotonic() - started)
            reporter.stepped(state)

            is_last = state.step == run.total_steps
            validates = bool(run.validation) and (state.step % options.eval_every == 0 or is_last)
            checkpoints = state.step % options.checkpoint_every == 0 or is_last
            notice = Notice.NONE if is_last else reporter.notices.agreed()
            if validates or checkpoints or state.step % options.log_every == 0:
                reporter.write(meter.row(state))
            if validates:
                state = reporter.validated(validate(run, state, reporter.watchdog.pet), state)
                reporter.report(state)
            if checkpoints or notice:
                state = reporter.checkpoint(state, meter.state)
            if validates or checkpoints:
                meter.restart_clock()
            if notice:
                reporter.leave(notice, state)
    reporter.export_last(state)


def train_step(run: Run, step: int, batch: StepBatch, sums: Meter) -> bool:
    """One optimizer step: forward and backward for each micro-batch, then the update.

    Where the gradient of any worker is not finite, no worker updates, and the step's sums do not
    count. Returns whether there was an update: the same on every worker.
    """
    set_learning_rate(run.engine, run.learning_rate(step))
    parts = run.share.num_workers * run.share.accumulation
    shared = run.spec.train.free_bits_per == "batch" and run.spec.train.free_bits > 0
    batch_kl = mean_batch_kl(run, step, batch) if shared and parts > 1 else None
    found: list[dict[str, torch.Tensor]] = []
    for micro, micro_batch in enumerate(batch.micro_batches):
        seed_dropout(run, step, micro)
        loss, summed = run.engine(
            **micro_batch.arguments(run.device), beta=run.beta(step), batch_kl=batch_kl
        )
        run.engine.backward(loss)
        run.engine.step()  # updates after the last micro-batch
        found.append(summed)
    if not made_update(run.engine):
        return False
    for summed in found:
        sums.add(summed, loss_scale=batch.num_documents / parts)
    return True


def seed_dropout(run: Run, step: int, micro: int) -> None:
    """Have a micro-batch of this worker draw its own dropout, the same whenever it is read."""
    part = micro * run.share.num_workers + run.share.rank
    torch.manual_seed(dropout_seed(run.spec.train.seed, step, part))


@torch.no_grad()
def mean_batch_kl(run: Run, step: int, batch: StepBatch) -> torch.Tensor:
    """Nats a document of the charged KL, over all of a global batch. A collective call.

    Free bits that a batch shares need it before the first backward pass, and no part of the batch
    knows it: one more pass of the encoder, under the same dropout.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=run.device)
    for micro, micro_batch in enumerate(batch.micro_batches):
        seed_dropout(run, step, micro)
        _, found = run.engine(**micro_batch.arguments(run.device), beta=0.0, only_kl=True)
        sums += torch.stack([found["charged_kl"].double(), found["num_documents"].double()])
    torch.distributed.all_reduce(sums)
    return sums[0] / sums[1]


@torch.no_grad()
def validate(run: Run, state: RunState, on_batch: Callable[[], None]) -> dict[str, Any]:
    """Figures over the validation documents; the noise is the same every time."""
    started = time.monotonic()
    meter = Meter(run.num_layers, run.device)
    run.engine.eval()
    for micro_batch in run.validation:
        beta = run.beta(state.step)
        _, summed = run.engine(**micro_batch.arguments(run.device), beta=beta)
        meter.add(summed)
        on_batch()
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
    """Sums and times of the steps since the last row.

    Args:
        run: whose steps.
        start: what a checkpoint between two rows kept of them.
    """

    def __init__(self, run: Run, start: MeterState) -> None:
        self._run = run
        self.sums = Meter(run.num_layers, run.device)
        self.sums.restore(start.sums)
        self._steps = start.steps
        self._waited_s = self._loader_waited_s = 0.0
        self._clock = time.perf_counter() - start.took_s

    @property
    def state(self) -> MeterState:
        """What a checkpoint keeps, so that the next row is the one of an uninterrupted run."""
        return MeterState(self.sums.local, self._steps, time.perf_counter() - self._clock)

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
    """Where figures, checkpoints and weights go; rank 0 writes what all ranks agree on.

    A collective call: its making, as most of what it does.
    """

    def __init__(
        self, run: Run, worker: WorkerConfig, store: CheckpointStore, resume_step: int
    ) -> None:
        self._run, self._output = run, worker.output
        options, share = run.spec.train, run.share
        self._is_first = share.rank == 0
        self._mailbox = worker.mailbox if self._is_first else None
        self._num_nodes = count_nodes()
        attempt = agreed_name()
        self._scratch = rank_scratch(worker.output, share.rank, attempt)
        self._uploader = Uploader(store, share.rank, share.num_workers, attempt, resume_step)
        self.watchdog = Watchdog(options.step_timeout_s, worker.say, f"worker {share.rank}")
        self.notices = Notices(run.device, options.grace_s, self._asked)
        self._log = None
        if self._is_first:
            with self._explained():
                self._log = MetricsLog(worker.output, resume_step)
        self._resumed, self._sent_at = resume_step, 0.0
        self._notes: dict[str, Any] = {}
        self._row: dict[str, Any] = {}
        if self._mailbox is not None:
            self._mailbox.set_training(True)

    def _asked(self) -> str | None:
        return None if self._mailbox is None else self._mailbox.asked()

    def _explained(self) -> AbstractContextManager[None]:
        return full_disk_explained(self._output, lambda: self._uploader.kept)

    def stepped(self, state: RunState) -> None:
        """Hear of a step that was made.

        Raises:
            UserError: if the gradients stay infinite or NaN, or a disk is full.
        """
        self.watchdog.pet()
        self._uploader.check()
        self.require_updates(state)
        self.progress(state)

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
        self._uploader.wait()
        raise UserError(
            f"the gradient was not finite in {state.skipped_in_a_row} steps in a row, up to step "
            f"{state.step} (train.max_skipped_steps={options.max_skipped_steps}): training has "
            f"diverged; lower train.learning_rate (now {options.learning_rate:g}) or raise "
            f"train.warmup_steps; {self._uploader.kept}."
        )

    def write(self, row: dict[str, Any] | None) -> None:
        """Add a row to the record, where there is one."""
        if row is None:
            return
        if self._log is not None:
            with self._explained():
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

    def report(self, state: RunState) -> None:
        """Report a validation to Ray Train, for those who search. A collective call."""
        ray.train.report(_reported(self._row, state.last_valid))

    def checkpoint(self, state: RunState, meter: MeterState) -> RunState:
        """Write a checkpoint here, and have it brought to the storage. A collective call.

        The rows up to it reach the storage first. Returns the state with the time that it took.

        Raises:
            UserError: if a disk is full.
        """
        started = time.monotonic()
        self._flush()
        self._uploader.wait()  # before there is a second one in scratch space
        share = self._run.share
        scratch = self._scratch / f"{state.step}"
        with full_disk_explained(scratch, lambda: self._uploader.kept):
            scratch.mkdir(parents=True)
            manifest = write_checkpoint(
                self._run.engine,
                self._run.spec,
                state,
                meter,
                share.rank,
                share.num_workers,
                self._run.tokenizer_folder,
                scratch,
            )
        self._uploader.submit(scratch, manifest)
        self.watchdog.pet()
        return replace(state, checkpoint_s=state.checkpoint_s + time.monotonic() - started)

    def _flush(self) -> None:
        if self._log is not None:
            with self._explained():
                self._log.flush()

    def leave(self, notice: Notice, state: RunState) -> None:
        """End this worker when the checkpoint is in the storage. A collective call.

        Raises:
            InterruptedRunError: always.
        """
        self._uploader.wait()
        torch.distributed.barrier()  # the first to leave has the others ended
        if self._mailbox is not None:
            self._mailbox.say(
                f"interrupted at step {state.step:,} ({notice.name.lower()}); {self._uploader.kept}"
            )
        raise InterruptedRunError(notice, state.step)

    def export_last(self, state: RunState) -> None:
        """Leave the final weights and figures. A collective call."""
        self._uploader.wait()
        self._export("last")
        if not self._is_first:
            return
        if state.best is None:  # nothing was validated: the last are the best known
            copy_weights(self._output / "weights" / "last", self._output / "weights" / "best")
        (self._output / SUMMARY).write_json(self._summary(state))

    def close(self) -> None:
        """Bring the record to the storage, and watch no longer."""
        self.watchdog.close()
        self.notices.close()
        self._uploader.close()
        shutil.rmtree(self._scratch, ignore_errors=True)
        if self._log is not None:
            with self._explained():
                self._log.close()
        if self._mailbox is not None:
            self._mailbox.set_training(False)

    def _export(self, name: str) -> None:
        target = self._output / "weights" / name
        run = self._run
        with self._explained():
            export_weights(run.engine, run.spec, run.tokenizer_folder, target, self._is_first)
        self.watchdog.pet()

    def _summary(self, state: RunState) -> dict[str, Any]:
        return {
            "steps": state.step,
            "epochs": state.position.epoch,
            "documents_seen": state.documents,
            "tokens_seen": state.tokens,
            "time_s": state.time_s,
            "checkpoint_s": state.checkpoint_s,
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


def rank_scratch(output: Location, rank: int, attempt: str) -> Path:
    """A local folder for this rank's checkpoints; what an attempt that died left is deleted."""
    folder = scratch_folder() / "checkpoints"
    mine = f"{digest(str(output))[:16]}-{rank:05d}"
    for left in folder.glob(f"{mine}-*"):
        shutil.rmtree(left, ignore_errors=True)
    return folder / f"{mine}-{attempt}"


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

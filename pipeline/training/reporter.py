"""Where a training's figures, checkpoints and weights go: the driver, Ray Train and the storage."""

from __future__ import annotations

import math
import resource
import shutil
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train
import torch

from pipeline.artifact import digest
from pipeline.cluster import scratch_folder
from pipeline.errors import UserError
from pipeline.storage import Location
from pipeline.training.checkpoint import MeterState, RunState, agreed_name, write_checkpoint
from pipeline.training.disk import full_disk_explained
from pipeline.training.export import copy_weights, export_weights
from pipeline.training.metrics import SUMMARY, VALID_KEYS, MetricsLog
from pipeline.training.notice import InterruptedRunError, Notice, Notices
from pipeline.training.setup import Run
from pipeline.training.store import CheckpointStore
from pipeline.training.upload import Uploader
from pipeline.training.watchdog import Watchdog
from pipeline.training.worker_config import WorkerConfig

_PROGRESS_EVERY_S = 0.5


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
        ray.train.report(reported_to_ray(self._row, state.last_valid))

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


def reported_to_ray(row: dict[str, Any], valid: dict[str, Any] | None) -> dict[str, Any]:
    """Ray's metrics are flat: the train row, and the validation's figures as `valid_*`."""
    metrics = {key: value for key, value in row.items() if isinstance(value, int | float)}
    if valid is not None:
        metrics |= {f"valid_{key}": valid[key] for key in VALID_KEYS}
    return metrics

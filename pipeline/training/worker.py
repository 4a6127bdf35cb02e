"""What each Ray Train worker runs: the whole loop, and the one step inside it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train
import torch

from pipeline.batches import dropout_seed
from pipeline.training.checkpoint import MeterState, RunState, find_newest
from pipeline.training.engine import made_update, set_learning_rate
from pipeline.training.loader import StepBatch
from pipeline.training.meter import Meter, perplexity
from pipeline.training.notice import Notice
from pipeline.training.process import prepare_process
from pipeline.training.reporter import Reporter
from pipeline.training.setup import Run, start_run
from pipeline.training.step_meter import StepMeter
from pipeline.training.store import CHECKPOINTS, CheckpointStore
from pipeline.training.worker_config import WorkerConfig


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

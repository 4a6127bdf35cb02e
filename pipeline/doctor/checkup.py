"""All checks in order; each that can be made is made, whatever the others found."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console

from pipeline.artifact import now, versions
from pipeline.cluster import connected, wants_gpu
from pipeline.doctor.checks import Check, print_checks
from pipeline.doctor.collective import Collective, check_collective, measure
from pipeline.doctor.memory import Need, check_memory, estimate
from pipeline.doctor.nodes import (
    check_budget,
    check_storage,
    check_tokens,
    check_versions,
    most_workers,
    report_nodes,
)
from pipeline.errors import UserError
from pipeline.secrets import redacted
from pipeline.shards import Dataset
from pipeline.specs.doctor import DoctorSpec
from pipeline.storage import Location
from pipeline.training.model import Vocabulary

FILE_NAME = "doctor.json"


def run_doctor(spec: DoctorSpec, dataset: Location | None, output: Location) -> list[Check]:
    """Look a cluster over, print the table, and leave `doctor.json` in `output`.

    Args:
        spec: the cluster, and the training that it is to carry.
        dataset: what that training will read, if it is there already: it tells the vocabulary.
        output: a folder of the storage that is checked.

    Raises:
        UserError: if no cluster answers, or the training's settings are refused.
    """
    vocabulary = _vocabulary(spec, dataset)
    workers = most_workers(spec.train)
    need = estimate(spec.training, vocabulary, workers)
    found: Collective | Exception | None = None
    with connected(spec.cluster):
        nodes = report_nodes()
        budget, storage = check_budget(nodes, spec.train), check_storage(output, nodes)
        checks = [check_versions(nodes), budget, storage, check_tokens(nodes)]
        if budget.state == "wrong" or storage.state == "wrong":
            lacking = "CPUs and GPUs" if budget.state == "wrong" else "storage"
            checks.append(
                Check("collective", "warning", f"not tried: {lacking} first", "see there")
            )
        else:
            found = _measured(spec, workers, output)
            checks.append(check_collective(found))
        places = found.places if isinstance(found, Collective) else []
        checks += check_memory(need, spec.training, nodes, places)
    print_checks(Console(), checks)
    if storage.state == "ok":
        measured = asdict(found) if isinstance(found, Collective) else None
        _record(output, spec, checks, need, [asdict(node) for node in nodes], measured)
    return checks


def _vocabulary(spec: DoctorSpec, dataset: Location | None) -> Vocabulary:
    if dataset is not None:
        return Vocabulary.of(Dataset.open(dataset))
    size = spec.vocab_size
    return Vocabulary(size, size, 0, min(1, size - 1), min(2, size - 1))


def _measured(spec: DoctorSpec, workers: int, output: Location) -> Collective | Exception:
    try:
        use_gpu = wants_gpu(spec.train.use_gpu, workers, "train.num_workers")
        return measure(spec.train, workers, use_gpu, spec.collective_bytes, output)
    except UserError:
        raise
    except Exception as error:  # whatever the workers met is what the check tells
        return error


def _record(
    output: Location,
    spec: DoctorSpec,
    checks: list[Check],
    need: Need,
    nodes: list[dict[str, Any]],
    collective: dict[str, Any] | None,
) -> None:
    record = {
        "at": now(),
        "spec": spec.model_dump(mode="json"),
        "versions": versions(),
        "checks": [asdict(check) for check in checks],
        "nodes": nodes,
        "estimated_bytes_per_worker": asdict(need),
        "collective": collective,
    }
    (output / FILE_NAME).write_json(redacted(record))

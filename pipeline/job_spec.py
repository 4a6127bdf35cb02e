"""A job: stages that read each other's output, in one typed graph."""

from __future__ import annotations

import graphlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import UserError, nearest
from pipeline.runner import Input, Planned, plan
from pipeline.specs import ClusterSpec, Spec
from pipeline.storage import Location


@dataclass(frozen=True)
class StageReference:
    """The output of another stage of the same job: `${stage:NAME}` in its file."""

    name: str


Source = StageReference | Location


@dataclass(frozen=True)
class JobStage:
    """One stage of a job: which kind, its spec, and where its inputs come from."""

    name: str
    kind: str
    spec: Spec
    inputs: Mapping[str, Source | Sequence[Source]]

    @property
    def needs(self) -> set[str]:
        """Names of the stages whose output this one reads."""
        return {source.name for source in self._sources() if isinstance(source, StageReference)}

    def _sources(self) -> Iterator[Source]:
        for given in self.inputs.values():
            if isinstance(given, StageReference | Location):
                yield given
            else:
                yield from given


@dataclass(frozen=True)
class JobSpec:
    """The stages of a job, in an order in which each comes after those that it needs."""

    name: str
    stages: tuple[JobStage, ...]
    cluster: ClusterSpec

    @classmethod
    def build(cls, name: str, stages: Mapping[str, JobStage], cluster: ClusterSpec) -> JobSpec:
        """Order the stages.

        Raises:
            UserError: if there is none, one refers to a stage that is not there, or they form a
                cycle.
        """
        if not stages:
            raise UserError(f"job {name}: it has no stages; give at least one under 'stages:'.")
        for stage in stages.values():
            for needed in stage.needs - stages.keys():
                raise UserError(
                    f"job {name}: stage '{stage.name}' refers to ${{stage:{needed}}}, which is not "
                    f"there{nearest(needed, stages)}; the stages are: {', '.join(stages)}."
                )
        graph = {name: stage.needs for name, stage in stages.items()}
        try:
            order = list(graphlib.TopologicalSorter(graph).static_order())
        except graphlib.CycleError as error:
            raise UserError(
                f"job {name}: the stages {' -> '.join(error.args[1])} wait for each other in a "
                "cycle, so none could start; remove one of these references."
            ) from None
        position = {stage: index for index, stage in enumerate(stages)}
        depth: dict[str, int] = {}
        for stage_name in order:
            depth[stage_name] = max((depth[n] + 1 for n in graph[stage_name]), default=0)
        ordered = sorted(order, key=lambda n: (depth[n], position[n]))
        return cls(name, tuple(stages[n] for n in ordered), cluster)

    def plan(self, storage: Location) -> Iterator[tuple[JobStage, Planned]]:
        """Name every stage's work by content, in order; nothing is run.

        A stage's fingerprint comes from its spec and its inputs' fingerprints, so the whole chain
        is known before its first stage has run.
        """
        planned: dict[str, Planned] = {}
        for stage in self.stages:

            def resolved(key: str, source: Source) -> Input:
                if isinstance(source, StageReference):
                    return planned[source.name].as_input()
                return Input.of_folder(key, source)

            inputs: dict[str, Input | list[Input]] = {
                key: resolved(key, given)
                if isinstance(given, StageReference | Location)
                else [resolved(key, source) for source in given]
                for key, given in stage.inputs.items()
            }
            planned[stage.name] = plan(stage.kind, stage.spec, inputs, storage)
            yield stage, planned[stage.name]

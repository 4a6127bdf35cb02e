"""A job: stages that read each other's output, in one typed graph."""

from __future__ import annotations

import graphlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from pipeline.errors import UserError, nearest
from pipeline.runner import Input, Planned, plan
from pipeline.specs import ClusterSpec, Spec
from pipeline.specs.job import StageOptions
from pipeline.storage import Location


@dataclass(frozen=True)
class StageReference:
    """The output of another stage of the same job: `${stage:NAME}` in its file."""

    name: str


Source = StageReference | Location


@dataclass(frozen=True)
class TrialSettings:
    """That a stage's spec takes the settings of a search's best trial, once they are known."""

    search: StageReference
    spec_with: Callable[[Location], Spec]  # from the search's folder


@dataclass(frozen=True)
class JobStage:
    """One stage of a job: which kind, its spec, where its inputs come from, how it is run."""

    name: str
    kind: str
    spec: Spec
    inputs: Mapping[str, Source | Sequence[Source]]
    trial: TrialSettings | None = None
    options: StageOptions = field(default_factory=StageOptions)
    place: str = ""  # where in its file it stands, for errors
    copy_of: str = ""  # the entry of that file, where it stands for many

    def is_among(self, names: Collection[str]) -> bool:
        """Whether it is meant by one of the names, its own or that of all copies of its entry."""
        return self.name in names or self.copy_of in names

    @property
    def needs(self) -> set[str]:
        """Names of the stages whose output this one reads."""
        names = {source.name for source in self._sources() if isinstance(source, StageReference)}
        return names | ({self.trial.search.name} if self.trial else set())

    def _sources(self) -> Iterator[Source]:
        for given in self.inputs.values():
            if isinstance(given, StageReference | Location):
                yield given
            else:
                yield from given

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Say of an error in the body that it is this stage's, and where that stands."""
        try:
            yield
        except UserError as error:
            head = f"stage '{self.name}': "
            message = error.message.removeprefix(head)
            place = f"{self.place}: " if self.place else ""
            raise UserError(f"{place}{head}{message}") from None


@dataclass(frozen=True)
class Undetermined:
    """A stage whose work has no name yet: its spec comes out of a search that is not done."""

    waits_for: str

    is_done = False


@dataclass(frozen=True)
class JobSpec:
    """The stages of a job, in an order in which each comes after those that it needs."""

    name: str
    stages: tuple[JobStage, ...]
    cluster: ClusterSpec
    with_code: bool = False  # the code's version is part of every stage's identity

    @classmethod
    def build(
        cls,
        name: str,
        stages: Mapping[str, JobStage],
        cluster: ClusterSpec,
        with_code: bool = False,
    ) -> JobSpec:
        """Order the stages.

        Raises:
            UserError: if there is none, one refers to a stage that is not there, or they form a
                cycle.
        """
        if not stages:
            raise UserError(f"job {name}: it has no stages; give at least one under 'stages:'.")
        for stage in stages.values():
            for needed in sorted(stage.needs - stages.keys()):
                with stage.blamed():
                    raise UserError(
                        f"it refers to ${{stage:{needed}}}, which is not there"
                        f"{nearest(needed, stages)}; the stages are: {', '.join(stages)}."
                    )
        graph = {name: stage.needs for name, stage in stages.items()}
        try:
            order = list(graphlib.TopologicalSorter(graph).static_order())
        except graphlib.CycleError as error:
            cycle: list[str] = error.args[1]
            with stages[cycle[0]].blamed():
                raise UserError(
                    f"the stages {' -> '.join(cycle)} wait for each other in a cycle, so none "
                    "could start; remove one of these references."
                ) from None
        position = {stage: index for index, stage in enumerate(stages)}
        depth: dict[str, int] = {}
        for stage_name in order:
            depth[stage_name] = max((depth[n] + 1 for n in graph[stage_name]), default=0)
        ordered = sorted(order, key=lambda n: (depth[n], position[n]))
        return cls(name, tuple(stages[n] for n in ordered), cluster, with_code)

    def named(self, name: str) -> list[JobStage]:
        """The stage of that name, or all copies of the entry of that name.

        Raises:
            UserError: if there is none, with the nearest right name.
        """
        found = [stage for stage in self.stages if stage.is_among({name})]
        if not found:
            names = [stage.name for stage in self.stages]
            known = dict.fromkeys([*names, *(s.copy_of for s in self.stages if s.copy_of)])
            raise UserError(
                f"job {self.name} has no stage '{name}'{nearest(name, known)}; its stages are: "
                f"{', '.join(names)}."
            )
        return found

    def dependants(self, stages: Collection[JobStage]) -> set[str]:
        """Names of all stages that need one of these, directly or through others."""
        needed = {stage.name for stage in stages}
        found: set[str] = set()
        for stage in self.stages:  # in order: what needs comes after what is needed
            if stage.needs & (found | needed):
                found.add(stage.name)
        return found

    def plan(self, storage: Location) -> Iterator[tuple[JobStage, Planned | Undetermined]]:
        """Name every stage's work by content, in order; nothing is run.

        A stage's fingerprint comes from its spec and its inputs' fingerprints, so the whole chain
        is known before its first stage has run, but for what takes a search's settings.

        Raises:
            UserError: if an input cannot be read, or two stages are the same work, and so would
                write one folder.
        """
        planned: dict[str, Planned | Undetermined] = {}
        writers: dict[str, str] = {}
        for stage in self.stages:
            with stage.blamed():
                found = self._planned(stage, planned, storage)
                if isinstance(found, Planned):
                    other = writers.setdefault(found.fingerprint, stage.name)
                    if other != stage.name:
                        raise UserError(
                            f"it is the same work as stage '{other}' (spec and inputs are equal), "
                            f"so both would write {found.output}; remove one, and refer to "
                            f"${{stage:{other}}}."
                        )
            planned[stage.name] = found
            yield stage, found

    def _planned(
        self, stage: JobStage, known: Mapping[str, Planned | Undetermined], storage: Location
    ) -> Planned | Undetermined:
        for needed in sorted(stage.needs):
            before = known[needed]
            if isinstance(before, Undetermined):
                return before
        spec = stage.spec
        if stage.trial is not None:
            search = known[stage.trial.search.name]
            assert isinstance(search, Planned)
            if not search.is_done:
                return Undetermined(stage.trial.search.name)
            spec = stage.trial.spec_with(search.output)

        def resolved(key: str, source: Source) -> Input:
            if isinstance(source, StageReference):
                before = known[source.name]
                assert isinstance(before, Planned)
                return before.as_input()
            return Input.of_folder(key, source)

        inputs: dict[str, Input | list[Input]] = {
            key: resolved(key, given)
            if isinstance(given, StageReference | Location)
            else [resolved(key, source) for source in given]
            for key, given in stage.inputs.items()
        }
        return plan(stage.kind, spec, inputs, storage, self.with_code)

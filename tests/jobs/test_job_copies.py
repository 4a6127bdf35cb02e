"""Stages that stand for many: their names, their settings, and who reads whom."""

from __future__ import annotations

import pytest

from jobs.entry import compose
from jobs.job_copies import copies
from jobs.job_file import expand_arguments, file_of_arguments, job_from_config
from pipeline.chain.driver import Selection
from pipeline.chain.job_spec import StageReference
from pipeline.errors import UserError
from pipeline.storage import Location

SYSTEMS = {"a": {"model.latents": "none"}, "b": None}
STAGES = {
    "data": {"run": "preprocess"},
    "search": {
        "run": "tune",
        "when": True,
        "dataset": "stage:data",
        "each": {"system": {"names": ["a", "b"], "of": SYSTEMS}},
    },
    "model": {
        "run": "train",
        "dataset": "stage:data",
        "from_trial": "stage:search",
        "settings": [{"x": 1, "y": 1}, {"y": 2}],
        "x": 3,
        "each": {"system": {"names": ["a", "b"], "of": SYSTEMS}, "train.seed": [0, 7]},
    },
    "figures": {"run": "evaluate", "weights": "stage:model", "dataset": "stage:data"},
    "page": {"run": "report", "runs": ["stage:figures", "else"], "names": ["labels:figures"]},
}


def entries(stages):
    return {copy.name: copy.entry for copy in copies(stages)}


def test_copies_are_named_by_their_values_and_hold_their_settings():
    found = entries(STAGES)
    assert list(found) == [
        "data", "search-a", "search-b",
        "model-a-0", "model-a-7", "model-b-0", "model-b-7",
        "figures-a-0", "figures-a-7", "figures-b-0", "figures-b-7", "page",
    ]  # fmt: skip
    assert found["model-a-7"] == {
        "run": "train", "dataset": "stage:data", "from_trial": "stage:search-a",
        "x": 3, "y": 2, "model.latents": "none", "train.seed": 7,
    }  # fmt: skip
    assert "model.latents" not in found["figures-a-0"]


def test_copies_read_what_has_their_values_and_a_list_reads_all():
    found = entries(STAGES)
    assert found["figures-b-7"]["weights"] == "stage:model-b-7"
    assert found["page"]["runs"] == [
        "stage:figures-a-0", "stage:figures-a-7", "stage:figures-b-0", "stage:figures-b-7", "else",
    ]  # fmt: skip
    assert found["page"]["names"] == ["a", "a", "b", "b"]


def test_stage_that_is_switched_off_is_left_out_with_the_settings_from_it():
    off = STAGES | {"search": STAGES["search"] | {"when": False}}
    found = entries(off)
    assert "search-a" not in found
    assert "from_trial" not in found["model-a-0"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"each": {"system": {"names": ["c"], "of": SYSTEMS}}}, "system=c is not there"),
        ({"each": {"system": [1]}}, "for a key with a dot"),
        ({"each": [1]}, "each is a table of dimensions"),
        ({"when": "no"}, "when is true or false"),
        ({"settings": "x"}, "settings is a table"),
    ],
)
def test_copies_that_cannot_be_read_are_refused(entry, message):
    with pytest.raises(UserError, match=message) as caught:
        copies({"model": {"run": "train"} | entry})
    assert caught.value.message.startswith("stage 'model': ")


@pytest.fixture
def study(tmp_path):
    for split in ("train", "valid", "test"):
        file = tmp_path / "mine" / f"{split}.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text("a line\n")

    def build(*arguments):
        given = ["job=study", "corpus=mine", f"folder={tmp_path}", *arguments]
        return job_from_config(compose("run", expand_arguments(given)), file_of_arguments(given))

    return build


@pytest.mark.parametrize("size", ["cpu", "gpu", "pretrained"])
def test_study_of_each_size_is_a_whole_job(study, size):
    few = ("systems=[plain,optimus]", "aids=[none,free_bits]", "seeds=[0,1,2]")
    stages = {stage.name: stage for stage in study(f"size={size}", *few).stages}
    aided = [name for name in stages if name.startswith("aided_figures")]
    assert len([name for name in stages if name.startswith("figures")]) == 2 * 3
    assert len(aided) == 2 * 2 * 3
    assert len(stages["page"].inputs["runs"]) == len(stages["page"].spec.names) == 18
    assert stages["figures-optimus-2"].inputs["weights"] == StageReference("model-optimus-2")
    assert stages["model-optimus-2"].trial.search == StageReference("search-optimus")
    search = stages["aided_search-single-free_bits"].spec
    assert set(search.search.space) == {"train.learning_rate", "train.free_bits"}
    assert (search.trial.model.latents, search.trial.train.free_bits) == ("single", 5.0)
    assert all(stages[name].spec.split == "test" for name in aided)


def test_study_may_have_fewer_seeds_of_the_aids_than_of_the_systems(study):
    few = ("systems=[plain,add]", "aided=[add]", "aids=[none]", "search=false", "seeds=[0,1]")
    names = [stage.name for stage in study(*few, "aided_seeds=[1]").stages]
    trained = [name for name in names if "model" in name]
    assert trained == [
        "model-plain-0", "model-plain-1", "model-add-0", "model-add-1", "aided_model-add-none-1",
    ]  # fmt: skip


def test_study_trains_all_systems_with_the_same_steps_data_and_tokenizer(study):
    stages = [s for s in study("search=false").stages if s.kind == "train"]
    assert len(stages) == 23
    spent = {
        (
            s.spec.train.max_steps,
            s.spec.train.batch_tokens,
            s.spec.train.learning_rate,
            s.spec.model.size,
        )
        for s in stages
    }
    assert len(spent) == 1
    assert {s.inputs["dataset"] for s in stages} == {StageReference("data")}
    assert not any(s.trial for s in stages)


def test_study_takes_a_key_of_one_stage_for_all_its_copies(study):
    few = ("systems=[plain,add]", "aided=[add]", "aids=[none]", "search=false")
    stages = study(*few, "model.train.max_steps=3").stages
    stages = [stage for stage in stages if stage.name.startswith("model-")]
    assert {s.spec.train.max_steps for s in stages} == {3}


def test_stage_of_the_file_means_all_its_copies_in_a_selection(study):
    job = study("systems=[plain,add]", "aided=[]", "search=false", "seeds=[0,1]")
    chosen = [stage.name for stage in Selection(only=["data", "model"]).chosen(job)]
    assert chosen == ["data", "model-plain-0", "model-plain-1", "model-add-0", "model-add-1"]
    chosen = [stage.name for stage in Selection(start="figures").chosen(job)]
    assert chosen == [
        "figures-plain-0", "figures-plain-1", "figures-add-0", "figures-add-1", "page",
    ]  # fmt: skip
    forced = [stage.name for stage in job.stages if stage.is_among(["model-add-1", "figures"])]
    assert forced == ["model-add-1", *chosen[:-1]]
    with pytest.raises(UserError, match=r"no stage 'figure' \(did you mean 'figures'"):
        Selection(only=["figure"]).chosen(job)


def test_study_takes_what_a_search_found_over_its_tables(study, tmp_path):
    found = "train.learning_rate: 0.0042\ntrain.free_bits: 4.5\n"
    (tmp_path / "best.yaml").write_text(found)
    few = ("systems=[plain]", "aided=[della]", "aids=[free_bits]")
    stages = {stage.name: stage for stage in study(*few).stages}
    aided = stages["aided_model-della-free_bits-0"].trial.spec_with(Location.parse(tmp_path))
    assert (aided.train.learning_rate, aided.train.free_bits) == (0.0042, 4.5)
    assert (aided.train.free_bits_per, aided.train.max_steps) == ("document", 1000)
    (given,) = study(*few, "aided_model.train.learning_rate=0.001").named(
        "aided_model-della-free_bits-0"
    )
    assert given.trial.spec_with(Location.parse(tmp_path)).train.learning_rate == 0.001


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("size=big", r"'job\.sizes\.big\.learning_rates' is referred to, but is not there"),
        ("systems=[dela]", "did you mean 'della'"),
        ("sise=cpu", "did you mean 'size'"),
    ],
)
def test_study_mistakes_are_one_sentence(study, argument, message):
    with pytest.raises(UserError, match=message):
        study(argument)

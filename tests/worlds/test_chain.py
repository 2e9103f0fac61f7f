"""Chains of teachers: each seed's student is taught by its own assistant, and what makes it stale."""

import re
from contextlib import nullcontext

import pandas as pd
import pytest
from serial_executor import Serial
from small_project import write_rows
from tiny import tiny_llama, tiny_tokenizer

from kd_utils.config.parameter_files import load_parameters, notebook_config
from kd_utils.config.project_paths import CODE_ROOT
from kd_utils.models.loading import save_model
from kd_utils.records import check
from kd_utils.records.trial_record import RecordError, read_record
from kd_utils.worlds import chain
from kd_utils.worlds.chain import ChainSweep, links_of

GRID = {"distill_type": ["task_only", "black_box"], "seed": [0, 3]}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """`files(NAME=parameters)` writes parameter files where chains look for them."""
    folder = tmp_path / "papermill_params"
    folder.mkdir()
    monkeypatch.setattr(chain, "CODE_ROOT", tmp_path)

    def write(**named):
        for name, values in named.items():
            lines = [f"{key}: {value}" for key, value in {"name": name, **values}.items()]
            (folder / f"{name}.yaml").write_text("\n".join(lines))

    return write


def test_every_seed_has_an_assistant_of_its_own(files, tmp_path):
    files(first={"beta": 0.25}, second={"alpha": 0.5})
    own = {"name": "end", "chain": "first, second", "epochs": 3}
    sweep = ChainSweep(own, GRID, tmp_path / "run")
    assert list(sweep.sweeps) == [
        "first", "second-seed-0", "second-seed-3", "end-seed-0", "end-seed-3"
    ]  # fmt: skip
    trials = {link: [t.trial for t in of.trials] for link, of in sweep.sweeps.items()}
    assert trials["first"] == ["black_box_seed0", "black_box_seed3"]
    assert trials["second-seed-3"] == ["black_box_seed3"]
    assert trials["end-seed-3"] == ["task_only_seed3", "black_box_seed3"]
    for before, link in (("first", "second-seed-3"), ("second-seed-3", "end-seed-3")):
        teacher = sweep.sweeps[link].parameters["teacher"]
        [made] = [t for t in sweep.sweeps[before].trials if t.trial == "black_box_seed3"]
        config = notebook_config("03_train_student", made.parameters)
        assert teacher == str(config.student_folder) or str(config.student_folder).endswith(teacher)
        assert sweep.sweeps[link].parameters["teacher_epochs"] == 0
    names = [of.name for of in sweep.sweeps.values()]
    assert names == ["end-first", "end-second-0", "end-second-3", "end-0", "end-3"]
    assert sweep.sweeps["first"].parameters["beta"] == 0.25
    assert {t.epochs for t in sweep.sweeps["end-seed-0"].trials} == {3}


def test_a_part_of_a_chain_has_its_seeds_in_every_link(files, tmp_path):
    files(first={})
    own = {"name": "end", "chain": "first"}
    sweep = ChainSweep(own, GRID, tmp_path / "run", "seed=3,distill_type=black_box")
    assert {link: [t.trial for t in of.chosen] for link, of in sweep.sweeps.items()} == {
        "first": ["black_box_seed3"], "end-seed-0": [], "end-seed-3": ["black_box_seed3"]
    }  # fmt: skip
    assert list(sweep._to_run) == ["first", "end-seed-3"]
    planned = {link: [t.trial for t in of.trials] for link, of in sweep.sweeps.items()}
    assert planned["first"] == ["black_box_seed0", "black_box_seed3"]  # the plan is the whole grid
    assert not any("end-seed-0" in line for line in sweep.dry_run())
    long = own | {"name": "n" * 60}
    with pytest.raises(ValueError, match="has more than 60 letters: give the experiment a shorter"):
        ChainSweep(long, GRID, tmp_path / "run")
    with pytest.raises(ValueError, match="seed=4 is not in the grid"):
        ChainSweep(own, GRID, tmp_path / "run", "seed=4")
    with pytest.raises(ValueError, match="end has chain and worlds: give one of them"):
        ChainSweep(own | {"worlds": "1-2"}, GRID, tmp_path / "run")


def test_a_chain_stops_where_an_assistant_is_missing(files, tmp_path):
    files(first={})
    sweep = ChainSweep({"name": "end", "chain": "first"}, GRID, tmp_path / "run")
    results = pd.DataFrame({"trial": ["a", "b"], "status": ["done", "failed"]})
    with pytest.raises(ValueError, match="first: b is not done, and its student is to teach"):
        sweep._require_done("first", results)
    sweep._require_done("first", results[:1])
    sweep._require_done("end-seed-3", results)  # teaches nobody


@pytest.mark.parametrize(
    "chained, message",
    [
        ("end", "chain = 'end' of end comes back to end: a student cannot teach its own teacher"),
        ("first second first", "comes back to first"),
        (
            "first looped",
            "chain names looped, whose file has `chain` itself: write the whole chain",
        ),
        ("nowhere", "no parameter file .*nowhere.yaml"),
        ("forgets", "chain names forgets, whose students are not kept: set save_student to True"),
        ("still", "chain names still, whose distill_type is untrained, which trains no student"),
        (
            "elsewhere",
            "chain names elsewhere, whose data_seed is 7, and that of end is 0: all links need",
        ),
        ('" "', "chain is empty"),
    ],
)
def test_what_is_no_chain_is_refused_in_one_line(files, chained, message):
    files(first={}, second={}, looped={"chain": "first"}, forgets={"save_student": False})
    files(still={"distill_type": "untrained"}, elsewhere={"data_seed": 7})
    with pytest.raises((ValueError, FileNotFoundError), match=message) as told:
        links_of({"name": "end", "chain": chained.strip('"')})
    assert "\n" not in str(told.value)


def test_a_grid_of_a_chain_has_seeds(files, tmp_path):
    files(first={})
    with pytest.raises(ValueError, match="a grid for a chain needs a key of its own for the seeds"):
        ChainSweep({"name": "end", "chain": "first"}, {"seed epochs": [[0, 1]]}, tmp_path / "run")


def test_a_run_of_one_experiment_is_no_chain(tmp_path):
    with pytest.raises(RecordError, match="run is no run of a chain: sweep a parameter file"):
        chain.last_runs(tmp_path / "run")


def test_the_projects_chains_are_planned(tmp_path):
    parameters = load_parameters(CODE_ROOT / "papermill_params" / "toy-chain.yaml")
    sweep = ChainSweep(parameters, GRID, tmp_path / "run")
    assert list(sweep.sweeps)[0] == "toy-large"
    trained = notebook_config("03_train_student", sweep.sweeps["toy-chain-seed-3"].parameters)
    assert trained.student == "teacher" and trained.student_init == "pruned"


@pytest.mark.notebook
def test_a_student_is_taught_by_the_assistant_of_its_seed(files, tmp_path, monkeypatch):
    """Really trained; an assistant that changed makes its student's cache and trial stale."""
    write_rows(tmp_path / "data")
    tokenizer = tiny_tokenizer(begin=False)
    model = tiny_llama(layers=2, vocab=len(tokenizer), max_position_embeddings=512)
    save_model(model, tokenizer, tmp_path / "teacher")
    common = {
        "artifacts_dir": tmp_path / "artifacts", "build": "none", "data_dir": tmp_path / "data",
        "tokenizer": tmp_path / "teacher", "train_rows": "sst2:12", "validation_rows": "sst2:4",
        "held_out_rows": 2, "labelled": 1, "teacher_epochs": 0, "device": "cpu", "epochs": 1,
        "evaluations": 1, "batch_size": 6, "student": "teacher", "student_init": "pruned",
    }  # fmt: skip
    common = {key: value if isinstance(value, int) else str(value) for key, value in common.items()}
    files(helper=common | {"teacher": str(tmp_path / "teacher"), "keep_mlp": 40})
    from kd_utils.sweep import sweep as sweeps

    stage = sweeps.execute_stage
    skip = "04_analyse_results"
    monkeypatch.setattr(
        sweeps, "execute_stage", lambda stem, *more: stem == skip or stage(stem, *more)
    )
    grid = {"distill_type": ["black_box"], "seed": [3]}

    def run():
        executor = Serial()
        made = ChainSweep(
            common | {"name": "end", "chain": "helper", "keep_mlp": 16}, grid, tmp_path / "run"
        )
        results = made.run(lambda: nullcontext(executor))
        assert (results["status"] == "done").all() and len(results) == 2
        return executor.ran, made

    ran, made = run()
    assert ran == ["black_box_seed3"] * 2
    *_, chosen_by = made.outcome(pd.read_csv(tmp_path / "run" / "results_summary.csv"))
    assert re.match(r"end, black_box: held-out accuracy \d+\.\d; choose", chosen_by)
    last = read_record(tmp_path / "run" / "link-end-seed-3" / "trials" / "black_box_seed3")
    helper = notebook_config("03_train_student", made.sweeps["helper"].trials[0].parameters)
    assert last["teacher"]["name"].endswith(str(helper.student_folder).lstrip("/").split("/")[-1])
    assert last["sizes"]["teacher"]["non_embedding"] > last["sizes"]["student"]["non_embedding"]
    problems = check.check_run(tmp_path / "run")
    assert problems and all("04_analyse_results.ipynb is missing" in line for line in problems)
    assert chain.last_runs(tmp_path / "run") == [tmp_path / "run" / "link-end-seed-3"]
    assert run()[0] == []
    changed = helper.student_folder / "generation_config.json"
    changed.write_text(changed.read_text() + " ")
    assert "teacher changed (weights)" in made.sweeps["end-seed-3"].why_to_run("02_cache_teacher")
    assert run()[0] == ["black_box_seed3"]

"""What of a sweep is done: what its trials have to be made of where there is no cache, and models
that are gone.
"""

import dataclasses

from stubs import metrics_of, write_notebook, write_trial

from kd_utils.config import notebook_files
from kd_utils.records import run_folder
from kd_utils.store.files import sha256_file
from kd_utils.store.sealed import SealedFolder
from kd_utils.sweep import planning, staleness
from kd_utils.sweep.sweep import Sweep


def test_a_plan_names_the_earlier_cache_until_there_is_another(run_dir):
    """Without it trials of two caches would count as done beside each other."""
    parameters = {"name": "stub"}
    grid = {"distill_type": ["black_box"], "seed": [0]}
    trials = planning.plan(parameters, grid, run_dir)
    earlier = run_folder.read_plan(run_dir)
    sweep = Sweep(parameters, grid, run_dir)
    sweep._write_plan()
    plan = run_folder.read_plan(run_dir)
    assert len(plan["trials"]) == 1 and plan["code"] != earlier["code"]
    for key in ("cache", "more_caches", "tokenizer", "students"):
        assert plan[key] == earlier[key] != {}
    config_hash = metrics_of("black_box", 1)["config_hash"]
    other = dataclasses.replace(trials[0], trial="black_box_seed1", config_hash=config_hash)
    write_trial(run_dir, "black_box", 1, code=plan["code"])
    assert sweep.states([other])["black_box_seed1"].state == "done"
    write_trial(
        run_dir,
        "black_box",
        1,
        code=plan["code"],
        cache=metrics_of()["cache"] | {"content_hash": "other"},
    )
    assert sweep.states([other])["black_box_seed1"].why.startswith("teacher cache changed")


def test_a_stage_whose_notebook_is_edited_while_it_runs_is_not_done(stub_notebooks):
    """Its record names what was executed, not what the notebook is by then."""
    run_dir, parameters = stub_notebooks / "runs" / "stub", {"name": "stub", "build": "none"}
    asked = staleness.asked_of("01_prepare_data", parameters)

    def about():
        notebook = notebook_files.notebook_path("01_prepare_data")
        text = notebook.read_text()
        notebook.write_text(text.replace("from kd_utils.store", "edited = 1\\nfrom kd_utils.store"))
        assert notebook.read_text() != text
        return staleness.stage_key("01_prepare_data", parameters, asked)

    data = stub_notebooks / "artifacts" / "data" / "stub" / "manifest.json"
    data.parent.mkdir(parents=True)
    data.write_text("{}")
    write_notebook(run_dir / "01_prepare_data.ipynb", about())
    why = staleness.why_to_run("01_prepare_data", run_dir, parameters)
    assert why == "code changed (notebooks/01_prepare_data.ipynb)"


def test_01_is_run_again_where_a_model_that_it_makes_is_gone(stub_notebooks):
    models = {
        name: stub_notebooks / "artifacts" / "embedded" / "toy" / name
        for name in ("student", "teacher")
    }
    for folder in models.values():
        folder.mkdir(parents=True)
        (folder / "model.safetensors").touch()
    parameters = {key: f"artifacts/embedded/toy/{key}" for key in models} | {"build": "toy"}
    assert "student is missing" not in staleness._why_data_stale(parameters)
    sealed = SealedFolder(models["student"].parent, "toy.json")
    (models["teacher"] / "config.json").write_text("{}")
    sealed.seal({}, {"teacher/config.json": sha256_file(models["teacher"] / "config.json")})
    assert "toy" not in staleness._why_data_stale(parameters).split("data/")[0]
    (models["teacher"] / "config.json").write_text("[]")
    assert staleness._why_data_stale(parameters).startswith(
        "artifacts/embedded/toy/teacher/config.json is damaged"
    )
    (models["student"] / "model.safetensors").unlink()
    assert staleness._why_data_stale(parameters) == "artifacts/embedded/toy/student is missing"
    assert "student is missing" not in staleness._why_data_stale(parameters | {"build": "none"})

"""Planning: a parameter file times a grid as named trials, all checked, nothing run."""

import pytest
from stubs import VALUES
from transformers import LlamaConfig

from kd_utils.analysis.compression.contrasts import QUESTIONS, Kind
from kd_utils.analysis.compression.students import start_of
from kd_utils.config import parameter_files, project_paths
from kd_utils.config.trial import DISTILLATIONS, TrialConfig
from kd_utils.demos import toy_large
from kd_utils.models.initial import ways
from kd_utils.sweep import planning

GRIDS = sorted(project_paths.CODE_ROOT.glob("papermill_params/grid-*.yaml"))
SMOL = dict(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
)
GRID = {"distill_type": ["black_box", "attention"], "seed": [0, 1, 2, 3]}


def test_the_projects_grid_is_28_trials_and_their_references(stub_notebooks):
    trials = planning.plan({}, parameter_files.load_grid(), stub_notebooks / "runs" / "stub")
    of_method = {
        method: [t.swept["seed"] for t in trials if t.swept["distill_type"] == method]
        for method in parameter_files.load_grid()["distill_type"]
    }
    assert of_method == {
        method: [0] if method == "untrained" else list(range(7)) for method in of_method
    }
    assert of_method.keys() >= {"untrained", "task_only", *DISTILLATIONS}
    assert sum(len(of_method[method]) for method in DISTILLATIONS) == 28
    assert len({t.config_hash for t in trials}) == len(trials) == 57
    assert [t.epochs for t in trials if t.swept["distill_type"] == "untrained"] == [1]


def test_the_untrained_student_goes_with_every_seed(stub_notebooks):
    grid = {"distill_type": ["untrained", "task_only"], "seed": [0, 1]}
    chosen = planning.select(planning.plan({}, grid, stub_notebooks / "runs" / "x"), "seed=1", grid)
    assert [t.trial for t in chosen] == ["untrained_seed0", "task_only_seed1"]


def test_parameters_that_change_together_are_planned_and_chosen_together(stub_notebooks):
    grid = {
        "distill_type": ["black_box"],
        "epochs learning_rate": [[1, 0.1], [2, 0.1], [2, 0.2]],
        "seed": [0, 1],
    }
    trials = planning.plan({}, grid, stub_notebooks / "runs" / "x")
    assert len(trials) == 6
    assert trials[2].trial == "black_box_seed0_epochs=2_learning_rate=0.1"
    assert trials[2].parameters["learning_rate"] == 0.1 and trials[2].epochs == 2

    def chosen(only):
        return {
            (t.swept["epochs"], t.swept["learning_rate"])
            for t in planning.select(trials, only, grid)
        }

    assert chosen("epochs=2") == {(2, 0.1), (2, 0.2)}
    assert chosen("learning_rate=0.1,epochs=2,seed=1") == {(2, 0.1)}
    with pytest.raises(ValueError, match="the grid has distill_type, epochs, learning_rate, seed"):
        planning.select(trials, "epochs learning_rate=2", grid)
    with pytest.raises(ValueError, match="epochs=3 is not in the grid, which has 1, 2$"):
        planning.select(trials, "epochs=3", grid)


def test_a_combination_that_is_refused_is_named(stub_notebooks):
    with pytest.raises(
        ValueError,
        match="every weight of the loss is 0.*in the grid: distill_type=task_only, alpha=0",
    ):
        planning.plan(
            {},
            {"distill_type": ["black_box", "task_only"], "alpha": [1, 0]},
            stub_notebooks / "runs" / "x",
        )


def test_a_method_that_does_not_use_a_swept_key_is_one_trial_for_all_its_values(stub_notebooks):
    grid = {
        "distill_type": ["task_only", "black_box", "hidden_state"],
        "gamma_hidden": [0.1, 1.0],
        "seed": [0, 1],
    }
    trials = planning.plan({}, grid, stub_notebooks / "runs" / "x")
    assert [t.trial for t in trials] == [
        "task_only_seed0",
        "task_only_seed1",
        "black_box_seed0",
        "black_box_seed1",
        *(
            f"hidden_state_seed{seed}_gamma_hidden={gamma}"
            for gamma in (0.1, 1.0)
            for seed in (0, 1)
        ),
    ]
    assert "gamma_hidden" not in trials[0].swept and "gamma_hidden" not in trials[0].parameters
    chosen = planning.select(trials, "gamma_hidden=1,seed=0", grid)
    assert [t.trial for t in chosen] == [
        "task_only_seed0",
        "black_box_seed0",
        "hidden_state_seed0_gamma_hidden=1.0",
    ]


@pytest.mark.parametrize(
    "path",
    [path for path in GRIDS if not path.stem.startswith(("grid-cut", "grid-chain"))],
    ids=lambda path: path.stem,
)
def test_every_further_grid_is_planned_with_its_references_once(stub_notebooks, path):
    grid = parameter_files.load_grid(path)
    trials = planning.plan({}, grid, planning.default_run_dir({}, path))
    seeds = len(grid["seed"])
    of_task_only = [t.swept for t in trials if t.swept["distill_type"] == "task_only"]
    # Every trained method has epochs; no other swept key is one of task_only's.
    assert len(of_task_only) == seeds * len(grid.get("epochs", [0]))
    last = [t.swept for t in trials if t.swept["distill_type"] == grid["distill_type"][-1]]
    if set(last[0]) == {"distill_type", "seed"}:  # grid-worlds, whose pairs are worlds
        return
    [key] = set(last[0]) - {"distill_type", "seed"}
    values = [swept[key] for swept in last]
    assert values == [value for value in grid[key] for _ in range(seeds)]
    assert planning.default_run_dir({}, path).name == f"stub-{path.stem.removeprefix('grid-')}"


@pytest.mark.parametrize(
    "path", [path for path in GRIDS if path.stem.startswith("grid-cut")], ids=lambda path: path.stem
)
def test_every_grid_of_cuts_asks_a_question_with_seeds_enough(path):
    """Of the real notebook and its file: each size is possible, and no arm stands alone."""
    smol = path.stem == "grid-cut-smol"
    params = project_paths.CODE_ROOT / "papermill_params"
    others = {"grid-cut-smol": "smol.yaml", "grid-cut-states": "toy-large-layers.yaml"}
    file = others.get(path.stem, "toy-large.yaml")
    # Of real weights, and of whether a kind rests, three seeds; of a comparison of kinds, five.
    least = 3 if path.stem.endswith(("-smol", "-twice")) else 5
    parameters = parameter_files.load_parameters(params / file)
    whole = LlamaConfig(**(SMOL if smol else toy_large.SIZES), vocab_size=9)
    trials = planning.plan(parameters, parameter_files.load_grid(path), "runs/x")
    kinds = {}
    for trial in trials:
        config = parameter_files.notebook_config("03_train_student", trial.parameters)
        if config.round == config.rounds:
            kept = [v for k, v in config.initial_settings.items() if k.startswith("keep_")]
            shape = str([v for v in kept if v != "all"] or [str(config.student_width)])
            kind = Kind(start_of(config.model_dump()), config.distill_type)
            kinds.setdefault(kind, set()).add((shape, config.seed))
            if config.student_init != "svd":
                ways.smaller_config(whole, **{**config.initial_settings, "rounds": 1, "round": 1})
    asked = [
        question
        for question, pairs in QUESTIONS.items()
        for pair in pairs
        if all(kind in kinds for kind in pair)
        and len({seed for _, seed in kinds[pair[0]] & kinds[pair[1]]}) >= least
    ]
    # Shapes of one size, a chain beside these, and whether a kind rests are no pairs of kinds.
    assert asked or path.stem in ("grid-cut-depth", "grid-cut-chain")
    trained = [found for kind, found in kinds.items() if kind.method != "untrained"]
    assert all(len(found) >= least for found in trained)


def test_the_projects_grid_has_the_plain_run_folder():
    assert (
        planning.default_run_dir({}).name
        == planning.default_run_dir({}, "elsewhere/grid.yaml").name
        == "toy"
    )
    assert planning.default_run_dir({}, "my.yaml").name == "toy-my"
    worlds = {"name": "toy-worlds", "worlds": "1-7", "build": "toy-{world}"}
    assert planning.default_run_dir(worlds, "grid-worlds.yaml").name == "toy-worlds"


def test_a_trial_is_injected_what_differs_and_what_names_it(stub_notebooks):
    grid = {"seed": [0], "temperature": [4]}
    [trial] = planning.plan(
        {"epochs": 5, "beta": 0.5, "teacher_epochs": 3}, grid, stub_notebooks / "runs" / "x"
    )
    assert trial.parameters == {
        "epochs": 5,
        "temperature": 4,
        "distill_type": "black_box",
        "seed": 0,
        "run_dir": "runs/x",
        "trial": "black_box_seed0_temperature=4",
    }
    assert trial.trial == "black_box_seed0_temperature=4"
    assert trial.epochs == 5
    assert (
        trial.config_hash
        == TrialConfig(**{**notebook_values(), "epochs": 5, "temperature": 4}).fingerprint()
    )


def notebook_values():
    return {key: VALUES[key] for key in TrialConfig.model_fields}


def test_the_grid_goes_before_the_parameter_file(stub_notebooks):
    trials = planning.plan(
        {"seed": 9, "distill_type": "combined"}, {"seed": [1, 2]}, stub_notebooks / "runs" / "x"
    )
    assert [t.trial for t in trials] == ["combined_seed1", "combined_seed2"]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"seed": [1, 1]}, "same trial twice"),
        ({"temperature": [4, 4.0]}, "same trial twice"),
        ({"seed": [-1]}, "seed = -1"),
        ({"distill_type": ["atention"]}, "distill_type = 'atention'"),
    ],
)
def test_bad_values_in_a_grid_are_refused_before_anything_runs(stub_notebooks, grid, message):
    with pytest.raises(ValueError, match=message):
        planning.plan({}, grid, stub_notebooks / "runs" / "x")


def test_a_bad_value_that_the_grid_overrides_is_refused_all_the_same(stub_notebooks):
    with pytest.raises(ValueError, match="distill_type = 'atention'"):
        planning.plan({"distill_type": "atention"}, {"distill_type": ["attention"]}, "runs/x")


def test_bad_values_of_another_stage_are_refused_too(stub_notebooks):
    with pytest.raises(ValueError, match="teacher_epochs = -1"):
        planning.plan({"teacher_epochs": -1}, GRID, stub_notebooks / "runs" / "x")


@pytest.mark.parametrize(
    ("only", "names"),
    [
        ("", 8),
        (
            "distill_type=attention",
            ["attention_seed0", "attention_seed1", "attention_seed2", "attention_seed3"],
        ),
        (
            "distill_type=attention,seed=0-1+3",
            ["attention_seed0", "attention_seed1", "attention_seed3"],
        ),
        ("seed=2, distill_type=attention+black_box", ["black_box_seed2", "attention_seed2"]),
    ],
)
def test_only_chooses_trials(stub_notebooks, only, names):
    chosen = planning.select(planning.plan({}, GRID, stub_notebooks / "runs" / "x"), only, GRID)
    assert len(chosen) == names if isinstance(names, int) else [t.trial for t in chosen] == names


@pytest.mark.parametrize(
    "only",
    [
        "seed",
        "seed=",
        "sed=1",
        "seed=0-9",
        "seed=1,seed=2",
        "seed=2-1",
        "seed=x",
        "seed=1++2",
        "distill_type=hidden_state",
        "seed=[",
        "temperature=2",
    ],
)
def test_only_refuses_what_the_grid_does_not_have(stub_notebooks, only):
    with pytest.raises(ValueError, match="--only"):
        planning.select(planning.plan({}, GRID, stub_notebooks / "runs" / "x"), only, GRID)


def test_a_name_that_is_too_long_with_method_and_seed_is_refused(stub_notebooks):
    grid = {"distill_type": ["black_box"], "seed": [0], "student": ["s" * 186]}
    with pytest.raises(
        ValueError,
        match="the trial name 'black_box_seed0_student=s.*is longer than 200 characters: sweep fewer",
    ):
        planning.plan({}, grid, stub_notebooks / "runs" / "x")


CUT = {"student_init": "pruned", "keep_mlp": "8", "epochs": 6}


def test_rounds_are_trials_that_start_from_each_other(stub_notebooks):
    grid = {"distill_type": ["black_box"], "rounds": [1, 3], "seed": [0, 1]}
    trials = planning.plan(CUT, grid, stub_notebooks / "runs" / "x")
    assert [t.trial for t in trials] == [
        "black_box_seed0_rounds=1",
        "black_box_seed1_rounds=1",
        *(f"black_box_seed0_round={n}_rounds=3" for n in (1, 2, 3)),
        *(f"black_box_seed1_round={n}_rounds=3" for n in (1, 2, 3)),
    ]
    one_shot, rounds = trials[0], trials[2:5]
    assert one_shot.epochs == 6 and [t.epochs for t in rounds] == [2, 2, 2]
    assert [t.after for t in rounds] == ["", rounds[0].trial, rounds[1].trial]
    assert rounds[0].parameters.get("student") == one_shot.parameters.get("student")
    assert [t.parameters["student"] for t in rounds[1:]] == [
        f"artifacts/students/x/{t.trial}" for t in rounds[:2]
    ]
    assert [len(wave) for wave in planning.waves(trials)] == [4, 2, 2]
    assert planning.waves(trials)[1] == [trials[3], trials[6]]
    assert planning.waves(trials[3:5]) == [[trials[3]], [trials[4]]]


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"keep_mlp": "0.5"}, "rounds = 3 with keep_mlp = 0.5, a share: give how many are kept"),
        ({"epochs": 7}, "rounds = 3 with epochs = 7, which they share: set it to a multiple"),
        ({"save_student": False}, "rounds = 3 with save_student = False, and each starts from"),
    ],
)
def test_rounds_that_no_sweep_could_run_are_refused(stub_notebooks, parameters, message):
    with pytest.raises(ValueError, match=message) as told:
        planning.plan(
            {**CUT, "rounds": 3, **parameters}, {"seed": [0]}, stub_notebooks / "runs" / "x"
        )
    assert "\n" not in str(told.value)


def test_what_is_not_pruned_has_no_rounds(stub_notebooks):
    grid = {"student_init": ["pruned", "random"], "rounds": [3], "seed": [0]}
    trials = planning.plan(CUT, grid, stub_notebooks / "runs" / "x")
    assert [t.epochs for t in trials] == [2, 2, 2, 6] and "rounds" not in trials[-1].swept


def test_a_round_is_not_swept(stub_notebooks):
    with pytest.raises(ValueError, match="the grid has round, which a sweep sets: give rounds"):
        planning.plan(CUT, {"rounds": [3], "round": [1, 2]}, stub_notebooks / "runs" / "x")
    with pytest.raises(ValueError, match="the grid has round, which a sweep sets"):
        planning.plan(CUT, {"rounds round": [[4, 1]]}, stub_notebooks / "runs" / "x")
    with pytest.raises(ValueError, match="rounds = 2 with round = 3: a sweep sets it"):
        TrialConfig(**CUT, rounds=2, round=3)

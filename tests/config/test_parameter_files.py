"""Parameter files and grids: what they may hold, and what a bad one is answered with."""

import pytest

from kd_utils.config.notebook_files import injected_names, notebook_defaults
from kd_utils.config.parameter_files import load_grid, load_parameters, notebook_config
from kd_utils.config.project_paths import ROOT
from kd_utils.config.stages import NOTEBOOKS
from kd_utils.worlds.parameters import parameters_by_world

FILES = sorted((ROOT / "papermill_params").glob("*.yaml"))


@pytest.mark.parametrize(
    "path", [f for f in FILES if not f.name.startswith("grid")], ids=lambda p: p.name
)
def test_every_parameter_file_builds_all_four_configs(path):
    parameters = load_parameters(path)
    for of_world in parameters_by_world(parameters).values() or [parameters]:
        for stem in NOTEBOOKS:
            notebook_config(stem, of_world)
    assert parameters.get("name", "toy") == path.stem
    for key, value in parameters.items():
        assert any(
            notebook_defaults(stem).get(key, value) != value for stem in NOTEBOOKS
        ) or key in ("name", "worlds", "chain"), (
            f"{path.name}: {key} is the default already: a file holds only what differs"
        )


@pytest.mark.parametrize(
    "text, message",
    [
        ("temprature: 2", "no notebook has a parameter 'temprature'; did you mean 'temperature'"),
        ("sst2_train: 2", "no notebook has a parameter 'sst2_train'; did you mean 'train_rows'"),
        ("x_validation: 2", "no notebook has a parameter 'x_validation'; .* 'validation_rows'"),
        ("qqq: 2", "known keys: "),
        ("- a\n- b", "must be flat"),
        (
            "seed: [1, 2]",
            r"seed must be one scalar .*, got '\[1, 2\]' \(YAML reads seq\): .* a list .* in a grid file",
        ),
        ("seed:", r"seed must be one scalar .*, got '' \(YAML reads null\)"),
        (
            "name: 2026-01-02",
            r"name must be one scalar .*, got '2026-01-02' \(YAML reads timestamp\): .* in quotes",
        ),
        ("name: !!binary dG95", "name must be one scalar .*got '!!binary dG95'"),
        (
            "seed: " + 5000 * "9",
            r"seed must be one scalar .*got '9{100,150}\.\.\. \(5,002 characters\) \(YAML reads int\)",
        ),
        ("seed: 1\nbeta: 2\nseed: 3", "'seed' is given twice, again in line 3"),
        ("1: seed", r"'1' \(YAML reads int\) is no key"),
        ("seed: 1\n<<: {beta: 2}", r"'<<' \(YAML reads merge\) is no key"),
        ("a: b: c", "is not YAML: mapping values are not allowed here in line 1, column 5"),
        ("a: " + 100_000 * "[", "nested too deeply"),
        ('name: "\\UFFFFFFFF"', "is not YAML: an escape or a version in it is out of range"),
        ("name: " + 1_000_000 * "x", "at most 1,000,000 bytes"),
        ("!!python/object/apply:os.system ['true']", "must be flat"),
        ("seed: !!python/object/apply:os.system ['true']", "seed must be one scalar"),
    ],
    ids=lambda text: text[:40],
)
def test_bad_parameter_files(tmp_path, text, message):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_parameters(tmp_path / "p.yaml")


def test_an_encoding_other_than_utf_8_is_named(tmp_path):
    (tmp_path / "p.yaml").write_bytes("name: toy # \xe9".encode("latin-1"))
    with pytest.raises(ValueError, match="is not YAML: byte 12 is not UTF-8"):
        load_parameters(tmp_path / "p.yaml")


def test_an_alias_of_a_scalar_is_its_value(tmp_path):
    (tmp_path / "p.yaml").write_text(
        "teacher: &model org/name\nstudent: *model\nseed: 0x10\nbeta: !!float 1"
    )
    model = "org/name"
    assert load_parameters(tmp_path / "p.yaml") == {
        "teacher": model,
        "student": model,
        "seed": 16,
        "beta": 1.0,
    }


def test_a_missing_parameter_file_names_its_neighbours(tmp_path):
    (tmp_path / "toy.yaml").write_text("")
    assert load_parameters(tmp_path / "toy.yaml") == {}
    with pytest.raises(FileNotFoundError, match="files there: toy.yaml"):
        load_parameters(tmp_path / "tay.yaml")
    for path in (tmp_path, tmp_path / ("x" * 300), tmp_path / ("x" * 300) / "p.yaml", "a\0b"):
        with pytest.raises(FileNotFoundError, match="no parameter file"):
            load_parameters(path)
        with pytest.raises(FileNotFoundError, match="no grid file"):
            load_grid(path)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("seed: 3", "seed must be a list"),
        ("seed: []", "seed must be a list"),
        ("seed: !!set {1, 2}", "seed must be a list"),
        ("sede: [1]", "'sede' cannot be swept"),
        ("run_dir: [a, b]", "'run_dir' cannot be swept"),
        ("- 1", "must be flat"),
        ("", "must hold"),
        ("seed: [", "is not YAML"),
        ("seed: [0, [1]]", r"each value of seed must be one scalar .*, got '\[1\]'"),
        (
            "epochs seed: [1, 2]",
            "each value of epochs seed must be a list of 2 scalars, .*, got '1'",
        ),
        ("epochs seed: [[1, 2, 3]]", "must be a list of 2 scalars, one for each parameter"),
        ("epochs seed: [[1, [2]]]", "each value of epochs seed must be one scalar"),
        ("epochs seed: [[1, -2]]", "seed = -2: Input should be"),
        ("epochs seed: []", "epochs seed must be a list of one or more lists"),
        ("epochs sede: [[1, 2]]", "'sede' cannot be swept"),
        ('"": [1]', "'' cannot be swept"),
        ("epochs seed: [[1, 2]]\nseed: [3]", "seed is swept by two keys: give it in one"),
        ("epochs epochs: [[1, 2]]", "epochs is swept by two keys"),
        ("seed: [0, -1]", "seed = -1: Input should be greater than or equal to 0"),
        ("seed: [0, yes]", "seed = True: Input should be a number, not true or false"),
        ('teacher: [""]', "teacher = '': Input should be a path or a name"),
        ('teacher: ["a\\nb"]', "in teacher: 'a.nb' must be ASCII"),
        ("teacher: [caf\u00e9]", "in teacher: 'caf.' must be ASCII"),
        (
            f"seed: {list(range(200))}\nepochs: {list(range(1, 60))}",
            "11,800 combinations of seed, epochs: at most 10,000",
        ),
    ],
    ids=lambda text: text[:40],
)
def test_a_bad_grid_file_is_one_clear_error(tmp_path, grid, message):
    path = tmp_path / "grid.yaml"
    path.write_text(grid)
    with pytest.raises(ValueError, match=message):
        load_grid(path)


def test_parameters_that_change_together_are_one_key(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text("epochs   learning_rate: [[1, 1e-3], [2, 1]]\nseed: [0]")
    assert load_grid(path) == {"epochs learning_rate": [[1, 0.001], [2, 1]], "seed": [0]}


def test_names_that_papermill_injected():
    cells = [
        "x = 1",
        '# Parameters\na = 1\nb = "# Parameters\\nc = 2"\n',
        "# Parameters\nd = = 1",
        "# Parameters by hand\ne = 1",
    ]
    assert injected_names(cells) == ["a", "b"]
    assert injected_names(["# Parameters\nx, y = 1, 2\nz[0] = 1"]) == ["x", "y"]


def test_a_grids_values_are_what_a_trial_will_have(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text('seed: ["0", 10, 3.0]\nlearning_rate: [1e-4, 0.001]\ngamma_hidden: [1, 0.5]\n')
    grid = load_grid(path)
    assert grid == {"seed": [0, 10, 3], "learning_rate": [1e-4, 0.001], "gamma_hidden": [1, 0.5]}
    path.write_text('more_teachers: ["", "other=0.5"]\n')  # without and with one
    assert load_grid(path) == {"more_teachers": ["", "other=0.5"]}
    assert [str(value) for values in grid.values() for value in values] == [
        "0",
        "10",
        "3",
        "0.0001",
        "0.001",
        "1",
        "0.5",
    ]

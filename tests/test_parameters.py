"""Parameter files and grids: what they may hold, and what a bad one is answered with."""

import pytest

from kd_utils.config import NOTEBOOKS, ROOT
from kd_utils.parameters import load_grid, load_parameters, notebook_config, notebook_defaults

FILES = sorted((ROOT / "papermill_params").glob("*.yaml"))


@pytest.mark.parametrize("path", [f for f in FILES if not f.name.startswith("grid")], ids=lambda p: p.name)
def test_every_parameter_file_builds_all_four_configs(path):
    parameters = load_parameters(path)
    for stem in NOTEBOOKS:
        notebook_config(stem, parameters)
    assert parameters.get("name", "toy") == path.stem
    for key, value in parameters.items():
        assert any(notebook_defaults(stem).get(key, value) != value for stem in NOTEBOOKS) or key == "name", \
            f"{path.name}: {key} is the default already: a file holds only what differs"


@pytest.mark.parametrize("text, message", [
    ("temprature: 2", "no notebook has a parameter 'temprature'; did you mean 'temperature'"),
    ("qqq: 2", "known keys: "),
    ("- a\n- b", "must be flat"),
    ("seed: [1, 2]", r"seed must be one scalar, got \[1, 2\]: lists belong in a grid file"),
    ("seed:", "seed must be one scalar, got None"),
    ("a: b: c", "is not YAML"),
    ("!!python/object/apply:os.system ['true']", "is not YAML"),
])
def test_bad_parameter_files(tmp_path, text, message):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_parameters(tmp_path / "p.yaml")


def test_a_missing_parameter_file_names_its_neighbours(tmp_path):
    (tmp_path / "toy.yaml").write_text("")
    assert load_parameters(tmp_path / "toy.yaml") == {}
    with pytest.raises(FileNotFoundError, match="files there: toy.yaml"):
        load_parameters(tmp_path / "tay.yaml")


@pytest.mark.parametrize(("grid", "message"), [
    ("seed: 3", "seed must be a list"),
    ("seed: []", "seed must be a list"),
    ("sede: [1]", "sede cannot be swept"),
    ("run_dir: [a, b]", "run_dir cannot be swept"),
    ("- 1", "must hold"),
    ("seed: [", "is not YAML"),
])
def test_a_bad_grid_file_is_one_clear_error(tmp_path, grid, message):
    path = tmp_path / "grid.yaml"
    path.write_text(grid)
    with pytest.raises(ValueError, match=message):
        load_grid(path)

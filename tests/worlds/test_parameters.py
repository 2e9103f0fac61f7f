"""A parameter file with `worlds`: what each world gets, and what is refused."""

import pytest

from kd_utils.__main__ import main
from kd_utils.config.parameter_files import load_parameters
from kd_utils.worlds.parameters import parameters_by_world


def test_each_world_has_its_name_in_every_value_that_says_so():
    parameters = {"worlds": "1-2 7", "build": "toy-{world}", "data_seed": "{world}", "epochs": 3}
    assert parameters_by_world(parameters) == {
        world: {
            "build": f"toy-{world}",
            "data_seed": int(world),
            "epochs": 3,
            "name": f"toy-{world}",
        }
        for world in ("1", "2", "7")
    }
    named = {"worlds": "llama2 mistral", "name": "cards", "teacher": "models/{world}"}
    assert parameters_by_world(named)["mistral"] == {
        "name": "cards-mistral",
        "teacher": "models/mistral",
    }
    assert parameters_by_world({"teacher": "a"}) == {}


@pytest.mark.parametrize(
    "worlds",
    ["", "1", "1 1", "1-1", "2-1", "1,2", "1 ../2", "1-9999", "a" * 60 + " b", "-1 2", "1-3 3"],
)
def test_bad_worlds_are_one_line(worlds):
    with pytest.raises(ValueError) as caught:
        parameters_by_world({"worlds": worlds, "build": "toy-{world}"})
    assert "worlds = " in str(caught.value) and "such as 1-7" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_worlds_that_are_the_same_and_a_world_without_worlds_are_refused():
    with pytest.raises(ValueError, match="would all be the same, for no value has {world}"):
        parameters_by_world({"worlds": "1-7", "epochs": 3})
    with pytest.raises(ValueError, match="build has {world}, but no worlds are given"):
        parameters_by_world({"build": "toy-{world}"})


def test_the_command_refuses_a_bad_world_before_anything_is_written(stub_notebooks, capsys):
    path = stub_notebooks / "p.yaml"
    path.write_text("worlds: 1-3\ndata_seed: '{world}'\nepochs: 0\n")
    before = sorted(stub_notebooks.rglob("*"))
    assert main(["sweep", str(path)]) == 2
    assert "epochs = 0" in capsys.readouterr().err
    path.write_text("build: toy-{world}\n")
    assert main(["sweep", str(path)]) == 2
    assert "add `worlds: 1-7`" in capsys.readouterr().err
    assert sorted(stub_notebooks.rglob("*")) == before


def test_worlds_is_a_key_of_parameter_files_alone(tmp_path):
    (tmp_path / "p.yaml").write_text("worlds: 1-3\nbuild: toy-{world}\n")
    assert load_parameters(tmp_path / "p.yaml")["worlds"] == "1-3"
    (tmp_path / "q.yaml").write_text("world: 1-3\n")
    with pytest.raises(ValueError, match="did you mean 'worlds'"):
        load_parameters(tmp_path / "q.yaml")

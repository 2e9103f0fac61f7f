"""Initial students: made once, read by all trials, refused where a file changed."""

import json
import multiprocessing
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from tiny import example_rows, tiny_llama, tiny_tokenizer

from kd_utils.config.parameter_files import notebook_config
from kd_utils.models.cut import bases, narrowing, pruning, sizes
from kd_utils.models.cut.slots import StoredModel
from kd_utils.models.importance import calibration, choosing
from kd_utils.models.importance.calibration import Calibration
from kd_utils.models.importance.scores import scores
from kd_utils.models.initial import ways
from kd_utils.models.initial.students import require_possible, student_source
from kd_utils.models.loading import load_causal_lm, model_fingerprint, save_model

#: Of a cache of another teacher.
KEY = {"data": "0a", "teacher": "0b"}
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def project(tmp_path):
    """`project(**parameters)`: the trial's config and student, of a source of four layers."""
    tokenizer = tiny_tokenizer(begin=False)
    model = tiny_llama(layers=4, vocab=len(tokenizer))
    save_model(model, tokenizer, tmp_path / "models" / "large")

    cache = SimpleNamespace(manifest={"key": KEY}, unit_sums=lambda: None)
    rows = example_rows([9, 5, 7, 12], vocab=len(tokenizer))

    def source(**parameters):
        values = {"student": str(tmp_path / "models" / "large"), "student_init": "layers"}
        values |= {"artifacts_dir": str(tmp_path / "artifacts")} | parameters
        config = notebook_config("03_train_student", values)
        return student_source(config, cache, tokenizer, rows)

    source.folders = tmp_path / "artifacts" / "initial_students"
    source.cache, source.rows = cache, rows
    source.large = tmp_path / "models" / "large"
    return source


def listed(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_no_trial_could_make_is_refused_from_the_config_alone(project):
    def asked(**parameters):
        return notebook_config("03_train_student", {"student": "teacher"} | parameters)

    possible = [
        asked(),
        asked(student_init="pruned", keep_heads=2),
        asked(student_init="svd", student_width=16),
        asked(student_init="pruned", keep_heads=3, student="of/another-machine"),
        asked(student_init="pruned", keep_heads=3, rounds=2, round=2),  # the first one says it
    ]
    require_possible(possible, str(project.large))
    for bad in (
        asked(student_init="pruned", keep_heads=3),
        asked(student_init="random", keep_heads=3),
        asked(student_init="pruned", keep_heads=3, rounds=2),
    ):
        with pytest.raises(ValueError, match="^black_box_seed0: keep_heads = 3: .* set it to 4"):
            require_possible([*possible, bad], str(project.large))
    with pytest.raises(ValueError, match="student_width = 17: .*set it to 1"):
        require_possible([asked(student_init="svd", student_width=17)], str(project.large))


def test_a_pretrained_student_is_its_own_folder_and_nothing_is_copied(project):
    source = project(student_init="pretrained")
    assert source.folder == source.name == str(project.large)
    assert source.initial == source.fingerprint == model_fingerprint(source.name)
    assert not project.folders.exists()


def test_an_initial_student_is_made_once_and_says_of_what(project, monkeypatch):
    source = project()
    [name] = listed(project.folders)
    assert name.startswith("large-layers-2-") and source.folder.endswith(name)
    assert source.fingerprint == model_fingerprint(str(project.large)) != source.initial
    assert source.initial == model_fingerprint(source.folder)
    made_from = json.loads((project.folders / name / "initial_student.json").read_text())[
        "made_from"
    ]
    assert made_from["source"] == {"fingerprint": source.fingerprint}
    assert made_from["config"] == {"student_init": "layers", "student_layers": 2}
    assert {"kd_utils/models/initial/ways.py", "kd_utils/models/loading.py"} <= made_from[
        "code"
    ].keys()
    assert load_causal_lm(source.folder).config.num_hidden_layers == 2
    monkeypatch.setitem(ways.WAYS, "layers", ways.Way(None, None))
    assert project() == source  # read, not made
    monkeypatch.undo()
    assert project(student_layers=3).initial != source.initial and len(listed(project.folders)) == 2


def test_trials_that_start_side_by_side_read_one_folder(project, tmp_path, monkeypatch):
    start, found = FORK.Barrier(3), FORK.Queue()
    build = ways.random_weights

    def slow(*source, **settings):
        (tmp_path / f"made-{os.getpid()}").touch()
        model = build(*source, **settings)
        with torch.no_grad():
            model.lm_head.weight.add_(os.getpid())  # another machine's random weights
        return model

    def trial():
        start.wait()
        source = project(student_init="random")
        found.put((source.initial, float(load_causal_lm(source.folder).lm_head.weight[0, 0])))

    monkeypatch.setitem(ways.WAYS, "random", ways.Way(slow, None))
    trials = [FORK.Process(target=trial) for _ in range(3)]
    for process in trials:
        process.start()
    results = [found.get(timeout=60) for _ in trials]
    for process in trials:
        process.join()
    assert len(set(results)) == 1
    assert len(listed(project.folders)) == 1 and len(list(tmp_path.glob("made-*"))) == 1


def test_a_killed_writer_leaves_nothing_that_is_read(project, monkeypatch):
    def dies(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def trial():
        monkeypatch.setattr(type(tiny_tokenizer(begin=False)), "save_pretrained", dies)
        project()  # the weights are written by then

    process = FORK.Process(target=trial)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert all(name.startswith(".") for name in listed(project.folders))
    source = project()
    assert load_causal_lm(source.folder).config.num_hidden_layers == 2
    assert len(listed(project.folders)) == 1


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "generation_config.json", "initial_student.json"]
)
def test_a_folder_that_changed_is_refused_in_one_line(project, file):
    path = project.folders / os.path.basename(project().folder) / file
    whole = path.read_bytes()
    # A blank more changes a file, and nothing that a sealed document says.
    changed = whole.replace(b"layer", b"lager", 1) if "initial" in file else whole[:-2] + b" }"
    assert changed != whole
    for change in (lambda: path.write_bytes(changed), path.unlink):
        change()
        with pytest.raises(
            ValueError, match=rf"initial_students/large-layers-2-\w+/{file} (is|was)"
        ) as raised:
            project()
        assert "remove this folder, then the next trial makes it" in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_student_that_cannot_be_made_leaves_no_folder(project):
    with pytest.raises(ValueError, match="student_layers = 5: choose 2 to 4"):
        project(student_layers=5)
    assert listed(project.folders) == []


SHAPE = {"student_init": "pruned", "keep_mlp": "16", "keep_width": "16"}


@pytest.mark.parametrize(
    "parameters",
    [
        *({"student_init": "svd", "student_width": 16, "student_basis": basis}
          for basis in ("weights", "activations", "channels", "random")),
        *(SHAPE | {"importance": importance}
          for importance in ("minitron", "block_influence", "random", "lowest")),
        SHAPE | {"importance": "leave_one_out", "keep_layers": "2"},
        SHAPE | {"student_init": "random"},
    ],
    ids=lambda parameters: " ".join(map(str, parameters.values())),
)  # fmt: skip
def test_every_way_makes_what_its_parameters_say(project, parameters):
    source = StoredModel(str(project.large))
    rows = Calibration("another", lambda: None, project.rows)
    size = source.config.hidden_size
    whole = sizes.sizes_of(source.config)
    cut = whole._replace(width=16, mlp=64 if parameters["student_init"] == "svd" else 16)
    known = scores(rows.sums_of(str(project.large)))
    model = load_causal_lm(str(project.large)).eval()

    def narrow(basis):
        return narrowing.narrowed(source, basis)

    def prune(found, layers=4):
        units = choosing.kept_units(source.config, cut._replace(layers=layers), found)
        return pruning.pruned(source, units)

    lost = known._replace(layers=calibration.leave_one_out(model, rows.few_rows))
    expected = {
        "weights": lambda: narrow(bases.of_weights(source, 16)),
        "activations": lambda: narrow(
            bases.top_eigenvectors(calibration.second_moments(model, rows.few_rows), 16)
        ),
        "channels": lambda: narrow(
            bases.of_channels(choosing.kept_units(source.config, cut, known).width, size)
        ),
        "minitron": lambda: prune(known),
        "block_influence": lambda: prune(known),
        "lowest": lambda: prune(choosing.reversed_scores(known)),
        "leave_one_out": lambda: prune(lost, layers=2),
    }
    kind = parameters.get("importance") or parameters.get("student_basis", "random")
    if kind == "random":
        first, second = (
            load_causal_lm(project(**parameters, student_seed=s).folder) for s in (0, 1)
        )
        assert not torch.equal(first.lm_head.weight, second.lm_head.weight)
        assert first.config.hidden_size == 16
        return
    made = load_causal_lm(project(**parameters).folder).state_dict()
    for name, weight in expected[kind]().state_dict().items():
        assert torch.equal(made[name], weight), name


@pytest.mark.parametrize(
    "parameters, reads",
    [
        ({"student_init": "svd", "student_width": 16}, False),
        ({"student_init": "svd", "student_width": 16, "student_basis": "channels"}, True),
        (SHAPE, True),
        (SHAPE | {"importance": "random"}, False),
        (SHAPE | {"student_init": "random"}, False),
    ],
)
def test_another_cache_makes_another_student_only_if_its_rows_are_read(project, parameters, reads):
    before = project(**parameters).folder
    project.cache.manifest["key"] = KEY | {"teacher_dtype": "torch.bfloat16"}
    assert (project(**parameters).folder != before) == reads

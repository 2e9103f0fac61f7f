"""Parameters: what is accepted, what is refused and in which words, and that every file and
notebook agrees.
"""

import ast
import json
import resource
import subprocess
import sys

import pytest
import yaml

from kd_utils.config.notebook_files import notebook_defaults, notebook_path
from kd_utils.config.parameter_files import notebook_config
from kd_utils.config.project_paths import ROOT, project_path, run_label, short_path
from kd_utils.config.stages import NOTEBOOKS, AnalysisConfig
from kd_utils.config.trial import INITIAL, METHODS, TrialConfig

DEFAULTS = notebook_defaults("03_train_student")
FILES = sorted((ROOT / "papermill_params").glob("*.yaml"))


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_each_notebook_declares_what_its_config_has(stem):
    assert set(notebook_defaults(stem)) == set(NOTEBOOKS[stem].model_fields)
    notebook_config(stem, {})


def test_a_key_of_two_notebooks_has_one_default():
    seen = {}
    for stem in NOTEBOOKS:
        for key, value in notebook_defaults(stem).items():
            if key not in ("run_dir",):
                assert seen.setdefault(key, value) == value, f"{key} has two defaults"


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_parameters_are_flat_scalars_with_a_comment_or_a_plain_name(stem):
    cells = json.loads(notebook_path(stem).read_text())["cells"]
    [cell] = [c for c in cells if "parameters" in c["metadata"].get("tags", [])]
    for node in ast.parse("".join(cell["source"])).body:
        assert isinstance(node, ast.Assign) and isinstance(
            ast.literal_eval(node.value), (str, int, float, bool)
        )


@pytest.mark.parametrize(
    "key, value, words",
    [
        (
            "distill_type",
            "atention",
            "distill_type = 'atention': Input should be 'untrained', 'task_only'",
        ),
        ("beta", -0.5, "beta = -0.5: Input should be greater than or equal to 0"),
        ("temperature", 0, "temperature = 0: Input should be greater than 0"),
        ("epochs", 0, "epochs = 0"),
        ("epochs", 1.5, "epochs = 1.5"),
        ("learning_rate", "fast", "learning_rate = 'fast': Input should be a valid number"),
        ("learning_rate", float("nan"), "learning_rate = nan"),
        ("seed", -1, "seed = -1"),
        ("name", "../outside", "name = '../outside'"),
        ("trial", "../outside", "trial = '../outside'"),
        ("name", "toy\n", r"name = 'toy\n'"),
        ("name", "..", "name = '..'"),
        ("trial", "..", "trial = '..'"),
        ("trial", "a\n", r"trial = 'a\n'"),
        ("distill_tokens", "some", "'all' or 'answer'"),
        ("seed", True, "seed = True: Input should be a number, not true or false"),
        ("beta", False, "beta = False: Input should be a number, not true or false"),
        ("seed", 2**31, "seed = 2147483648: Input should be less than 2147483648"),
        ("seed", 1e300, "seed = 1e+300: Input should be positive and less than 2147483648"),
        ("epochs", None, "epochs = None: Input should be a valid integer"),
        (
            "seed",
            b"1",
            "seed = b'1': Input should be a number, got a value (bytes)",
        ),
        ("student", "a\0b", r"student = 'a\x00b': Input should be plain text"),
        ("student", "\ud800", r"student = '\ud800': Input should be plain text"),
        ("student", "", "student = '': Input should be a path or a name: not blank"),
        ("run_dir", " \n", r"run_dir = ' \n': Input should be a path or a name: not blank"),
        (
            "artifacts_dir",
            "~no-such-user/x",
            "artifacts_dir = '~no-such-user/x': Input should be a path or a name",
        ),
        ("tokenizer", 256 * "x", "Input should be a path or a name"),
        ("teacher", "\u00e9" * 128, "Input should be a path or a name"),
        ("teacher", "x/" * 600, "... (1,202 characters): Input should be a path or a name"),
        (
            "device",
            "gpu",
            "device = 'gpu': String should match pattern '^(auto|cpu|cuda(:[0-9]{1,3})?)$'",
        ),
        ("device", "cuda:", "device = 'cuda:'"),
        ("device", "", "device = ''"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_bad_values_are_one_line_that_names_them(key, value, words):
    with pytest.raises(ValueError) as caught:
        TrialConfig(**{**DEFAULTS, key: value})
    assert (
        words in str(caught.value)
        and "\n" not in str(caught.value)
        and "errors.pydantic" not in str(caught.value)
    )


def test_several_bad_values_are_all_named_and_unknown_keys_too():
    with pytest.raises(
        ValueError,
        match=r"TrialConfig: .*alpha = -1.*temprature = 2.0: no such parameter, did you "
        "mean 'temperature'",
    ):
        TrialConfig(**{**DEFAULTS, "alpha": -1, "temprature": 2.0})
    with pytest.raises(ValueError, match="every weight of the loss is 0"):
        TrialConfig(**{**DEFAULTS, "alpha": 0, "beta": 0})


def test_yaml_exponents_are_numbers():
    assert yaml.safe_load("1e-4") == "1e-4"  # YAML 1.1 reads it as text; the config must not
    assert TrialConfig(**{**DEFAULTS, "learning_rate": "1e-4"}).learning_rate == 1e-4


def test_a_number_without_a_repr_is_refused_too():
    with pytest.raises(
        ValueError, match="epochs = a value of type int: Input should be less than 2147483648"
    ):
        TrialConfig(**{**DEFAULTS, "epochs": 10**5000})


def test_values_that_are_taken_as_they_stand():
    for key, value in {
        "student": "a \"b\" 'c' \\n \n \u2028 \U0001f600",
        "device": "cuda:7",
        "trial": "",
        "seed": 2**31 - 1,
        "run_dir": "~/runs",
        "teacher": 255 * "x",
    }.items():
        assert getattr(TrialConfig(**{**DEFAULTS, key: value}), key) == value
    data = notebook_defaults("01_prepare_data")
    assert (
        NOTEBOOKS["01_prepare_data"](**{**data, "data_dir": " "}).data_dir == ""
    )  # blank is the hub, as "" is


@pytest.mark.parametrize(
    "text", ["", "sst2", "sst2:", "sst2:0", ":5", "sst2:-1", "sst2:1.5", "sst2:1 sst2:2", "sst2=5"]
)
def test_rows_of_tasks_are_a_checked_text(text):
    data = notebook_defaults("01_prepare_data")
    with pytest.raises(ValueError, match="train_rows = '.*': Input should be TASK:ROWS") as caught:
        NOTEBOOKS["01_prepare_data"](**{**data, "train_rows": text})
    assert "\n" not in str(caught.value) and "leave out a task" in str(caught.value)


def test_rows_of_tasks_by_split():
    data = notebook_defaults("01_prepare_data")
    config = NOTEBOOKS["01_prepare_data"](**{**data, "validation_rows": " arc:5  sst2:1"})
    assert config.rows("train") == {"sst2": 400, "mmlu": 400, "gsm8k": 400}
    assert config.rows("validation") == {"arc": 5, "sst2": 1}
    assert config.tasks == {"sst2", "mmlu", "gsm8k", "arc"}


def test_labels_are_a_share_or_counts_of_tasks():
    rows = {"train_rows": "sst2:30 mmlu:9", "validation_rows": "arc:5"}
    expected = {
        "1": {"sst2": 30, "mmlu": 9},
        "0": {"sst2": 0, "mmlu": 0},
        "0.1": {"sst2": 3, "mmlu": 1},
        ".05": {"sst2": 2, "mmlu": 1},  # at least one
        "mmlu=0": {"sst2": 30, "mmlu": 0},
        "mmlu=9 sst2=2": {"sst2": 2, "mmlu": 9},
        "mmlu:9 sst2:2": {"sst2": 2, "mmlu": 9},
        "mmlu:10 gsm8k:5": {"sst2": 30, "mmlu": 9},  # at most, and of what is trained on
    }
    for text, counts in expected.items():
        assert NOTEBOOKS["01_prepare_data"](**rows, labelled=text).labels == counts
    for number, text in ((1, "1"), (1.0, "1"), (0.15, "0.15"), (0, "0")):  # as YAML reads them
        config = NOTEBOOKS["01_prepare_data"](**rows, labelled=number)
        assert config.labelled == text
    assert config.rows("held_out") == {"sst2": 300, "mmlu": 300}  # trained on


@pytest.mark.parametrize(
    "value, words",
    [
        ("1.5", "Input should be a share of every task's training rows, from 0 to 1 (such as"),
        (1.5, "Input should be a share"),
        (True, "labelled = True: Input should be text, got true or false (bool)"),
        ("", "Input should be a share"),
        ("sst2:5 mmlu=5", "Input should be a share"),
        ("sst2=5 sst2=6", "Input should be a share"),
        ("=5", "Input should be a share"),
    ],
)
def test_bad_labels_are_one_line(value, words):
    with pytest.raises(ValueError) as caught:
        NOTEBOOKS["01_prepare_data"](labelled=value)
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_a_config_is_frozen_and_shows_every_value():
    config = TrialConfig(**DEFAULTS)
    with pytest.raises(Exception, match="frozen"):
        config.seed = 3
    assert len(str(config).splitlines()) == len(DEFAULTS) and "temperature" in str(config)


def test_fingerprint_changes_with_what_matters_only():
    base = TrialConfig(**DEFAULTS)
    for key in ("name", "run_dir", "artifacts_dir", "device", "save_student", "trial"):
        other = {"save_student": False, "device": "cpu"}.get(key, "elsewhere")
        assert TrialConfig(**{**DEFAULTS, key: other}).fingerprint() == base.fingerprint()
    for key, value in {
        "seed": 1,
        "distill_type": "combined",
        "temperature": 3.0,
        "precision": "bfloat16",
    }.items():
        assert TrialConfig(**{**DEFAULTS, key: value}).fingerprint() != base.fingerprint()


OF_LOGITS = {"beta", "temperature", "logit_loss", "distill_tokens", "more_teachers"}
#: A method that reads no teacher has its answers, or none, by itself.
NO_TEACHER = OF_LOGITS | {"answers", "paired_layers", "weighting"}
OF_HIDDEN = {"gamma_hidden", "hidden_layers"}
OF_SHARES = {"hidden_share", "attention_share"}
KEPT = {"keep_layers", "keep_heads", "keep_mlp", "keep_width"}
ROUNDS = {"rounds", "round"}  # more than one needs student_init "pruned"
#: With `student_init` "pretrained" nothing is made.
OF_INITIAL = {key for keys in INITIAL.values() for key in keys}
OF_ATTENTION = {"gamma_attention", "attention_normaliser", "attention_layers", "head_mapping"}


@pytest.mark.parametrize(
    "method, without_effect",
    [
        ("combined", {"paired_layers"}),
        ("shuffled", {"paired_layers"}),
        ("attention", OF_HIDDEN | {"paired_layers"}),
        ("hidden_state", OF_ATTENTION | {"paired_layers"}),
        ("black_box", OF_HIDDEN | OF_ATTENTION | {"paired_layers", "weighting"}),
        (
            "label_smoothing",
            OF_HIDDEN | OF_ATTENTION | {"temperature", "logit_loss", "paired_layers", "weighting"},
        ),
        ("task_only", NO_TEACHER | OF_HIDDEN | OF_ATTENTION),
        ("teacher_answers", NO_TEACHER | OF_HIDDEN | OF_ATTENTION),
        (
            "untrained",
            NO_TEACHER
            | OF_HIDDEN
            | OF_ATTENTION
            | {
                "seed",
                "alpha",
                "epochs",
                "micro_batch_size",
                "learning_rate",
                "lr_schedule",
                "warmup_ratio",
                "average_last",
                "evaluations",
                "weight_decay",
                "max_grad_norm",
                "trained",
            },
        ),
    ],
)
def test_what_a_method_does_not_use_does_not_make_another_trial(method, without_effect):
    base = TrialConfig(**{**DEFAULTS, "distill_type": method})
    changed = {
        "beta": 0.7,
        "temperature": 3.0,
        "logit_loss": "uld",
        "distill_tokens": "answer",
        "more_teachers": "other=0.4",
        "answers": "gold",
        "gamma_hidden": 0.2,
        "gamma_attention": 0.2,
        "hidden_layers": "uniform",
        "attention_layers": "3:2",
        "paired_layers": 7,
        "head_mapping": "learned",
        "attention_normaliser": "queries",
        "weighting": "share",
        "hidden_share": 0.2,
        "attention_share": 0.3,
        "seed": 5,
        "alpha": 0.5,
        "epochs": 9,
        "micro_batch_size": 2,
        "learning_rate": 0.5,
        "lr_schedule": "cosine",
        "warmup_ratio": 0.1,
        "average_last": 0.1,
        "evaluations": 2,
        "weight_decay": 0.5,
        "max_grad_norm": 0.5,
        "trained": "layers",
        "student_layers": 3,
        "student_width": 8,
        "student_basis": "channels",
        "student_output": "tied",
        "keep_layers": 1,
        "keep_heads": 0.5,
        "keep_mlp": "0.5",
        "keep_width": 4,
        "importance": "lowest",
        "student_seed": 3,
    }
    same = {
        key
        for key, value in changed.items()
        if TrialConfig(**{**DEFAULTS, "distill_type": method, key: value}).fingerprint()
        == base.fingerprint()
    }
    assert same | ROUNDS == without_effect | OF_SHARES | OF_INITIAL == base.without_effect


@pytest.mark.parametrize(
    "init, used",
    [
        ({"student_init": "layers"}, {"student_layers"}),
        ({"student_init": "random"}, KEPT | {"student_seed"}),
        ({"student_init": "svd"}, {"student_width", "student_basis", "student_output"}),
        (
            {"student_init": "svd", "student_basis": "random"},
            {"student_width", "student_basis", "student_output", "student_seed"},
        ),
        ({"student_init": "pruned"}, KEPT | {"importance", "rounds"}),
        (
            {"student_init": "pruned", "importance": "random"},
            KEPT | {"importance", "student_seed", "rounds"},
        ),
        (
            {"student_init": "pruned", "rounds": 2, "keep_mlp": 9},
            KEPT | {"importance", "rounds", "round"},
        ),
    ],
)
def test_a_student_is_made_from_the_parameters_of_its_way_alone(init, used):
    config = TrialConfig(**{**DEFAULTS, **init})
    assert used == OF_INITIAL - config.without_effect
    one_cut = {"rounds"} if config.rounds == 1 else set()
    assert config.initial_settings.keys() == used - one_cut


@pytest.mark.parametrize(
    "value, text",
    [("all", "all"), (1.0, "all"), (1, "1"), (96, "96"), (0.5, "0.5"), (".25", ".25")],
)
def test_what_is_kept_is_a_count_or_a_share(value, text):
    assert TrialConfig(**{**DEFAULTS, "keep_mlp": value}).keep_mlp == text


@pytest.mark.parametrize("value", [0, -1, 0.0, 1.5, "half", "", True, "0.", "1e3"])
def test_what_cannot_be_kept_is_refused_in_one_line(value):
    with pytest.raises(ValueError, match="keep_mlp = .*: Input should be") as told:
        TrialConfig(**{**DEFAULTS, "keep_mlp": value})
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "method, used",
    [
        ("combined", OF_SHARES),
        ("shuffled", OF_SHARES),
        ("hidden_state", {"hidden_share"}),
        ("attention", {"attention_share"}),
        ("black_box", set()),
    ],
)
def test_shares_count_where_weights_are_set_by_them_and_the_method_has_the_term(method, used):
    config = TrialConfig(**{**DEFAULTS, "distill_type": method, "weighting": "share"})
    assert OF_SHARES - config.without_effect == used
    assert {f"{term}_share" for term in config.shares} == used


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_share": 0.4, "attention_share": 0.6},
        {"alpha": 0, "beta": 0},
    ],
)
def test_shares_must_leave_something_to_the_other_terms(changes):
    wrong = {**DEFAULTS, "distill_type": "combined", "weighting": "share", **changes}
    with pytest.raises(ValueError, match="hidden_share = .*leaves nothing to the terms of a fixed"):
        TrialConfig(**wrong)
    TrialConfig(**{**wrong, "weighting": "fixed"})


def test_how_many_layers_are_paired_counts_where_they_are_not_named():
    for method, key in (("hidden_state", "hidden_layers"), ("attention", "attention_layers")):
        for choice, counts in (
            ("uniform", True),
            ("reversed", True),
            ("random", True),
            ("3:2", False),
        ):
            config = TrialConfig(**{**DEFAULTS, "distill_type": method, key: choice})
            assert ("paired_layers" not in config.without_effect) == counts


def test_the_untrained_student_alone_is_not_trained():
    trains = {name: TrialConfig(**{**DEFAULTS, "distill_type": name}).trains for name in METHODS}
    assert not trains.pop("untrained") and all(trains.values())


@pytest.mark.parametrize(
    "value",
    [
        "other",
        "other=",
        "other=1",
        "other=0",
        "other=0.0",
        "a=0.5 b=0.5",
        "a=0.1 a=0.1",
        "../a=0.5",
        "a=-.5",
        "a=1e-1",
        "toy=0.4",
    ],
)
def test_teachers_need_weights_that_leave_some_to_the_trials_own(value):
    with pytest.raises(ValueError, match="more_teachers"):
        TrialConfig(**{**DEFAULTS, "more_teachers": value})


def test_the_trials_own_teacher_has_the_rest_of_the_weights():
    config = TrialConfig(**{**DEFAULTS, "more_teachers": "a=0.5 b=.25"})
    assert config.teachers == {"toy": 0.25, "a": 0.5, "b": 0.25}
    assert TrialConfig(**DEFAULTS).teachers == {"toy": 1.0}


def test_methods_have_the_terms_of_the_design():
    terms = {m: set(TrialConfig(**{**DEFAULTS, "distill_type": m}).weights) for m in METHODS}
    assert terms == {
        "untrained": {"task"},
        "task_only": {"task"},
        "teacher_answers": {"task"},
        "label_smoothing": {"task", "smoothing"},
        "shuffled": {"task", "kd", "hidden", "attention"},
        "black_box": {"task", "kd"},
        "hidden_state": {"task", "kd", "hidden"},
        "attention": {"task", "kd", "attention"},
        "combined": {"task", "kd", "hidden", "attention"},
    }


def test_what_the_task_loss_sees_of_rows_without_a_label():
    for method in METHODS:
        for answers in ("gold", "teacher"):
            config = TrialConfig(**{**DEFAULTS, "distill_type": method, "answers": answers})
            own = {"untrained": "gold", "task_only": "gold", "teacher_answers": "teacher"}
            assert config.task_answers == own.get(method, answers)


def test_from_notebook_takes_declared_names_and_refuses_injected_strangers():
    cells = ["", "# Parameters\nname = 'toy'\n"]
    namespace = {
        "name": "toy",
        "artifacts_dir": "a",
        "run_dir": "",
        "margin_points": 1.0,
        "epoch": 3,
        "In": cells,
    }
    assert AnalysisConfig.from_notebook(namespace).name == "toy"
    namespace["In"] = ["# Parameters\ntemprature = 4.0\n"]
    with pytest.raises(
        ValueError, match="no notebook has a parameter 'temprature'; did you mean 'temperature'"
    ):
        AnalysisConfig.from_notebook(namespace)
    with pytest.raises(ValueError, match="does not define run_dir, margin_points"):
        AnalysisConfig.from_notebook({"name": "toy", "artifacts_dir": "a"})


def test_paths_start_at_the_root(tmp_path):
    assert project_path("runs/x") == ROOT / "runs" / "x" and project_path(tmp_path) == tmp_path
    assert short_path(ROOT / "runs" / "x") == "runs/x" and short_path(tmp_path) == str(tmp_path)


def test_a_method_and_a_parameter_from_outside_change_no_other_trial():
    """In a process of its own, as registration lasts as long as the process."""
    code = """
from typing import Annotated
from kd_utils.config.fields import Layers, Weight
from kd_utils.config.parameter_files import notebook_config
from kd_utils.config.trial import METHODS, Method, TrialConfig, UsedBy

def fingerprint(**changes):
    return notebook_config('03_train_student', changes).fingerprint()

before = fingerprint()
METHODS['relations'] = Method({'task': 'alpha', 'relation': 'gamma_relation'})
TrialConfig.add_parameter('gamma_relation', Weight, 0.5)
TrialConfig.add_parameter('relation_layers', Annotated[Layers, UsedBy('relation')], 'last')
assert before == fingerprint() == fingerprint(gamma_relation=3.0, relation_layers='uniform')
config = notebook_config('03_train_student', {'distill_type': 'relations'})
assert config.weights == {'task': 1.0, 'relation': 0.5} and config.distils
assert {'beta', 'temperature', 'paired_layers'} <= config.without_effect
assert not {'gamma_relation', 'relation_layers', 'distill_tokens'} & config.without_effect
new = {'distill_type': 'relations', 'relation_layers': 'uniform'}
assert fingerprint(**new, paired_layers=2) != fingerprint(**new, paired_layers=3)
namespace = {key: getattr(config, key) for key in type(config).model_fields} | {'seed': 4}
del namespace['gamma_relation']
assert TrialConfig.from_notebook(namespace).gamma_relation == 0.5
try:
    fingerprint(gamma_relation=-1)
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "gamma_relation = -1: Input should be greater than or equal to 0" in done.stdout


def test_importing_the_package_is_cheap():
    code = (
        "import kd_utils.config, sys; heavy = {'torch', 'transformers', 'ray', 'pandas', "
        "'papermill'} "
        "& set(sys.modules); assert not heavy, heavy"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(
        resource.RUSAGE_CHILDREN
    )  # CPU time: on a busy machine the other goes by without us
    assert (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    )  # it is well under 0.3 s


def test_runs_of_one_name_at_two_places_have_two_labels():
    own = run_label("runs/toy")
    assert own == run_label(ROOT / "runs" / "toy") == "toy"
    others = {run_label(place) for place in ("/x/toy", "/y/toy", "runs/more/toy", "toy")}
    assert len(others | {own}) == 5 and all(label.startswith("toy-") for label in others)

"""What is printed where the terminal, or a batch system's log, has ASCII alone."""

import io
import os
import subprocess
import sys

import pytest

from kd_utils.sweep.display import Progress, print_plainly

ENDINGS = [
    {"PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("61.2 \u00b1 0.4, 3\u20135", "61.2 +/- 0.4, 3-5"),
        ("\u22121.5 points", "-1.5 points"),
        ("caf\u00e9", "cafe"),
        ("\u05d0\udcff", "??"),  # a name on disk that is not UTF-8 is shown too
    ],
)
def test_signs_that_ascii_lacks_have_a_plain_form(text, shown):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_plainly(stream)
    print(text, file=stream, end="", flush=True)
    assert stream.buffer.getvalue().decode() == shown


def test_utf_8_is_left_as_it_is():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    print_plainly(stream)
    print("\u00b1", file=stream, end="", flush=True)
    assert stream.buffer.getvalue().decode() == "\u00b1"


def test_a_trials_place_is_a_part_of_its_epochs_and_its_accuracy_that_of_the_rows_read(capsys):
    progress = Progress({"a": 3, "b": 1})
    progress.reported("a", {"epoch": 2.7, "held_out_accuracy": 0.5})
    assert "a: epoch 2.7/3, held-out accuracy 50.0 %" in capsys.readouterr().err
    progress.began -= 270  # for 2.7 of 4 epochs
    assert progress.summary().endswith("about 0:02:10 left")
    progress.reported("a", {"epoch": 3.0, "held_out_accuracy": 0.5, "validation_accuracy": 0.25})
    progress.finished("a")
    said = capsys.readouterr().err
    assert "a: epoch 3/3, validation accuracy 25.0 %" in said
    assert "a: done, validation accuracy 25.0 %" in said


@pytest.mark.parametrize("variables", ENDINGS, ids=lambda variables: next(iter(variables)))
@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--help"], 0, b"Usage"),
        (["check", "no-\u00e9\u05d0"], 2, b"error: "),
        (["sweep", "p.yaml"], 2, b"did you mean"),
    ],
    ids=["help", "check", "sweep"],
)
def test_every_command_ends_by_itself_in_an_ascii_terminal(
    tmp_path, variables, arguments, status, words
):
    (tmp_path / "p.yaml").write_text("\u00e9pochs: 3", encoding="utf-8")
    command = [sys.executable, "-m", "kd_utils", *map(os.fsencode, arguments)]
    ran = subprocess.run(
        command, cwd=tmp_path, env=os.environ | variables, capture_output=True, timeout=300
    )
    assert ran.returncode == status and words in ran.stdout + ran.stderr, ran.stderr
    assert b"Traceback" not in ran.stderr and b"UnicodeEncodeError" not in ran.stderr

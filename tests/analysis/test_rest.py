"""At rest: what moves in the last tenth of the steps, what with twice the steps, and what cannot be
known.
"""

import numpy as np
import pandas as pd
import pytest

from kd_utils.analysis import rest
from kd_utils.config.trial import TrialConfig


def record(method="black_box", seed=0, ends=(0.80, 0.803), steps=20, swept=(), **config):
    """A trial whose held-out accuracy at 90 and 100 % of its steps is `ends`."""
    values = {0.5: 0.4, 0.9: ends[0], 1.0: ends[1]}
    rows = [
        {"epoch": 3.0 * at, "step": round(at * steps), rest.HELD_OUT: value}
        for at, value in values.items()
    ]
    known = TrialConfig(distill_type=method, seed=seed, **config).model_dump()
    return {
        "config": known,
        "swept": {"distill_type": method, "seed": seed} | {key: config[key] for key in swept},
        "epochs": rows,
        "final": rows[-1],
    }


def test_the_last_tenth_is_a_mean_over_seeds_of_each_method_and_setting():
    records = [record(seed=0, ends=(0.80, 0.82)), record(seed=1, ends=(0.80, 0.79))]
    records += [record("attention", 0, (0.5, 0.6), swept=("gamma_attention",), gamma_attention=1.0)]
    table = rest.last_tenth(records)
    assert table[["setting", "distill_type", "planned", "n"]].to_numpy().tolist() == [
        ["", "black_box", 2, 2],
        ["gamma_attention=1", "attention", 1, 1],
    ]
    assert table["mean"].tolist() == pytest.approx([0.005, 0.1])
    assert rest.moving(table)["distill_type"].tolist() == ["attention"]


@pytest.mark.parametrize("steps", [7, 10, 33, 1000])
def test_the_row_at_90_per_cent_is_found_whatever_the_number_of_steps(steps):
    assert rest.last_tenth([record(steps=steps)])["mean"].item() == pytest.approx(0.003)


@pytest.mark.parametrize("missing", ["step", rest.HELD_OUT])
def test_older_rows_cannot_say(missing):
    old = record()
    for row in old["epochs"]:
        del row[missing]
    table = rest.last_tenth([old])
    assert table["n"].item() == 0 and np.isnan(table["mean"].item())
    assert rest.at_rest(table) is None


def test_the_end_is_not_taken_for_90_per_cent():
    few = record()
    few["epochs"] = few["epochs"][::2]
    assert np.isnan(rest.last_tenth([few])["mean"].item())


def test_an_untrained_student_is_no_method_that_rests():
    untrained = record("untrained")
    untrained["epochs"] = [{"epoch": 0, rest.HELD_OUT: 0.2}]
    untrained["final"] = untrained["epochs"][-1]
    assert rest.last_tenth([untrained]).empty and rest.at_rest(rest.last_tenth([untrained])) is None


def longer(end, **config):
    """The run that measured rest: three seeds with 8 and with 16 epochs."""
    return [
        record(seed=seed, ends=(0.5, value), epochs=epochs, **config)
        for seed in range(3)
        for epochs, value in ((8, 0.8), (16, end))
    ]


@pytest.mark.parametrize("end, known", [(0.805, True), (0.815, False), (0.785, False)])
def test_twice_the_steps_decide_too(end, known):
    moves = pd.concat([rest.last_tenth([record()]), rest.twice([record()], longer(end))])
    assert rest.at_rest(moves) is known and moves["n"].tolist() == [1, 3]
    assert rest.at_rest(moves.iloc[:1]) is True  # the first criterion alone would not see it


def test_other_settings_do_not_measure_the_rest_of_these():
    for other in ({"learning_rate": 0.5}, {"temperature": 3.0}):
        assert rest.twice([record()], longer(0.9, **other))["n"].item() == 0
    # What a method does not use may differ, and so may names and places.
    for same in ({"gamma_attention": 9.0}, {"run_dir": "runs/x", "device": "cpu"}):
        assert rest.twice([record()], longer(0.9, **same))["n"].item() == 3
    assert rest.twice([record(epochs=16)], longer(0.9))["n"].item() == 0


def test_a_parameter_that_is_newer_than_a_record_has_its_default_there():
    records, older = [record(seed=seed) for seed in range(3)], longer(0.805)
    for trial in older:
        del trial["config"]["trained"]
    assert rest.twice(records, older)["n"].item() == 3
    others = [record(seed=seed, trained="layers") for seed in range(3)]
    assert rest.twice(others, older)["n"].item() == 0


def test_longer_trials_are_compared_with_those_beside_them():
    own = [record(seed=seed, ends=(0.5, 0.8)) for seed in range(3)]
    double = [record(seed=seed, ends=(0.5, 0.9), epochs=16) for seed in range(1, 3)]
    moved = rest.twice(own, double, own)
    assert moved["n"].item() == 2 and moved["mean"].item() == pytest.approx(0.1)
    assert rest.twice(own, [], own)["n"].item() == 0 == rest.twice(own, double)["n"].item()
    both = [*double, record(seed=1, ends=(0.5, 0.7)), record(seed=2, ends=(0.5, 0.7))]
    assert rest.twice(own, both, own)["mean"].item() == pytest.approx(0.2)
    for made in (
        {"cache": {"content_hash": "x"}},
        {"student": {"fingerprint": "x"}},
        {"initial": "x"},
    ):
        other = [trial | made for trial in double]
        assert rest.twice(own, other, own)["n"].item() == 0
        # A run with another cache has the rest of its experiment, from trials that share theirs.
        kept = [trial | made for trial in own]
        assert rest.twice(own, other, kept)["mean"].item() == pytest.approx(0.1)
    swept = [*own, *double]  # a run's own longer trials do not make another run the measuring one
    assert rest.measured(swept, [("alien", [record(learning_rate=0.5)], swept)])[0] == ""


def test_a_seed_counts_where_both_its_trials_are_done():
    moves = rest.twice([record()], longer(0.9)[:-1])
    assert moves["n"].item() == 2 and rest.at_rest(moves) is None and rest.moving(moves).empty


def test_the_first_run_that_agrees_measured_it():
    measuring = {"new": longer(0.9, learning_rate=0.5), "old": longer(0.9), "older": longer(0.7)}
    runs = [(name, records, []) for name, records in measuring.items()]
    name, moves = rest.measured([record()], iter(runs))
    assert name == "old" and moves["mean"].item() == pytest.approx(0.1)
    name, moves = rest.measured([record()], [])
    assert name == "" and moves["n"].item() == 0

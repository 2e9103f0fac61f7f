"""Trials forked by one process, one after another: their numbers are those of fresh processes."""

import json
import shutil

import pandas as pd
import pytest
from sweeps import Command, record

from kd_utils.records.check import check_run
from kd_utils.records.trial_record import read_record


def test_forked_trials_have_the_bits_of_fresh_ones_in_any_order(undisturbed, prepared, tmp_path):
    """In `undisturbed` Ray ran them, in the grid's order; here one slot runs them all."""
    wanted = undisturbed / "runs" / "toy-2"
    grid = (prepared / "grid2.yaml").read_text()
    assert "[black_box, combined]" in grid
    grid = grid.replace("[black_box, combined]", "[combined, black_box]")
    (prepared / "turned.yaml").write_text(grid)
    names = pd.read_csv(wanted / "results_summary.csv")["trial"]
    memory, run_dir = {}, prepared / "runs" / "toy-2"
    for forked in ("1", "0"):
        shutil.rmtree(run_dir / "trials", ignore_errors=True)
        arguments = ["--grid", prepared / "turned.yaml", "--run-dir", run_dir]
        arguments += ["--executor", "local", "--cpus", "1"]
        command = Command(prepared, "sweep", prepared / "small.yaml", *arguments, KD_FORK=forked)
        status, output = command.wait()
        assert status == 0 and command.orphans(within=10) == [], output[-2000:]
        assert check_run(run_dir) == []
        for name in names:
            assert record(run_dir, name) == record(wanted, name), (name, forked)
        first = read_record(run_dir / "trials" / names[0])
        assert first["device"] == read_record(wanted / "trials" / names[0])["device"]
        memory[forked] = first["peak_memory_mb"]
    # A fork counts the imports that it shares, but not the parts of libraries that it never reads.
    assert memory["1"] == pytest.approx(memory["0"], rel=0.4), json.dumps(memory)

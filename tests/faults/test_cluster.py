"""A cluster of several nodes, here on one machine: how many at once, nodes lost, trials that fail,
other views.
"""

import os
import random
import shutil
import time

import pandas as pd
import pytest
from clusters import (
    KILLED,
    MEMORY,
    ON_GPU,
    RAISES,
    Sweep,
    add_node,
    begun,
    cluster,
    ended,
    events,
    fault,
    forget,
    hold,
    most_at_once,
    project,
)

from kd_utils.records.check import check_run

GPUS = {"a": 10, "b": 10, "c": 8}
BIG = (
    "--gpus-per-trial",
    "16",
    "--cpus-per-trial",
    "0.1",
)  # fits on no node but those of 16 that a test adds


@pytest.fixture(scope="module")
def nodes():
    """Three nodes with 28 logical GPUs; one is lost in `swept`, and none that is added stays."""
    with cluster(**GPUS) as started:
        yield started


@pytest.fixture(scope="module")
def swept(nodes, tmp_path_factory):
    """28 trials; while all of them run, "c" is lost: project, status, what was printed, what they
    had told by then.
    """
    home = project(tmp_path_factory.mktemp("swept") / "project")
    hold(home, True)
    sweep = Sweep(home, "--address", nodes.address, *ON_GPU)
    told = begun(home, 28, sweep)
    lose(
        nodes,
        next(
            node for node in nodes.worker_nodes if node.get_resource_and_label_spec().num_gpus == 8
        ),
    )
    assert ended(told[told["node"] == "c"]["pid"]), "kernels outlive their node"
    hold(home, False)
    status, output = sweep.wait()
    return home, status, output, told


@pytest.fixture
def home(swept, tmp_path):
    """A copy of that project, in which all 28 are done."""
    return shutil.copytree(swept[0], tmp_path / "project", symlinks=True)


def lose(nodes, node):
    """Kill all of a node's processes, which closes its workers."""
    nodes.remove_node(node, allow_graceful=False)


def sweep(home, nodes, *arguments):
    return Sweep(home, "--address", nodes.address, *arguments)


def test_28_trials_run_side_by_side_on_28_gpus_and_never_more_than_a_node_has(swept, tried):
    home, _, _, told = swept
    assert len(told) == told["trial"].nunique() == 28 and set(told["what"]) == {"begins"}, (
        "all ran at the same time"
    )
    assert told["node"].value_counts().to_dict() == GPUS
    for node, rows in events(home).groupby("node"):
        assert most_at_once(rows) <= GPUS[node]
    tried("28 side by side, never more than the resources")


def test_trials_of_a_lost_node_go_to_others_and_nobody_elses_run_twice(swept, tried):
    home, status, output, told = swept
    lost = set(told[told["node"] == "c"]["trial"])
    begins = events(home).query("what == 'begins'").groupby("trial")["node"].agg(list)
    ends = events(home).query("what == 'ends'").groupby("trial")["node"].agg(list)
    assert status == 0, output
    assert {trial for trial, where in begins.items() if len(where) != 1} == lost and len(lost) == 8
    assert all(len(where) == 2 and where[1] != "c" for where in begins[list(lost)])
    assert ends.map(len).eq(1).all() and len(ends) == 28 and "c" not in ends.sum()
    assert output.count("its process or machine was lost; starting again (1 of 3)") == 8
    assert "28 of 28 trials are done" in output
    said_plainly(output)
    summary = pd.read_csv(home / "runs" / "stub" / "results_summary.csv")
    assert len(summary) == 28 and (summary["status"] == "done").all()
    assert sorted(path.name for path in (home / "runs" / "stub" / "trials").iterdir()) == sorted(
        f"{trial}{end}" for trial in summary["trial"] for end in ("", ".ipynb")
    )
    assert check_run(home / "runs" / "stub") == []
    tried("Ray node lost mid-sweep")


def said_plainly(output):
    """No log of Ray's, no traceback, no line that fills a screen."""
    for line in output.splitlines():
        assert len(line) < 400 and not line.startswith((" ", "\x1b")), output
        assert not any(
            noise in line for noise in ("Traceback", "(raylet)", "ray::", "WARNING", "RayError")
        ), output


def test_one_that_fails_does_not_stop_27_others_and_tells_why(home, nodes, tried):
    """And 8 that need 4 GPUs each run 4 at once on two nodes of 10."""
    run_dir = home / "runs" / "stub"
    missing = [f"{method}_seed{seed}" for method in ("attention", "combined") for seed in range(4)]
    raises, killed, hungry = missing[1], missing[4], missing[6]
    forget(home, *missing)
    for trial, code in ((raises, RAISES), (killed, KILLED), (hungry, MEMORY)):
        fault(home, trial, code)
    hold(home, True)
    command = sweep(home, nodes, "--gpus-per-trial", "4", "--cpus-per-trial", "0.1")
    begun(home, 4, command)
    time.sleep(3)  # a fifth would begin
    assert len(events(home)) == 4
    hold(home, False)
    status, output = command.wait()
    assert status == 1 and "25 of 28 trials are done; 3 failed: " in output, output
    assert sorted(events(home).query("what == 'begins'")["trial"]) == sorted(missing), (
        "each once, and no other"
    )
    causes = failed(run_dir)
    assert causes[raises] == "FloatingPointError: the loss is not finite"
    assert causes[killed].startswith("the kernel was killed or")
    assert causes[hungry].startswith("out of memory: this machine's memory is full")
    for trial, cause in causes.items():
        assert f"{trial}: FAILED: {cause}" in output
    said_plainly(output)
    for trial in (raises, hungry):
        assert "Traceback" in (run_dir / "trials" / f"{trial}.failed.ipynb").read_text()

    fault(home, killed, "")
    fault(home, hungry, "")
    status, output = sweep(home, nodes, "--gpus-per-trial", "0.5", "--cpus-per-trial", "0.1").wait()
    assert status == 1 and f"27 of 28 trials are done; 1 failed: {raises}" in output, output
    assert failed(run_dir) == {raises: "FloatingPointError: the loss is not finite"}
    assert check_run(run_dir) == [f"{raises}: failed: FloatingPointError: the loss is not finite"]
    assert (events(home)["what"] == "begins").sum() == 8 + 3, "what was done is not run again"
    tried("trial fails: not finite, raising cell, kernel killed, out of memory", 4)


def failed(run_dir):
    summary = pd.read_csv(run_dir / "results_summary.csv").set_index("trial")
    return summary[summary["status"] == "failed"]["why"].to_dict()


def test_nodes_that_see_no_cache_or_another_are_refused_before_training(
    home, nodes, tmp_path, tried
):
    forget(home, "combined_seed6")
    shutil.copytree(home / "artifacts", tmp_path / "cache" / "artifacts")
    shutil.copytree(home / "runs", tmp_path / "cache" / "runs")
    manifest = next(tmp_path.glob("cache/artifacts/cache/*/manifest.json"))
    manifest.write_text(manifest.read_text().replace("checksums", "check-sums"))
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "artifacts").symlink_to(home / "artifacts")
    shutil.copytree(home / "runs", tmp_path / "plan" / "runs")
    (tmp_path / "plan" / "runs" / "stub" / "sweep.json").write_text("{}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "runs").symlink_to(home / "runs")
    before = contents(home)
    others = [
        add_node(nodes, name, 1, KD_ROOT=str(tmp_path / name))
        for name in ("nothing", "cache", "plan", "data")
    ]
    try:
        status, output = sweep(home, nodes, *ON_GPU).wait()
        assert status == 2, output
        [error] = [line for line in output.splitlines() if line.startswith("error: ")]
        address = others[0].node_ip_address
        for problem in (
            f"{tmp_path}/nothing/runs/stub/sweep.json: No such file",
            f"{tmp_path}/plan/runs/stub/sweep.json differs from the file that the sweep sees",
            f"{manifest} differs from the file that the sweep sees",
            f"{tmp_path}/data/artifacts/data/stub/manifest.json: No such file",
        ):
            assert f"node {address}: {problem}" in error
        assert error.count(f"node {address}: ") == 4 and "set KD_ROOT to it" in error
        assert output.splitlines()[-1] == error and "Traceback" not in output
        assert events(home).empty and contents(home) == before
        assert not (tmp_path / "nothing").exists() and not list(tmp_path.rglob("*.failed.ipynb"))
    finally:
        for node in others:
            lose(nodes, node)
    tried("node that sees no or another cache", 4)


def contents(home):
    """Every file but the table of results, which says that a record is missing."""
    return {
        path: path.read_bytes()
        for folder in ("artifacts", "runs")
        for path in (home / folder).rglob("*")
        if path.is_file() and path.name != "results_summary.csv"
    }


def test_a_cluster_on_which_no_trial_fits_is_told_at_once(nodes, tmp_path, tried):
    home = project(tmp_path / "project")
    for arguments, device, message in (
        (
            ("--gpus-per-trial", "11"),
            "auto",
            "a trial asks for 1 CPUs and 11 GPUs, but the machines have: ",
        ),
        (
            ("--cpus-per-trial", "99"),
            "auto",
            "a trial asks for 99 CPUs and 1 GPUs, but the machines have: ",
        ),
        (
            ("--gpus-per-trial", "0"),
            "cuda",
            "device = 'cuda', but a trial gets 0 GPUs (the machines have: ",
        ),
    ):
        (home / "p.yaml").write_text(f"device: {device}\n")
        status, output = sweep(home, nodes, *arguments).wait()
        refused(home, status, output, message)
        assert "2 x 1 CPUs and 10 GPUs" in output
    tried("no GPU, or fewer than asked for", 3)


def test_a_machine_without_a_gpu_where_one_is_asked_for_says_so_at_once(tmp_path, tried):
    home = project(tmp_path / "project")
    command = Sweep(home, "--gpus-per-trial", "1", CUDA_VISIBLE_DEVICES="")
    refused(home, *command.wait(), "a trial asks for 1 CPUs and 1 GPUs, but the machines have: ")
    assert command.orphans(within=15) == []
    tried("no GPU, or fewer than asked for")


def refused(home, status, output, message):
    """In one line, after Ray's start, and nothing is there that was not there before."""
    # The stubs' defaults are not the project's, which is said first.
    lines = [line for line in output.splitlines() if " in the notebook, " not in line]
    assert status == 2 and lines[:-1] == ["Ray is starting"], output
    assert lines[-1].startswith(f"error: {message}"), output
    assert not list((home / "runs").glob("*")) and not (home / "artifacts" / "data").exists()


def test_a_node_that_sees_the_folder_at_another_path_works_and_its_path_is_in_no_record(
    home, nodes, tmp_path, tried
):
    forget(home, "combined_seed6")
    (tmp_path / "elsewhere").mkdir()
    for folder in ("artifacts", "runs"):
        (tmp_path / "elsewhere" / folder).symlink_to(home / folder)
    other = add_node(nodes, "elsewhere", 16, KD_ROOT=str(tmp_path / "elsewhere"))
    try:
        status, output = sweep(home, nodes, *BIG).wait()
    finally:
        lose(nodes, other)
    assert status == 0, output
    assert list(events(home)["node"]) == ["elsewhere"] * 2
    assert check_run(home / "runs" / "stub") == []
    for path, data in contents(home).items():
        if "runs" in path.parts:
            assert str(tmp_path).encode() not in data, f"{path.name} holds a path of a machine"
    tried("node that sees no or another cache")


def test_a_node_that_joins_later_and_sees_another_folder_fails_the_trial_with_the_reason(
    home, nodes, tmp_path, tried
):
    forget(home, "combined_seed5", "combined_seed6")
    hold(home, True)
    good, late = add_node(nodes, "good", 16), None
    try:
        command = sweep(home, nodes, *BIG)
        begun(home, 1, command)
        late = add_node(nodes, "late", 16, KD_ROOT=str(tmp_path / "nothing"))
        until = time.monotonic() + 600
        while not list(home.glob("runs/stub/trials/*.failed.ipynb")) and time.monotonic() < until:
            time.sleep(0.1)
        hold(home, False)
        status, output = command.wait()
    finally:
        for node in filter(None, (good, late)):
            lose(nodes, node)
    assert status == 1, output
    [(trial, cause)] = failed(home / "runs" / "stub").items()
    assert cause == f"{tmp_path}/nothing/runs/stub/sweep.json: No such file or directory"
    assert f"{trial}: FAILED: {cause}" in output
    assert list(events(home)["node"]) == ["good"] * 2
    assert not (tmp_path / "nothing").exists(), (
        "nothing is written where the node thinks that the folder is"
    )
    tried("node that sees no or another cache")


def test_a_stopped_command_leaves_no_trial_running_on_the_cluster_and_goes_on(home, nodes, tried):
    forget(home, "combined_seed6")
    for stop in ("Ctrl-C", "SIGKILL"):
        hold(home, True)
        command = sweep(home, nodes, *ON_GPU)
        told = begun(home, 1 if stop == "Ctrl-C" else 2, command)
        command.interrupt() if stop == "Ctrl-C" else command.kill("driver")
        status, output = command.wait()
        assert ended(told["pid"]), "its kernel goes on without it"
        if stop == "Ctrl-C":
            assert status == 130 and output.splitlines()[-1].startswith(
                "stopped; finished trials are kept"
            ), output
    hold(home, False)
    status, output = sweep(home, nodes, *ON_GPU).wait()
    assert status == 0 and check_run(home / "runs" / "stub") == [], output
    assert list(events(home)["what"]) == ["begins"] * 3 + ["ends"]


@pytest.mark.skipif(os.environ.get("KD_FAULTS") != "long", reason="long: a part of make faults")
def test_nodes_are_lost_again_and_again_and_more_trials_than_gpus_come_to_their_end(
    nodes, tmp_path, tried
):
    home = project(tmp_path / "project", seed=list(range(14)))
    rng = random.Random(0)
    command = sweep(home, nodes, *ON_GPU)
    spare = {add_node(nodes, "0", 8): "0"}
    for number in range(1, 6):
        begun(home, 10 * number, command, within=1500)
        time.sleep(rng.uniform(0, 5))
        node = rng.choice(list(spare))
        spare[add_node(nodes, str(number), 8)] = str(number)
        lose(nodes, node)
        del spare[node]
    status, output = command.wait()
    for node in spare:
        lose(nodes, node)
    assert status == 0, output
    said_plainly(output)
    for name, told in events(home).groupby("node"):
        assert most_at_once(told.groupby("pid").filter(lambda rows: len(rows) == 2)) <= 10, name
    assert check_run(home / "runs" / "stub") == []
    assert (
        len(pd.read_csv(home / "runs" / "stub" / "results_summary.csv").query("status == 'done'"))
        == 56
    )
    tried("Ray node lost mid-sweep", 5)

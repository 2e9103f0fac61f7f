"""A trial that is killed and started again ends with the numbers, to the last bit, that it would
have had.
"""

import json
import random
import shutil
import time

import pytest
from papermill_cli import kill, start
from sweeps import LONG, record

from kd_utils.records.trial_record import read_record
from kd_utils.store.sealed import read_sealed, write_sealed

TRIAL = "combined_seed0"  # all the terms, and a projector that trains


#: So many epochs that one is killed long before its end; averages begin within the fourth.
COMBINED = {
    "distill_type": "combined",
    "epochs": 8,
    "evaluations": 8,
    "lr_schedule": "cosine",
    "warmup_ratio": 0.2,
    "average_last": 0.6,
    "weighting": "share",  # set in the second epoch
}


def reached(saved):
    """The epoch after which a trial's state was saved; 0 where there is none."""
    return json.loads(saved.read_text())["state"]["rows"][-1]["epoch"] if saved.exists() else 0


@pytest.fixture(scope="module")
def with_dropout(undisturbed, tmp_path_factory):
    """A project root whose student drops attention weights, and the trial there, not interrupted,
    as `runs/whole`.
    """
    home = tmp_path_factory.mktemp("dropout") / "home"
    shutil.copytree(undisturbed, home)
    path = home / "artifacts" / "embedded" / "toy" / "student" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 0.3}))
    process = start(home, "whole", COMBINED)
    assert process.wait(1500) == 0, process.stdout.read()[-3000:]
    assert (
        record(home / "runs" / "whole", TRIAL)[0][0]
        != record(undisturbed / "runs" / "toy-2", TRIAL)[0][0]
    ), "dropout has no effect, so nothing is said about it"
    return home


@pytest.mark.parametrize("epoch", [1, 2, 4] if LONG else [4])
def test_a_trial_killed_after_an_epoch_goes_on_to_the_same_bits(with_dropout, epoch, times, tried):
    rng = random.Random(epoch)
    for number in range(times(1, 10)):
        run = f"killed{epoch}-{number}"
        saved = with_dropout / "artifacts" / "checkpoints" / run / f"{TRIAL}.json"
        process = start(with_dropout, run, COMBINED)
        while reached(saved) < epoch:
            assert process.poll() is None, process.stdout.read()[-3000:]
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))  # in the next stretch, or already in its saving
        kill(process)
        after = reached(saved)
        assert not (with_dropout / "runs" / run / "trials" / TRIAL).exists()
        again = start(with_dropout, run, COMBINED)
        output = again.communicate(timeout=1500)[0]
        assert again.returncode == 0, output[-3000:]
        assert record(with_dropout / "runs" / run, TRIAL) == record(
            with_dropout / "runs" / "whole", TRIAL
        )
        metrics = read_record(with_dropout / "runs" / run / "trials" / TRIAL)
        assert metrics["resumed_after"] == after >= epoch
        assert (
            f"resumes after epoch {after:g}: an earlier execution was killed"
            in (with_dropout / f"{run}.ipynb").read_text()
        )
        assert not saved.exists() and not list(saved.parent.glob("*.safetensors")), (
            "the state goes when it is done"
        )
        tried("trial resumed from its checkpoint, bit-identical")


@pytest.fixture(scope="module")
def killed(with_dropout):
    """The folder of checkpoints that a trial left which was killed after its first stretch."""
    folder = with_dropout / "artifacts" / "checkpoints" / "killed"
    process = start(with_dropout, "killed", COMBINED)
    while not (folder / f"{TRIAL}.json").exists():
        assert process.poll() is None, process.stdout.read()[-3000:]
        time.sleep(0.02)
    kill(process)
    return folder


@pytest.mark.parametrize(
    "damage", ["weights", "code", "threads"] if LONG else ["weights", "threads"]
)
def test_a_state_that_is_damaged_or_from_other_code_or_threads_is_not_used(
    with_dropout, killed, damage
):
    """The trial begins again, and its numbers are right all the same. With another number of
    threads sums are added up in another order.
    """
    folder = killed.with_name(damage)
    shutil.copytree(killed, folder)
    state = read_sealed(folder / f"{TRIAL}.json", "checksums")
    if damage == "weights":
        [weights] = state["checksums"].keys() - {"sha256"}
        data = bytearray((folder / weights).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / weights).write_bytes(data)
    else:
        made = state["key"]
        if damage == "code":
            made["code"]["kd_utils/distill/training.py"] = "0" * 12
        else:
            made["arithmetic"]["threads"] += 1
        write_sealed(folder / f"{TRIAL}.json", state, "checksums")
    again = start(with_dropout, damage, COMBINED)
    output = again.communicate(timeout=1500)[0]
    assert again.returncode == 0, output[-3000:]
    assert read_record(with_dropout / "runs" / damage / "trials" / TRIAL)["resumed_after"] is None
    assert record(with_dropout / "runs" / damage, TRIAL) == record(
        with_dropout / "runs" / "whole", TRIAL
    )

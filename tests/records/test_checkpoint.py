"""A trial's state: going on from it gives the very numbers of a trial that was never stopped."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_llama

from kd_utils.distill import schedules
from kd_utils.distill.terms.hidden import make_projector
from kd_utils.distill.training import seed_step
from kd_utils.records.checkpoint import Checkpoint
from kd_utils.store.sealed import read_sealed, write_sealed

KEY = {"config": "c" * 16, "versions": {"torch": torch.__version__}}
STEPS = 5  # of an epoch


class Trial:
    """A tied student with dropout, a projector, AdamW, a schedule, averages, the losses so far."""

    def __init__(self, path: Path, *, key=KEY, tied=True, initial=0):
        self.student = tiny_llama(
            vocab=31, seed=initial, tie_word_embeddings=tied, attention_dropout=0.3
        ).train()
        self.projector = make_projector(32, 16, 0)
        trained = [*self.student.parameters(), *self.projector.parameters()]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1, fused=True)
        modules = {"student": self.student, "projector": self.projector}
        self.schedule = schedules.learning_rate(self.optimizer, "cosine", 3 * STEPS, 0.1)
        # From the seventh step on: the first state has no averages, later ones have.
        self.average = schedules.Average(trained, 3 * STEPS, 0.6)
        self.checkpoint = Checkpoint(
            path, key, modules, self.optimizer, self.schedule, self.average
        )
        self.losses: list[float] = []

    def epoch(self, number):
        for step in range((number - 1) * STEPS, number * STEPS):
            seed_step(7, step)
            ids = torch.randint(0, 31, (3, 9), generator=torch.Generator().manual_seed(step))
            output = self.student(input_ids=ids, labels=ids, output_hidden_states=True)
            loss = output.loss + self.projector(output.hidden_states[-1]).square().mean()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.average.update(step)
            self.optimizer.zero_grad(set_to_none=True)
            self.losses.append(loss.item())

    def save(self, epoch=1):
        self.checkpoint.save_if_due(epoch, {"losses": self.losses})

    def numbers(self):
        """Everything that another epoch depends on, as bits."""
        named = {
            f"{kind}.{name}": value
            for kind, part in (("student", self.student), ("projector", self.projector))
            for name, value in part.state_dict().items()
        }
        named |= {
            f"{index}.{key}": value
            for index, values in self.optimizer.state_dict()["state"].items()
            for key, value in values.items()
        }
        named |= {f"average.{at}": value for at, value in enumerate(self.average.values)}
        rates = [self.schedule.get_last_lr(), [g["lr"] for g in self.optimizer.param_groups]]
        named["rates"] = torch.tensor(rates, dtype=torch.float64)
        return {
            name: (value.dtype, value.detach().numpy().tobytes()) for name, value in named.items()
        }


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def saved(path, epochs=1):
    trial = Trial(path)
    for epoch in range(1, epochs + 1):
        trial.epoch(epoch)
        trial.save(epoch)
    return trial


@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_going_on_gives_the_very_numbers_of_a_trial_that_was_never_stopped(tmp_path, tied, epochs):
    straight = Trial(tmp_path / "never.json", tied=tied)
    for epoch in (1, 2, 3):
        straight.epoch(epoch)
    first = Trial(tmp_path / "t.json", tied=tied)
    for epoch in range(1, epochs + 1):
        first.epoch(epoch)
    first.save()
    assert bool(first.average.values) == (epochs == 2)
    second = Trial(tmp_path / "t.json", tied=tied, initial=5)
    assert second.numbers() != first.numbers()
    second.losses = second.checkpoint.load()["losses"]
    assert second.numbers() == first.numbers() and second.losses == first.losses
    for epoch in range(epochs + 1, 4):
        second.epoch(epoch)
    assert second.losses == straight.losses and len(set(straight.losses)) > 2 * STEPS
    assert second.numbers() == straight.numbers() and second.average.values


def test_an_interrupted_trial_goes_back_to_before_its_averages(tmp_path):
    trial = saved(tmp_path / "t.json")
    before = trial.numbers()
    trial.epoch(2)
    assert trial.average.values
    trial.checkpoint.load()
    assert trial.numbers() == before and not trial.average.values


def test_without_the_moments_the_numbers_would_differ(tmp_path):
    """So the test above can fail."""
    straight, cold = Trial(tmp_path / "a.json"), Trial(tmp_path / "b.json", initial=5)
    straight.epoch(1)
    cold.student.load_state_dict(straight.student.state_dict())
    cold.projector.load_state_dict(straight.projector.state_dict())
    straight.epoch(2)
    cold.epoch(2)
    assert (
        cold.losses[0] == straight.losses[STEPS] and cold.losses[1:] != straight.losses[STEPS + 1 :]
    )


def test_a_tied_weight_is_kept_once_and_stays_tied(tmp_path):
    from safetensors import safe_open

    saved(tmp_path / "t.json")
    with safe_open(tmp_path / "t-step1.safetensors", "pt") as file:
        names = [name for name in file.keys() if "embed_tokens" in name or "lm_head" in name]
    assert names == ["parameter.student.model.embed_tokens.weight"]
    trial = Trial(tmp_path / "t.json", initial=5)
    trial.checkpoint.load()
    assert trial.student.lm_head.weight is trial.student.model.embed_tokens.weight


def test_nothing_saved_is_none_and_leaves_the_weights(tmp_path):
    trial = Trial(tmp_path / "t.json")
    before = trial.numbers()
    assert trial.checkpoint.load() is None and trial.numbers() == before


@pytest.mark.parametrize(
    "key", [KEY | {"config": "d" * 16}, {"config": "c" * 16}, KEY | {"more": 1}]
)
def test_a_state_of_something_else_is_not_read(tmp_path, key):
    saved(tmp_path / "t.json")
    trial = Trial(tmp_path / "t.json", key=key, initial=5)
    before = trial.numbers()
    assert trial.checkpoint.load() is None and trial.numbers() == before


@pytest.mark.parametrize("name", ["t.json", "t-step1.safetensors"])
def test_a_damaged_state_is_not_read(tmp_path, name):
    saved(tmp_path / "t.json")
    trial = Trial(tmp_path / "t.json", initial=5)
    before, path = trial.numbers(), tmp_path / name
    whole = path.read_bytes()
    for number, at in enumerate(np.linspace(0, len(whole) - 1, 60).astype(int)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << number % 8)]) + whole[at + 1 :])
        assert trial.checkpoint.load() is None, f"byte {at}"
    for damaged in (whole[:-2], whole + b"0", whole[: len(whole) // 2], b""):
        path.write_bytes(damaged)
        assert trial.checkpoint.load() is None, f"{len(damaged)} bytes"
    path.unlink()
    assert trial.checkpoint.load() is None
    path.mkdir()
    assert trial.checkpoint.load() is None
    assert trial.numbers() == before, "what was not read changed nothing"
    path.rmdir()
    path.write_bytes(whole)
    assert trial.checkpoint.load() is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": None},
        {"weights": {"sha256": "0"}},
        {"weights": {"file": 3}},
        {"weights": {"file": "t.json"}},
        {"weights": {"file": "../t.json", "sha256": "0"}},
        {"key": []},
    ],
)
def test_a_sealed_file_of_another_shape_is_not_read(tmp_path, changes):
    saved(tmp_path / "t.json")
    document = read_sealed(tmp_path / "t.json", "checksums")
    write_sealed(tmp_path / "t.json", document | changes, "checksums")
    assert Trial(tmp_path / "t.json").checkpoint.load() is None
    for key in changes:
        write_sealed(
            tmp_path / "t.json",
            {name: document[name] for name in document if name != key},
            "checksums",
        )
        assert Trial(tmp_path / "t.json").checkpoint.load() is None


def test_a_save_that_is_killed_before_its_last_file_leaves_the_earlier_state(tmp_path, monkeypatch):
    trial = saved(tmp_path / "t.json")
    after_one = trial.numbers()
    trial.epoch(2)

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("kd_utils.store.sealed.write_sealed", killed)
    with pytest.raises(KeyboardInterrupt):
        trial.save(2)
    monkeypatch.undo()
    assert names_in(tmp_path) == ["t-step1.safetensors", "t-step2.safetensors", "t.json"]
    again = Trial(tmp_path / "t.json", initial=5)
    assert len(again.checkpoint.load()["losses"]) == STEPS and again.numbers() == after_one
    again.epoch(2)
    again.save(2)
    assert names_in(tmp_path) == ["t-step2.safetensors", "t.json"]
    assert again.numbers() == trial.numbers()


def killed_saving(trial, monkeypatch, name, nth):
    """Save epoch 2 in a process of its own, which gets SIGKILL at the nth call of os.NAME."""
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    calls, real = [], getattr(os, name)

    def killing(*arguments, **keywords):
        calls.append(1)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)

    monkeypatch.setattr(os, name, killing)
    trial.save(2)
    os._exit(0)


@pytest.mark.parametrize("name", ["fsync", "replace", "unlink"])
def test_a_save_that_is_killed_anywhere_leaves_a_whole_state_and_no_rest(
    tmp_path, monkeypatch, name
):
    after = {}
    statuses = []
    for nth in range(1, 9):
        trial = Trial(tmp_path / "t.json")
        for epoch in (1, 2):
            trial.epoch(epoch)
            after[epoch] = trial.numbers()
            if epoch == 1:
                trial.save(1)
        statuses.append(killed_saving(trial, monkeypatch, name, nth))
        again = Trial(tmp_path / "t.json", initial=5)
        state = again.checkpoint.load()
        assert again.numbers() == after[len(state["losses"]) // STEPS]
        again.save(3)
        assert names_in(tmp_path) == ["t-step3.safetensors", "t.json"]
        killed_saving(trial, monkeypatch, name, nth)
        again.checkpoint.remove()
        assert not list(tmp_path.iterdir())
        if statuses[-1] == 0:
            break
    assert statuses[0] == -signal.SIGKILL and statuses[-1] == 0, "every call of it was tried"


def test_each_save_keeps_one_epochs_weights_and_remove_keeps_nothing(tmp_path):
    trial = saved(tmp_path / "t.json", epochs=3)
    (tmp_path / "t2-step1.safetensors").touch()  # another trial's
    assert names_in(tmp_path) == ["t-step3.safetensors", "t.json", "t2-step1.safetensors"]
    trial.checkpoint.remove()
    trial.checkpoint.remove()
    assert names_in(tmp_path) == ["t2-step1.safetensors"]
    assert trial.checkpoint.load() is None


def test_nothing_is_pickled(tmp_path):
    saved(tmp_path / "t.json")
    data = (tmp_path / "t-step1.safetensors").read_bytes()
    assert data[8:10] == b'{"' and int.from_bytes(data[:8], "little") < len(data), (
        "safetensors: a length, then JSON"
    )
    assert (tmp_path / "t.json").read_bytes().startswith(b"{\n")


def test_a_loss_that_is_not_finite_is_not_kept(tmp_path):
    trial = Trial(tmp_path / "t.json")
    with pytest.raises(ValueError, match=r"losses\[0\] is nan"):
        trial.checkpoint.save_if_due(1, {"losses": [float("nan")]})
    assert trial.checkpoint.load() is None

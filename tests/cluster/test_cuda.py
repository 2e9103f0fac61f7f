"""Which GPUs trials can use: a stand-in for torch counts as CUDA does, on a machine made up."""

import os

import pytest
import torch

from kd_utils.cluster import cuda
from kd_utils.cluster.cuda import Torch, disagreement, entries, names_of

#: torch on a machine with the devices of KD_DEVICES, and the rules of CUDA: an entry that is no
#: device ends the list, a device named twice empties it, and of MIG devices only the first counts.
TORCH = """
import os
__version__ = os.environ["KD_TORCH"]
class version:
    cuda = None if __version__.endswith("+cpu") else "13.0"
class cuda:
    def device_count():
        devices = os.environ["KD_DEVICES"].split()
        named = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(len(devices))))).split(",")
        found = []
        for name in named:
            if name in devices:
                name = str(devices.index(name))
            if not name.isdecimal() or int(name) >= len(devices):
                break
            found.append(name)
        if len(set(found)) < len(found):
            return 0
        return min(len(found), 1) if "MIG-" in named[0] else len(found)
    def is_available():
        return version.cuda is not None and cuda.device_count() > 0
"""


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """`machine(devices, visible, torch)`: from now on torch and nvidia-smi are of that machine;
    returns an empty list for what `usable_gpus` will say.
    """
    (tmp_path / "torch.py").write_text(TORCH)
    listing = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def machine(devices, visible=None, torch="2.11.0"):
        monkeypatch.setenv("KD_TORCH", torch)
        monkeypatch.setenv("KD_DEVICES", devices)
        cards = "\n".join(f"GPU {n}: NVIDIA X" for n, name in enumerate(devices.split()))
        listing.write_text(f"#!/bin/sh\necho '{cards}\n  MIG 1g.5gb Device 0:'\n")
        listing.chmod(0o755)
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return []

    return machine


TWO, MIG = "GPU-aa GPU-bb", "MIG-aa MIG-bb"


@pytest.mark.parametrize(
    ("devices", "visible", "names"),
    [
        (TWO, None, ["0", "1"]),
        (TWO, "1", ["1"]),
        (TWO, "GPU-bb,GPU-aa", ["GPU-bb", "GPU-aa"]),
        (TWO, "1, 0", ["1", "0"]),
        (MIG, "MIG-bb", ["MIG-bb"]),
        (MIG, "MIG-aa,MIG-bb", ["MIG-aa", "MIG-bb"]),  # one each, though a process sees one
        (TWO, "", []),
        (TWO, "-1", []),  # Ray counts this as one
        (TWO, "NoDevFiles", []),
        (TWO, "0,-1,1", ["0"]),
        ("", None, []),
    ],
)
def test_the_gpus_are_those_that_cuda_shows_and_nothing_need_be_said(
    machine, devices, visible, names
):
    said = machine(devices, visible)
    assert cuda.usable_gpus(None, "auto", said.append) == names and said == []


@pytest.mark.parametrize(
    ("devices", "visible", "torch", "names", "line"),
    [
        (
            "GPU-aa",
            None,
            "2.11.0+cpu",
            [],
            "torch 2.11.0+cpu can use 0 of the 1 GPUs that the driver has; this torch is built "
            "without CUDA: install a CUDA build; to train on the CPU: --gpus-per-trial 0",
        ),
        (
            TWO,
            "0,9",
            "2.11.0",
            ["0"],
            "torch 2.11.0 can use 1 of the 2 GPUs that CUDA_VISIBLE_DEVICES=0,9 names; see "
            "`nvidia-smi -L`",
        ),
        (
            TWO,
            "9,0",
            "2.11.0",
            [],
            "torch 2.11.0 can use 0 of the 2 GPUs that CUDA_VISIBLE_DEVICES=9,0 names",
        ),
        (
            TWO,
            "0,0",
            "2.11.0",
            [],
            "torch 2.11.0 can use 0 of the 2 GPUs that CUDA_VISIBLE_DEVICES=0,0 names",
        ),
        (
            MIG,
            "MIG-aa,MIG-xx",
            "2.11.0",
            ["MIG-aa"],
            "torch 2.11.0 can use 1 of the 2 GPUs that CUDA_VISIBLE_DEVICES=MIG-aa",
        ),
    ],
)
def test_where_torch_can_use_fewer_one_line_says_so(machine, devices, visible, torch, names, line):
    said = machine(devices, visible, torch)
    assert cuda.usable_gpus(None, "auto", said.append) == names
    assert len(said) == 1 and said[0].startswith(line) and "\n" not in said[0]


@pytest.mark.parametrize(("gpus", "device"), [(0.5, "auto"), (None, "cuda"), (1, "cuda:0")])
def test_a_gpu_that_is_asked_for_and_that_torch_cannot_use_is_refused(machine, gpus, device):
    said = machine("GPU-aa", None, "2.11.0+cpu")
    with pytest.raises(
        ValueError, match="torch 2.11.0.cpu can use 0 of the 1 GPUs that the driver has"
    ):
        cuda.usable_gpus(gpus, device, said.append)
    assert said == []


@pytest.mark.parametrize(("gpus", "device"), [(0, "auto"), (0, "cuda"), (None, "cpu")])
def test_torch_is_not_asked_where_no_trial_gets_a_gpu(machine, monkeypatch, gpus, device):
    said = machine(TWO)
    monkeypatch.setattr(cuda, "ask_torch", None)
    assert cuda.usable_gpus(gpus, device, said.append) == []


def test_a_trial_cannot_have_two_mig_devices(machine):
    machine(MIG, "MIG-aa,MIG-bb")
    with pytest.raises(ValueError, match="cannot have 2 MIG devices.*: give --gpus-per-trial 1"):
        cuda.usable_gpus(2, "auto", print)


def test_a_torch_that_cannot_be_imported_is_named_with_its_error(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: no such file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ValueError, match="torch cannot be imported .*: ImportError: libcudart"):
        cuda.ask_torch()


@pytest.mark.parametrize(
    ("visible", "given", "count", "problem"),
    [
        ("0", 0.5, 1, ""),
        ("MIG-aa", 1, 1, ""),
        ("0,1", 2, 2, ""),
        ("3", 1, 0, "torch 2.11.0 can use 0 of the 1 GPUs that CUDA_VISIBLE_DEVICES=3 names; see"),
        (
            "0,1",
            2,
            1,
            "torch 2.11.0 can use 1 of the 2 GPUs that CUDA_VISIBLE_DEVICES=0,1 names; see",
        ),
        (None, 1, 0, "torch 2.11.0 can use 0 of the 1 GPUs that the driver has; see"),
    ],
)
def test_a_process_that_was_given_gpus_tells_whether_torch_can_use_them(
    monkeypatch, visible, given, count, problem
):
    monkeypatch.setattr(cuda, "ask_torch", lambda: Torch("2.11.0", "13.0", count, []))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = cuda.problem_with_gpus(given)
    assert found.startswith(problem) and bool(found) == bool(problem)


def test_more_than_promised_is_no_disagreement():
    """nvidia-smi may be missing where torch sees a GPU."""
    torch = Torch("2.11.0", "13.0", 1, [])
    assert names_of(None, torch) == ["0"] and disagreement(None, 0, 1, torch) == ""
    assert entries(None) is None and entries("") == [] and entries("0,-1") == ["0"]


def test_this_machines_own_torch_is_asked_in_another_process():
    asked = cuda.ask_torch("", "-1")
    assert asked.version == torch.__version__ and asked.cuda == (torch.version.cuda or "")
    assert asked.counts == [0, 0]

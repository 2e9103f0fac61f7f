"""What a record says about where it was made."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import torch

from kd_utils.records.provenance import environment, git_commit


def test_environment_says_nothing_of_the_machine_but_its_kind():
    about = environment()
    assert set(about) == {"git_commit", "versions", "device"}
    assert (
        about["versions"]["python"] == sys.version.split()[0]
        and about["versions"]["pandas"] == pd.__version__
    )
    assert about["device"]["threads"] == torch.get_num_threads()
    text = json.dumps(about)
    assert (
        os.uname().nodename not in text
        and str(Path.home()) not in text
        and "/" not in text.replace("//", "")
    )


def test_two_kinds_of_cpu_with_one_name_are_told_apart(monkeypatch):
    real = Path.read_text

    def cpu(text):
        def read_text(path, *arguments, **options):
            is_cpuinfo = str(path) == "/proc/cpuinfo"
            return text if is_cpuinfo else real(path, *arguments, **options)

        monkeypatch.setattr(Path, "read_text", read_text)
        return environment()["device"]["cpu"]

    core = "model name\t: AMD EPYC\ncpu family\t: 25\nmodel\t\t: {}\nflags\t\t: fpu\n\n"
    first, second = (cpu(2 * core.format(model)) for model in (1, 17))
    assert first == "AMD EPYC, family 25, model 1" != second
    assert cpu("Processor : of another kind")


def test_git_commit_of_a_checkout(tmp_path, monkeypatch):
    (tmp_path / "kd_utils").mkdir()
    (tmp_path / "kd_utils" / "records.py").write_text("1")
    monkeypatch.delenv("KD_COMMIT", raising=False)
    monkeypatch.setattr("kd_utils.config.project_paths.CODE_ROOT", tmp_path)
    assert git_commit() == "unknown"
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "m"]):
        subprocess.run([*git, *arguments], check=True)
    commit = git_commit()
    assert len(commit) == 40
    (tmp_path / "other").write_text("not code")
    assert git_commit() == commit
    (tmp_path / "kd_utils" / "new.py").write_text("2")
    assert git_commit() == f"{commit}-dirty"
    monkeypatch.setenv("KD_COMMIT", "travelled")
    assert git_commit() == "travelled"

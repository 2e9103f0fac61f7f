"""What a record says of where it was made, and that requirements.txt is the whole environment."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kd_utils.demos import smol
from kd_utils.records.provenance import environment, git_commit

ROOT = Path(__file__).resolve().parents[2]
NOT_OURS_TO_PIN = {"pip", "setuptools", "wheel", "kd-utils"}  # what installs, and what is installed


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


def pins(path=ROOT / "requirements.txt"):
    """The requirements of a file, by name."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    requirements = [Requirement(line) for line in lines if line]
    by_name = {canonicalize_name(requirement.name): requirement for requirement in requirements}
    assert len(by_name) == len(requirements), "a package is named twice"
    return by_name


def needs_of(name, extras=()):
    """What an installed package requires here, with those of its extras that are asked for."""
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        if not requirement.marker or any(
            requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)
        ):
            yield requirement


def needed(requirements):
    """Every package that these bring along, and what asks for it: (its requirement, the package
    that has it).
    """
    waiting, found = [(requirement, "requirements.txt") for requirement in requirements], {}
    while waiting:
        requirement, asker = waiting.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key not in found:
            found[key] = requirement, asker
            waiting += [
                (need, requirement.name) for need in needs_of(requirement.name, requirement.extras)
            ]
    return found


def exact(requirement):
    return re.fullmatch(r"==[^*,]+", str(requirement.specifier)) is not None


def test_every_dependency_is_pinned_once_at_what_is_installed():
    pinned = pins()
    assert len(pinned) > 100 and all(exact(requirement) for requirement in pinned.values())
    other = {
        name: metadata.version(name)
        for name, requirement in pinned.items()
        if not requirement.specifier.contains(metadata.version(name), prereleases=True)
    }
    assert not other, "installed at another version than requirements.txt says: run `make setup`"
    missing = {
        f"{name} (for {asker})"
        for (name, _), (requirement, asker) in needed(pinned.values()).items()
        # torch's CUDA build pins its nvidia-* packages itself, on the machines that have them
        if name not in pinned.keys() | NOT_OURS_TO_PIN and not exact(requirement)
    }
    assert not missing


@pytest.mark.skipif(not os.environ.get("CI"), reason="whoever works here may have installed more")
def test_nothing_else_is_installed():
    pinned = pins()
    weights = canonicalize_name(Requirement(smol.PACKAGE).name)  # `make smol-weights` adds it
    brought = {
        name
        for (name, _), (requirement, _) in needed(pinned.values()).items()
        if exact(requirement)
    }
    installed = {
        canonicalize_name(found.name)
        for found in metadata.distributions(
            path=[str(path) for path in (Path(sys.prefix, "lib").glob("python*/site-packages"))]
        )
    }
    assert "torch" in installed
    assert not installed - pinned.keys() - brought - NOT_OURS_TO_PIN - {weights}


def test_no_other_file_names_a_version():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert [entry for entry in conda if not isinstance(entry, dict)] == ["python=3.11", "pip"]
    assert [entry["pip"] for entry in conda if isinstance(entry, dict)] == [
        ["-r requirements.txt", "-e ."]
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert not {"dependencies", "optional-dependencies"} & project["project"].keys()
    assert project["project"]["dynamic"] == ["dependencies"] and "dependency-groups" not in project
    assert project["tool"]["setuptools"]["dynamic"] == {
        "dependencies": {"file": ["requirements.txt"]}
    }
    assert [Requirement(line).name for line in project["build-system"]["requires"]] == [
        "setuptools"
    ]
    beside = pins(ROOT / "benchmarks" / "lm_eval_requirements.txt")
    assert (
        all(exact(requirement) for requirement in beside.values())
        and not beside.keys() & pins().keys()
    )

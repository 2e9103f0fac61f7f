"""What is in `artifacts/`, who needs it, and what `clean` removes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stubs import MADE, write_plan, write_trial

from kd_utils.__main__ import main
from kd_utils.cache.manifest import FORMAT_VERSION, read_manifest, sealed_cache
from kd_utils.config import project_paths
from kd_utils.data import hub
from kd_utils.models import loading
from kd_utils.records.trial_record import read_record
from kd_utils.storage import cleaning
from kd_utils.store.files import sha256_file, sha256_json
from kd_utils.store.locks import locked
from kd_utils.store.sealed import SealedFolder


def cache(artifacts: Path, name: str, day: int, **header) -> Path:
    """A finished cache that was last used on this day of 1970."""
    folder = artifacts / "cache" / name
    sealed_cache(folder).seal({"format": FORMAT_VERSION, "name": name.split("-")[0], **header}, {})
    os.utime(folder / "manifest.json", (day * 86400, day * 86400))
    return folder


def write(folder: Path, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("x" * 1000)
    return folder


@pytest.fixture
def artifacts(tmp_path, monkeypatch):
    """Of each kind one that something needs and one that nobody does."""
    monkeypatch.setattr(project_paths, "ROOT", tmp_path)
    artifacts = tmp_path / "artifacts"
    for name in ("toy", "gone"):
        SealedFolder(artifacts / "data" / name, "manifest.json").seal({"name": name}, {})
        for kind in ("students", "checkpoints", "analysis", "embedded"):
            write(artifacts / kind / name)
    (artifacts / "checkpoints" / "toy" / "black_box_seed1.json").touch()  # planned, not done
    recorded = cache(artifacts, "toy-2026-01-01-aaaaaaaa", 1, teacher="artifacts/teachers/toy-1")
    cache(artifacts, "toy-2026-01-02-bbbbbbbb", 2)
    cache(artifacts, "toy-2026-01-03-cccccccc", 3, teacher="artifacts/embedded/toy/teacher")
    write(artifacts / "cache" / "toy-2026-01-04-dddddddd", "train-00000.parquet")
    begun_early = write(artifacts / "cache" / "toy-2026-01-05-eeeeeeee", "train-00000.parquet")
    notes = write(artifacts / "cache" / f".{begun_early.name}.shards", "train-00000.parquet")
    for folder in (begun_early, notes):
        os.utime(folder / "train-00000.parquet", (0, 0))
    for name in ("toy-1", "toy-2", "toy-12"):
        write(artifacts / "teachers" / name)
    checksums = {"config.json": "0" * 64, "model.safetensors": "1" * 64, "tokenizer.json": "2" * 64}
    for name, other in (("toy-layers-2-1", ""), ("toy-layers-2-2", "3" * 64)):
        folder = SealedFolder(write(artifacts / "initial_students" / name), "initial_student.json")
        folder.seal({}, checksums | ({"config.json": other} if other else {}))
    write(artifacts / "initial_students" / "unknown")
    write(artifacts / "bench-k1")
    write(artifacts / "mine")
    write(artifacts / "data" / ".toy.partial-999999999")
    write(artifacts / "data" / f".toy.partial-{os.getpid()}")
    run_dir = tmp_path / "runs" / "toy"
    content_hash = read_manifest(recorded)["content_hash"]
    initial = sha256_json({key: checksums[key] for key in ("config.json", "model.safetensors")})
    student = {"name": "tiny", "fingerprint": MADE["students"]["tiny"], "initial": initial}
    named = {"name": "renamed", "content_hash": content_hash}
    write_plan(run_dir, name="toy", cache=named)
    write_trial(run_dir, "black_box", 0, student=student, cache=named)
    return artifacts


UNNEEDED = {
    ("data", "gone"),
    ("cache", "toy-2026-01-02-bbbbbbbb"),
    ("cache", "toy-2026-01-05-eeeeeeee"),
    ("teacher", "toy-2"),
    ("teacher", "toy-12"),
    ("initial student", "toy-layers-2-2"),
    ("students", "gone"),
    ("checkpoints", "gone"),
    ("analysis", "gone"),
    ("embedded", "gone"),
    ("bench", "bench-k1"),
    ("leftover", ".toy.partial-999999999"),
}


def entries(artifacts, *what):
    return cleaning.entries(artifacts, artifacts.parent / "runs", what)


def free(artifacts, force=False):
    found = [entry for entry in entries(artifacts) if cleaning.removable(entry, force=force)]
    return {(entry.item.kind, entry.item.name) for entry in found}


def test_what_a_run_a_record_or_an_experiment_names_is_needed(artifacts):
    assert free(artifacts) == UNNEEDED
    by = {entry.item.name: entry.use.by for entry in entries(artifacts, "cache", "teacher")}
    assert by["toy-2026-01-01-aaaaaaaa"] == ["runs/toy"]
    assert by["toy-2026-01-03-cccccccc"] == ["newest of toy"]
    assert by["toy-2026-01-04-dddddddd"] == ["begun for toy"]
    assert by["toy-1"] == ["cache toy-2026-01-01-aaaaaaaa"]


def test_an_initial_student_has_the_fingerprint_that_records_name(tmp_path):
    for name in ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / name).write_text(name)
    checksums = {path.name: sha256_file(path) for path in tmp_path.iterdir()} | {"sha256": "4"}
    assert hub.fingerprint_of(checksums) == loading.model_fingerprint(str(tmp_path))


def test_clean_removes_with_yes_only_and_nothing_that_is_needed(artifacts, capsys):
    before = sorted(artifacts.rglob("*"))
    assert main(["clean"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(UNNEEDED) + 1 and said[-1].startswith("would free: ")
    assert sorted(artifacts.rglob("*")) == before
    assert main(["clean", "--yes"]) == 0
    now = capsys.readouterr().out.splitlines()
    assert now == [line.replace("would remove", "removed") for line in said[:-1]] + [
        said[-1].replace("would free", "freed")
    ]
    assert free(artifacts) == set()
    for kind, name in UNNEEDED:
        assert not [
            path for path in before if path.name == name and path.exists() and kind in path.parts
        ]
    assert not list(artifacts.glob("cache/.*")) and (artifacts / "mine").exists()
    assert read_record(artifacts.parent / "runs" / "toy" / "trials" / "black_box_seed0")


def test_kinds_and_names_choose_and_force_takes_what_is_needed(artifacts, capsys):
    assert main(["clean", "teachers", "toy-2026-01-01-aaaaaaaa", "--yes"]) == 0
    shown = capsys.readouterr().out
    assert "kept: cache toy-2026-01-01-aaaaaaaa: runs/toy" in shown and "data" not in shown
    assert {path.name for path in (artifacts / "teachers").iterdir()} == {"toy-1"}
    assert main(["clean", "toy-2026-01-01-aaaaaaaa", "--yes", "--force"]) == 0
    assert not (artifacts / "cache" / "toy-2026-01-01-aaaaaaaa").exists()
    assert "needed by runs/toy" in capsys.readouterr().out
    assert main(["clean", "mine", "--yes", "--force"]) == 0 and (artifacts / "mine").exists()
    assert main(["clean", "cach"]) == 2
    assert "nothing of kind or name 'cach'; did you mean 'cache'?" in capsys.readouterr().err


def test_checkpoints_of_trials_that_are_done_are_free(artifacts):
    (artifacts / "checkpoints" / "toy" / "black_box_seed1.json").unlink()
    (artifacts / "checkpoints" / "toy" / "black_box_seed0.json").touch()
    assert ("checkpoints", "toy") in free(artifacts)
    (artifacts.parent / "runs" / "toy" / "sweep.json").write_text("{")
    assert ("checkpoints", "toy") not in free(artifacts), "what is planned is not known"


def test_a_checkpoint_of_a_first_trial_by_hand_is_needed_before_there_is_a_run_folder(artifacts):
    (artifacts / "checkpoints" / "gone" / "black_box_seed0.json").touch()
    assert ("checkpoints", "gone") not in free(artifacts)


def test_a_student_that_another_run_or_a_needed_cache_names_is_needed(artifacts):
    """Its own run was removed, since it is another one's teacher or initial student."""
    for name in ("taught", "teaches"):
        write(artifacts / "students" / name)
    cache(artifacts, "own-2026-01-01-ffffffff", 1, teacher="artifacts/students/teaches/a_seed0")
    write_plan(artifacts.parent / "runs" / "next", students={"artifacts/students/taught/a": ""})
    assert not {("students", "taught"), ("students", "teaches")} & free(artifacts)


def test_a_run_folder_deeper_in_runs_is_seen(artifacts):
    deep = artifacts.parent / "runs" / "group" / "deep"
    write_plan(deep, name="gone", students={"artifacts/embedded/gone/student": ""})
    write(artifacts / "students" / project_paths.run_label(deep))
    found = {entry.item.path: entry.use.by for entry in entries(artifacts)}
    assert found[artifacts / "data" / "gone"] == ["runs/group/deep"]
    assert found[artifacts / "embedded" / "gone"] == ["runs/group/deep"]
    assert found[artifacts / "students" / project_paths.run_label(deep)] == ["runs/group/deep"]


def test_the_folder_of_a_measurement_that_runs_is_in_use(artifacts):
    write(artifacts / f"bench-a1-{os.getppid()}")
    assert {entry for entry in free(artifacts, force=True) if entry[0] == "bench"} == {
        ("bench", "bench-k1")
    }


def test_a_run_folder_elsewhere_may_need_its_students(artifacts, tmp_path):
    label = project_paths.run_label(tmp_path / "elsewhere" / "toy")
    write(artifacts / "students" / label)
    assert ("students", label) not in free(artifacts)


HOLD = """
import sys
from pathlib import Path
from kd_utils.store.locks import locked
with locked(Path(sys.argv[1]), "a sweep"):
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_what_a_running_sweep_uses_or_just_wrote_is_not_removed_even_with_force(artifacts, capsys):
    run_dir = artifacts.parent / "runs" / "toy"
    long_ago = time.time() - 3600
    for path in artifacts.rglob("*"):
        if path.is_file() and path.stat().st_mtime > long_ago:
            os.utime(path, (long_ago, long_ago))
    command = [sys.executable, "-c", HOLD, run_dir]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as sweep:
        try:
            assert sweep.stdout.readline() == "held\n"
            new = write(artifacts / "embedded" / "new")
            found = free(artifacts, force=True)
            assert ("cache", "toy-2026-01-01-aaaaaaaa") not in found
            assert ("students", "toy") not in found and ("embedded", new.name) not in found
            assert found >= UNNEEDED
            assert main(["clean", "students", "--force", "--yes"]) == 0
            assert "kept: students toy: toy is in use by a sweep (proc" in capsys.readouterr().out
        finally:
            sweep.communicate("\n")
    assert ("students", "toy") in free(artifacts, force=True)


def test_a_cache_that_is_being_written_stays_and_the_rest_goes(artifacts, capsys):
    folder = artifacts / "cache" / "toy-2026-01-05-eeeeeeee"
    with locked(folder, "a caching run"):
        assert main(["clean", "cache", "--force", "--yes"]) == 1
    shown = capsys.readouterr().out
    assert "not removed: cache toy-2026-01-05-eeeeeeee" in shown
    assert "is in use by a caching run" in shown and (folder / "train-00000.parquet").exists()
    notes = folder.with_name(f".{folder.name}.shards")
    assert sorted((artifacts / "cache").iterdir()) == [notes, folder]


def test_a_killed_removal_leaves_a_leftover_and_no_half_folder(artifacts, monkeypatch):
    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        cleaning.remove(entries(artifacts, "toy-2")[0].item)
    [left] = artifacts.glob("teachers/.*.partial-*")
    assert not (artifacts / "teachers" / "toy-2").exists()
    left.rename(left.with_name(".toy-2.partial-999999999"))  # the process is gone
    assert ("leftover", ".toy-2.partial-999999999") in free(artifacts)


def test_links_are_not_followed_and_not_removed(artifacts, tmp_path):
    big = write(tmp_path / "elsewhere")
    (artifacts / "teachers" / "linked").symlink_to(big)
    assert ("teacher", "linked") not in free(artifacts, force=True)
    assert [entry.item.bytes < 1000 for entry in entries(artifacts, "linked")] == [True]


def test_the_table_adds_up_and_strays_are_not_in_it(artifacts, capsys):
    (artifacts / ".DS_Store").touch()
    (artifacts / "data" / "Thumbs.db").touch()
    assert main(["ls"]) == 0
    head, *lines, total = capsys.readouterr().out.splitlines()
    assert head.split() == ["kind", "name", "size", "last", "used", "needed", "by"]
    assert not [line for line in lines if "DS_Store" in line or "Thumbs" in line]
    assert f"in {len(lines)} folders" in total
    assert [cleaning.size(n) for n in (0, 999, 1000, 12_345_678, 10**15)] == [
        *("0 B", "999 B", "1.0 kB", "12.3 MB", "1000.0 TB")
    ]


def test_nothing_was_made_yet_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(project_paths, "ROOT", tmp_path)
    assert main(["ls"]) == 2 and "no folder artifacts: nothing was made" in capsys.readouterr().err

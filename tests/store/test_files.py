"""Files appear whole or not at all, and a folder has one writer."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from kd_utils.store.files import (
    full_disk_named,
    matching,
    sha256_file,
    sha256_json,
    write_json,
    written_aside,
    written_folder,
)
from kd_utils.store.locks import locked

HOLD = """
import sys, time
from pathlib import Path
from kd_utils.store.locks import locked
with locked(Path(sys.argv[1]), "a sweep"):
    print("held", flush=True)
    time.sleep(60)
"""
RACE = """
import os, sys
from pathlib import Path
from kd_utils.store.locks import locked
folder, marker = Path(sys.argv[1]), sys.argv[2]
held = 0
while held < 50:
    try:
        with locked(folder, "a racer"):
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))  # fails where another is inside
            os.unlink(marker)
            held += 1
    except ValueError as error:
        assert "is in use by" in str(error), error
print(held)
"""


def test_an_error_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "deep" / "table.csv"
    with written_aside(path) as aside:
        aside.write_text("old")
    with pytest.raises(RuntimeError), written_aside(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_a_folder_takes_an_older_ones_place_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "deep" / "trial"
    with written_folder(folder) as aside:
        assert aside.parent == folder.parent and not list(aside.iterdir())
        (aside / "old").touch()
        assert not folder.exists()
    with pytest.raises(RuntimeError), written_folder(folder) as aside:
        (aside / "half").touch()
        raise RuntimeError
    assert [path.name for path in folder.iterdir()] == ["old"]
    (
        tmp_path / "deep" / f".trial.partial-{os.getpid()}"
    ).mkdir()  # of an earlier process with our number
    with written_folder(folder) as aside:
        (aside / "new").touch()
    assert [path.name for path in folder.iterdir()] == ["new"] and list(
        folder.parent.iterdir()
    ) == [folder]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/secret/place"),
            "no space left on device",
        ),
        (OSError(errno.EDQUOT, "x"), "disk quota exceeded"),
        (OSError(errno.EFBIG, "x"), "file too large"),
        (
            RuntimeError("could not write: No space left on device (os error 28)"),
            "no space left on device",
        ),
    ],
)
def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, error, words):
    for writing in (full_disk_named, written_aside, written_folder):
        with pytest.raises(OSError) as raised, writing(tmp_path / "trials" / "a"):
            raise error
        assert (
            str(raised.value)
            == f"[Errno {raised.value.errno}] {words} while writing trials/a: make room and run "
            "the same command again, finished files are kept"
        )
        assert raised.value.__suppress_context__ and not list(tmp_path.glob("trials/*"))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, "Permission denied"),
        RuntimeError("other"),
        KeyError("x"),
        KeyboardInterrupt(),
    ],
)
def test_any_other_error_passes_as_it_is(tmp_path, error):
    with pytest.raises(type(error)) as raised, written_aside(tmp_path / "a"):
        raise error
    assert raised.value is error


def test_a_really_full_place_is_named(tmp_path):
    code = (
        "import resource, sys; from pathlib import Path; from kd_utils.store.files import write_json\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "write_json(Path(sys.argv[1]), ['x' * 1000])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.json"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (
        f"[Errno {errno.EFBIG}] file too large while writing {tmp_path.name}/a.json: make room"
        in done.stderr
    )
    assert not list(tmp_path.iterdir())


def test_json_is_whole_and_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": 2})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": 2,\n  "b": 1\n}\n'


def test_digests(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert (
        sha256_file(tmp_path / "f")
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1}) != sha256_json({"a": 1})


@pytest.mark.parametrize(
    "name",
    [
        *(".DS_Store", "._model.safetensors", ".nfs0000000001", ".fuse_hidden0001", "Thumbs.db"),
        *("desktop.ini", "a.safetensors~", "~$a.xlsx", "#a.safetensors#", ".#a.safetensors"),
        *(".~lock.a.csv#", ".a.safetensors.swp", ".ipynb_checkpoints/a.safetensors"),
    ],
)
def test_what_tools_leave_is_not_taken_for_ours(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    for own in ("model.safetensors", ".model.safetensors.partial-7", name):
        (tmp_path / own).touch()
    names = [".model.safetensors.partial-7", "model.safetensors"]
    assert [path.name for path in matching(tmp_path, "*")] == names
    assert [path.name for path in matching(tmp_path, "**/*")] == names
    assert [path.name for path in matching(tmp_path, "*.safetensors")] == names[1:]


def test_a_second_process_is_refused_and_told_who_holds_until_that_is_killed(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True
    ) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            with (
                pytest.raises(ValueError) as raised,
                locked(tmp_path / "run", "another sweep", "wait"),
            ):
                pytest.fail("two hold it")
            assert re.fullmatch(
                rf"run is in use by a sweep \(process {holder.pid} on .+, since \d\d:\d\d:\d\d\): wait",
                str(raised.value),
            )
        finally:
            os.kill(holder.pid, signal.SIGKILL)
    assert (tmp_path / "run" / ".lock").exists(), "what a killed one leaves"
    with locked(tmp_path / "run", "another sweep"):
        assert (
            (tmp_path / "run" / ".lock")
            .read_text()
            .startswith(f"another sweep (process {os.getpid()} on ")
        )
    assert not (tmp_path / "run").exists()


def test_the_lock_goes_away_with_the_block_and_an_error_in_it(tmp_path):
    for _ in range(2):
        with pytest.raises(RuntimeError), locked(tmp_path / "run", "a sweep"):
            (tmp_path / "run" / "result").touch()
            raise RuntimeError
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["result"]


def test_a_lock_of_the_dead_or_one_that_says_nothing_is_no_obstacle(tmp_path):
    (tmp_path / ".lock").write_text("a sweep (process 1 on nowhere, since 00:00:00) " * 9)
    with locked(tmp_path, "a sweep"):
        assert len((tmp_path / ".lock").read_text()) < 100
        (tmp_path / ".lock").write_text("")
        held = pytest.raises(
            ValueError, match="in use by another process: wait for it, or stop it and run"
        )
        with held, locked(tmp_path, "x"):
            pytest.fail("two hold it")


def test_who_holds_a_folder_that_was_removed_does_not_free_the_new_one(tmp_path):
    folder = tmp_path / "run"
    with locked(folder, "the first"):
        (folder / ".lock").unlink()
        folder.rmdir()
        second = locked(folder, "the second")
        second.__enter__()
    with pytest.raises(ValueError, match="in use by the second"), locked(folder, "the third"):
        pytest.fail("two hold it")
    second.__exit__(None, None, None)
    assert not folder.exists()


def test_a_folder_that_cannot_be_is_an_error_at_once(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "away")
    for name in ("file", "nowhere"):
        with pytest.raises(OSError, match=name), locked(tmp_path / name, "a sweep"):
            pytest.fail("there is no such folder")


def test_processes_that_race_for_a_folder_never_both_hold_it(tmp_path):
    command = [sys.executable, "-c", RACE, tmp_path / "run", tmp_path / "inside"]
    racers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [racer.communicate(timeout=600) for racer in racers]
    assert outputs == [("50\n", "")] * 3
    assert not list(tmp_path.iterdir())


def test_threads_that_race_for_a_folder_never_both_hold_it(tmp_path):
    inside, most, held = [], [], []

    def race():
        while len(held) < 50:
            try:
                with locked(tmp_path / "run", "a thread"):
                    inside.append(1)
                    time.sleep(0.0005)
                    most.append(len(inside))
                    inside.pop()
                    held.append(1)
            except ValueError:
                time.sleep(0)

    threads = [threading.Thread(target=race) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and len(held) >= 50 and not list(tmp_path.iterdir())


def test_a_folder_of_which_something_cannot_be_removed_is_replaced_all_the_same(
    tmp_path, monkeypatch
):
    """On NFS a file that somebody has open stays, under another name, until it is closed."""
    folder, remove = tmp_path / "trial", shutil.rmtree
    with written_folder(folder) as aside:
        (aside / "metrics.json").write_text("old")
    monkeypatch.setattr(
        shutil,
        "rmtree",
        lambda path, **how: None if (path / "metrics.json").exists() else remove(path, **how),
    )
    with written_folder(folder) as aside:
        (aside / "metrics.json").write_text("new")
    assert (folder / "metrics.json").read_text() == "new"
    assert all(
        path.name.startswith(".trial.partial-") for path in tmp_path.iterdir() if path != folder
    )


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(
        OSError,
        match=r"toy/\.lock: this file system has no locks .*use a folder on another file system",
    ):
        with locked(tmp_path / "toy", "a sweep"):
            pass
    assert not (tmp_path / "toy" / ".lock").exists()

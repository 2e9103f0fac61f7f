"""`check` of a run's folder from anyone: it answers in lines, whatever is in the folder, and reads
nothing outside.
"""

import contextlib
import copy
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import stubs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stubs import files_of

from kd_utils.__main__ import main
from kd_utils.records import check
from kd_utils.store import sealed

ROOT = Path(__file__).resolve().parents[2]
HOLDERS = {".json": "checksums", ".ipynb": "metadata.kd_utils"}
OPENED: list[str] = []  # what was opened or listed
WATCHING: list[bool] = []  # while this is not empty


def watch(event, arguments):
    if WATCHING and event in ("open", "os.listdir", "os.scandir"):
        with contextlib.suppress(TypeError):  # a descriptor of what was opened before
            OPENED.append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(watch)


@pytest.fixture(scope="module", autouse=True)
def all_is_imported(tmp_path_factory):
    """Before anything is watched."""
    assert main(["check", str(stubs.whole_run(tmp_path_factory.mktemp("first")))]) == 0


def answer(run_dir):
    """The lines that `check` prints before its last; nothing but the folder is opened, and nothing
    is raised.
    """
    output, errors = io.StringIO(), io.StringIO()
    OPENED.clear()
    WATCHING.append(True)
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            status = main(["check", str(run_dir)])
    finally:
        WATCHING.clear()
    inside = os.path.realpath(run_dir)
    assert [
        path for path in OPENED if path != inside and not path.startswith(inside + os.sep)
    ] == []
    if status == 2:
        assert errors.getvalue().startswith("error: no run folder ") and not output.getvalue()
        return None
    *problems, last = output.getvalue().splitlines()
    assert errors.getvalue() == "" and status == (1 if problems else 0)
    assert last.endswith(f"trials whole; {len(problems)} problems" if problems else "trials whole")
    assert all(problem.isprintable() and len(problem) <= check.LONGEST for problem in problems), (
        problems
    )
    return problems


NAMES = [
    "../outside/stolen",
    "../../etc",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a\0b",
    "a\nb",
    "x" * 5000,
    "~root",
    "\x1b[2J",
    "é",
    "\ud800",
    "0.5",
    "attention_seed0",
    "status",
    "trial",
    "config/seed",
    "sha256",
    "student",
    "total",
    "data",
]
VALUES = [
    0,
    -1,
    10**400,
    2**63,
    1e308,
    -0.0,
    float("nan"),
    float("inf"),
    True,
    None,
    [],
    {},
    [[]],
    [{}],
    {"": None},
]
SIMPLE = st.sampled_from([*NAMES, *VALUES])
HOSTILE = (
    SIMPLE
    | st.recursive(
        SIMPLE,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
        ),
        max_leaves=6,
    )
    | st.sampled_from(
        [
            list(range(20_000)),
            {str(n): n for n in range(3000)},
            *(stubs.nested(depth) for depth in (20, 300)),
        ]
    )
)


def place(document, data):
    """(container, key) of something in it: as often at its top as anywhere below."""
    container = document
    while True:
        key = data.draw(
            st.sampled_from([*container] if isinstance(container, dict) else range(len(container)))
        )
        if (
            not isinstance(container[key], (dict, list))
            or not container[key]
            or data.draw(st.booleans())
        ):
            return container, key
        container = container[key]


def mutate(document, data):
    """Drop, replace, rename, add or double one thing in it."""
    container, key = place(document, data)
    match data.draw(st.sampled_from(["drop", "replace", "replace", "rename", "add", "double"])):
        case "drop":
            del container[key]
        case "rename" if isinstance(container, dict):
            container[data.draw(st.sampled_from(NAMES))] = container.pop(key)
        case "add" if isinstance(container, dict):
            container[data.draw(st.sampled_from(NAMES))] = copy.deepcopy(data.draw(HOSTILE))
        case "double" if isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        case _:
            container[key] = copy.deepcopy(data.draw(HOSTILE))


def write(path, document):
    """With a right checksum, where there can be one: no text that a file can hold has a lone
    surrogate.
    """
    try:
        text = sealed.seal(document, HOLDERS[path.suffix]).encode()
    except (ValueError, TypeError, AttributeError, RecursionError):
        text = json.dumps(document).encode(errors="surrogatepass")
    path.write_bytes(text)


@pytest.fixture
def answer_to(run_dir, tmp_path):
    """What `check` says when these documents take the place of the whole run's: path -> document.

    They are sealed, and the parts of a record that vouch for each other still do, so that what is
    read is looked at.
    """
    stubs.write_trial(tmp_path / "outside", "attention", 0)
    (tmp_path / "outside" / "trials" / "attention_seed0").rename(tmp_path / "outside" / "stolen")
    contents = {path: path.read_bytes() for path in files_of(run_dir)}

    def said(documents):
        for path, content in contents.items():
            path.write_bytes(content)
        for name, document in documents.items():
            path = run_dir / name
            if (
                path.name == "metrics.json"
                and document.get("epochs")
                and isinstance(document["epochs"], list)
            ):
                document["final"] = document["epochs"][-1]
            write(path, document)
            if path.name == "metrics.json":
                notebook = json.loads(contents[path.parent.with_suffix(".ipynb")])
                with contextlib.suppress(sealed.RecordError):
                    record = sealed.read_sealed(path, "checksums")["checksums"]["sha256"]
                    notebook["metadata"]["kd_utils"]["record"] = record
                write(path.parent.with_suffix(".ipynb"), notebook)
        return answer(run_dir)

    return said


FILES = (
    "sweep.json",
    "trials/attention_seed0/metrics.json",
    "trials/attention_seed0.ipynb",
    *(f"{stem}.ipynb" for stem in check.STAGES),
)


def test_any_content_is_answered_in_lines(run_dir, answer_to, times, tried):
    """Sealed files of any structure, with right checksums."""
    documents, outcomes = {name: json.loads((run_dir / name).read_text()) for name in FILES}, []

    @settings(
        max_examples=times(300, 5000),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def each(data):
        chosen = data.draw(st.lists(st.sampled_from(FILES), min_size=1, max_size=2, unique=True))
        mutated = {name: copy.deepcopy(documents[name]) for name in chosen}
        for document in mutated.values():
            for _ in range(data.draw(st.integers(1, 3))):
                mutate(document, data)
        outcomes.append(answer_to(mutated))

    each()
    assert any(problems == [] for problems in outcomes) and any(
        len(problems) > 1 for problems in outcomes
    )
    tried("stranger's run folder", len(outcomes))


def everywhere(value, path=()):
    """Where anything stands in it; of a list, only the last."""
    for key, inner in list(value.items() if isinstance(value, dict) else [*enumerate(value)][-1:]):
        yield *path, key
        if isinstance(inner, (dict, list)):
            yield from everywhere(inner, (*path, key))


@pytest.mark.parametrize("name", FILES)
def test_any_value_in_any_place_and_any_missing_key_is_answered(
    run_dir, answer_to, times, tried, name
):
    whole, randomly, n = json.loads((run_dir / name).read_text()), random.Random(6), 0
    values = [
        "0.5",
        "../outside/stolen",
        "a\nb",
        ["x"],
        {"status": 1, "trial": "x"},
        None,
        10**400,
        float("nan"),
        {},
    ]
    few = times(len(values) if name.endswith("json") else 2, len(values))
    for *path, last in everywhere(whole):
        for value in [..., *randomly.sample(values, few)]:
            document = copy.deepcopy(whole)
            container = document
            for key in path:
                container = container[key]
            if value is ...:
                del container[last]
            else:
                container[last] = value
            answer_to({name: document})
            n += 1
    tried("stranger's run folder", n)


@pytest.mark.parametrize(
    "name", ["sweep.json", "trials/attention_seed0/metrics.json", "01_prepare_data.ipynb"]
)
def test_nesting_of_any_depth_is_answered(run_dir, name, times):
    """Also where reading succeeds at one place of the program and fails at another, which stands
    deeper in calls.
    """
    path, limit = run_dir / name, sys.getrecursionlimit()
    document = json.loads(path.read_text())
    for depth in (100, *range(limit - 120, limit, times(17, 1))):
        sys.setrecursionlimit(2 * limit)
        write(path, document | {"precision": stubs.nested(depth)})
        sys.setrecursionlimit(limit)
        answer(run_dir)
    path.write_text('{"deep": ' + "[" * 100_000 + "]" * 100_000 + "}")
    assert path.name in " ".join(answer(run_dir))


def led_out(run_dir):
    (run_dir / "trials" / "attention_seed0").rename(run_dir.parent / "outside")
    (run_dir / "trials" / "attention_seed0").symlink_to(run_dir.parent / "outside")


def replaced(name, put):
    def change(run_dir):
        path = run_dir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        put(path)

    return change


def each_file(change):
    return lambda run_dir: [change(path) for path in files_of(run_dir)]


KINDS = {
    "a link that leads out": led_out,
    "links in a loop": lambda run_dir: (run_dir / "trials" / "loop").symlink_to(run_dir / "trials"),
    "a link to itself": replaced("01_prepare_data.ipynb", lambda path: path.symlink_to(path)),
    "a link to nowhere": replaced("sweep.json", lambda path: path.symlink_to("nowhere")),
    "a link to an endless file": replaced(
        "results_summary.csv", lambda path: path.symlink_to("/dev/zero")
    ),
    "a pipe": replaced("trials/attention_seed0/metrics.json", os.mkfifo),
    "no files": each_file(Path.unlink),
    "nothing": lambda run_dir: shutil.rmtree(run_dir) or run_dir.mkdir(),
    "a file in its place": lambda run_dir: shutil.rmtree(run_dir) or run_dir.write_text("{}"),
    "no folder": shutil.rmtree,
    "a name that is no text": lambda run_dir: (
        run_dir / "trials" / os.fsdecode(b"\xff\n\x1b[2J")
    ).touch(),
    "junk": each_file(lambda path: path.write_bytes(random.Random(5).randbytes(999))),
    "empty files": each_file(lambda path: path.write_bytes(b"")),
    "folders in place of files": each_file(lambda path: path.unlink() or path.mkdir()),
    "a file for trials": replaced("trials", Path.touch),
    "a thousand files": lambda run_dir: [
        (run_dir / "trials" / str(n)).touch() for n in range(1000)
    ],
    **{
        f"no right to {name}": lambda run_dir, name=name: (run_dir / name).chmod(0)
        for name in (
            ".",
            "sweep.json",
            "trials",
            "trials/attention_seed0",
            "trials/attention_seed0/metrics.json",
            "trials/attention_seed0/predictions.parquet",
            "verdict.txt",
            "results_summary.csv",
        )
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_kind_of_folder_is_answered(run_dir, monkeypatch, kind, tried):
    assert answer(run_dir) == []
    KINDS[kind](run_dir)
    monkeypatch.chdir(run_dir.parent)
    run_dir.parent.chmod(0o755)
    root = os.geteuid() == 0 and kind.startswith(
        "no right"
    )  # whom no right is denied: let it be nobody
    try:
        os.seteuid(65534 if root else os.geteuid())
        problems = answer(Path(run_dir.name))
    finally:
        os.seteuid(0 if root else os.geteuid())
        for path in (run_dir, run_dir / "trials"):
            if path.is_dir():
                path.chmod(0o755)
    assert problems is None if kind in ("a file in its place", "no folder") else problems
    tried("stranger's run folder")


def test_the_command_itself_gives_no_traceback(run_dir, tmp_path):
    (run_dir / "sweep.json").write_bytes(b"\xff")
    (tmp_path / "file").touch()
    for folder, status in (
        (run_dir, 1),
        (tmp_path, 1),
        (tmp_path / "file", 2),
        (tmp_path / ("x" * 300), 2),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "kd_utils", "check", folder],
            capture_output=True,
            text=True,
            timeout=600,
            cwd=ROOT,
        )
        assert done.returncode == status and "Traceback" not in done.stderr

"""Bad input: mutated parameter files, grids, notebook globals, and strings that papermill writes as
code.

Each either works all the way to a plan whose trials come out of papermill as they were planned, or
is one line that names what is wrong; what a library thinks of it is never seen, and none starts a
model load.
"""

from __future__ import annotations

import datetime
import decimal
import functools
import json
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import papermill
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from IPython.core.inputtransformer2 import TransformerManager
from papermill.translators import PythonTranslator

from kd_utils.__main__ import main
from kd_utils.config import notebook_files, project_paths
from kd_utils.config.notebook_files import injected_names, notebook_defaults
from kd_utils.config.parameter_files import load_grid, load_parameters
from kd_utils.config.stages import NOTEBOOKS
from kd_utils.config.trial import TrialConfig
from kd_utils.sweep import planning
from kd_utils.sweep.execution import kernel_settings

PACKAGE = project_paths.CODE_ROOT / "kd_utils"
FILES = sorted(PACKAGE.parent.glob("papermill_params/*.yaml"))
GRIDS = [path for path in FILES if path.name.startswith("grid")]
PARAMETER_FILES = [path for path in FILES if path not in GRIDS]
KEYS = sorted({key for notebook in NOTEBOOKS.values() for key in notebook.model_fields})
#: Small, and with a method that does not use what others do: the plan of the real grid is no other
#: code.
GRID = "distill_type: [untrained, black_box, combined]\nseed: [0, 1]\n"

#: Values as they stand in a file, of every type that YAML has and some that it pretends to have.
SOURCES = r"""
""  ''  ~  null  yes  no  on  true  True  0  -1  1  7  2  64  1.5  1e-4  1.0e-4  .inf  -.inf  .nan  1e400  1.0e+400
0b_  0x_  1_000  010  0x10  1:30  -0.0  2147483647  2147483648  2026-01-02  2026-02-31  2026-01-02T03:04:05Z
0001-01-01T00:00:00+23:59  !!binary dG95  !!binary "@"  !!set {a, b}  !!omap [a: 1]  !!pairs [a: 1]  !!int x  !!int ""
!!float x  !!bool x  !!timestamp x  !!null x  !!str 3  !!str  !!map x  !!seq x  !custom x  !<tag:x,1:y> z  !a%0A%1B x
!!python/name:os.system x  !!python/object/apply:os.system ["touch HACKED"]  !!python/object/new:os.system [x]
!!python/tuple [1]  [1, 2]  []  {}  {a: b}  &x [*x]  &x 1  *nowhere  =  <<  ?  -  "\0"  "\ud800"  "x\udfff"
"\ud83d\ude00"  "\U00110000"  "\UFFFFFFFF"  "a\nb"  "toy\n"  "\x85"  "\u2028"  " "  "\t"  "~"  "~no-such-user/x"
~no-such-user/x  /  ..  .  ../x  a/b  /etc/passwd  cpu  cuda  cuda:0  cuda:x  gpu  auto  all  toy  none  teacher
"'"  '"'  "\\"  "\\n"  '# Parameters'  "{0}"  %d  $HOME  "🧪 עברית e\u0301"  é
"""
SOURCES = [source for line in SOURCES.split("\n") for source in line.split("  ") if source] + [
    "9" * 30,
    "9" * 5000,
    "0x" + "f" * 5000,
    "x" * 300,
    "x/" * 600,
    "é" * 128,
    '"' + "x\\n" * 33_000 + '"',
    "|\n  a\n  b",
    "",
]
ODD_KEYS = [
    "1",
    "null",
    "yes",
    "[a]",
    "{a: b}",
    "2026-01-01",
    "<<",
    "=",
    '""',
    '"a\\nb"',
    "? [x]\n",
    "*x",
    "&x a",
    "🧪",
    "!!int 1",
    "!!binary YQ==",
    "x" * 10_000,
    '"\\ud800"',
    '"\\0"',
    "seed ",
    "Seed",
    "!!python/name:os.system x",
]
#: The third is a billion laughs.
ODD_LINES = [
    "base: &b {seed: 1}\n<<: *b\n",
    "<<: {seed: 1}\n",
    "a: &a [x]\n"
    + "".join(
        f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n"
        for old, new in zip("abcdefghi", "bcdefghij")
    ),
    "---",
    "...",
    "%YAML 1.1",
    "%YAML " + "9" * 5000 + ".1\n---",
    "%TAG ! x",
    "\ttab: 1",
    "  seed: 1",
    "@",
    "`",
    "- a",
    "{",
    "plain",
    "? seed",
    ": 1",
    "#",
    "seed : 1",
]

keys = st.sampled_from(KEYS)
text = st.text(max_size=30)
source = st.one_of(
    st.sampled_from(SOURCES),
    text.map(lambda value: json.dumps(value, ensure_ascii=False)),
    text.map(json.dumps),
    st.integers().map(str),
    st.floats().map(repr),
    text,
)


def few(examples: int) -> settings:
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True)
def fast_and_elsewhere(monkeypatch, tmp_path):
    """The notebooks' defaults are read once, not once per combination; nothing is read from this
    machine's runs.
    """
    monkeypatch.setattr(
        notebook_files, "notebook_defaults", functools.cache(notebook_files.notebook_defaults)
    )
    monkeypatch.setattr(project_paths, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("HACKED"))


def one_line(error: Exception) -> str:
    """The error's text, which must be such as a user can do something with."""
    said = str(error)
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    assert raised_in.is_relative_to(PACKAGE), f"{raised_in}: {said}"
    assert error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)
    assert len(said.splitlines()) == 1 and len(said) < 3000 and max(map(len, said.split())) < 300, (
        said
    )
    assert any(
        word in said
        for word in (
            "should",
            "must",
            "known keys",
            "did you mean",
            "a grid may have",
            "at most",
            "is not YAML",
            "above 0",
            "the same trial twice",
            "no such parameter",
        )
    ), said
    for word in (
        "pydantic",
        "Exceeds the limit",
        "codec",
        "recursion",
        "<unicode string>",
        "Traceback",
        "chr()",
    ):
        assert word not in said, said
    return said


def refused(folder: Path, parameter_file: str | bytes, grid_file: str | bytes) -> str:
    """Take the two files through all that a sweep does before it runs: "" if that works, else the
    one line.

    Where it works, trials' values, written by papermill and read as Python, are the trial that was
    planned.
    """
    for name, content in (("p.yaml", parameter_file), ("g.yaml", grid_file)):
        (folder / name).write_bytes(
            content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        )
    try:
        values, grid = load_parameters(folder / "p.yaml"), load_grid(folder / "g.yaml")
        trials = planning.plan(values, grid, planning.default_run_dir(values, folder / "g.yaml"))
        assert planning.select(trials, "", grid) == trials
    except (ValueError, FileNotFoundError) as error:
        return one_line(error)
    for trial in trials[:: 1 + len(trials) // 4]:
        read = TrialConfig(**{**notebook_defaults("03_train_student"), **as_read(trial.parameters)})
        assert read.fingerprint() == trial.config_hash and read.trial == trial.trial
    place = planning.default_run_dir(values)
    assert (
        place.parent == project_paths.ROOT / "runs"
        and (project_paths.ROOT / "runs" / place.name).resolve() == place
    )
    json.dumps([values, grid], allow_nan=False)  # both stand in the run's sweep.json
    return ""


def as_read(values: dict[str, object]) -> dict[str, object]:
    """What a kernel has after the cell that papermill writes for these values."""
    cell = papermill.parameterize.parameterize_notebook(notebook(""), values).cells[1].source
    read: dict[str, object] = {}
    exec(TransformerManager().transform_cell(cell), read)
    assert (
        injected_names([cell])
        == injected_names([TransformerManager().transform_cell(cell)])
        == list(values)
    )
    return {key: read[key] for key in values}


def notebook(source: str, values: str = "x = 0") -> nbformat.NotebookNode:
    cells = [
        nbformat.v4.new_code_cell(values, metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(source, metadata={"tags": []}),
    ]
    return nbformat.v4.new_notebook(
        cells=cells,
        metadata={
            "papermill": {},
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        },
    )


@st.composite
def files(draw, paths: list[Path], values: st.SearchStrategy[str]) -> str:
    """A real file, with one to three of its lines changed."""
    lines = draw(st.sampled_from(paths)).read_text(encoding="utf-8").splitlines()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(lines) - 1))
        key, _, rest = lines[at].partition(":")
        known, odd = draw(keys), draw(st.one_of(st.sampled_from(ODD_KEYS), text))
        extra = draw(st.sampled_from(ODD_LINES))
        cut = draw(st.integers(0, len(key)))
        lines[at : at + 1] = draw(
            st.sampled_from(
                [
                    [f"{key}: {draw(values)}"],
                    [lines[at], f"{known}: {draw(values)}"],
                    [lines[at], lines[at]],
                    [],
                    [f"{key[:cut]}{key[cut + 1 :]}:{rest}"],
                    [f"{key[:cut]}z{key[cut:]}:{rest}"],
                    [f"{odd}:{rest}"],
                    [lines[at], extra],
                    [extra, lines[at]],
                    [" " + lines[at]],
                ]
            )
        ) or [""]
    return "\n".join(lines)


@st.composite
def damaged(draw, paths: list[Path]) -> bytes:
    """A real file with some of its bytes changed, or in another encoding."""
    content = draw(st.sampled_from(paths)).read_bytes()
    encoding = draw(
        st.sampled_from(["utf-8"] * 8 + ["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp037"])
    )
    content = content.decode().encode(encoding)
    for _ in range(draw(st.integers(0 if encoding != "utf-8" else 1, 3))):
        at, length = draw(st.integers(0, len(content))), draw(st.integers(0, 20))
        added = draw(
            st.one_of(
                st.binary(max_size=20),
                st.just(b""),
                st.sampled_from(
                    [b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\r", b"\x1b[2J", b"'", b'"']
                ),
                st.builds(
                    bytes.__mul__,
                    st.sampled_from([b"[", b"{", b"- ", b"? ", b"!", b"&a ", b"a: {", b"\n", b"9"]),
                    st.sampled_from([1, 100, 100_000]),
                ),
            )
        )
        content = content[:at] + draw(
            st.sampled_from([added + content[at + length :], added + content[at:], b""])
        )
    return content


def test_mutated_parameter_files(tmp_path, times, tried):
    outcomes: list[str] = []

    @few(times(500, 5000))
    @given(files(PARAMETER_FILES, source))
    def each(content):
        outcomes.append(refused(tmp_path, content, GRID))

    each()
    assert (
        len(outcomes) >= 500 and 0.1 < sum(map(bool, outcomes)) / len(outcomes) < 0.95
    )  # not all of one kind
    tried("mutated parameter file", len(outcomes))


def test_parameter_files_with_damaged_bytes(tmp_path, times, tried):
    outcomes: list[str] = []

    @few(times(300, 3000))
    @given(damaged(PARAMETER_FILES))
    def each(content):
        outcomes.append(refused(tmp_path, content, GRID))

    each()
    assert len(outcomes) >= 300 and any(outcomes) and not all(outcomes)
    tried("mutated parameter file", len(outcomes))


def test_one_bad_value_is_named_with_its_key(tmp_path, times, tried):
    count = 0

    @few(times(300, 3000))
    @given(keys, source)
    def each(key, value):
        nonlocal count
        count += 1
        said = refused(tmp_path, f"{key}: {value}\n", GRID)
        assert (
            not said
            or "is not YAML" in said
            or "must be flat" in said
            or f"{key} must be" in said
            or f"{key} = " in said
            or "above 0" in said
            or "is no key" in said
        ), said

    each()
    tried("mutated parameter file", count)


def test_mutated_grids(tmp_path, times, tried):
    outcomes: list[str] = []
    lists = st.one_of(
        source, st.lists(source, max_size=4).map(lambda values: f"[{', '.join(values)}]")
    )

    @few(times(300, 3000))
    @given(st.one_of(files(GRIDS, lists), files(GRIDS, lists), damaged(GRIDS)))
    def each(content):
        outcomes.append(refused(tmp_path, "", content))

    each()
    assert len(outcomes) >= 300 and any(outcomes) and not all(outcomes)
    tried("mutated grid file", len(outcomes))


def test_the_command_line_says_it_in_one_line(tmp_path, capsys, times, tried):
    count, statuses = 0, set()

    @few(times(40, 400))
    @given(
        files(PARAMETER_FILES, source),
        st.one_of(st.just(GRID), files(GRIDS, st.lists(source).map(str))),
    )
    def each(content, grid):
        nonlocal count
        count += 1
        for name, written in (("p.yaml", content), ("g.yaml", grid)):
            (tmp_path / name).write_bytes(written.encode("utf-8", "surrogatepass"))
        status = main(
            ["sweep", str(tmp_path / "p.yaml"), "--grid", str(tmp_path / "g.yaml"), "--dry-run"]
        )
        statuses.add(status)
        captured = capsys.readouterr()
        if status == 2:
            assert (
                not captured.out
                and len(captured.err.splitlines()) == 1
                and captured.err.startswith("error: ")
            )
        else:
            assert status == 0 and not captured.err and "trials are done" in captured.out

    each()
    assert statuses == {0, 2}
    tried("mutated parameter file", count)


def test_no_bad_file_starts_a_model_load(tmp_path):
    code = """
import sys
from pathlib import Path
from kd_utils.__main__ import main
from kd_utils.config.parameter_files import load_grid, load_parameters
from kd_utils.sweep.planning import plan
class Refuse:  # stronger than a look at sys.modules afterwards: who imports one of them does not get on
    def find_spec(self, name, path=None, target=None):
        assert name.split(".")[0] not in ("torch", "transformers", "ray", "tokenizers", "safetensors"), name
sys.meta_path.insert(0, Refuse())
for text in sys.argv[1:]:
    Path("p.yaml").write_text(text)
    try:
        plan(load_parameters("p.yaml"), load_grid(), "runs/x")
    except ValueError:
        assert main(["sweep", "p.yaml"]) == 2  # not even a dry run
        continue
    assert text == "name: toy"
"""
    bad = [
        "name: toy",
        "teacher: ''",
        "student: [a]",
        "device: tpu",
        "tokenizer: ~no-such-user/x",
        "seed: yes",
        "a: b: c",
        "teacher: !!python/object/apply:os.system ['touch HACKED']",
        "teecher: x",
    ]
    subprocess.run(
        [sys.executable, "-c", code, *bad],
        check=True,
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(PACKAGE.parent), "KD_ROOT": str(tmp_path)},
    )


class Stranger:
    """An object whose text is no one line, or fails."""

    def __init__(self, text: str | None) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text + "\n\u2028second line" if self.text else 1 / 0

    def __eq__(self, other: object) -> bool:
        raise TypeError("not comparable")

    __hash__ = None


STRANGERS = [
    None,
    [],
    [1],
    {},
    {"a": 1},
    set(),
    (),
    b"toy",
    bytearray(b"1"),
    object(),
    int,
    print,
    lambda: 1,
    ...,
    NotImplemented,
    1j,
    np.int64(3),
    np.float64(0.5),
    np.float64("nan"),
    np.float32(2),
    np.bool_(True),
    np.str_("toy"),
    np.array(1),
    np.array([1, 2]),
    np.zeros((100, 100)),
    Path("a"),
    decimal.Decimal("0.5"),
    decimal.Decimal("NaN"),
    range(3),
    datetime.date(2026, 1, 2),
    datetime.timedelta(1),
    SimpleNamespace(a=1),
    ValueError("x"),
    Stranger("text"),
    Stranger("x" * 10**6),
    Stranger(None),
    True,
    False,
    float("inf"),
    float("nan"),
    -float("inf"),
    1e308,
    -0.0,
    5e-324,
    10**400,
    10**5000,
    -(10**5000),
    2**31,
    -1,
    0,
    1,
    3,
    2.0,
    2.5,
    "",
    " ",
    "1e-4",
    "3",
    " 3 ",
    "nan",
    "1e400",
    "\0",
    "\ud800",
    "a\nb",
    "x" * 100_000,
    "..",
    "~no-such-user",
    "cuda:0",
    "auto",
]


def test_any_object_in_a_notebooks_parameters(times, tried):
    count = 0

    @few(times(400, 4000))
    @given(st.sampled_from(sorted(NOTEBOOKS)), st.data())
    def each(stem, data):
        nonlocal count
        count += 1
        kind = NOTEBOOKS[stem]
        changed = data.draw(
            st.dictionaries(
                st.sampled_from(sorted(kind.model_fields)),
                st.one_of(
                    st.sampled_from(STRANGERS),
                    st.text(),
                    st.integers(),
                    st.floats(),
                    st.binary(),
                    st.lists(st.integers()),
                ),
                min_size=1,
                max_size=3,
            )
        )
        by_hand = data.draw(
            st.sampled_from(
                ["x, y = 1, 2", "# Parameters\nseed = = 1", "# Parameters\nname = 'toy'"]
            )
        )
        try:
            made = kind.from_notebook({**notebook_defaults(stem), "In": ["", by_hand], **changed})
        except ValueError as error:
            said = one_line(error)
            assert any(f"{key} = " in said for key in changed) or "above 0" in said
            return
        plain = made.model_dump()
        assert all(type(value) in (str, int, float, bool) for value in plain.values()), plain
        assert as_read(plain) == plain and kind(**plain).fingerprint() == made.fingerprint()

    each()
    tried("strange object in a notebook", count)


#: Strings that a writer of code gets wrong if it gets any wrong.
TRAPS = [
    "",
    '"',
    "'",
    "\\",
    '\\"',
    "\\'",
    "\\\\",
    '"""',
    3 * "'",
    '"; x = 1; "',
    "'; x = 1; '",
    "\n",
    "\r",
    "\r\n",
    "\t",
    "\\n",
    "\\x00",
    "\\u0041",
    "\\N{BULLET}",
    "# Parameters\n",
    "\n# Parameters\nseed = 1\n",
    "x\nseed = 1",
    "{}",
    "{name}",
    "{{",
    "%s",
    "%time",
    "!ls",
    "?",
    "print?",
    "$HOME",
    "`x`",
    "\u2028",
    "\u2029",
    "\x85",
    "\x0b\x0c",
    "\x1b[2J",
    "\x7f",
    "\u200f\u05d0\u202e",
    "e\u0301",
    "🧪👩‍🔬",
    "\ufeff",
    "\uffff",
    "\U0010ffff",
    "None",
    "True",
    "1e-4",
    "nan",
    "# type: int",
    "__import__('os').system('touch HACKED')",
    "x = 1  # comment",
    "<script>",
    " lead and trail ",
]
LONG = ["x" * 100_000, "a \"b\" 'c'\n" * 10_000, "\\" * 1001, "\U0001f9ea\n" * 50_000]
strings = st.one_of(
    st.sampled_from([*TRAPS, *LONG]),
    st.text(),
    st.lists(st.sampled_from(TRAPS), max_size=6).map("".join),
)


def test_papermill_writes_every_value_as_it_is(times, tried):
    count = 0

    @few(times(400, 4000))
    @given(
        st.dictionaries(
            keys,
            st.one_of(strings, strings, st.integers(), st.floats(allow_nan=False), st.booleans()),
            min_size=1,
            max_size=8,
        )
    )
    def each(values):
        nonlocal count
        count += len(values)
        read = as_read(values)
        assert read == values and [type(v) for v in read.values()] == [
            type(v) for v in values.values()
        ]
        assert [str(v) for v in read.values()] == [str(v) for v in values.values()]  # -0.0 too

    each()
    tried("value through papermill's translator", count)


def test_a_string_cannot_pass_for_an_injected_parameter():
    revision = 'a"\n# Parameters\nstranger = 1\n'
    cell = PythonTranslator.codify({"teacher_revision": revision})
    values = {
        **notebook_defaults("02_cache_teacher"),
        "teacher_revision": revision,
        "In": [cell, TransformerManager().transform_cell(cell)],
    }
    assert NOTEBOOKS["02_cache_teacher"].from_notebook(values)


def test_one_real_execution_brings_every_string_through(tmp_path, tried):
    numbers = [0, -1, 2**31, True, False, 0.1, 1e-300, -0.0]
    values = {f"v{number}": value for number, value in enumerate([*TRAPS, *LONG, *numbers])}
    source = (
        "import json, kd_utils.config.parameter_files\n"
        f"values = {{name: globals()[name] for name in {list(values)!r}}}\n"
        "names = kd_utils.config.notebook_files.injected_names(In)\n"
        "open('read.json', 'w').write(json.dumps([values, names]))"
    )
    nbformat.write(
        notebook(source, "\n".join(f"{name} = None" for name in values)), tmp_path / "n.ipynb"
    )
    with tempfile.TemporaryDirectory(prefix="kd-") as sockets:
        papermill.execute_notebook(
            "n.ipynb",
            "out.ipynb",
            values,
            kernel_name="python3",
            progress_bar=False,
            **kernel_settings(sockets),
        )
    read, names = json.loads((tmp_path / "read.json").read_text())
    assert read == values and names == list(values) and not (tmp_path / "HACKED").exists()
    assert nbformat.read(tmp_path / "out.ipynb", 4).metadata.papermill.parameters == values
    tried("value through a real execution", len(values))

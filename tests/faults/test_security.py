"""Nothing that comes from elsewhere runs: weights, model folders, parameter files, tables, records,
rows of data.
"""

from __future__ import annotations

import ast
import base64
import json
import pickle
import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny_model, tiny_tokenizer, write_task_files

from kd_utils.config.parameter_files import load_grid, load_parameters
from kd_utils.data.task_rows import load_task
from kd_utils.evaluation.scoring import evaluate_folder
from kd_utils.models.initial.ways import random_weights, some_layers
from kd_utils.models.loading import load_causal_lm, load_tokenizer, save_model

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted(ROOT.glob("runs/[0-9]*/**/*.ipynb"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


@pytest.fixture
def touched(tmp_path) -> Path:
    return tmp_path / "touched"


@pytest.fixture
def folder(tmp_path) -> Path:
    tokenizer = tiny_tokenizer(begin=True)
    save_model(tiny_model(tokenizer), tokenizer, tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- weights and model folders


@pytest.mark.parametrize(
    "indexed", [False, True], ids=["alone", "named by the index of the safetensors"]
)
@pytest.mark.parametrize("kind", ["pickle", "torch.save", "torch.save of tensors"])
def test_weights_that_are_no_safetensors_are_refused_and_not_unpickled(
    folder, touched, kind, indexed
):
    weights, state = (
        folder / "pytorch_model.bin",
        tiny_model(tiny_tokenizer(begin=True)).state_dict(),
    )
    if kind == "pickle":
        weights.write_bytes(pickle.dumps(Evil(touched)))
    else:
        torch.save(
            state if "tensors" in kind else {**state, "lm_head.weight": Evil(touched)}, weights
        )
    if indexed:
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": dict.fromkeys(state, weights.name)})
        )
    else:
        (folder / "model.safetensors").unlink()
    data = write_task_files(folder.parent / "data")
    for call in (
        lambda: load_causal_lm(str(folder)),
        lambda: some_layers(str(folder), student_layers=2),
        lambda: evaluate_folder(
            folder, "sst2", "train", folder.parent / "out.parquet", data_dir=data
        ),
    ):
        with pytest.raises(
            ValueError, match="cannot load .*not all in .*safetensors; .*a pickle can run"
        ) as error:
            call()
        assert "\n" not in str(error.value) and not touched.exists()
    with pytest.raises(Exception):  # the trap is set: read the other way, it goes off
        torch.load(weights, weights_only=False)["no such"]
    assert touched.exists() or kind == "torch.save of tensors"


@pytest.mark.parametrize("model_type", ["llama", "evil"])
def test_a_models_own_code_is_never_run(folder, touched, model_type, monkeypatch):
    code = f"import pathlib\npathlib.Path({str(touched)!r}).touch()\n"
    for name in (
        "modeling_evil",
        "configuration_evil",
        "tokenization_evil",
        "generate",
        "__init__",
    ):
        (folder / f"{name}.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(code)
    edit(
        folder / "config.json",
        model_type=model_type,
        auto_map={
            "AutoConfig": "configuration_evil.EvilConfig",
            "AutoModelForCausalLM": "modeling_evil.EvilModel",
            "AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"],
        },
    )
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="EvilTokenizer",
        auto_map={
            "AutoTokenizer": ["tokenization_evil.EvilTokenizer", "tokenization_evil.EvilTokenizer"]
        },
    )
    for name in (
        "TRUST_REMOTE_CODE",
        "HF_TRUST_REMOTE_CODE",
        "HF_DATASETS_TRUST_REMOTE_CODE",
        "TRANSFORMERS_TRUST_REMOTE_CODE",
    ):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(
        "builtins.input", lambda *_: "y"
    )  # to "do you wish to run the custom code?"
    data = write_task_files(folder.parent / "data")
    calls = [
        lambda: load_tokenizer(str(folder)),
        lambda: load_causal_lm(str(folder)),
        lambda: random_weights(str(folder)),
        lambda: evaluate_folder(
            folder, "sst2", "train", folder.parent / "out.parquet", data_dir=data
        ),
    ]
    for call in calls:
        try:
            call()  # a known architecture is built by transformers' own code
        except ValueError as error:
            assert "\n" not in str(error)
        assert not touched.exists()
    if model_type == "evil":
        with pytest.raises(ValueError, match="cannot load"):
            load_causal_lm(str(folder))


# --- parameter files


@pytest.mark.parametrize(
    "load, text",
    [
        (load_parameters, "name: !!python/object/apply:os.system ['touch {}']\n"),
        (load_parameters, "!!python/object/apply:os.system ['touch {}']\n"),
        (load_parameters, "? !!python/object/apply:os.system ['touch {}']\n: 1\n"),
        (load_grid, "seed: !!python/object/apply:os.system ['touch {}']\n"),
        (load_grid, "seed: [!!python/object/apply:os.system ['touch {}']]\n"),
        (load_grid, "seed: [!!python/object/new:subprocess.Popen [['touch', '{}']]]\n"),
    ],
)
def test_a_parameter_file_cannot_call_anything(tmp_path, touched, load, text):
    path = tmp_path / "p.yaml"
    path.write_text(text.format(touched))
    with pytest.raises(ValueError, match="p.yaml") as error:
        load(path)
    assert "\n" not in str(error.value) and not touched.exists()


# --- tables


@pytest.mark.parametrize(
    "read",
    [
        lambda folder: load_task("sst2", "train", data_dir=folder),
        lambda folder: pd.read_parquet(folder / "sst2/train.parquet"),
        lambda folder: (
            pq.ParquetFile(folder / "sst2/train.parquet", memory_map=True).read().to_pydict()
        ),
    ],
    ids=["load_task", "pandas", "cache"],
)
@pytest.mark.parametrize("extension", ["arrow.py_extension_type", "pandas.period", "arrow.opaque"])
def test_a_table_with_a_pickle_in_its_schema_runs_nothing(tmp_path, touched, read, extension):
    payload = pickle.dumps(Evil(touched))
    claims = {"ARROW:extension:name": extension, "ARROW:extension:metadata": payload}
    call = f"__import__('pathlib').Path({str(touched)!r}).touch()"
    about = {
        "index_columns": [call],
        "column_indexes": [
            {
                "name": call,
                "field_name": call,
                "pandas_type": "object",
                "numpy_type": "object",
                "metadata": {"encoding": call},
            }
        ],
        "columns": [
            {
                "name": "label",
                "field_name": "label",
                "pandas_type": "object",
                "numpy_type": "object",
                "metadata": {"pickle": payload.hex()},
            }
        ],
        "pandas_version": "3.1.1",
    }
    schema = pa.schema(
        [pa.field("sentence", pa.string()), pa.field("label", pa.int64(), metadata=claims)],
        metadata={"pandas": json.dumps(about), "PANDAS_ATTRS": json.dumps({"x": call})},
    )
    (tmp_path / "sst2").mkdir()
    pq.write_table(
        pa.table({"sentence": ["fine"], "label": [1]}, schema=schema),
        tmp_path / "sst2/train.parquet",
    )
    stored = re.findall(rb"[A-Za-z0-9+/=]{400,}", (tmp_path / "sst2/train.parquet").read_bytes())
    assert any(payload in base64.b64decode(text) for text in stored)
    try:
        read(tmp_path)
    except (ValueError, KeyError) as error:  # refused is as good
        assert "\n" not in str(error)
    assert not touched.exists()
    pickle.loads(payload)  # the trap is set
    assert touched.exists()


# --- records

TAGS = {"div", "style", "table", "thead", "tbody", "tr", "th", "td"}
ATTRIBUTES = {
    "border",
    "class",
    "colspan",
    "halign",
    "id",
    "rowspan",
    "scoped",
    "style",
    "type",
    "valign",
}


class Markup(HTMLParser):
    """Collects what an output has besides a plain table."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [f"<{tag}>"] * (tag not in TAGS)
        self.found += [
            f"{key}={value}"
            for key, value in attributes
            if key not in ATTRIBUTES or re.search("script:|url|expression", (value or "").lower())
        ]

    def handle_data(self, data: str) -> None:
        if self.lasttag == "style" and re.search("@import|url", data):
            self.found.append(data)

    def handle_comment(self, data: str) -> None:
        self.found.append("a comment")

    handle_decl = handle_pi = unknown_decl = handle_comment


def actives(notebook: dict[str, Any]) -> Iterator[str]:
    """What in a notebook could act when somebody opens it, or vouches that it may."""
    metadata = [notebook["metadata"], *(cell["metadata"] for cell in notebook["cells"])]
    yield from (
        f"metadata: {key}"
        for part in metadata
        for key in {"trusted", "signature", "widgets"} & part.keys()
    )
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            yield from re.findall(r"(?i)<\w[^>]*>|javascript:|data:text", "".join(cell["source"]))
        for output in cell.get("outputs", []):
            for kind, data in output.get("data", {}).items():
                if kind == "text/html":
                    markup = Markup()
                    markup.feed("".join(data))
                    markup.close()
                    yield from markup.found
                elif kind not in ("text/plain", "image/png"):
                    yield kind


def test_a_record_that_is_opened_runs_nothing():
    assert len(RECORDS) > 100 and len(NOTEBOOKS) == 9
    found = {
        path.relative_to(ROOT): list(actives(json.loads(path.read_text())))
        for path in RECORDS + NOTEBOOKS
    }
    assert not {path: active for path, active in found.items() if active}
    assert not [
        path
        for path in NOTEBOOKS
        for cell in json.loads(path.read_text())["cells"]
        if cell.get("outputs")
    ]


@pytest.mark.parametrize(
    "output",
    [
        {"text/html": "<script>alert(1)</script>"},
        {"text/html": ["<table><tr><td>", "<img src=x onerror=alert(1)>"]},
        {"text/html": "<td onclick='x'>"},
        {"text/html": "<iframe src=a>"},
        {"text/html": "<a href='javascript:x'>"},
        {"text/html": "<td style='background: url(javascript:x)'>"},
        {"text/html": "<style>@import 'x'</style>"},
        {"text/html": "<svg/onload=x>"},
        {"application/javascript": "x"},
        {"application/vnd.jupyter.widget-view+json": {}},
        {"image/svg+xml": "<svg/>"},
        {"text/markdown": "<script>"},
    ],
)
def test_an_active_output_would_be_found(output):
    cell = {
        "cell_type": "code",
        "metadata": {},
        "outputs": [{"output_type": "display_data", "data": output}],
    }
    assert list(actives({"metadata": {}, "cells": [cell]}))
    assert list(
        actives({"metadata": {}, "cells": [{**cell, "metadata": {"trusted": True}, "outputs": []}]})
    )
    assert list(
        actives(
            {
                "metadata": {},
                "cells": [{"cell_type": "markdown", "metadata": {}, "source": ["<b x=1>"]}],
            }
        )
    )


# --- rows of data in what the notebooks show


def code_of(path: Path) -> ast.Module:
    """A module, or a notebook's code cells as one."""
    if path.suffix == ".py":
        return ast.parse(path.read_text(encoding="utf-8"))
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ast.parse(
        "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem[:2])
def test_a_hostile_row_is_shown_as_text(path):
    hostile = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    options = [
        tuple(ast.literal_eval(argument) for argument in node.args)
        for node in ast.walk(code_of(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pd.set_option"
    ]
    assert {name for name, _ in options} <= {"display.max_colwidth"}
    table = pd.DataFrame(
        {"prompt": [hostile], hostile: hostile}, index=pd.Index([hostile], name=hostile)
    )
    with pd.option_context(
        *[part for option in options for part in option] or ["display.max_rows", 60]
    ):
        shown = [
            table._repr_html_(),
            table.assign(choices=[[hostile]])._repr_html_(),
            table.set_index([hostile, "prompt"], drop=False).T._repr_html_(),
        ]
    for html in shown:
        markup = Markup()
        markup.feed(html)
        assert not markup.found and "&lt;script&gt;" in html


# --- the code itself: calls that run what they read, and displays that do not escape

FORBIDDEN = (
    "pickle.",
    "cloudpickle.",
    "dill.",
    "marshal.",
    "shelve.",
    "joblib.",
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "os.exec",
    "os.spawn",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "yaml.load",
    "yaml.load_all",
    "yaml.full_load",
    "yaml.full_load_all",
    "yaml.unsafe_load",
    "yaml.unsafe_load_all",
    "yaml.Loader",
    "yaml.CLoader",
    "yaml.FullLoader",
    "yaml.UnsafeLoader",
    "pandas.read_pickle",
    "pandas.eval",
    "IPython.display.HTML",
    "IPython.display.Javascript",
    "IPython.display.Markdown",
    "IPython.display.SVG",
    "IPython.display.IFrame",
    "torch.hub.",
    "importlib.import_module",
    "runpy.",
)
#: Where it is known to be harmless: file, name, how often, and why.
ALLOWED = {
    ("notebooks/05_measure_speed.ipynb", "verdict.style"): (
        1,
        "a Styler does not escape; its texts are 05's own",
    ),
    ("kd_utils/data/tasks/__init__.py", "importlib.import_module"): (1, "files beside it"),
    ("kd_utils/distill/terms/__init__.py", "importlib.import_module"): (1, "files beside it"),
    ("kd_utils/sweep/slots/forks.py", "runpy.run_module"): (1, "ipykernel, of papermill's command"),
    ("kd_utils/sweep/slots/server.py", "compile"): (1, "import lines of notebook 03"),
    ("kd_utils/sweep/slots/server.py", "exec"): (1, "import lines of notebook 03"),
    ("kd_utils/sweep/slots/server.py", "importlib.import_module"): (1, "names in the file"),
}


def dangers(tree: ast.Module) -> Iterator[str]:
    """What a tree names, by its whole name, that runs what it reads, and keywords that switch such
    a thing on.
    """
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                alias.asname or alias.name.split(".")[0]: alias.name
                if alias.asname
                else alias.name.split(".")[0]
                for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {
                alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names
            }

    def whole(node: ast.expr) -> str:
        if isinstance(node, ast.Attribute):
            return f"{whole(node.value)}.{node.attr}"
        return names.get(node.id, node.id) if isinstance(node, ast.Name) else "()"

    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)):
            name = whole(node)
            if name in FORBIDDEN or name.startswith(
                tuple(word for word in FORBIDDEN if word.endswith("."))
            ):
                yield name
            if name.endswith(".style"):  # a pandas Styler
                yield name
        if isinstance(node, ast.Call):
            given = {
                word.arg: word.value.value if isinstance(word.value, ast.Constant) else "?"
                for word in node.keywords
                if word.arg
            }
            if whole(node.func) == "torch.load" and given.get("weights_only") is not True:
                yield "torch.load"
            yield from (
                f"{word}="
                for word in ("shell", "trust_remote_code", "allow_pickle")
                if given.get(word)
            )
            yield from ("escape=" for word in given if word == "escape" and not given[word])


def test_no_code_of_ours_runs_what_it_reads():
    paths = [*(ROOT / "kd_utils").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py"), *NOTEBOOKS]
    assert len(paths) > 40
    used = Counter(
        (str(path.relative_to(ROOT)), name) for path in paths for name in dangers(code_of(path))
    )
    assert used == {place: count for place, (count, _) in ALLOWED.items()}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle\npickle.load(f)",
        "import pickle as p\np.Unpickler(f).load()",
        "from pickle import loads as l\nl(b)",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "from torch import load\nload(f)",
        "import yaml\nyaml.load(t, yaml.Loader)",
        "from yaml import UnsafeLoader as L\nL(t)",
        "eval(t)",
        "exec(t)",
        "import os\nos.system(t)",
        "import subprocess as s\ns.run(t, shell=True)",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "import joblib\njoblib.load(f)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
        "table.to_html(escape=False)",
        "table.style.format('x')",
        "from IPython.display import HTML\nHTML(t)",
        "import pandas as pd\npd.read_pickle(f)",
        "import importlib\nimportlib.import_module(t)",
        "from joblib import load\nload(f)",
    ],
)
def test_such_code_would_be_found(code):
    assert list(dangers(ast.parse(code)))


def test_harmless_code_is_not_taken_for_such():
    code = (
        "import ast, torch, yaml, re\nast.literal_eval(t)\ntorch.load(f, "
        "weights_only=True)\nyaml.safe_load(t)\n"
        "model.eval()\nre.compile(t)\nyaml.SafeLoader(t)\nf(trust_remote_code=False)\nnp.load(f)\njson.load(f)"
    )
    assert not list(dangers(ast.parse(code)))

"""What a sealed JSON document says is kept by any tool that writes it anew; any change is found."""

import copy
import hashlib
import json

import nbformat
import pytest

from kd_utils.store import content
from kd_utils.store.sealed import RecordError, read_sealed, seal, write_sealed

HOLDER = "metadata.kd_utils"


def lines(text):
    return text.splitlines(keepends=True)


def notebook():
    """A notebook with an output of every kind, as papermill and `_finish` leave one."""
    table = {"text/html": lines("<b>1</b>\n<i>2</i>"), "text/plain": lines("1\n2")}
    chart = {"application/vnd.vegalite.v6+json": {"data": [0.1, 2.0, -1e-07, 3], "lines": ["a\n"]}}
    picture = {"image/png": "iVBORw0KGgo=\n", "text/plain": ["<Image>"]}
    outputs = [
        {"name": "stdout", "output_type": "stream", "text": lines("a\nb é\n")},
        {"name": "stderr", "output_type": "stream", "text": ["careful\n"]},
        {"data": table, "execution_count": 3, "metadata": {}, "output_type": "execute_result"},
        {"data": chart, "metadata": {}, "output_type": "display_data"},
        {
            "data": picture,
            "metadata": {"image/png": {"width": 643}},
            "output_type": "display_data",
        },
        {"ename": "E", "evalue": "no", "output_type": "error", "traceback": ["\x1b[0;31mE", "no"]},
    ]
    return {
        "cells": [
            {
                "attachments": {"a.png": {"image/png": "iVBORw0KGgo="}},
                "cell_type": "markdown",
                "id": "m-00",
                "metadata": {"tags": [], "seconds": 0.0},
                "source": lines("# Title\n\nText"),
            },
            {
                "cell_type": "code",
                "execution_count": 3,
                "id": "c-01",
                "metadata": {"tags": ["parameters"], "seconds": 2.34},
                "outputs": outputs,
                "source": lines("x = 1\nprint(x)"),
            },
            {"cell_type": "raw", "id": "r-02", "metadata": {}, "source": ["raw"]},
        ],
        "metadata": {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "papermill": {"parameters": {"seed": 0, "alpha": 1.0}, "duration": 12.5},
            "kd_utils": {"trial": "attention_seed0", "config_hash": "d" * 16},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }


@pytest.fixture
def path(tmp_path):
    write_sealed(tmp_path / "n.ipynb", notebook(), HOLDER)
    return tmp_path / "n.ipynb"


def with_nbformat(path):
    nbformat.write(nbformat.read(path, as_version=4), path)


def with_older_nbformat(path):
    """Minor version 4 has no cell ids."""
    document = nbformat.read(path, as_version=4)
    document["nbformat_minor"] = 4
    for cell in document["cells"]:
        cell.pop("id", None)
    nbformat.write(document, path)


def with_papermill(path):
    iorw = pytest.importorskip("papermill.iorw")
    iorw.write_ipynb(iorw.load_notebook_node(str(path)), str(path))


def with_nbconvert(path):
    exporters = pytest.importorskip("nbconvert.exporters")
    text, _ = exporters.NotebookExporter().from_filename(str(path))
    path.write_text(text, encoding="utf-8")


def with_jupyter_server(path):
    """GET, then PUT what came."""
    manager = pytest.importorskip("jupyter_server.services.contents.largefilemanager")
    server = manager.LargeFileManager(root_dir=str(path.parent))
    server.save({**server.get(path.name, type="notebook"), "chunk": None}, path.name)


def as_javascript_writes(value):
    """Whole numbers have no decimal point, and -0 no sign."""
    if isinstance(value, dict):
        return {key: as_javascript_writes(item) for key, item in reversed(value.items())}
    if isinstance(value, list):
        return [as_javascript_writes(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def with_jupyterlab(path):
    """What JupyterLab 4.6 was seen to change on Save, and what it and others may add."""
    document = as_javascript_writes(json.loads(path.read_bytes()))
    document["metadata"] |= {
        "kernelspec": {"display_name": "Python 3 (ipykernel)", "name": "python3"},
        "language_info": {"name": "python", "version": "3.14.1"},
        "widgets": {"application/vnd.jupyter.widget-state+json": {"state": {}}},
        "vscode": {"interpreter": {"hash": "0"}},
    }
    for cell in document["cells"]:
        cell["id"] = f"new-{cell['id']}"
        cell["source"] = "".join(cell["source"])
        cell["metadata"] |= {
            "collapsed": False,
            "scrolled": True,
            "trusted": True,
            "jupyter": {"outputs_hidden": True},
            "execution": {"iopub.status.busy": "2026-01-01T00:00:00Z"},
            "ExecuteTime": {"start_time": "2026-01-01T00:00:00Z"},
        }
    first = document["cells"][1]["outputs"][0]
    document["cells"][1]["outputs"][:1] = [{**first, "text": line} for line in first["text"]]
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def with_json(path):
    path.write_text(json.dumps(json.loads(path.read_bytes()), sort_keys=True))


def with_windows(path):
    """Line ends of two bytes, and a byte order mark."""
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))


TOOLS = (
    with_nbformat,
    with_older_nbformat,
    with_papermill,
    with_nbconvert,
    with_jupyter_server,
    with_jupyterlab,
    with_json,
    with_windows,
)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_a_notebook_that_a_tool_opened_and_saved_is_whole(path, tool):
    written = path.read_bytes()
    digest = read_sealed(path, HOLDER)["metadata"]["kd_utils"]["sha256"]
    tool(path)
    assert path.read_bytes() != written, "the tool changes nothing: this test shows nothing"
    assert read_sealed(path, HOLDER)["metadata"]["kd_utils"]["sha256"] == digest


def test_it_is_whole_after_all_of_them(path):
    for tool in TOOLS:
        tool(path)
    read_sealed(path, HOLDER)


def test_outputs_that_were_stripped_are_found(path):
    strip = pytest.importorskip("nbstripout").strip_output
    document = strip(
        nbformat.read(path, as_version=4), keep_output=False, keep_count=False, keep_id=True
    )
    nbformat.write(document, path)
    with pytest.raises(RecordError, match=r"n.ipynb was changed after it was written"):
        read_sealed(path, HOLDER)


def leaves(value, at=()):
    """The place of everything that is no dict or list, and of empty ones."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in inside:
        if isinstance(item, (dict, list)) and item:
            yield from leaves(item, (*at, key))
        else:
            yield (*at, key)


def changed(value):
    """Values that are a little other: each character, each digit."""
    match value:
        case str():
            return [value[:i] + chr(ord(c) ^ 1) + value[i + 1 :] for i, c in enumerate(value)] + [
                f"{value} ",
                value.upper() if value != value.upper() else f"{value}x",
            ]
        case bool():
            return [not value]
        case int():
            return [value + 1, value + 1e-9, str(value)]
        case float():
            return [value + 2e-16 + abs(value) * 3e-16, -value - 1, str(value)]
        case _:
            return [1, "x", ["x"], {"x": 1}]


#: The places in `notebook()` of what its record does not say.
NOT_SAID = (
    *(("cells", k, "id") for k in range(3)),
    *(("metadata", "kernelspec", key) for key in ("display_name", "language", "name")),
    ("metadata", "language_info", "name"),
    ("metadata", "kd_utils", "sha256"),
    ("nbformat_minor",),
    ("cells", 2, "metadata"),
)


def test_any_changed_character_or_number_of_what_a_notebook_says_is_found(path):
    whole = json.loads(path.read_bytes())
    places = [place for place in leaves(whole) if place not in NOT_SAID]
    assert len(places) == len([*leaves(whole)]) - len(NOT_SAID) > 40
    for *inside, key in places:
        for value in changed(get(whole, (*inside, key))):
            document = copy.deepcopy(whole)
            get(document, inside)[key] = value
            path.write_text(json.dumps(document), encoding="utf-8")
            try:
                read_sealed(path, HOLDER)
            except RecordError:
                continue
            pytest.fail(f"{inside} {key}: {value!r} was not found")


def get(document, place):
    for key in place:
        document = document[key]
    return document


def test_any_missing_added_or_moved_part_is_found(path):
    whole = json.loads(path.read_bytes())
    for place in (("cells",), ("cells", 1, "outputs"), ("cells", 1, "outputs", 3, "data")):
        for change in (
            lambda part: part.clear(),
            lambda part: part.pop() if isinstance(part, list) else part.popitem(),
            lambda part: part.reverse() if isinstance(part, list) else part.update({"x/y": "z"}),
        ):
            document = copy.deepcopy(whole)
            change(get(document, place))
            path.write_text(json.dumps(document), encoding="utf-8")
            with pytest.raises(RecordError, match="was changed"):
                read_sealed(path, HOLDER)


@pytest.mark.parametrize("broken", [{"cells": 7}, {"cells": [7]}, {"cells": [{}]}, {"metadata": 1}])
def test_of_a_document_that_only_looks_like_a_notebook_everything_counts(tmp_path, broken):
    document = {"nbformat": 4, "metadata": {}, "cells": []} | broken
    if document["metadata"] == {}:
        write_sealed(tmp_path / "n.ipynb", document, HOLDER)
        assert read_sealed(tmp_path / "n.ipynb", HOLDER)["cells"] == broken["cells"]
    else:
        with pytest.raises(AttributeError):
            seal(document, HOLDER)


def digest(text):
    return content.content_digest(text, "checksums")


@pytest.mark.parametrize(
    "spellings",
    [
        ("1", "1.0", "1e0", "10E-1"),
        ("0", "-0", "0.0", "-0.0"),
        ("1e-05", "0.00001", "1E-5"),
        ("0.9523809523809523", "0.95238095238095231"),
        ("1.152921504606847e+18", "1152921504606847000"),  # as JavaScript writes it
    ],
)
def test_a_number_is_the_same_however_it_is_written(spellings):
    assert len({digest(f'{{"x": {spelling}}}') for spelling in spellings}) == 1


def test_numbers_that_differ_are_not_the_same():
    numbers = (
        "1",
        "2",
        "1.0000000000000002",
        "-1",
        "9007199254740992",
        "9007199254740993",
        "1e300",
    )
    numbers += ("true", "false", "null", '"1"', "[1]", "1" * 400, "1" * 399 + "2", "0")
    assert len({digest(f'{{"x": {number}}}') for number in numbers}) == len(numbers)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", '{"a": 1, "a": 1}'])
def test_what_readers_take_differently_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(f'{{"x": {text}, "checksums": {{"sha256": "0"}}}}')
    with pytest.raises(ValueError):
        digest((tmp_path / "a.json").read_bytes())
    with pytest.raises(RecordError, match="a.json is damaged: it is not a sealed JSON file"):
        read_sealed(tmp_path / "a.json", "checksums")


def test_a_seal_over_the_text_still_holds_for_that_very_text_and_no_other(tmp_path):
    """As all records were sealed before."""
    document = {"b": 1.0, "a": ["é", 1e-05], "checksums": {"x": "0"}}
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    document["checksums"]["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    sealed = (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode()
    path = tmp_path / "a.json"
    path.write_bytes(sealed)
    assert read_sealed(path, "checksums") == document
    for other in (sealed + b" ", sealed.replace(b"1e-05", b"1E-05"), sealed.replace(b"1.0", b"1")):
        path.write_bytes(other)
        with pytest.raises(RecordError, match="was changed after it was written"):
            read_sealed(path, "checksums")

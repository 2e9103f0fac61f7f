"""Files appear whole or not at all."""

import pytest

from kd_utils.files import sha256_file, sha256_json, write_json, written_aside


def test_an_error_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "deep" / "table.csv"
    with written_aside(path) as aside:
        aside.write_text("old")
    with pytest.raises(RuntimeError), written_aside(path) as aside:
        aside.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_json_is_whole_and_has_no_nan(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": 2})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert (tmp_path / "a.json").read_text() == '{\n  "a": 2,\n  "b": 1\n}\n'


def test_digests(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1}) != sha256_json({"a": 1})

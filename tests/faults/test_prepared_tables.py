"""Prepared tables of any kind behind a right seal work or are refused in one line; and any text
comes through.
"""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_prepared_data import config, resealed, with_shots
from tiny import tiny_tokenizer, write_task_files

from kd_utils.data.drawing import prepare
from kd_utils.data.prepared_data import PreparedData, columns_of, load_prepared, save_prepared
from kd_utils.data.tasks import TASKS
from kd_utils.tokens.encoding import encode_table

TOKENIZER = tiny_tokenizer(begin=False)
COLUMNS = columns_of("train")
HARD = settings(
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)
ODD_TEXT = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        [
            "",
            " ",
            "\n",
            "\0",
            "\ufeff",
            "\u2028",
            "\u200b",
            "e\u0301",
            "\u202eabc",
            "a\0b",
            "🧑🏽‍🚀",
            "\U0010ffff",
            "\x85",
            "NaN",
            "None",
            "null",
            "-1",
            "4",
            "0",
            "1e400",
            " A",
            " negative",
            "sst2",
            "mmlu",
            "gsm8k",
            "#### 5",
            "<e>",
            "<|im_end|>",
            "\r\n",
            "x" * 100_000,
            "word " * 20_000,
            "\0" * 100_000,
            "🙂" * 25_000,
        ]
    ),
)
TYPES = [
    pa.int64(),
    pa.float64(),
    pa.bool_(),
    pa.binary(),
    pa.large_binary(),
    pa.large_string(),
    pa.null(),
    pa.timestamp("ns"),
    pa.timestamp("s", "Mars/Olympus"),
    pa.date32(),
    pa.duration("us"),
    pa.decimal128(38, 9),
    pa.dictionary(pa.int8(), pa.string()),
    pa.list_(pa.string()),
    pa.list_(pa.int8()),
    pa.list_(pa.string(), 2),
    pa.list_(pa.list_(pa.string())),
    pa.struct([("a", pa.string())]),
    pa.struct([("choices", pa.list_(pa.string()))]),
    pa.map_(pa.string(), pa.string()),
    pa.large_list(pa.large_string()),
    pa.list_(pa.null()),
]
ODD_VALUES = st.one_of(
    st.none(),
    ODD_TEXT,
    st.integers(-9, 9),
    st.floats(),
    st.booleans(),
    st.binary(max_size=5),
    st.lists(st.one_of(st.none(), ODD_TEXT), max_size=5),
    st.just([" negative", " positive"]),
    st.just([" A", " B", " C", " D"]),
    st.just({"a": "b"}),
    st.just([["a"], []]),
)


@st.composite
def changes(draw) -> list[tuple]:
    column, row = st.sampled_from(COLUMNS), st.integers(0, 5)
    return draw(
        st.lists(
            st.one_of(
                st.tuples(st.just("text"), column, row, ODD_TEXT),
                st.tuples(st.just("text"), st.sampled_from(["prompt", "subject"]), row, ODD_TEXT),
                st.tuples(st.just("value"), column, row, ODD_VALUES),
                st.tuples(st.just("all"), column, ODD_VALUES),
                st.tuples(st.just("type"), column, st.sampled_from(TYPES)),
                st.tuples(st.just("drop"), column),
                st.tuples(st.just("rename"), column, st.one_of(column, st.text(max_size=9))),
                st.tuples(st.just("order"), st.permutations(COLUMNS)),
                st.tuples(st.just("extra"), st.one_of(column, st.text(max_size=9)), ODD_VALUES),
                st.tuples(
                    st.just("extra"),
                    st.sampled_from(
                        ["prompt.a", "choices.list.element", "__index_level_0__", "row"]
                    ),
                    ODD_VALUES,
                ),
                st.tuples(st.just("rows"), st.lists(row, max_size=8)),
                st.tuples(st.just("swap"), column, column),
                st.tuples(
                    st.just("raw bytes"),
                    st.sampled_from(["prompt", "gold"]),
                    st.binary(min_size=1, max_size=9),
                ),
                st.tuples(st.just("metadata"), st.binary(max_size=40)),
            ),
            min_size=1,
            max_size=3,
        )
    )


def changed_table(table: pa.Table, change: tuple) -> pa.Table:
    """The table with one change; as it is, where Arrow itself refuses such a table."""
    kind, *how = change
    names = table.column_names
    if (
        kind in ("text", "value", "all", "type", "drop", "rename", "raw bytes")
        and names.count(how[0]) != 1
    ):
        return table
    place = (
        names.index(how[0])
        if kind not in ("order", "extra", "rows", "metadata") and how[0] in names
        else -1
    )
    try:
        if kind in ("text", "value"):
            values = table.column(place).to_pylist()
            values[how[1] % len(values)] = how[2]
            return table.set_column(place, how[0], pa.array(values))
        if kind == "all":
            return table.set_column(place, how[0], pa.array([how[1]] * len(table)))
        if kind == "type":
            column = table.column(place)
            new = pa.nulls(len(table), how[1])
            try:
                new = column.cast(how[1])
            except pa.ArrowException:
                pass
            return table.set_column(place, how[0], new)
        if kind == "drop":
            return table.remove_column(place)
        if kind == "rename":
            return table.rename_columns(
                [how[1] if at == place else name for at, name in enumerate(names)]
            )
        if kind == "order":
            return table.select(
                [*sorted(names, key=lambda name: how[0].index(name) if name in how[0] else 99)]
            )
        if kind == "extra":
            return table.append_column(how[0], pa.array([how[1]] * len(table)))
        if kind == "rows":
            return table.take([row % len(table) for row in how[0]]) if len(table) else table
        if kind == "swap":
            return table.rename_columns([dict([how, how[::-1]]).get(name, name) for name in names])
        if kind == "raw bytes":  # text that is no UTF-8
            column = pa.array([how[1]] * len(table), pa.binary())
            return table.set_column(
                place, how[0], pa.Array.from_buffers(pa.string(), len(column), column.buffers())
            )
        return table.replace_schema_metadata({b"pandas": how[0], b"ARROW:schema": how[0]})
    except (pa.ArrowException, UnicodeDecodeError, ZeroDivisionError, OverflowError, KeyError):
        return table


def hash_of(train: pa.Table, whole: PreparedData) -> str:
    """What the manifest would say of such rows, if they can be hashed at all."""
    try:
        rows = {column: pd.Series(train[column].to_pylist(), dtype=object) for column in COLUMNS}
        return replace(whole, train=rows).data_hash
    except (KeyError, ValueError, TypeError, pa.ArrowException):
        return whole.data_hash


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[PreparedData, pa.Table, Path]:
    raw = with_shots(write_task_files(tmp_path_factory.mktemp("raw")))
    prepared = prepare(config(raw), TOKENIZER)
    place = save_prepared(prepared, raw.parent / "prepared")
    return prepared, pq.read_table(place / "train.parquet"), place


def test_a_mutated_prepared_table_works_or_is_one_line(whole, times, tried):
    prepared, table, place = whole
    found: Counter[str] = Counter()

    @settings(HARD, max_examples=times(500, 5000))
    @given(changes(), st.sampled_from(["snappy", "zstd", "none"]), st.integers(1, 9), st.booleans())
    def check(how, compression, group, dictionary):
        train = table
        for change in how:
            train = changed_table(train, change)
        try:
            pq.write_table(
                train,
                place / "train.parquet",
                compression=compression,
                row_group_size=group,
                use_dictionary=dictionary,
            )
        except (pa.ArrowException, TypeError):  # nobody can have such a file
            found["not written"] += 1
            return
        resealed(place, data_hash=hash_of(train, prepared))
        try:
            rows = encode_table(TOKENIZER, load_prepared(place).train, "train.parquet")
        except ValueError as error:
            require_clear(error)
            found["refused"] += 1
        else:
            assert len(rows) == len(train) and all(
                0 < row.answer_start < len(row.tokens) for row in rows
            )
            found["works"] += 1

    check()
    assert (
        found["refused"] > 100 and found["works"] > 50 and found["not written"] < found.total() / 5
    ), found
    assert found["refused"] + found["works"] >= times(400, 4000), found
    tried("mutated prepared table", found["refused"] + found["works"])


def require_clear(error: ValueError) -> None:
    """One line that names the file, says what is expected and what to do, from our own code."""
    message, [*_, frame] = str(error), traceback.extract_tb(error.__traceback__)
    assert isinstance(error, ValueError) and "/kd_utils/" in frame.filename, (
        frame.filename,
        message,
    )
    assert len(message.splitlines()) == 1 and len(message) < 700 and message.isprintable(), message
    assert ".parquet" in message, message
    assert any(
        word in message
        for word in (
            "expected",
            "has no column",
            "has no rows",
            "not a complete parquet file",
            "is already used by",
            "joins prompt and answer",
            "has no token",
        )
    ), message
    assert "01_prepare_data again" in message or "tokenizer" in message, message


LONG_TEXT = "A sentence of 100 kB: \0\u202e🙂 " * 3000


def write_raw(folder: Path, texts: list[str]) -> None:
    """The three tasks in the hub's schema, with these texts wherever a task has text of its own."""
    own = [
        f"{number} {text}" for number, text in enumerate(texts)
    ]  # contents must differ, not in blanks alone
    half = len(own) // 2
    write_task_files(folder)
    for name, part in (("train", own[:half]), ("validation", own[half:])):
        pq.write_table(
            pa.table({"sentence": part, "label": [0] * len(part)}),
            folder / "sst2" / f"{name}.parquet",
        )
    for name, part in (("train", own[:half]), ("test", own[half:])):
        answers = [f"{text}\n#### {number}" for number, text in enumerate(part)]
        pq.write_table(
            pa.table({"question": part, "answer": answers}), folder / "gsm8k" / f"{name}.parquet"
        )
    pq.write_table(
        pa.table(
            {
                "question": own,
                "subject": texts,
                "answer": [3] * len(own),
                "choices": [[text, "", text[::-1], "d"] for text in texts],
            }
        ),
        folder / "mmlu/test.parquet",
    )
    with_shots(folder)


def through(folder: Path, texts: list[str]) -> None:
    """Raw rows to prepared rows, to disk, back, and to tokens and back: the same text
    everywhere.
    """
    write_raw(folder / "raw", texts)
    half = len(texts) // 2
    counts = {
        f"{task}_{split}": n
        for task, n in (("sst2", half), ("mmlu", half), ("gsm8k", half))
        for split in ("train", "validation")
    }
    prepared = prepare(config(folder / "raw", max_length=10**7, **counts), TOKENIZER)
    loaded = load_prepared(save_prepared(prepared, folder / "prepared"))
    raw = [
        (path.parent.name, row)
        for path in sorted((folder / "raw").glob("*/*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    about = "The following are multiple choice questions (with answers) about {}.\n\n"
    expected = {
        (about.format(row["subject"].replace("_", " ")) if task == "mmlu" else "")
        + TASKS[task].prompt(row)
        + TASKS[task].answer(row)
        for task, row in raw
    }
    for split in ("train", "validation"):
        before, after = getattr(prepared, split), getattr(loaded, split)
        assert before.to_dict("list") == after.to_dict("list") and len(after) == 3 * half
        for row, tokens in zip(after.itertuples(), encode_table(TOKENIZER, after)):
            assert row.prompt + row.answer in expected
            assert TOKENIZER.decode(tokens.tokens[: tokens.answer_start]) == row.prompt
            assert TOKENIZER.decode(tokens.tokens[tokens.answer_start : -1]) == row.answer


def test_any_text_goes_through_unharmed(tmp_path, times):
    @settings(HARD, max_examples=times(25, 300))
    @given(st.lists(ODD_TEXT.filter(lambda text: len(text) < 100), min_size=4, max_size=4))
    def check(texts):
        through(tmp_path, texts)

    check()
    through(tmp_path, [LONG_TEXT, "", "b", "\0" * 100_000])

"""What a prepared table must be: its columns, their types, and every row, so that nothing later
meets a surprise.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from kd_utils.config.project_paths import short_path
from kd_utils.data.task_rows import COLUMNS
from kd_utils.data.tasks import TASKS

#: Columns of a prepared table, in order; all are text but `choices`, a list of texts.
PREPARED = tuple(column for column in COLUMNS if column != "row")


def read_table(path: Path) -> pd.DataFrame:
    """A prepared table whose columns, types and rows were all looked at.

    Raises:
        ValueError: one line that names the file, the column or row, and what is expected.
    """
    where = short_path(path)
    try:
        file = pq.ParquetFile(path)
        if not file.metadata.num_rows:
            raise ValueError(f"{where} has no rows: run 01_prepare_data again")
        _require_columns(file.schema_arrow, where)
        columns = file.read(columns=list(PREPARED)).to_pydict()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{where} is no whole parquet file of Unicode text ({_shown(str(error))}): run "
            "01_prepare_data again"
        ) from None
    table = pd.DataFrame({column: columns[column] for column in PREPARED})
    for number, values in enumerate(zip(*(columns[column] for column in PREPARED), strict=True)):
        if problem := _problem(dict(zip(PREPARED, values))):
            raise ValueError(f"{where}, row {number}: {problem}: run 01_prepare_data again")
    return table


def require_own_ids(tables: dict[str, pd.DataFrame], where: str) -> None:
    """Raise a ValueError if an `example_id` comes twice: whatever is kept of a row is found by it.

    Args:
        tables: file name -> table.
        where: their folder.
    """
    seen: dict[str, str] = {}
    for file, table in tables.items():
        for number, example_id in enumerate(table["example_id"]):
            row = f"{file}, row {number}"
            if (first := seen.setdefault(example_id, row)) != row:
                raise ValueError(
                    f"{where}/{row}: example_id {_shown(example_id)} is that of {first} too, "
                    f"expected one "
                    "of its own: run 01_prepare_data again"
                )


def _require_columns(schema: pa.Schema, where: str) -> None:
    for column in PREPARED:
        found = [field.type for field in schema if field.name == column]
        if not found:
            raise ValueError(
                f"{where} has no column {column} (it has {_shown(', '.join(schema.names), 300)}): "
                f"run "
                "01_prepare_data again"
            )
        wanted = "a list of texts" if column == "choices" else "text"
        if len(found) > 1:
            raise ValueError(
                f"{where} has {len(found)} columns {column}, expected one, {wanted}: run "
                f"01_prepare_data "
                "again"
            )
        if not (_is_texts(found[0]) if column == "choices" else _is_text(found[0])):
            raise ValueError(
                f"{where}: column {column} holds {_shown(str(found[0]))}, expected {wanted}: run "
                "01_prepare_data again"
            )


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_texts(kind: pa.DataType) -> bool:
    """A list of texts, or of nothing: a table of GSM8K alone has empty lists only."""
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and (
        _is_text(kind.value_type) or pa.types.is_null(kind.value_type)
    )


def _problem(row: dict[str, Any]) -> str:
    """What is wrong with a row, and what is expected; "" for nothing."""
    for column, value in row.items():
        if value is None or column == "choices" and None in value:
            return (
                f"{column} is null, expected {'a list of texts' if column == 'choices' else 'text'}"
            )
    if not row["example_id"]:
        return "example_id is empty, expected the example's own"
    if row["task"] not in TASKS:
        return f"task = {_shown(row['task'])}, expected one of {', '.join(TASKS)}"
    if not row["prompt"].strip():
        return "prompt is empty, expected a question: a model needs a token to start from"
    task = TASKS[row["task"]]
    return task.prepared_problem(row["choices"], row["answer"], row["gold"])


def _shown(value: Any, limit: int = 80) -> str:
    """A value in one line that can be printed, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."

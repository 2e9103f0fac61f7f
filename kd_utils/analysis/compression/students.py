"""The students of a run by how they were made and how large they are, beside their teacher."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from kd_utils.analysis.pairs import example_weights
from kd_utils.analysis.tables import setting_text
from kd_utils.config.trial import INITIAL, initial_settings
from kd_utils.data.tasks import TASKS

#: How a record's sizes are called (`evaluation.footprint`).
SIZES = ("parameters", "non_embedding", "flops_per_token", "bytes", "state_bytes_per_token")

#: Parameters that say how large a student is, not how it was made.
OF_SIZE = ("student_layers", "student_width", "round")

#: What trials that differ in seed or draw alone have in common: where the student's weights come
#: from, its method, its shape, and other swept parameters.
KIND = ["start", "distill_type", "shape", "setting"]


def start_of(config: Mapping[str, Any]) -> str:
    """Where a student's weights come from, in words: "pruned minitron", "svd weights", "svd
    weights tied", "random".

    Args:
        config: of a trial's record.
    """
    settings = initial_settings(config)
    words = [
        f"{key}={value}" if key == "rounds" else str(value)
        for key, value in settings.items()
        if not key.startswith("keep_") and key not in (*OF_SIZE, "student_seed") and value != "own"
    ]
    return " ".join([config.get("student_init", "pretrained"), *words])


class Students(NamedTuple):
    """All done trials of one run whose students are final: not those of an earlier round.

    Attributes:
        table: a row a trial: trial, `KIND`, seed, draw (the `student_seed`), commit (of the code),
            `SIZES`, and ratio: the teacher's non-embedding parameters over the student's.
        correct: (trials, N) 1.0 where the student answered the row right.
        teacher: (N,) the same of the teacher.
        tasks: (N,) the rows' tasks.
        examples: (N,) the rows' ids.
    """

    table: pd.DataFrame
    correct: np.ndarray
    teacher: np.ndarray
    tasks: np.ndarray
    examples: pd.Index

    @classmethod
    def of(
        cls, records: Sequence[Mapping[str, Any]], predictions: pd.DataFrame, cache: str = ""
    ) -> "Students":
        """From `run_folder.done_records` and `run_folder.predictions`.

        Args:
            cache: the `content_hash` of the teacher cache that they must have; "": any.

        Raises:
            ValueError: the records do not say how large the models are, or how the teacher
                answered, as those of older code; trials did not answer the same rows; or they had
                another teacher.
        """
        rows = [row for record in records if (row := _row(record))]
        if not rows or "teacher_correct" not in predictions:
            raise ValueError(
                "no trial of this run says how large its student is and what its teacher answers: "
                "run the sweep again, or set run_dir to another run"
            )
        found = {record["cache"]["content_hash"] for record in records} if cache else {cache}
        if found != {cache}:
            raise ValueError(
                "the run's trials were taught from another cache than the one that is read here: "
                "set name, teacher and tokenizer to those of the run's experiment, or run 02 again"
            )
        table = pd.DataFrame(rows).sort_values(["ratio", "start", "distill_type", "seed", "draw"])
        answers = predictions.pivot(index="trial", columns="example_id", values="correct")
        answers = answers.loc[table["trial"]]
        if answers.isna().any(axis=None) or predictions["teacher_correct"].isna().any():
            raise ValueError("trials did not answer the same rows: run the sweep again")
        of_rows = predictions.drop_duplicates("example_id").set_index("example_id")
        of_rows = of_rows.loc[answers.columns]
        return cls(
            _with_one_name_a_shape(table.reset_index(drop=True)),
            answers.to_numpy(float),
            of_rows["teacher_correct"].to_numpy(float),
            of_rows["task"].to_numpy(),
            answers.columns,
        )

    def by_seed(self, places: pd.Index) -> dict[int, np.ndarray]:
        """Seed -> (N,) the share of its trials, one for each draw, that answered each row right.

        Args:
            places: of the table's rows.
        """
        seeds = self.table.loc[places, "seed"]
        return {
            int(seed): self.correct[seeds.index[seeds == seed]].mean(axis=0)
            for seed in seeds.unique()
        }

    @property
    def weights(self) -> np.ndarray:
        """(N,) of each row in the mean over tasks."""
        return example_weights(list(self.tasks))["macro"]

    @property
    def chance(self) -> float:
        """Of a blind guess, mean over tasks."""
        return float(np.mean([TASKS[task].chance for task in dict.fromkeys(self.tasks)]))


def _with_one_name_a_shape(table: pd.DataFrame) -> pd.DataFrame:
    """The table in which students of the same sizes have one name for their shape: "mlp=0.5" and
    "mlp=192" may be the same.
    """
    shapes = table.groupby([*SIZES])["shape"].transform("first")
    return table.assign(shape=shapes)


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's row of the table; {} for a student of a round before the last."""
    config, sizes = record["config"], record.get("sizes") or {}
    if not sizes.get("student") or not sizes.get("teacher"):
        return {}
    settings = initial_settings(config)
    if settings.get("round", 1) < settings.get("rounds", 1):
        return {}
    keep = {key: value for key, value in settings.items() if value != "all"}
    own = {
        "distill_type",
        "seed",
        "student_init",
        *(key for keys in INITIAL.values() for key in keys),
    }
    swept = {key: value for key, value in record.get("swept", {}).items() if key not in own}
    for key in {"student", "more_teachers"} & swept.keys():  # an assistant of each seed: one kind
        swept[key] = re.sub(rf"(-|_seed){config['seed']}(?!\d)", r"\1SEED", swept[key])
    shape = " ".join(
        f"{key.partition('_')[2]}={keep[key]}"
        for key in keep
        if key.startswith("keep_") or key in ("student_layers", "student_width")
    )
    return {
        "trial": config["trial"] or f"{config['distill_type']}_seed{config['seed']}",
        "start": start_of(config),
        "distill_type": config["distill_type"],
        "shape": shape or "whole",
        "setting": setting_text(swept),
        "seed": config["seed"],
        "draw": config.get("student_seed", 0),
        "commit": record.get("git_commit", ""),
        **{key: sizes["student"][key] for key in SIZES},
        "ratio": sizes["teacher"]["non_embedding"] / sizes["student"]["non_embedding"],
    }

"""SST-2: is a sentence of a film review positive or negative? (Socher et al. 2013, from GLUE)

Prompt and choices are those of lm-evaluation-harness's `sst2`.
"""

from kd_utils.data.tasks.base import Task

TASK = Task(
    name="sst2",
    hub=("nyu-mll/glue", "sst2"),
    columns=("sentence", "label"),
    texts=("sentence",),
    splits={"train": "train", "validation": "validation", "shots": "train"},  # test has no labels
    chance=1 / 2,
    labels=(" negative", " positive"),
    prompt=lambda row: (
        f"{row['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:"
    ),
    gold=lambda row: str(row["label"]),
)

"""What a plan can show at best, and how many seeds it needs, judged by the spread that an earlier
record of it has.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pandas as pd

from kd_utils.analysis import questions, stats
from kd_utils.config import project_paths

#: The difference that a reader would want found: 3 points.
DIFFERENCE = 0.03


def reach_lines(
    planned: pd.DataFrame, analysed: Iterable[Path], pairs: str = "seeds"
) -> Iterator[str]:
    """Whether any effect could be significant, and how many pairs find three points.

    Args:
        planned: of `tables.planned_trials`.
        analysed: earlier runs, which say how much pairs differ.
        pairs: what a pair is.
    """
    reach = questions.reach(planned)
    for row in reach.itertuples():
        can = row.smallest_p < stats.ALPHA
        yield (
            f"question {row.question}: comparisons {row.comparisons}, pairs each {row.pairs}, "
            f"smallest possible corrected p {row.smallest_p:.3f}: "
            + ("can be significant" if can else f"CANNOT be significant, add {pairs}")
        )
    yield from needed(reach, analysed, pairs)


def needed(reach: pd.DataFrame, records: Iterable[Path], pairs: str = "seeds") -> Iterator[str]:
    """In one line, the pairs that find 3 points with power 0.8 over these validation rows; nothing
    without an earlier record.

    Args:
        reach: of `questions.reach`. Its largest family is asked for.
        records: of `run_folder.analysed`. The first one counts in which the question was asked.
        pairs: what a pair is.
    """
    if reach.empty:
        return
    row = reach.loc[reach["family"].idxmax()]
    for record in records:
        table = pd.read_csv(record / "comparisons.csv")
        asked = table["question"].eq(row["question"])
        sd = table[asked & table["metric"].eq(questions.primary(table["metric"]))]
        largest = sd["difference_sd"].max()  # NaN without two seeds of any pair
        if largest > 0:
            number = stats.seeds_needed(largest, DIFFERENCE, int(row["family"]))
            yield (
                f"finding {100 * DIFFERENCE:g} points needs {number or 'more than 99'} {pairs} "
                f"(question {row['question']}, paired sd {100 * largest:.1f} points in "
                f"{project_paths.short_path(record)})"
            )
            return

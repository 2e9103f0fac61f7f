"""The README's first table: what the newest record of each experiment shows, by rule.

Everything is read from the tables that notebook 04 wrote into the record, so old records keep
their findings: `results_summary.csv`, `analysis.csv`, `comparisons.csv`.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kd_utils.analysis import questions, rest, tables
from kd_utils.analysis.words import verdict
from kd_utils.analysis.words.formatting import Row
from kd_utils.config.project_paths import short_path

#: The questions of the table, in a word or two: rows of README.md have at most 120 columns.
NAMES = {
    "teacher": "logits",
    "hard_answers": "over hard",
    "references": "over best",
    "white_box": "signals",
    "white_box_references": "signals over best",
}

COLUMNS = (
    "experiment",
    "trials",
    "`task_only`",
    "`black_box`",
    "shown",
    "equal",
    "not shown",
    "at rest",
    "+",
    "−",
)

NOTHING = "–"


def newest(runs: Path) -> list[Path]:
    """The newest record of each experiment under `runs` in which something was tested, by the
    experiments' names: folders called `DATE-NAME` or, a day's further ones, `DATE-NAME-2`, that
    notebook 04 has analysed. Runs that measure another one's rest (`run_folder.rest_runs`) are no
    experiments.
    """
    found: dict[str, tuple[str, int, Path]] = {}
    for path in sorted(runs.glob("20*/comparisons.csv")):
        if match := re.fullmatch(r"(\d{4}-\d\d-\d\d)-(.+?)(?:-(\d+))?", path.parent.name):
            date, name, number = match.groups()
            if re.search(r"-rest(-|$)", name) or not _is_tested(path.parent):
                continue
            record = date, int(number or 1), path.parent
            found[name] = max(found.get(name, record), record)
    return [found[name][2] for name in sorted(found)]


def markdown(records: Iterable[Path]) -> str:
    """The table in Markdown, with the links of its first column below it.

    Raises:
        FileNotFoundError: a folder lacks a table.
    """
    records = [Path(record) for record in records]
    rows = [COLUMNS, ["---"] * len(COLUMNS), *map(_line, records)]
    links = [f"[{experiment(record)}]: {short_path(record)}/" for record in records]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", *links])


def experiment(record: Path) -> str:
    """The experiment of a record: its folder's name without date and number."""
    return re.sub(r"^\d{4}-\d\d-\d\d-|-\d+$", "", record.name)


def _line(record: Path) -> Sequence[str]:
    results, analysis, compared = (
        _read(record / name) for name in ("results_summary.csv", "analysis.csv", "comparisons.csv")
    )
    metric = questions.primary(compared["metric"])
    primary = compared[compared["metric"] == metric]
    moves = analysis[analysis["metric"].isin([rest.LAST_TENTH, rest.TWICE])]
    done = (results["status"] == "done").sum()
    return [
        f"[{experiment(record)}]",
        f"{done}" + f" of {len(results)}" * bool(done < len(results)),
        *(_mean(analysis, metric, method) for method in ("task_only", questions.BASELINE)),
        *(_cell(primary, find) for find in (_shown, _equal, _not_shown)),
        _at_rest(moves),
        _control(primary, "teacher", "seen", "not seen"),
        _negative(primary),
    ]


def _is_tested(record: Path) -> bool:
    outcomes = set(_read(record / "comparisons.csv")["outcome"])
    return outcomes != {"not tested"}


def _read(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise FileNotFoundError(
            f"{short_path(path.parent)} has no {path.name}: give a folder that notebook 04 analysed"
        )
    table = pd.read_csv(path)
    return table.fillna({"setting": ""}) if "setting" in table else table


def _mean(analysis: pd.DataFrame, metric: str, method: str) -> str:
    """Mean +- sd over seeds in per cent; of several settings, the lowest and the highest mean."""
    is_metric = analysis["metric"] == f"{tables.ACCURACY}/{metric}"
    rows = analysis[is_metric & (analysis["distill_type"] == method)].dropna(subset=["mean"])
    means, sd = 100 * rows["mean"], 100 * rows["sd"]
    if len(rows) == 1:
        return f"{means.item():.1f}" + ("" if sd.isna().item() else f" ± {sd.item():.1f}")
    return f"{means.min():.1f} to {means.max():.1f}" if len(rows) else NOTHING


def _at_rest(moves: pd.DataFrame) -> str:
    """Whether all methods are at rest; where only some are not, these."""
    if rest.at_rest(moves) is False and rest.others_rest(moves):
        return "but " + ", ".join(dict.fromkeys(rest.moving(moves)["distill_type"]))
    return {True: "yes", False: "no", None: "?"}[rest.at_rest(moves)]


def _control(primary: pd.DataFrame, question: str, found: str, not_found: str) -> str:
    """Whether any comparison of a control's question shows a gain; ? if none was tested."""
    outcomes = set(primary.loc[primary["question"] == question, "outcome"])
    if outcomes <= {"not tested"}:
        return "?" if outcomes else NOTHING
    return found if "better" in outcomes else not_found


def _negative(primary: pd.DataFrame) -> str:
    gains = primary[(primary["question"] == "controls") & (primary["outcome"] == "better")]
    false = questions.is_false_alarm(gains.to_dict("records"))
    return _control(primary, "controls", "FALSE ALARM" if false else "smoothing helps", "quiet")


def _cell(primary: pd.DataFrame, find: Callable[[str, list[Row]], list[str]]) -> str:
    found = []
    for question, name in NAMES.items():
        rows = primary[primary["question"] == question]
        family = rows.to_dict("records")
        if question in questions.JOINT:
            family = [
                verdict.joint_row(of_method.to_dict("records"))
                for _, of_method in rows.groupby(["setting", "method"], sort=False)
            ]
        found += find(name, family)
    return ", ".join(found) or NOTHING


def _shown(name: str, family: list[Row]) -> list[str]:
    found = []
    for word in ("better", "worse"):
        rows = [row for row in family if row["outcome"] == word]
        if rows and len(family) == 1:
            found.append(f"{name} {100 * rows[0]['difference']:+.1f}")
        elif rows:
            found.append(f"{_part(len(rows), family)}{name} {word}")
    return found


def _equal(name: str, family: list[Row]) -> list[str]:
    equal = sum(row["outcome"] == "equivalent" for row in family)
    return [f"{_part(equal, family)}{name}"] * bool(equal)


def _not_shown(name: str, family: list[Row]) -> list[str]:
    """With the difference that would have been found: the largest of those of the comparisons."""
    rows = [row for row in family if row["outcome"] not in ("better", "worse", "equivalent")]
    tested = [100 * row["detectable"] for row in rows if row["outcome"] != "not tested"]
    size = "none" if np.isinf(tested).any() else f"{max(tested, default=np.nan):.1f}"
    found = [f"{_part(len(tested), family)}{name} {size}"] * bool(tested)
    untested = len(rows) - len(tested)
    return found + [f"{_part(untested, family)}{name} not tested"] * bool(untested)


def _part(some: int, family: list[Row]) -> str:
    return "" if some == len(family) else f"{some}/{len(family)} "

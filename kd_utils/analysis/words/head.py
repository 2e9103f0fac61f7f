"""The first lines of a verdict: what this run can show at all.

Was training at rest, is an effect seen that must be there, is none seen where there can be none,
and has the teacher something to hand on?
"""

from collections.abc import Iterator, Sequence

import pandas as pd

from kd_utils.analysis import questions, rest, tables
from kd_utils.analysis.words import formatting

SPEEDS = "Not at rest, so speeds are compared, not ends:"

PERIODS = {rest.LAST_TENTH: "over the last tenth of the steps", rest.TWICE: "with twice the steps"}


def head_text(
    moves: pd.DataFrame, measured: str, compared: pd.DataFrame, uninformed: Sequence[str]
) -> str:
    """The lines, to print above `verdict.verdict_text`.

    Args:
        moves: as in `rest.at_rest`.
        measured: the run that measured rest, of `rest.measured`.
        compared: the rows of `comparisons.compare`.
        uninformed: of `retention.uninformed_tasks`.
    """
    primary = compared[compared["metric"] == questions.primary(compared["metric"])]
    tasks = [m for m in dict.fromkeys(compared["metric"]) if m not in tables.MEANS]
    lines = [rest_line(moves, measured), positive_line(primary), negative_line(primary)]
    lines += informed_lines(uninformed, tasks)
    return "\n".join(row for line in filter(None, lines) for row in formatting.wrapped(line))


def rest_line(moves: pd.DataFrame, measured: str) -> str:
    """Whether training was at rest; which methods were not; what is not known. "" for a run that
    trained nothing.
    """
    if moves.empty:
        return ""
    unknown = {
        metric: [_arm(row) for row in rest.unknown(rows).to_dict("records")]
        for metric, rows in moves.groupby("metric", sort=False)
    }
    where = f"twice the steps were measured in {measured}" if measured else _not_measured("")
    if len(moved := rest.moving(moves)):
        found = [
            f"{_arm(row)} moves {100 * row['mean']:+.1f} points {PERIODS[row['metric']]}"
            for row in moved.to_dict("records")
        ]
        others = " All other methods are at rest." * rest.others_rest(moves)
        return f"{SPEEDS} {', '.join(found)} ({where}).{others}"
    if unknown[rest.LAST_TENTH]:
        return (
            "Whether training was at rest cannot be said: the record has no held-out accuracy at "
            f"90 and 100 % of the steps{_of(unknown[rest.LAST_TENTH], moves)}."
        )
    still = "no method's mean held-out accuracy moves by a point or more"
    if unknown[rest.TWICE]:
        not_measured = _not_measured(_of(unknown[rest.TWICE], moves))
        return (
            f"Over the last tenth of the steps {still}, but {not_measured}: whether "
            "training was at rest is not known."
        )
    at = moves["mean"].abs().groupby(moves["metric"], sort=False).idxmax()
    most = ", ".join(
        f"{_arm(row)} {100 * row['mean']:+.1f} {PERIODS[row['metric']]}"
        for row in moves.loc[at].to_dict("records")
    )
    return f"At rest: {still} (the most: {most}; {where})."


def positive_line(primary: pd.DataFrame) -> str:
    """Whether an effect that must be there is seen: that of the logits over no teacher."""
    rows = primary[primary["question"] == "teacher"].to_dict("records")
    what = f"Positive control ({questions.BASELINE} over task_only)"
    if not rows:
        return f"{what}: not in this run."
    rows = [row for row in rows if row["outcome"] != "not tested"]
    if not rows:
        return f"{what}: not tested."
    seen = [row for row in rows if row["outcome"] == "better"]
    unseen = [row for row in rows if row["outcome"] != "better"]
    found = [f"seen: {', '.join(map(_difference, seen))}"] * bool(seen)
    if unseen:
        found.append(
            f"not seen: {', '.join(map(_difference, unseen))}; nothing here says anything about "
            "smaller effects"
        )
    return f"{what} {'; '.join(found)}."


def negative_line(primary: pd.DataFrame) -> str:
    """Whether an effect is seen where there can be none. Smoothing alone may truly help."""
    rows = primary[primary["question"] == "controls"].to_dict("records")
    if not rows:
        return "Negative controls: not in this run."
    pairs = dict.fromkeys(f"{row['method']} over {row['baseline']}" for row in rows)
    gains = [row for row in rows if row["outcome"] == "better"]
    what, said = f"Negative controls ({', '.join(pairs)})", ", ".join(map(_difference, gains))
    if questions.is_false_alarm(gains):
        return f"{what}: a FALSE ALARM, {said}: trust no other gain of this run."
    if gains:
        return f"{what}: {said}; smoothing may help as a regulariser, so look at it first."
    tested = any(row["outcome"] != "not tested" for row in rows)
    return f"{what}: {'quiet' if tested else 'not tested'}."


def informed_lines(uninformed: Sequence[str], tasks: Sequence[str]) -> Iterator[str]:
    """On which tasks the teacher has nothing to hand on, and what the verdict rests on then."""
    if uninformed:
        others = [task for task in tasks if task not in uninformed]
        mean = f"the mean of the others ({', '.join(others)})" if others else "all tasks"
        yield (
            f"On {', '.join(uninformed)} the teacher is not shown to be above chance, so there is "
            f"nothing to hand on: the verdict rests on {mean}."
        )


def _difference(row: formatting.Row) -> str:
    setting = f"[{row['setting']}] " if row["setting"] else ""
    return f"{setting}{formatting.difference(row)}, {row['outcome']}"


def _arm(row: formatting.Row) -> str:
    return row["distill_type"] + f" [{row['setting']}]" * bool(row["setting"])


def _of(some: list[str], moves: pd.DataFrame) -> str:
    """ " of A, B", or nothing where it is all."""
    everything = len(some) == len(moves[tables.KEYS].drop_duplicates())
    return "" if everything else f" of {', '.join(some)}"


def _not_measured(where: str) -> str:
    return f"what twice the steps would change was not measured{where} over {rest.SEEDS} seeds"

"""The questions of `analysis.questions`, asked of several worlds: a pair is a world."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from kd_utils.analysis import comparisons, questions, stats
from kd_utils.analysis.pairs import Answers, Pairs, detectable
from kd_utils.worlds.statistics import World, over_worlds

#: What the numbers are over, in place of `verdict.SCOPE`.
SCOPE = (
    "A pair is a world: another teacher, another initial student, maybe other rows, as the "
    "parameters say. Its seeds are averaged first. p tests the worlds' differences by sign flips; "
    "rows p and the 95 % intervals also cover seeds and validation rows, and better or worse needs "
    "both p. Both are corrected by Holm; the intervals are not."
)


def results_by_world(results: pd.DataFrame) -> pd.DataFrame:
    """The worlds' results as one table in which a world is a seed.

    Args:
        results: of `runs.collect`.

    Returns:
        A row for each world, method and setting, as `run_folder.collect` has them for trials:
        metrics are means over the trials that are done, `config/seed` is the number of the world, 0
        first, and `status` is "done" where any trial is.
    """
    number = {world: i for i, world in enumerate(dict.fromkeys(results["world"]))}
    keys = [key for key in results if key.startswith("config/") and key != "config/seed"]
    done = results["status"] == "done"
    metrics = [key for key in results.select_dtypes("number") if not key.startswith("config/")]
    shown = results.assign(done=done, **{key: results[key].where(done) for key in metrics})
    arms = shown.groupby(["world", *keys], dropna=False, sort=False)
    table = arms.agg({"done": "any", **dict.fromkeys(metrics, "mean")}).reset_index()
    places = table[["world", *keys]].astype(str).agg("/".join, axis=1)
    return table.assign(
        **{"trial": "world-" + places, "config/seed": table["world"].map(number)},
        status=np.where(table["done"], "done", "missing"),
    ).drop(columns=["world", "done"])


def compare(worlds: Mapping[str, Answers], margin: float = 0.01, planned: int = 0) -> pd.DataFrame:
    """Every comparison of every question, on every metric.

    Args:
        worlds: the answers in each world, which have the same tasks.
        margin: as in `comparisons.compare`.
        planned: the number of worlds in the plan, with those in which nothing is done; 0: no more.

    Returns:
        The columns of `comparisons.compare`, where planned and pairs count worlds, and seeds are
        worlds in every test (`statistics.over_worlds`). What compares spreads, and g, is NaN.

    Raises:
        ValueError: the worlds have different tasks.
    """
    rows = []
    for question, compared in questions.QUESTIONS.items():
        of_question = _by_comparison(worlds, compared)
        heads = [_head(members, planned or len(worlds)) for members in of_question]
        if family := questions.family_size(question, heads):
            rows += [
                {"question": question, "family": family} | head | numbers
                for head, members in zip(heads, of_question)
                for numbers in _by_metric(members, margin, family)
            ]
    return comparisons.judged(rows, margin)


Member = tuple[Answers, Pairs]


def _by_comparison(
    worlds: Mapping[str, Answers], compared: tuple[tuple[str, str], ...]
) -> list[list[Member]]:
    """The worlds' pairs of each setting, method and baseline."""
    found: dict[tuple[str, ...], list[Member]] = defaultdict(list)
    for answers in worlds.values():
        for pairs in answers.pairs(compared):
            place = tuple(pairs.row[key] for key in ("setting", "method", "baseline"))
            found[place].append((answers, pairs))
    return list(found.values())


def _head(members: list[Member], planned: int) -> dict[str, Any]:
    """Of a comparison: setting, method, baseline; the numbers of worlds, planned and done."""
    done = sum(bool(pairs.seeds) for _, pairs in members)
    return members[0][1].row | {"planned": planned, "pairs": done}


def _done(members: list[Member]) -> list[World]:
    return [
        World(pairs.difference, answers.tasks, answers.examples)
        for answers, pairs in members
        if pairs.seeds
    ]


def _by_metric(members: list[Member], margin: float, family: int) -> Iterator[dict[str, Any]]:
    metrics = members[0][0].metrics
    members = [(answers, pairs) for answers, pairs in members if pairs.seeds]
    if not members:  # it counts in its family: nobody may drop a comparison by failing
        yield from ({"metric": metric} for metric in metrics)
        return
    in_worlds = _done(members)
    for metric in metrics:
        weights = [answers.weights([metric]) for answers, _ in members]
        accuracy, baseline_accuracy = (
            np.array([(side @ weight).mean() for side, weight in zip(sides, weights)])
            for sides in zip(*((pairs.correct, pairs.baseline_correct) for _, pairs in members))
        )
        found, narrow = (
            over_worlds(in_worlds, metric, level, members[0][0].informed) for level in (0.95, 0.9)
        )
        sizes = detectable(found["sd"], found["error"], len(members), family)
        yield {
            "metric": metric,
            **{key: found[key] for key in ("difference", "low", "high", "p", "p_rows")},
            "difference_sd": found["sd"],
            "low_90": narrow["low"],
            "high_90": narrow["high"],
            "p_equivalence": stats.equivalence_p(accuracy, baseline_accuracy, margin),
            "sd": stats.interval(accuracy)["sd"],
            "baseline_sd": stats.interval(baseline_accuracy)["sd"],
            "smallest_p": stats.smallest_p(len(members), family),
            "detectable": float(np.maximum(*sizes)),
            "detectable_seeds": sizes[0],
            "detectable_rows": sizes[1],
        }


def differences(worlds: Mapping[str, Answers], metric: str = "macro") -> pd.DataFrame:
    """Every comparison's difference in each world and seed, for a figure.

    Returns:
        question, comparison ("METHOD minus BASELINE"), setting, world, seed, difference (fraction).
    """
    rows = [
        (question, f"{row['method']} minus {row['baseline']}", row["setting"], world, seed, value)
        for question, compared in questions.QUESTIONS.items()
        for world, answers in worlds.items()
        for pairs in answers.pairs(compared)
        for row in [pairs.row]
        for seed, value in zip(pairs.seeds, pairs.difference @ answers.weights([metric])[:, 0])
    ]
    columns = ["question", "comparison", "setting", "world", "seed", "difference"]
    return pd.DataFrame(rows, columns=columns)


def spread(worlds: Mapping[str, Answers], metric: str = "macro") -> pd.DataFrame:
    """How much each comparison varies from world to world, and from seed to seed in one world.

    Returns:
        comparison, setting; worlds, sd_worlds, sd_seeds, share_worlds, as `statistics.over_worlds`
        has them. Comparisons that are done in no world are left out.
    """
    rows = []
    for asked in questions.QUESTIONS.values():
        for members in _by_comparison(worlds, asked):
            if in_worlds := _done(members):
                answers, pairs = members[0]
                found = over_worlds(in_worlds, metric, informed=answers.informed)
                comparison = f"{pairs.row['method']} minus {pairs.row['baseline']}"
                numbers = (found[key] for key in ("worlds", "sd", "sd_seeds", "share_worlds"))
                rows.append((comparison, pairs.row["setting"], *numbers))
    columns = ["comparison", "setting", "worlds", "sd_worlds", "sd_seeds", "share_worlds"]
    return pd.DataFrame(rows, columns=columns).drop_duplicates(columns[:2], ignore_index=True)

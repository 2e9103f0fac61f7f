"""Figures of two tokenizations: the groups on the text's bytes, and a map before and after it is
merged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from kd_utils.figures.plots import finish, map_cells, visible
from kd_utils.tokens.alignment import Groups, merge_map

if TYPE_CHECKING:
    import altair as alt

MOST_BYTES = 120  # of a text, so that pieces can be read


def token_groups(
    text: str, teacher_ends: np.ndarray, student_ends: np.ndarray, groups: Groups
) -> alt.Chart:
    """Both tokenizations over the bytes of the text, each group in one colour; of a longer text the
    beginning.

    Args:
        text: what was tokenized.
        teacher_ends, student_ends: (n,) behind which byte each token ends.
    """
    import altair as alt

    rows, data = text.encode(), []
    for side, ends, last in (
        ("teacher", teacher_ends, groups.teacher),
        ("student", student_ends, groups.student),
    ):
        starts = np.concatenate([[0], ends[:-1]])
        for k, (start, end) in enumerate(zip(starts.tolist(), ends.tolist())):
            if start < end <= MOST_BYTES:
                group = int(np.searchsorted(last, k))
                data.append(
                    {
                        "side": side,
                        "start": start,
                        "end": end,
                        "middle": (start + end) / 2,
                        "colour": group % 3,
                        "piece": visible(rows[start:end].decode(errors="replace")),
                    }
                )
    table = pd.DataFrame(data)
    y = alt.Y("side:N", sort=["teacher", "student"], title=None)
    boxes = (
        alt.Chart(table)
        .mark_rect(stroke="white", strokeWidth=2)
        .encode(
            x=alt.X("start:Q", title="byte of the text", scale=alt.Scale(nice=False, zero=True)),
            x2="end:Q",
            y=y,
            color=alt.Color(
                "colour:N", legend=None, scale=alt.Scale(range=["#9ecae1", "#fdd0a2", "#c7e9c0"])
            ),
        )
    )
    words = (
        alt.Chart(table).mark_text(fontSize=11, angle=270).encode(x="middle:Q", y=y, text="piece:N")
    )
    cut = "" if len(rows) <= MOST_BYTES else f"; the first {MOST_BYTES} of {len(rows):,} bytes"
    return finish(
        (boxes + words).properties(width=min(900, 8 * int(table["end"].max())), height=220),
        "Two tokenizations of one text",
        f"a colour is a group: it closes where both sides end a token{cut}",
    )


def merged_maps(
    rows: np.ndarray, tokens: list[str], groups: Groups, text: str, ends: np.ndarray
) -> alt.HConcatChart:
    """One head's map over the teacher's tokens, and over groups: keys summed, the last query's row.

    Args:
        rows: (n, n) the teacher's map.
        tokens: its n tokens, as text.
        ends: (n,) behind which byte of `text` each ends.
    """
    import altair as alt

    spelled, last = text.encode(), ends[groups.teacher]
    names = [
        spelled[start:end].decode(errors="replace") or tokens[place]
        for start, end, place in zip(np.concatenate([[0], last[:-1]]), last, groups.teacher)
    ]
    before = map_cells(rows, tokens).properties(title=f"over the teacher's {len(tokens)} tokens")
    after = map_cells(merge_map(rows, groups.teacher), names).properties(
        title=f"over {len(names)} groups"
    )
    return finish(
        alt.hconcat(before, after),
        "A teacher's map, before and after it is lined up",
        "rows sum to 1 in both",
    )

"""Figures of two tokenizations: their groups over the bytes of a text, and an attention map before
and after its tokens are merged to groups.
"""

import altair as alt
import numpy as np
import pandas as pd

from kd_utils.figures import plots
from kd_utils.tokens.alignment import Groups, merge_map

MOST_BYTES = 90  # of a text, so that its pieces can be read


def token_groups(
    text: str, teacher_ends: np.ndarray, student_ends: np.ndarray, groups: Groups
) -> alt.Chart:
    """Draw both tokenizations over the bytes of a text, each group in one colour.

    Args:
        text: what was tokenized; of a longer text the first `MOST_BYTES` bytes are drawn.
        teacher_ends, student_ends: (n,) behind which byte each token ends.
    """
    spelled, boxes = text.encode(), []
    for side, ends, last in (
        ("teacher", teacher_ends, groups.teacher),
        ("student", student_ends, groups.student),
    ):
        colours = np.asarray(np.searchsorted(last, np.arange(len(ends)))) % 3
        starts = np.concatenate([[0], ends[:-1]])
        for start, end, colour in zip(starts.tolist(), ends.tolist(), colours, strict=True):
            if start < end <= MOST_BYTES:
                piece = plots.visible(spelled[start:end].decode(errors="replace"))
                boxes.append((side, start, end, (start + end) / 2, colour, piece))
    table = pd.DataFrame(boxes, columns=["side", "start", "end", "middle", "colour", "piece"])
    base = alt.Chart(table).encode(y=alt.Y("side:N", sort=["teacher", "student"], title=None))
    palette = alt.Scale(range=["#9ecae1", "#fdd0a2", "#c7e9c0"])
    rectangles = base.mark_rect(stroke="white", strokeWidth=2).encode(
        x=alt.X("start:Q", title="byte of the text", scale=alt.Scale(nice=False, zero=True)),
        x2="end:Q",
        color=alt.Color("colour:N", legend=None, scale=palette),
    )
    words = base.mark_text(fontSize=10, angle=270).encode(x="middle:Q", text="piece:N")
    return plots.finish(
        (rectangles + words).properties(width=10 * int(table["end"].max()), height=220),
        "Two tokenizations of one text",
        "each group has one colour; it closes where both sides end a token"
        + f"; the first {MOST_BYTES} of {len(spelled):,} bytes" * (len(spelled) > MOST_BYTES),
    )


def merged_maps(
    rows: np.ndarray, tokens: list[str], groups: Groups, text: str, ends: np.ndarray
) -> alt.HConcatChart:
    """Draw one head's map over the teacher's tokens, and beside it over groups.

    The keys of a group are summed, and its last query gives the row. If every group has one token
    of the teacher, the two maps are equal and only one is drawn.

    Args:
        rows: (n, n) the teacher's map.
        tokens: its n tokens, as text.
        ends: (n,) behind which byte of `text` each token ends.
    """
    spelled, last = text.encode(), ends[groups.teacher]
    starts = np.concatenate([[0], last[:-1]])
    names = [
        spelled[start:end].decode(errors="replace") or tokens[place]
        for start, end, place in zip(starts, last, groups.teacher, strict=True)
    ]
    panels = [
        plots.map_cells(cells, labels).properties(title=f"over {name}")
        for cells, labels, name in (
            (rows, tokens, f"the teacher's {len(tokens)} tokens"),
            (merge_map(rows, groups.teacher), names, f"{len(names)} groups"),
        )
    ]
    if len(names) < len(tokens):
        title = "A teacher's attention map, before and after merging"
        return plots.finish(alt.hconcat(*panels), title, "rows sum to 1")
    return plots.finish(
        alt.hconcat(panels[0]),
        "A teacher's attention map",
        "rows sum to 1; every group has one token of the teacher, so merging does not change the "
        "map",
    )

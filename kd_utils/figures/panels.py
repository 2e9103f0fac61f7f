"""What the figures over trials share: rows and columns of panels, an axis of settings, and the
places of seeds.
"""

import json
from collections.abc import Sequence

import altair as alt
import pandas as pd

from kd_utils.analysis.tables import setting_items

#: The place on an axis of settings for methods that do not use the swept key.
NOT_USED = "–"


def facet(
    panels: alt.LayerChart | alt.Chart,
    data: pd.DataFrame,
    column: str,
    order: Sequence[str] = (),
    row: str = "setting",
) -> alt.FacetChart:
    """A panel per value of `column`, in this order (else that of the rows), with a row of panels
    per value of `row` unless the only row is one setting.
    """
    # Panels are numbered and the numbers get names as labels: given an order of names, Vega puts
    # the panels without data first, and all others under wrong names.
    rows, columns = list(dict.fromkeys(data[row])), list(order or dict.fromkeys(data[column]))
    data = data.assign(
        panel_row=data[row].map(rows.index), panel_column=data[column].map(columns.index)
    )
    header = alt.Header(labelExpr=f"{json.dumps(columns)}[datum.value]")
    grid = {"column": alt.Column("panel_column:O", title=None, header=header)}
    if row != "setting" or len(rows) > 1:
        # The name of a row is horizontal, with a line per swept key.
        names = f"split({json.dumps(rows)}[datum.value], ', ')"
        header = alt.Header(labelAngle=0, labelAlign="left", labelExpr=names)
        grid["row"] = alt.Row("panel_row:O", title=None, header=header)
    return panels.facet(data=data, **grid)


def panel_height(data: pd.DataFrame, alone: int) -> int:
    """Height of a panel in pixels: `alone`, or 60 % of it where there is a row per setting."""
    return alone if data["setting"].nunique() < 2 else round(0.6 * alone)


def panel_name(metric: str) -> str:
    """The heading of a panel, for "macro", "micro", "informed" and tasks."""
    names = {"macro": "mean of tasks", "micro": "all examples", "informed": "informed tasks"}
    return names.get(metric, metric)


def setting_axis(data: pd.DataFrame) -> tuple[pd.DataFrame, alt.X, str | None]:
    """An axis of settings: of the key's values, numbers in order, if one key was swept; else of
    whole settings.

    Returns:
        The rows with `at`, their place on the axis; the axis; the name of the key if it is one.
    """
    settings = list(dict.fromkeys(data["setting"]))
    keys = {key for setting in settings for key in setting_items(setting)}
    key = keys.pop() if len(keys) == 1 else None
    if key:
        name = {setting: setting_items(setting).get(key, NOT_USED) for setting in settings}
        axis = alt.Axis(labelAngle=0)
    else:
        name = {setting: setting or NOT_USED for setting in settings}
        axis = alt.Axis(labelAngle=-35, labelLimit=260, labelExpr="split(datum.label, ', ')")
    # Sorting is stable, so values that are not numbers keep the grid's order.
    numbers = pd.to_numeric(pd.Series(name), errors="coerce").fillna(0)
    order = sorted(settings, key=lambda setting: (setting != "", numbers[setting]))
    scale = alt.Scale(domain=[name[s] for s in order], paddingInner=0.15, paddingOuter=0.075)
    return data.assign(at=data["setting"].map(name)), alt.X("at:N", axis=axis, scale=scale), key


def seed_slots(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """The rows with `slot`, the place (0 to 1) of a seed within its method's bar: the same for all
    methods, in the middle for a single trial.
    """
    place = (table["seed"].rank(method="dense") - 0.5) / table["seed"].nunique()
    alone = table.groupby(by)["seed"].transform("size") == 1
    return table.assign(slot=place.where(~alone, 0.5))

"""Figures: valid charts, with the data they claim to show, that render to a picture in few and in many trials."""

import json
import zlib

import numpy as np
import pandas as pd
import pytest

from kd_utils import plots, stats
from kd_utils.config import METHODS

TASKS = ("sst2", "mmlu", "gsm8k")


def accuracies(seeds: int, methods=METHODS) -> pd.DataFrame:
    noise = np.random.default_rng(0)
    return pd.DataFrame([{"setting": "", "distill_type": method, "seed": seed, "task": task,
                          "accuracy": noise.uniform(0.4, 0.6)}
                         for method in methods for seed in range(seeds) for task in TASKS])


def curves(seeds: int, methods=METHODS, epochs: int = 3) -> pd.DataFrame:
    def epoch(number: int, seed: int) -> dict:
        return {"epoch": number, "validation_accuracy": 0.1 * number + 0.01 * seed, "validation_loss": 2 / number,
                "grad_share/task": 0.6, "grad_share/kd": 0.4, "grad_share/attention": 0.0}

    return stats.learning_curves({"config": {"distill_type": method, "seed": seed},
                                  "epochs": [epoch(number, seed) for number in range(1, epochs + 1)]}
                                 for method in methods for seed in range(seeds))


def differences(seeds: int) -> pd.DataFrame:
    return pd.DataFrame([{"metric": "validation_accuracy", "setting": "", "distill_type": method, "seed": seed,
                          "difference": 0.01 * seed} for method in METHODS[1:] for seed in range(seeds)])


def data_of(chart) -> list[dict]:
    [rows] = chart.to_dict()["datasets"].values()
    return rows


@pytest.fixture(scope="module", params=[1, 7], ids=["one seed", "seven seeds"])
def seeds(request) -> int:
    return request.param


@pytest.mark.parametrize("figure", [
    lambda seeds: plots.accuracy_by_task(accuracies(seeds)),
    lambda seeds: plots.accuracy_by_task(accuracies(seeds, ["attention", "task_only"])),
    lambda seeds: plots.differences_from_baseline(differences(seeds)),
    lambda seeds: plots.learning_curves(curves(seeds), "validation_accuracy"),
    lambda seeds: plots.learning_curves(curves(seeds, ["attention"], 1), "validation_loss"),
    lambda seeds: plots.gradient_share(curves(seeds)),
], ids=["accuracy", "accuracy without black box", "differences", "curves", "one epoch", "gradient"])
def test_figures_render_to_a_small_picture(figure, seeds):
    image = plots.show(figure(seeds))
    assert image.data.startswith(b"\x89PNG") and 5_000 < len(image.data) < 120_000


def test_show_gives_an_image_and_no_javascript():
    from IPython.core.formatters import DisplayFormatter

    bundle, _ = DisplayFormatter().format(plots.show(plots.gradient_share(curves(1, ["black_box"]))))
    assert set(bundle) == {"image/png", "text/plain"}


def test_packing_keeps_every_pixel_and_a_valid_file():
    import vl_convert

    whole = vl_convert.vegalite_to_png(plots.gradient_share(curves(2)).to_dict())
    packed = plots._packed(whole)
    assert len(packed) < 0.6 * len(whole)
    chunks = {name: (body, crc) for name, body, crc in png_chunks(packed)}
    assert list(chunks)[0] == b"IHDR" and list(chunks)[-1] == b"IEND"
    assert all(zlib.crc32(name + body) == crc for name, (body, crc) in chunks.items())
    original = b"".join(body for name, body, _ in png_chunks(whole) if name == b"IDAT")
    assert zlib.decompress(chunks[b"IDAT"][0]) == zlib.decompress(original)


def png_chunks(png: bytes):
    at = 8
    while at < len(png):
        size = int.from_bytes(png[at:at + 4], "big")
        yield png[at + 4:at + 8], png[at + 8:at + 8 + size], int.from_bytes(png[at + 8 + size:at + 12 + size], "big")
        at += 12 + size


def test_accuracy_has_a_point_per_trial_and_task_and_the_interval_of_stats():
    table = accuracies(7)
    rows = data_of(plots.accuracy_by_task(table))
    assert len(rows) == len(table) == 28 * 3
    mine = [r for r in rows if r["distill_type"] == "attention" and r["task"] == "mmlu"]
    expected = stats.interval([r["percent"] for r in mine])
    assert mine[0]["low"] == pytest.approx(expected["low"]) and mine[0]["high"] == pytest.approx(expected["high"])
    black_box = [r["percent"] for r in rows if r["distill_type"] == "black_box" and r["task"] == "mmlu"]
    assert mine[0]["baseline"] == pytest.approx(np.mean(black_box))


def test_one_seed_has_a_mean_and_no_interval():
    [*rows] = data_of(plots.accuracy_by_task(accuracies(1)))
    assert all(r["low"] is None and r["high"] is None and r["mean"] == pytest.approx(r["percent"]) for r in rows)


def test_curves_hold_every_seed_and_the_mean_with_one_standard_deviation():
    rows = data_of(plots.learning_curves(curves(7), "validation_accuracy"))
    assert sum(r["row"] == "seed" for r in rows) == 28 * 3
    [last] = [r for r in rows if r["row"] == "mean" and r["distill_type"] == "combined" and r["epoch"] == 3]
    sd = np.std(np.arange(7.0), ddof=1)  # seeds differ by 1 point
    assert last["mean"] == pytest.approx(33.0) and last["high"] - last["mean"] == pytest.approx(sd)


def test_a_method_has_one_colour_in_every_figure_and_no_two_share_one():
    for chart in (plots.accuracy_by_task(accuracies(2, ["attention", "task_only"])),
                  plots.differences_from_baseline(differences(2)), plots.learning_curves(curves(2), "validation_loss")):
        colours = method_colours(chart.to_dict())
        assert colours["attention"] == plots.COLOURS["attention"] and len(set(colours.values())) == len(colours) >= 4


def method_colours(spec) -> dict[str, str]:
    """The first colour scale over `distill_type` in a chart's spec."""
    if isinstance(spec, dict):
        if spec.get("field") == "distill_type" and "range" in spec.get("scale", {}):
            return dict(zip(spec["scale"]["domain"], spec["scale"]["range"], strict=True))
        spec = list(spec.values())
    found = [method_colours(part) for part in spec] if isinstance(spec, list) else []
    return next((colours for colours in found if colours), {})


def test_no_share_of_the_gradient_falls_off_the_log_scale():
    rows = data_of(plots.gradient_share(curves(2)))
    assert len(rows) == 4 * 3 * 3
    assert [r["percent"] for r in rows if r["term"] == "attention"] == pytest.approx([0.01] * 4 * 3)


def test_further_settings_get_a_row_of_panels():
    two = pd.concat([accuracies(2).assign(setting=f"temperature={t}") for t in (1, 4)])
    assert plots.accuracy_by_task(two).to_dict()["facet"]["row"]["field"] == "setting"


def test_lengths_histogram_counts_every_example_once():
    lengths = pd.DataFrame({"task": ["sst2"] * 6000 + ["gsm8k"] * 3, "tokens": [30] * 6000 + [1, 511, 700]})
    chart = plots.token_lengths(lengths, max_length=512)
    rows = data_of(chart)
    assert sum(r["examples"] for r in rows) == 6003 and len(rows) == 2 * 40
    assert max(r["high"] for r in rows) > 700 and plots.show(chart).data.startswith(b"\x89PNG")


def test_heatmap_draws_the_causal_half_with_its_tokens():
    size = 5
    chart = plots.attention_heatmap(np.tril(np.full((size, size), 0.2)), ["The", "Ġfilm", "▁is", "Ċ", '"'])
    rows = data_of(chart)
    assert len(rows) == size * (size + 1) // 2 and all(r["key"] <= r["query"] for r in rows)
    labels = chart.to_dict()["encoding"]["x"]["axis"]["labelExpr"]
    assert json.loads(labels.removesuffix("[datum.value]")) == ["The", "·film", "·is", "\\n", '"']
    assert plots.show(chart).data.startswith(b"\x89PNG")


def test_heatmap_of_a_long_text_shows_its_beginning():
    size = plots.LONGEST_MAP + 20
    chart = plots.attention_heatmap(np.tril(np.ones((size, size))), ["word"] * size)
    assert len(data_of(chart)) == plots.LONGEST_MAP * (plots.LONGEST_MAP + 1) // 2
    assert f"the first {plots.LONGEST_MAP} of {size} tokens" in chart.to_dict()["title"]["subtitle"]


def test_heatmap_refuses_a_map_that_does_not_fit_its_tokens():
    with pytest.raises(ValueError, match=r"\(2, 3, 3\).*2 tokens"):
        plots.attention_heatmap(np.zeros((2, 3, 3)), ["a", "b"])

"""README and docs: sizes, links, and numbers that must equal those in the records."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pandas as pd
import pytest

from kd_utils.analysis.words import findings

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("runs/20*/README.md"))]
RECORDS = sorted(path.name for path in ROOT.glob("runs/20*") if path.is_dir())
FOLDERS = ("benchmarks", "docs", "kd_utils", "notebooks", "papermill_params", "tests")
FOLDER = "|".join(FOLDERS)
INTERVAL = r"([+-][\d.]+) (\[[+-][\d.]+, [+-][\d.]+\])"

#: Where the README has what `python -m kd_utils findings` prints.
FINDINGS = ("<!-- findings -->\n", "\n<!-- /findings -->")


def page_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def links(path: Path) -> list[str]:
    """Targets of the page's links, in the text and as references, without those on the web."""
    text = re.sub(r"```.*?```", "", text_of(path), flags=re.DOTALL)
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(
        r"^\[[^\]]+\]: (\S+)", text, re.MULTILINE
    )
    return [target.split("#")[0] for target in found if "://" not in target and target[0] != "#"]


def table_rows(text: str, first: str) -> list[dict[str, str]]:
    """Rows of the Markdown table whose first column is called `first`."""
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    columns, rows = cells(lines[at]), []
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(columns, cells(line), strict=True)))
    return rows


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


#: Tables that are kept of runs for whose trials the tree has no room; they name the commit.
TABLES = ("repetition", "retention")


def summary(record: str) -> pd.DataFrame:
    return pd.read_csv(ROOT / "runs" / record / "results_summary.csv")


def verdict(record: str) -> str:
    """The verdict as one line; "" for a record that has none."""
    path = ROOT / "runs" / record / "verdict.txt"
    return " ".join(text_of(path).split()) if path.is_file() else ""


def done_of_planned(results: pd.DataFrame) -> str:
    return f"{(results['status'] == 'done').sum()} of {len(results)}"


def mean_and_spread(results: pd.DataFrame, method: str) -> str:
    done = results[(results["status"] == "done") & (results["config/distill_type"] == method)]
    values = 100 * done["validation_accuracy/macro"]
    return f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")


def missing_numbers(text: str, known: str) -> list[str]:
    """Means with spreads and differences with intervals of the text that the verdict has not."""
    wanted = re.findall(r"\d+\.\d ± \d+\.\d", text)
    wanted += [f"{number} points {interval}" for number, interval in re.findall(INTERVAL, text)]
    return [number for number in wanted if number not in known]


def seconds(record: str, stem: str) -> float:
    """Runtime of a stage, from its executed notebook; of 03, the mean over trials."""
    folder = ROOT / "runs" / record
    if stem == "03_train_student":
        return summary(record)["seconds"].mean()
    return json.loads(text_of(folder / f"{stem}.ipynb"))["metadata"]["papermill"]["duration"]


def targets_of_readme() -> dict[str, str]:
    """Labels of the README's records -> their folders' names."""
    return dict(re.findall(r"^(\[[^\]]+\]): runs/(\S+?)/?$", text_of(README), re.MULTILINE))


def records_table() -> dict[str, dict[str, str]]:
    rows = table_rows(text_of(ROOT / "docs/RECORDS.md"), "date")
    return {re.search(r"20\d\d-\d\d-\d\d-[\w-]+", row["where"])[0]: row for row in rows}


def test_readme_is_short() -> None:
    lines = text_of(README).splitlines()
    assert len(lines) <= 150
    assert len(text_of(README).split()) <= 1500
    prose = [(at, line) for at, line in enumerate(lines, 1) if not line.startswith("| [")]
    assert not [f"line {at}" for at, line in prose if len(line) > 120]  # a row cannot be wrapped


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_and_paths_exist(page: Path) -> None:
    broken = [target for target in links(page) if not (page.parent / target).exists()]
    # An example's names ("my-pair.yaml") and patterns ("NAME.yaml", "grid-X.yaml") are no paths.
    named = re.findall(rf"(?<![\w/.-])(?:\.\./)?((?:{FOLDER})/[\w./-]*\w)", text_of(page))
    real = [path for path in named if not re.search(r"/my-|NAME|-X\.", path)]
    broken += [path for path in real if not (ROOT / path).exists()]
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_named_functions_are_where_the_page_says(page: Path) -> None:
    found = re.findall(r"`(\w+)`\s+in\s+\[[^\]]+\]\(([^)]+\.py)\)", text_of(page))
    for name, target in found:
        source = text_of(page.parent / target)
        assert re.search(rf"^(def |class )?{name}\b", source, re.MULTILINE), (
            f"{name} is not in {target}"
        )


def test_every_page_is_reached_from_the_readme() -> None:
    reached, todo = set(), [README]
    while todo:
        page = todo.pop()
        reached.add(page)
        near = [(page.parent / target).resolve() for target in links(page)]
        todo += [
            path for path in near if path.suffix == ".md" and path.is_file() and path not in reached
        ]
    assert not [page_name(path) for path in (ROOT / "docs").glob("*.md") if path not in reached]


def test_readme_names_every_room() -> None:
    rooms = [path.parent.name for path in (ROOT / "kd_utils").glob("*/__init__.py")]
    tree = text_of(README).split("## The tree")[1].split("##")[0]
    assert rooms and not [room for room in rooms if f" {room}/" not in tree]


def test_no_page_has_a_path_of_a_machine() -> None:
    pattern = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users)/")
    assert not [page_name(page) for page in PAGES if pattern.search(text_of(page))]


def test_the_table_of_results_is_what_the_records_say() -> None:
    """When a record is added or replaced, paste what `python -m kd_utils findings` prints."""
    start, end = FINDINGS
    table = text_of(README).split(start)[-1].split(end)[0].strip()
    assert table == findings.markdown(findings.newest(ROOT / "runs"))


def test_runtimes_are_those_of_the_records() -> None:
    toy, bench, cross = re.search(
        r"records (\[.+?\]),\s+(\[.+?\]) and (\[.+?\])", text_of(README)
    ).groups()
    records = {"05": bench, "06": cross}
    for row in table_rows(text_of(README), "notebook"):
        stem = re.search(r"notebooks/(\w+)\.ipynb", row["notebook"])[1]
        if found := re.match(r"(\d+) s\b", row["runtime"]):
            record = targets_of_readme()[records.get(stem[:2], toy)]
            assert int(found[1]) == round(seconds(record, stem)), stem


def test_records_page_names_every_record() -> None:
    assert not set(RECORDS) - set(records_table())


@pytest.mark.parametrize("record", RECORDS)
def test_records_page_says_what_the_record_says(record: str) -> None:
    row = records_table()[record]
    assert record.startswith(row["date"])
    if verdict(record):
        assert not missing_numbers(row["finding"], verdict(record))
    if (ROOT / "runs" / record / "results_summary.csv").is_file():
        assert row["trials"] == done_of_planned(summary(record))
    documents = sorted((ROOT / "runs" / record).rglob("trials/*/metrics.json"))
    if documents:
        made = json.loads(text_of(documents[0]))["git_commit"]
    elif tables := [
        path for path in (ROOT / "runs" / record).iterdir() if path.name.startswith(TABLES)
    ]:
        [made] = pd.concat(map(pd.read_csv, tables))["commit"].unique()
    else:
        made = json.loads(text_of(ROOT / "runs" / record / "speed.json"))["commit"]
    assert made.startswith(row["commit"].strip("`"))


@pytest.mark.parametrize("record", RECORDS)
def test_kept_record_has_a_readme(record: str) -> None:
    """A record that leaves the tree, as RECORDS.md says, needs none."""
    path, row = ROOT / "runs" / record / "README.md", records_table()[record]
    if "in the history" in row["where"]:
        return
    text = text_of(path)
    assert len(text.splitlines()) <= 20
    assert row["commit"] in text
    assert not verdict(record) or not missing_numbers(text, verdict(record))


@pytest.mark.parametrize("record", RECORDS)
def test_kept_record_names_no_folder_of_one_machine(record: str) -> None:
    """A folder beside the project is given as `../data`: the notebooks and the plan name it."""
    folder = re.compile(r"""["'](?:/(?:home|root|work|tmp|mnt|opt|srv|Users)/|[A-Z]:\\\\)""")
    files = [path for path in (ROOT / "runs" / record).rglob("*") if path.is_file()]
    named = [path for path in files if path.suffix in (".json", ".ipynb", ".csv", ".md", ".txt")]
    assert named and not [page_name(path) for path in named if folder.search(text_of(path))]


def test_log_says_what_the_records_say() -> None:
    wrong, compared = [], 0
    for section in re.split(r"^## ", text_of(ROOT / "docs/log.md"), flags=re.MULTILINE)[1:]:
        head = re.search(r"^Record `(20[\w-]+)`", section, re.MULTILINE)
        known = verdict(head[1]) if head else ""
        for paragraph in section.split("\n\n") if known else []:
            if "not kept" not in paragraph:
                compared += 1
                wrong += [f"{head[1]}: {n}" for n in missing_numbers(paragraph, known)]
    assert compared and not wrong


def test_speed_page_says_what_the_record_says() -> None:
    record = json.loads(text_of(ROOT / "runs/2026-11-30-bench/speed.json"))
    for row in table_rows(text_of(ROOT / "docs/speed.md"), "quantity"):
        key = re.search(r"\(`([\w/]+)`\)", row["quantity"])[1]
        for said, value in ((row["measured"], record[key]), (row["limit"], record["limits"][key])):
            decimals = len(said.partition(".")[2])
            assert float(said) == round(value, decimals), key


def test_figure_is_small_and_drawn_from_records_in_the_tree() -> None:
    assert (ROOT / "docs/figures/accuracy.png").stat().st_size < 60_000
    make = runpy.run_path(str(ROOT / "docs/figures/make.py"))
    panels = make["PANELS"]
    assert {path.removeprefix("runs/") for path in panels.values()} <= set(RECORDS)
    title, run_dir = next(iter(panels.items()))
    drawn = make["accuracy_by_record"]({title: run_dir}).data
    results = summary(run_dir.removeprefix("runs/"))
    for method, points in drawn.groupby("distill_type"):
        assert f"{points['percent'].mean():.1f}" == mean_and_spread(results, method).split()[0]

"""The page about costs shows the tables that its command prints."""

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_pages_tables_are_those_that_the_command_prints(monkeypatch):
    monkeypatch.chdir(ROOT)
    printed = runpy.run_path(str(ROOT / "docs/cost_table.py"))["main"]()
    page = (ROOT / "docs/cost.md").read_text(encoding="utf-8")
    assert all(table in page for table in printed.split("\n\n"))

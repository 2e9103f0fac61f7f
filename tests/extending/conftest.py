"""A small project, whose data has one task."""

from __future__ import annotations

import pytest
from small_project import small_project


@pytest.fixture
def project(tmp_path):
    """A teacher and a student with one tokenizer, prepared data, and 02 as a function."""
    return small_project(tmp_path, train_rows="sst2:24", validation_rows="sst2:6")

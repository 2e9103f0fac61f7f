"""The tasks, a file each: each file of this folder defines one as `TASK`, known here by its name.

`docs/add-a-task.md` says how to add one.
"""

import importlib
import pkgutil
import re
from collections.abc import Iterable

from kd_utils.data.tasks.base import FLEXIBLE, Task

#: The tasks that tables list first; the others follow in the order of their names.
FIRST = ("sst2", "mmlu", "gsm8k")

#: The known tasks by name, in the order in which the project lists them.
TASKS: dict[str, Task] = {}


def register(task: Task) -> None:
    """Make a task known by its name. A task that is defined elsewhere is registered before use.

    Raises:
        ValueError: the name is taken, or could be read as something else in parameters or metrics.
    """
    name = task.name
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", name) or name.endswith(FLEXIBLE):
        raise ValueError(
            f"task name {name!r}: expected letters, digits, '.', '_' and '-', and no {FLEXIBLE!r} "
            "at the end"
        )
    if name in (*TASKS, "all", "macro", "micro"):
        raise ValueError(f"task name {name!r} is taken: give the task another name")
    TASKS[name] = task


def find_task(name: str) -> Task:
    """The task of that name.

    Raises:
        ValueError: no task has this name; the message lists the known ones.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name]


def task_order(names: Iterable[str]) -> list[str]:
    """The distinct names: known tasks in the project's order, then any others by name."""
    given = set(names)
    return [name for name in TASKS if name in given] + sorted(given - TASKS.keys())


_found = {module.name for module in pkgutil.iter_modules(__path__)} - {"base"}
for _name in (*FIRST, *sorted(_found.difference(FIRST))):
    register(importlib.import_module(f"{__name__}.{_name}").TASK)

"""Ray, on this machine or a cluster: one task per trial, which executes 03 through papermill and
yields its epochs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd_utils.cluster.session import (
    RESTARTS,
    _in_words,
    _was_lost,
)
from kd_utils.config import project_paths
from kd_utils.sweep.display import Progress
from kd_utils.sweep.execution import NotebookFailed, execute_trial, keep_failure

WAIT_SECONDS = 0.5  # between two looks at what the trials report: Ctrl-C is answered within it


def run_trials(
    trials: dict[str, dict[str, Any]],
    run_dir: Path,
    progress: Progress,
    *,
    cpus: float,
    gpus: float,
    seen: dict[str, str],
) -> None:
    """Run trials on the Ray that is running, as many side by side as fit; one that fails does not
    stop others.

    A trial whose process or machine is lost starts again elsewhere, `RESTARTS` times at the most.

    Args:
        trials: name -> its entry of `sweep.json`.
        run_dir: where the records go.
        progress: told of every start, epoch, end and failure.
        cpus, gpus: what Ray reserves for a trial, fractions too.
        seen: files that every trial must see as they are here (`execution.unlike_the_sweeps`).

    Raises:
        OSError: Ray itself ended; of trials that were not done nothing is said to have failed.
    """
    import ray

    place = project_paths.short_path(run_dir)  # a node may have its own root

    @ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)
    def run(trial: dict[str, Any]) -> Iterator[dict[str, Any]]:
        # No pickled exception: one line is enough, and it must not need this code's classes where
        # it is read.
        try:
            yield {"started": True}
            for row in execute_trial(
                trial, project_paths.project_path(place), max(1, int(cpus)), seen
            ):
                yield row
        except NotebookFailed as error:
            yield {"failure": error.cause, "kept": error.kept}

    running = {run.options(name=name).remote(trial): name for name, trial in trials.items()}
    restarts = dict.fromkeys(trials, 0)
    while running:
        ready, _ = ray.wait(
            list(running), num_returns=len(running), timeout=WAIT_SECONDS, fetch_local=False
        )
        for stream in ready:
            name, row = running[stream], _next_row(stream)
            if "started" in row:
                progress.started(name)
            elif "ended" in row:
                del running[stream]
                progress.finished(name)
            elif "failure" not in row:
                progress.reported(name, row)
            else:
                del running[stream]
                if row.get("lost") and restarts[name] < RESTARTS:
                    restarts[name] += 1
                    progress.lost(
                        name,
                        f"its process or machine was lost; starting again ({restarts[name]} of "
                        f"{RESTARTS})",
                    )
                    running[run.options(name=name).remote(trials[name])] = name
                    continue
                if not row[
                    "kept"
                ]:  # the process was killed, or its machine does not see the run's folder
                    keep_failure(
                        run_dir / "trials" / f"{name}.ipynb", "03_train_student", row["failure"]
                    )
                progress.broke(name, row["failure"])


def _next_row(stream: Iterator[Any]) -> dict[str, Any]:
    """What a trial says next: "started", an epoch's row, "ended", or why it is a "failure" and
    whether it was lost.
    """
    import ray

    try:
        return ray.get(next(stream))
    except StopIteration:
        return {"ended": True}
    except ray.exceptions.LocalRayletDiedError:
        raise OSError(
            "Ray's process on this machine ended: killed, or out of memory; what is done is kept: "
            "run the "
            "same command again"
        ) from None
    except ray.exceptions.RayError as error:
        return {"failure": _in_words(error), "lost": _was_lost(error), "kept": False}

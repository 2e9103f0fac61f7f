"""Many short trials through Ray: none lost, none doubled, the driver's memory flat, the summary
right.
"""

import os
import subprocess
import sys
import time
from collections import Counter

import pandas as pd
import psutil
import stubs
import yaml
from ray._private.utils import get_num_cpus

EPOCH_SECONDS = "time.sleep(0.3)"


def test_a_sweep_of_many_short_trials(tmp_path, times, tried):
    count = times(12, 280)
    project = stubs.stub_project(tmp_path)
    notebook = project / "notebooks" / "03_train_student.ipynb"
    assert EPOCH_SECONDS in notebook.read_text()
    notebook.write_text(notebook.read_text().replace(EPOCH_SECONDS, "pass"))
    (project / "p.yaml").write_text(yaml.safe_dump({"epochs": 1}))
    (project / "grid.yaml").write_text(
        yaml.safe_dump(
            {
                "distill_type": ["black_box", "hidden_state", "attention", "combined"],
                "seed": list(range(count // 4)),
            }
        )
    )
    environment = {key: value for key, value in os.environ.items() if key != "KD_ROOT"} | {
        "PYTHONPATH": str(project)
    }
    command = [
        sys.executable,
        "-m",
        "kd_utils",
        "sweep",
        "p.yaml",
        "--grid",
        "grid.yaml",
        "--cpus-per-trial",
        str(max(1, get_num_cpus() // 4)),
    ]  # so that there is a time to look at the driver
    with open(project / "log.txt", "w") as log:
        driver = subprocess.Popen(
            command, cwd=project, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        process, memory, executed = (
            psutil.Process(driver.pid),
            [],
            project / "artifacts" / "executed.txt",
        )
        while driver.poll() is None:
            time.sleep(0.5)
            done = len(executed.read_text().splitlines()) if executed.exists() else 0
            if count // 10 <= done < count and process.status() != psutil.STATUS_ZOMBIE:
                memory.append(process.memory_info().rss / 2**20)
    assert driver.returncode == 0, (project / "log.txt").read_text()[-3000:]
    trials = [line.split()[0] for line in executed.read_text().splitlines()]
    assert len(trials) == count and set(Counter(trials).values()) == {1}
    summary = pd.read_csv(project / "runs" / "stub" / "results_summary.csv")
    assert (
        len(summary) == count
        and set(summary["trial"]) == set(trials)
        and (summary["status"] == "done").all()
    )
    assert (summary["validation_accuracy"] == 0.5 + 0.01 * summary["config/seed"]).all()
    print(
        f"driver: {memory[0]:.0f} MB after a tenth of {count}, {max(memory):.0f} at most, "
        f"{memory[-1]:.0f} last"
    )
    assert memory[-1] < memory[0] + 30, memory
    again = stubs.sweep_in(project, *command[3:])
    assert again.returncode == 0 and len(executed.read_text().splitlines()) == count
    checked = stubs.sweep_in(project, "check", "runs/stub")
    assert (checked.returncode, checked.stdout) == (0, f"{count} of {count} trials whole\n")
    tried("trial of a sweep of many, none lost or doubled", count)

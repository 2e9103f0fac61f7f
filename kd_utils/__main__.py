"""`python -m kd_utils`: sweep, bench, evaluate, verify, check. Exit: 0 well, 1 failed, 2 wrong
input, 130 stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

SPEED = "05_measure_speed"
INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        from kd_utils.sweep.execution import NotebookFailed

        if not isinstance(error, NotebookFailed):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = (
            "; what is done is kept: run the same command again to go on"
            if options.run is sweep
            else ""
        )
        print(f"\nstopped{kept}", file=sys.stderr)
        return INTERRUPTED


def sweep(options: argparse.Namespace) -> int:
    from kd_utils.config.parameter_files import load_grid, load_parameters, notebook_config
    from kd_utils.config.stages import TRAIN
    from kd_utils.records import check, run_folder
    from kd_utils.sweep import planning, report
    from kd_utils.sweep.sweep import Sweep

    values, lists = load_parameters(options.parameters), load_grid(options.grid)
    run_dir = options.run_dir or planning.default_run_dir(values, options.grid)
    planned = Sweep(values, lists, run_dir, options.only)
    if options.dry_run:
        print(*report.dry_run(planned), sep="\n")
        return 0

    def executor() -> Any:
        from kd_utils.sweep.ray_executor import ray_executor

        device = notebook_config(TRAIN, values).device
        return ray_executor(
            options.address, options.cpus_per_trial, options.gpus_per_trial, device
        )

    results = planned.run(executor)
    print(*report.outcome(planned, results), sep="\n")
    trials = run_folder.trials_with_status(planned.run_dir)
    for problem in check.differences(planned.run_dir, trials):  # a package since upgraded, say
        print(
            f"warning: {problem}: remove the trials of one kind from trials/ and run again",
            file=sys.stderr,
        )
    chosen = results[results["trial"].isin([trial.trial for trial in planned.chosen])]
    return 0 if (chosen["status"] == "done").all() else 1


def bench(options: argparse.Namespace) -> int:
    from kd_utils.config import project_paths
    from kd_utils.config.parameter_files import load_parameters, notebook_config
    from kd_utils.sweep.execution import execute_stage

    parameters = load_parameters(options.parameters) if options.parameters else {}
    run_dir = project_paths.project_path(notebook_config(SPEED, parameters).run_dir)
    run_dir = Path(options.run_dir or run_dir).expanduser().absolute()
    execute_stage(SPEED, run_dir, parameters | {"run_dir": project_paths.short_path(run_dir)})
    record = json.loads((run_dir / "speed.json").read_text(encoding="utf-8"))
    for key, value in record.items():
        if isinstance(value, float):
            print(f"{key:<32} {value:.4g}")
    print(
        f"Record: {project_paths.short_path(run_dir)}/ (speed.json and {SPEED}.ipynb, with its "
        f"charts)"
    )
    return 0


def evaluate(options: argparse.Namespace) -> int:
    from kd_utils.evaluation.scoring import evaluate_folder

    table = evaluate_folder(
        options.model_dir,
        options.task,
        options.split,
        options.out,
        data_dir=options.data_dir,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        precision=options.precision,
        progress=True,
    )
    print(
        f"{options.task} {options.split}: accuracy {100 * table['correct'].mean():.2f} % of "
        f"{len(table)} rows; "
        f"written to {options.out}"
    )
    return 0


def verify(options: argparse.Namespace) -> int:
    from kd_utils.cache.manifest import CacheError
    from kd_utils.cache.verification import verify as verify_cache

    if not options.cache_dir.is_dir():
        raise FileNotFoundError(f"no cache folder {options.cache_dir}")
    try:
        report = verify_cache(options.cache_dir)
    except CacheError as error:
        print(f"not whole: {error}", file=sys.stderr)
        return 1
    print(report.to_string(index=False, justify="left"))
    return 0


def check(options: argparse.Namespace) -> int:
    from kd_utils.records.check import check_run, count_done

    problems = check_run(options.run_dir)
    for problem in problems:
        print(problem)
    done, planned = count_done(options.run_dir)
    print(f"{done} of {planned} trials whole" + (f"; {len(problems)} problems" if problems else ""))
    return 1 if problems else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kd_utils", description="White-box distillation benchmark."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    add = commands.add_parser(
        "sweep", help="run a parameter file times a grid; only what is missing"
    )
    add.set_defaults(run=sweep)
    add.add_argument(
        "parameters", metavar="PARAMS.yaml", help="what differs from the notebooks' defaults"
    )
    add.add_argument(
        "--grid", metavar="FILE", help="lists of values (default: all methods x 7 seeds)"
    )
    add.add_argument(
        "--only",
        default="",
        metavar="KEY=VALUES,...",
        help="run a part: distill_type=attention,seed=0-2 (several values: seed=0-2+5)",
    )
    add.add_argument(
        "--run-dir",
        metavar="DIR",
        help="where the records go (default: runs/NAME, or runs/NAME-X with --grid grid-X.yaml)",
    )
    add.add_argument("--address", help="a Ray cluster (auto, or HOST:PORT); default: this machine")
    add.add_argument("--cpus-per-trial", type=float, default=1, metavar="N")
    add.add_argument(
        "--gpus-per-trial",
        type=float,
        metavar="N",
        help="fractions too (default: 1 where there is a GPU)",
    )
    add.add_argument(
        "--dry-run", action="store_true", help="show the trials, and which are already done"
    )

    add = commands.add_parser("bench", help="measure the speed: execute notebook 05")
    add.set_defaults(run=bench)
    add.add_argument(
        "parameters",
        metavar="PARAMS.yaml",
        nargs="?",
        help="default: small shapes, for 2 CPU cores",
    )
    add.add_argument("--run-dir", metavar="DIR", help="where the record goes (default: runs/bench)")

    add = commands.add_parser(
        "evaluate", help="score a causal LM folder, with prompts and scoring of the trials"
    )
    add.set_defaults(run=evaluate)
    add.add_argument("model_dir", metavar="MODEL_DIR", type=Path)
    add.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder with the hub's schema (default: the hub)",
    )
    add.add_argument("--task", required=True, choices=["sst2", "mmlu", "gsm8k"])
    add.add_argument("--split", required=True, metavar="S")
    add.add_argument(
        "--limit", type=int, metavar="N", help="the first N rows (MMLU: of each subject)"
    )
    add.add_argument(
        "--num-fewshot", type=int, default=0, metavar="K", help="solved examples before each prompt"
    )
    add.add_argument("--batch-size", type=int, default=8, metavar="N")
    add.add_argument(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="GSM8K's longest answer (as lm-eval)",
    )
    add.add_argument(
        "--precision",
        default="float32",
        choices=["auto", "float32", "bfloat16"],
        help="auto: bfloat16 autocast on a GPU, as trials use",
    )
    add.add_argument("--out", required=True, type=Path, metavar="FILE.parquet")

    add = commands.add_parser("verify", help="look at everything in a teacher cache")
    add.set_defaults(run=verify)
    add.add_argument("cache_dir", metavar="CACHE_DIR", type=Path)

    add = commands.add_parser(
        "check", help="say whether a run's records are whole, or exactly what is wrong"
    )
    add.set_defaults(run=check)
    add.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    return parser


def _interrupt(*signal_and_frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)  # what a batch system sends before it kills
    status = main()
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # too late to stop anything: the status is that of what was done
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if (
        status == INTERRUPTED
    ):  # Ray, interrupted while it starts, can crash the interpreter's own end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)

"""The commands of `python -m kd_utils`.

A command is a function that returns its exit status; its signature gives the arguments, its first
docstring line the help. It imports what it needs itself, so that `--help` answers at once.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer
from typer import Argument, Option

app = typer.Typer(
    help="White-box distillation benchmark: sweeps of trials, and what checks their results.",
    add_completion=False,
)


What = Annotated[
    list[str] | None,
    Argument(metavar="[KIND | NAME]...", help="Kinds such as cache, or names. Default: all."),
]
Artifacts = Annotated[Path, Option(metavar="DIR", help="The folder that 01 to 03 write to.")]


@app.command()
def sweep(
    parameters: Annotated[
        Path,
        Argument(
            metavar="PARAMS.yaml",
            help="Parameter file: values that differ from the notebooks' defaults.",
        ),
    ],
    grid: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            help="Grid file: values of each swept parameter. Default: the methods times 7 seeds.",
        ),
    ] = None,
    only: Annotated[
        str,
        Option(
            metavar="KEY=VALUES,...",
            help="Run a part of the grid: distill_type=attention,seed=0-2 (several: seed=0-2+5).",
        ),
    ] = "",
    run_dir: Annotated[
        Path | None,
        Option(
            metavar="DIR",
            help="Where the records go. Default: runs/NAME; runs/NAME-X with --grid grid-X.yaml.",
        ),
    ] = None,
    executor: Annotated[
        Literal["ray", "local"],
        Option(help="What runs the trials: Ray, or processes of this machine without Ray."),
    ] = "ray",
    address: Annotated[
        str | None,
        Option(metavar="HOST:PORT", help="A Ray cluster, or auto. Default: this machine."),
    ] = None,
    cpus_per_trial: Annotated[
        float, Option(help="CPU cores reserved for each trial; may be a fraction.")
    ] = 1,
    gpus_per_trial: Annotated[
        float | None, Option(help="GPUs for each trial. Default: 1 if a machine has one.")
    ] = None,
    cpus: Annotated[
        int | None,
        Option(min=1, help="CPU cores of this machine in all. Default: those it may use."),
    ] = None,
    data_dir: Annotated[
        Path | None,
        Option(metavar="DIR", help="A folder with the hub's files. Default: PARAMS.yaml's."),
    ] = None,
    dry_run: Annotated[
        bool, Option("--dry-run", help="Show each trial's state and run nothing.")
    ] = False,
    strict: Annotated[
        bool, Option("--strict", help="Refuse a notebook whose defaults are not the project's.")
    ] = False,
) -> int:
    """Run all trials of a parameter file and grid; finished trials are not run again."""
    from kd_utils.cluster import machines
    from kd_utils.config import parameter_files
    from kd_utils.sweep.executor import open_executor
    from kd_utils.sweep.planning import default_run_dir
    from kd_utils.worlds.chain import kind_of_sweep

    values, lists = parameter_files.load_parameters(parameters), parameter_files.load_grid(grid)
    if data_dir is not None:
        values["data_dir"] = str(data_dir)
    if executor == "local" and address is not None:
        raise ValueError(
            "--address names a Ray cluster, which --executor local does not use: leave one out"
        )
    if cpus is not None and address is not None:
        raise ValueError(
            "--cpus limits this machine, and --address names a Ray cluster, which says itself what "
            "it has: leave one out"
        )
    machines.limit_cores(cpus)
    planned = kind_of_sweep(values)(values, lists, run_dir or default_run_dir(values, grid), only)
    changed = parameter_files.changed_defaults(planned.notebooks)
    if strict and changed:
        raise ValueError(
            f"{'; '.join(changed)}: restore notebooks/ (as with `git checkout`), write the values "
            "into a parameter file, or leave out --strict"
        )
    for line in changed:
        print(line, file=sys.stderr)
    if dry_run:
        print(*planned.dry_run(), sep="\n")
        return 0

    asked = (address, cpus_per_trial, gpus_per_trial)
    running = partial(open_executor, executor, planned.parameters, *asked)
    results = planned.run(running)
    print(*planned.outcome(results), sep="\n")
    for problem in planned.warnings():
        print(f"warning: {problem}", file=sys.stderr)
    chosen = results[results["trial"].isin([trial.trial for trial in planned.chosen])]
    return 0 if (chosen["status"] == "done").all() else 1


@app.command()
def bench(
    parameters: Annotated[
        Path | None, Argument(metavar="PARAMS.yaml", help="Default: small shapes, for 2 CPU cores.")
    ] = None,
    run_dir: Annotated[
        Path | None, Option(metavar="DIR", help="Where the record goes. Default: runs/bench.")
    ] = None,
) -> int:
    """Measure the speed: execute notebook 05."""
    from kd_utils.config import parameter_files, project_paths
    from kd_utils.config.stages import SPEED
    from kd_utils.sweep.execution import execute_stage

    values = parameter_files.load_parameters(parameters) if parameters else {}
    for line in parameter_files.changed_defaults([SPEED]):
        print(line, file=sys.stderr)
    default = project_paths.project_path(parameter_files.notebook_config(SPEED, values).run_dir)
    folder = Path(run_dir or default).expanduser().absolute()
    place = project_paths.short_path(folder)
    execute_stage(SPEED, folder, values | {"run_dir": place})
    for key, value in json.loads((folder / "speed.json").read_text(encoding="utf-8")).items():
        if isinstance(value, float):
            print(f"{key:<32} {value:.4g}")
    print(f"Record: {place}/ (speed.json and {SPEED}.ipynb, with its charts)")
    return 0


@app.command()
def evaluate(
    model_dir: Annotated[
        Path, Argument(metavar="MODEL_DIR", help="A folder that save_pretrained wrote.")
    ],
    task: Annotated[str, Option(help="A task of kd_utils/data/tasks, such as sst2.")],
    split: Annotated[
        str, Option(metavar="S", help="A split of the task's dataset, such as validation.")
    ],
    out: Annotated[Path, Option(metavar="FILE.parquet", help="Where the predictions go.")],
    data_dir: Annotated[
        Path | None, Option(metavar="DIR", help="A folder with the hub's files. Default: the hub.")
    ] = None,
    limit: Annotated[int | None, Option(help="First rows only (MMLU: of each subject).")] = None,
    num_fewshot: Annotated[int, Option(help="Few-shot examples before each prompt.")] = 0,
    batch_size: Annotated[int, Option(help="Sequences per forward pass.")] = 8,
    max_new_tokens: Annotated[int, Option(help="Longest answer of GSM8K (as lm-eval).")] = 256,
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Option(help="auto: bfloat16 autocast on a GPU, as trials do."),
    ] = "float32",
) -> int:
    """Score a causal LM, with the prompts and the scoring of the trials."""
    from kd_utils.evaluation.scoring import evaluate_folder

    table = evaluate_folder(
        model_dir,
        task,
        split,
        out,
        data_dir=data_dir,
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        precision=precision,
        progress=True,
    )
    accuracy = 100 * table["correct"].mean()
    print(f"{task} {split}: accuracy {accuracy:.2f} % of {len(table)} rows; written to {out}")
    return 0


@app.command()
def verify(
    cache_dir: Annotated[
        Path, Argument(metavar="CACHE_DIR", help="A folder such as artifacts/cache/NAME-DATE-KEY.")
    ],
) -> int:
    """Check everything in a teacher cache, and print what was checked."""
    from kd_utils.cache import manifest, verification

    if not cache_dir.is_dir():
        raise FileNotFoundError(
            f"no cache folder {cache_dir}: give a folder such as artifacts/cache/NAME-DATE-KEY"
        )
    try:
        report = verification.verify(cache_dir)
    except manifest.CacheError as error:
        print(f"the cache failed verification: {error}", file=sys.stderr)
        return 1
    print(report.to_string(index=False, justify="left"))
    return 0


@app.command()
def check(
    run_dir: Annotated[Path, Argument(metavar="RUN_DIR", help="A folder such as runs/NAME.")],
) -> int:
    """Check the records of a run, and print every problem."""
    from kd_utils.records.check import check_run, count_done

    problems = check_run(run_dir)
    done, planned = count_done(run_dir)
    whole = f"{done} of {planned} trials whole" + f"; {len(problems)} problems" * bool(problems)
    print(*problems, whole, sep="\n")
    return 1 if problems else 0


@app.command()
def findings(
    run_dirs: Annotated[
        list[Path] | None,
        Argument(metavar="[RUN_DIR]...", help="Default: the newest record of each experiment."),
    ] = None,
) -> int:
    """Print what records show, as the README's first table."""
    from kd_utils.analysis.words import findings as table
    from kd_utils.config import project_paths

    print(table.markdown(run_dirs or table.newest(project_paths.ROOT / "runs")))
    return 0


@app.command()
def repeats(
    run_dirs: Annotated[
        list[Path], Argument(metavar="RUN_DIR...", help="Runs of one grid; worlds count each.")
    ],
    out: Annotated[
        Path | None, Option(metavar="FILE.csv", help="Where every run's outcomes go as well.")
    ] = None,
) -> int:
    """Print how often each comparison had each outcome, over several runs or worlds."""
    from kd_utils.worlds import repetition

    table = repetition.outcomes(run_dirs)
    if out is not None:
        table.to_csv(out, index=False, float_format="%.6g")
    print(repetition.repeated(table).to_string(index=False))
    return 0


@app.command("ls")
def list_artifacts(what: What = None, artifacts: Artifacts = Path("artifacts")) -> int:
    """List what is in artifacts/: kind, name, size, last use, and who needs it."""
    from kd_utils.storage import cleaning

    print(*cleaning.table(cleaning.entries(artifacts, Path("runs"), what or ())), sep="\n")
    return 0


@app.command()
def clean(
    what: What = None,
    yes: Annotated[bool, Option("--yes", help="Remove; otherwise only say what.")] = False,
    force: Annotated[bool, Option("--force", help="Remove what is needed too.")] = False,
    artifacts: Artifacts = Path("artifacts"),
) -> int:
    """Remove from artifacts/ what nobody needs; says what, and removes only with --yes."""
    from kd_utils.storage import cleaning

    found = cleaning.entries(artifacts, Path("runs"), what or ())
    status = 0
    for line in cleaning.clean(found, yes=yes, force=force, all_kept=bool(what)):
        print(line)
        status |= line.startswith(cleaning.FAILED)
    return status

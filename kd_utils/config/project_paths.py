"""Where the project's files are: the code, the data and artifacts, and names for runs."""

import os
from pathlib import Path

from kd_utils.store.files import sha256_json

#: The checkout, or on a cluster what Ray unpacked on this node: `kd_utils/`, `notebooks/`.
CODE_ROOT = Path(__file__).resolve().parents[2]

#: Every relative path of a config starts here. On a cluster the code travels by itself, so KD_ROOT
#: names the shared folder that holds `artifacts/` and `runs/`: a node's own KD_ROOT, or else the
#: place where the sweep was started.
ROOT = Path(os.environ.get("KD_ROOT") or os.environ.get("KD_SWEEP_ROOT") or CODE_ROOT)

ROOT = ROOT.expanduser().resolve()


def project_path(path: str | Path) -> Path:
    """A path as the project means it: absolute as given, relative to the project's root
    otherwise.
    """
    return ROOT / Path(path).expanduser()


def short_path(path: str | Path) -> str:
    """The path relative to the project's root where it lies inside it, for text that goes into
    records.
    """
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def run_label(run_dir: str | Path) -> str:
    """A name for a run's checkpoints and students that no other run has: NAME of `runs/NAME`, else
    with a digest.
    """
    place = short_path(project_path(run_dir))
    name = Path(place).name
    return name if Path(place) == Path("runs", name) else f"{name}-{sha256_json(place)[:8]}"

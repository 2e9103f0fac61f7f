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
    """A path as the project means it: relative to the project's root, if it is not absolute."""
    return ROOT / Path(path).expanduser()


def short_path(path: str | Path) -> str:
    """The path as records have it: relative to the project's root where it lies inside it."""
    return str(Path(path).relative_to(ROOT) if Path(path).is_relative_to(ROOT) else path)


def run_label(run_dir: str | Path) -> str:
    """A name that no other run has: NAME of `runs/NAME`, and with a digest for another folder."""
    place = Path(short_path(project_path(run_dir)))
    digest = "" if place.parent == Path("runs") else f"-{sha256_json(str(place))[:8]}"
    return place.name + digest

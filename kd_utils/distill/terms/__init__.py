"""The terms of the loss, one per file. Importing this folder registers each of them."""

from importlib import import_module
from pathlib import Path

for file in sorted(Path(__file__).parent.glob("[!_.]*.py")):
    import_module(f"{__name__}.{file.stem}")

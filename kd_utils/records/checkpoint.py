"""A trial's state after an epoch, so that a trial that was killed goes on from there to the very
same numbers.

Two files: `TRIAL-epochN.safetensors` with weights and AdamW's moments, and `TRIAL.json`, sealed and
written last, with the rest and the other's checksum. Nothing is pickled. Random numbers need no
saving: dropout is seeded by step (`training.seed_step`), the order of the data by epoch
(`training.epoch_batches`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_utils.store.files import sha256_file, written_aside
from kd_utils.store.sealed import plain, read_sealed, write_sealed


class Checkpoint:
    """Where one trial keeps its state, and what the state is of.

    Args:
        path: `FOLDER/TRIAL.json`.
        key: JSON values; a state that was saved under another key is not of this trial and is not
            read.
        modules: name -> module that trains (or is saved along, at its initial weights).
        optimizer: over parameters of these modules.
        every_seconds: least time from one saved state to the next (`save_if_due`).
    """

    def __init__(
        self,
        path: Path,
        key: dict[str, Any],
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        every_seconds: float = 0,
    ) -> None:
        self.every_seconds, self._saved = every_seconds, time.monotonic()
        self.path, self.key, self.modules, self.optimizer = (
            path,
            plain(key, finite=True),
            modules,
            optimizer,
        )

    def save_if_due(self, epoch: int, state: dict[str, Any]) -> None:
        """`save`, if the last state is `every_seconds` old."""
        if time.monotonic() - self._saved >= self.every_seconds:
            self.save(epoch, state)
            self._saved = time.monotonic()

    def save(self, epoch: int, state: dict[str, Any]) -> None:
        """Keep weights, optimizer and `state` (JSON values) as they are after `epoch`; an earlier
        epoch's go away.
        """
        from safetensors.torch import save_file

        weights = self.path.with_name(f"{self.path.stem}-epoch{epoch}.safetensors")
        with written_aside(weights) as aside:
            save_file(self._tensors(), aside)
            checksum = sha256_file(aside)
        write_sealed(
            self.path,
            {
                "key": self.key,
                "epoch": epoch,
                "state": plain(state, finite=True),
                "weights": {"file": weights.name, "sha256": checksum},
            },
            "checksums",
        )
        self._remove_others(weights)

    def load(self) -> dict[str, Any] | None:
        """Put weights and optimizer back; `state` as it was saved, or None: nothing saved, damaged,
        or of other key.
        """
        from safetensors.torch import load_file

        try:
            saved = read_sealed(self.path, "checksums")
            if saved["key"] != self.key:
                return None
            weights = self.path.with_name(saved["weights"]["file"])
            if sha256_file(weights) != saved["weights"]["sha256"]:
                return None
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ):  # not there, damaged, or of another shape
            return None
        tensors = load_file(weights)
        with torch.no_grad():
            for name, tensor in self._weights().items():
                tensor.copy_(tensors[name])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, index, key = name.split(".", 2)
            if kind == "optimizer":
                state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()[
            "param_groups"
        ]  # what they say is the config's, which is in the key
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        return saved["state"]

    def remove(self) -> None:
        """Forget the state: the trial has its record."""
        self.path.unlink(missing_ok=True)
        self._remove_others()

    def _remove_others(self, but: Path | None = None) -> None:
        """Remove other epochs' weights, and what was being written when an execution of this trial
        was killed.
        """
        for pattern in (
            f"{self.path.stem}-epoch*.safetensors",
            f".{self.path.stem}-epoch*.safetensors.partial-*",
            f".{self.path.name}.partial-*",
        ):
            for path in self.path.parent.glob(pattern):
                if path != but:
                    path.unlink(missing_ok=True)

    def _weights(self) -> dict[str, Tensor]:
        """Parameters, each once, however many names a tied one has, and those buffers that a saved
        model has.
        """
        return {
            f"{kind}.{module}.{name}": tensor
            for module, part in self.modules.items()
            for kind, named in (
                ("parameter", part.named_parameters()),
                ("buffer", part.named_buffers()),
            )
            for name, tensor in named
            if name in part.state_dict()
        }

    def _tensors(self) -> dict[str, Tensor]:
        moments = {
            f"optimizer.{index}.{key}": value
            for index, values in self.optimizer.state_dict()["state"].items()
            for key, value in values.items()
        }
        return {
            name: tensor.detach().contiguous()
            for name, tensor in (self._weights() | moments).items()
        }

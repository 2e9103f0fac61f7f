"""A trial's state after a stretch of steps; a killed trial resumes with exactly the same numbers.

`TRIAL-stepN.safetensors` has the weights, AdamW's moments and the averaged weights; `TRIAL.json`,
sealed and written last, has the rest. Nothing is pickled. Random numbers need no saving: dropout is
seeded by step (`training.seed_step`), the order of the data by epoch (`batches.epoch_batches`).
"""

import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kd_utils.store.files import sha256_file, written_aside
from kd_utils.store.sealed import SealedFolder, plain


class Checkpoint:
    """Where one trial keeps its state.

    Args:
        path: `FOLDER/TRIAL.json`.
        key: JSON values that say what the state was made from; a state with another key is not
            read, since the trial would not end in the same numbers.
        modules: name -> module that is trained (or saved with them, at its initial weights).
        optimizer: over parameters of these modules; schedule: of its learning rate.
        average: of the weights (`distill.schedules.Average`).
        every_seconds: least time from one saved state to the next (`save_if_due`).
    """

    def __init__(
        self,
        path: Path,
        key: dict[str, Any],
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        average: Any,
        every_seconds: float = 0,
    ) -> None:
        self.every_seconds, self._saved = every_seconds, time.monotonic()
        self.path, self.key = path, plain(key)
        self.modules, self.optimizer = modules, optimizer
        self.schedule, self.average = schedule, average
        self._sealed = SealedFolder(path.parent, path.name)

    def save_if_due(self, step: int, state: dict[str, Any]) -> None:
        """Keep all weights, optimizer and `state` (JSON values) after `step`, and no earlier ones.

        Nothing is done if the last state is not yet `every_seconds` old.
        """
        if time.monotonic() - self._saved < self.every_seconds:
            return
        moments = {
            f"optimizer.{index}.{key}": value
            for index, values in self.optimizer.state_dict()["state"].items()
            for key, value in values.items()
        }
        averaged = {f"average.{at}": value for at, value in enumerate(self.average.values)}
        tensors = self._weights() | moments | averaged
        weights = self.path.with_name(f"{self.path.stem}-step{step}.safetensors")
        with written_aside(weights) as aside:
            save_file({key: value.detach().contiguous() for key, value in tensors.items()}, aside)
            checksum = sha256_file(aside)
        document = {
            "key": self.key,
            "step": step,
            "state": state,
            "schedule": self.schedule.state_dict(),
            "weights": weights.name,
        }
        self._sealed.seal(document, {weights.name: checksum})
        self._remove_weights(but=weights)
        self._saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """Restore weights and optimizer; returns `state`, or None if there is none for this key.

        A damaged state counts as none.
        """
        try:
            saved = self._sealed.read()
            if saved["key"] != self.key:
                return None
            state, schedule = saved["state"], saved["schedule"]
            weights = self._sealed.file(saved["weights"], saved)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        tensors = load_file(weights)
        with torch.no_grad():
            for name, tensor in self._weights().items():
                tensor.copy_(tensors[name])
        moments: dict[int, dict[str, Tensor]] = {}
        averaged: dict[int, Tensor] = {}
        for name, tensor in tensors.items():
            kind, index, *key = name.split(".", 2)
            if kind == "optimizer":
                moments.setdefault(int(index), {})[key[0]] = tensor
            elif kind == "average":
                averaged[int(index)] = tensor
        # As they were first made: where a tensor lies can change the last bits of a product.
        self.average.values = [
            torch.empty_like(parameter).copy_(averaged[at])
            for at, parameter in enumerate(self.average.parameters[: len(averaged)])
        ]
        # The parameter groups have the config's values, which are in the key, but for the rate.
        groups = self.optimizer.state_dict()["param_groups"]
        self.schedule.load_state_dict(schedule)
        for group, rate in zip(groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        # An interrupted step may have left some.
        self.optimizer.zero_grad(set_to_none=True)
        return state

    def remove(self) -> None:
        """Delete the state, when the trial has its record."""
        self.path.unlink(missing_ok=True)
        self._remove_weights()

    def _remove_weights(self, but: Path | None = None) -> None:
        """Delete other steps' weights, and what a killed execution of this trial was writing."""
        for pattern in (
            f"{self.path.stem}-step*.safetensors",
            f".{self.path.stem}-step*.safetensors.partial-*",
            f".{self.path.name}.partial-*",
        ):
            for path in self.path.parent.glob(pattern):
                if path != but:
                    path.unlink(missing_ok=True)

    def _weights(self) -> dict[str, Tensor]:
        """Parameters (a tied one once) and the buffers that a saved model has."""
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

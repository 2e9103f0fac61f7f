"""What might be faster than the code that is used: compiled layers, Liger's KL, larger batches."""

from collections.abc import Callable
from functools import partial

import pandas as pd
import torch

from kd_utils.cache import writer
from kd_utils.distill import logit_losses
from kd_utils.models import devices, output_head, signals
from kd_utils.speed import meters
from kd_utils.speed.step import METHODS, StepBench
from kd_utils.tokens.encoding import Example


def tried(measure: Callable[[], pd.DataFrame]) -> pd.DataFrame | str:
    """What `measure` gives, or in one line why there is nothing: that too is a finding."""
    try:
        return measure()
    except ImportError as error:
        return f"not installed: {error}"
    except Exception as error:
        words = " ".join(str(error).split())
        return f"failed: {type(error).__name__}: {words[:300]}"


def compiled(bench: StepBench, repeats: int, backend: str) -> pd.DataFrame:
    """Train with all signals, the student's layers compiled for any shape and not compiled.

    The bench has a new student afterwards, which is not compiled.

    Args:
        backend: of `torch.compile`.

    Returns:
        Seconds of an epoch, a row per repeat: `eager` and `compiled`; `first`, those of the first
        compiled epoch, in which torch compiles.
    """
    train = partial(bench.epoch, METHODS["combined"])

    def eager() -> None:
        with torch.compiler.set_stance("force_eager"):
            train()

    try:
        for layer in signals.decoder_layers(bench.student):
            layer.compile(dynamic=True, backend=backend)
        laps = meters.Laps(bench.device)
        train()
        laps.lap("first")
        sides: dict[str, Callable[[], object]] = {"eager": eager, "compiled": train}
        return meters.alternate(sides, repeats, device=bench.device).assign(**laps.seconds)
    finally:
        bench.restart()
        torch.compiler.reset()


def kl_losses(bench: StepBench, tokens: int, repeats: int) -> pd.DataFrame:
    """Value and gradient of L_KD from random hidden states: `kd_loss`, and Liger Kernel's.

    Liger's is `LigerFusedLinearJSDLoss` with beta 0, which is KL(teacher || student) without T^2.
    On a GPU it is compiled, as is its default.

    Returns:
        Seconds of ten times, a row per repeat: `kd_loss`, `Liger`.

    Raises:
        ImportError: Liger Kernel is not installed, or it lacks Triton.
        AssertionError: the two values differ by more than rounding explains.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    device, T, head = bench.device, bench.config.temperature, bench.teacher_terms["kd"].head
    random = partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(0))
    hidden = random(tokens, bench.shape["student"]["hidden_size"]).requires_grad_()
    teacher_hidden = random(tokens, bench.shape["teacher"]["hidden_size"])
    weight = output_head.output_head(bench.student).weight
    labels = torch.zeros(tokens, dtype=torch.long, device=device)  # none is ignored
    liger = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=0.0,
        temperature=T,
        compiled=device.type == "cuda",
    )

    def values(loss: Callable[[], torch.Tensor], times: int) -> float:
        for _ in range(times):
            with devices.autocast(device, bench.config.precision):
                value = loss()
            torch.autograd.grad(value, (hidden, weight))
        return value.item()

    losses = {
        "kd_loss": lambda: logit_losses.kd_loss(hidden, weight, teacher_hidden, head, T),
        "Liger": lambda: T**2 * liger(hidden, weight, teacher_hidden, head.weight, labels),
    }
    both = [torch.tensor(values(loss, 1)) for loss in losses.values()]
    torch.testing.assert_close(*both, atol=1e-4, rtol=1e-2)
    sides = {name: partial(values, loss, 10) for name, loss in losses.items()}
    return meters.alternate(sides, repeats, device=device)


def budget_plan(rows: list[Example], batch_tokens: int) -> list[list[int]]:
    """Rows of similar lengths in batches of at most `batch_tokens` with padding, as indices.

    Paired trials cannot use it: the plan's batches of 8 are the same for all methods.
    """
    place = {row.example_id: i for i, row in enumerate(rows)}
    by_length = sorted(rows, key=lambda row: len(row.tokens))
    return [
        [place[row.example_id] for row in batch]
        for batch in writer.token_batches(by_length, batch_tokens)
    ]

"""The teacher on several GPUs or machines: Ray Data hands shards to a pool of workers, each with a
teacher of its own.

A worker writes its shards into the folder that all machines see, by the very code that a single
process uses; what travels back is a line of text. So nothing in a cache depends on how many workers
made it.
"""

from __future__ import annotations

import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kd_utils.cache.shards import WRITERS, Shard, SignalsOf, write_shards
from kd_utils.cluster.session import ray_running
from kd_utils.config.stages import CacheConfig
from kd_utils.models.devices import amp_dtype, choose_device
from kd_utils.models.loading import load_causal_lm
from kd_utils.teacher.extraction import signal_function
from kd_utils.tokens.encoding import Example

if TYPE_CHECKING:
    import pyarrow as pa

# of a worker, and of a shard; Ray's default is no limit, and a shard that kills would go round for
# ever
RESTARTS = 3


def shard_writer(
    config: CacheConfig,
    folder: Path,
    model: nn.Module,
    teacher: str,
    how: dict[str, Any],
    progress: Callable[[Iterable], Iterable] = iter,
) -> Callable[[list[Shard]], None]:
    """How `cache_writer.assemble_cache` gets its shards: from `model` here, or from a pool
    (`config.workers`).

    The pool is on the Ray cluster that the environment variable RAY_ADDRESS names, else on this
    machine.

    Args:
        config: parameters of 02.
        folder: the cache's; every machine of the cluster sees it at this path.
        model: the teacher, in eval mode, on its device.
        teacher: the name that `prepare_teacher` gave; workers load the teacher from there.
        how: what `signal_function` is told besides the model.
        progress: wraps the list of shards, e.g. `tqdm`.
    """
    device = choose_device(config.device)

    def write(shards: list[Shard]) -> None:
        workers = min(pool_size(config.workers, device), len(shards))
        if workers == 1:
            return write_shards(
                folder,
                shards,
                signal_function(model, **how),
                batch_tokens=config.batch_tokens,
                progress=progress,
            )
        load = partial(
            load_signal_function,
            teacher,
            config.teacher_revision,
            device.type,
            amp_dtype(device, config.precision),
            how,
        )
        place = next(model.parameters()).device
        # Each worker gets a whole GPU. This process's copy makes room, and comes back to verify the
        # cache with.
        model.to("cpu")
        torch.cuda.empty_cache()
        try:
            write_shards_in_pool(
                folder,
                shards,
                load,
                workers=workers,
                on_gpu=device.type == "cuda",
                batch_tokens=config.batch_tokens,
                progress=progress,
            )
        finally:
            model.to(place)

    return write


def pool_size(workers: int, device: torch.device) -> int:
    """How many workers run the teacher; 1: none, this process does.

    Args:
        workers: as many as asked for; 0: one for each GPU of the Ray cluster or, without one, of
            this machine.
        device: what this process runs the teacher on; "cpu", or one GPU by its number, asks for no
            others.
    """
    if workers or device.type != "cuda" or device.index is not None:
        return workers or 1
    if not (address := os.environ.get("RAY_ADDRESS")) or address == "local":
        return torch.cuda.device_count()
    with _muted(), ray_running(address):
        return max(1, _available("GPU"))


def _available(resource: str) -> int:
    """For how many workers the machines have one each."""
    import ray

    return sum(int(node["Resources"].get(resource, 0)) for node in ray.nodes() if node["Alive"])


def load_signal_function(
    teacher: str, revision: str, device: str, dtype: torch.dtype, how: dict[str, Any]
) -> SignalsOf:
    """The teacher loaded from a folder or the hub, as a function from batches to signals
    (`signal_function`).
    """
    return signal_function(load_causal_lm(teacher, revision, dtype).to(device).eval(), **how)


def write_shards_in_pool(
    folder: Path,
    shards: list[Shard],
    load: Callable[[], SignalsOf],
    *,
    workers: int,
    on_gpu: bool,
    batch_tokens: int,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """As `cache_writer.write_shards`, by `workers` processes; what one was writing when it died is
    written again.

    Args:
        load: called once in each worker; can be pickled.
        on_gpu: each worker has a GPU of its own; else a CPU core.

    Raises:
        ValueError: more workers than the machines have GPUs or cores, or no Ray cluster answers.
        RuntimeError: the first thing that went wrong in a worker, in one line; shards that are
            whole stay.
    """
    with _muted(), ray_running(os.environ.get("RAY_ADDRESS")):
        resource = "GPU" if on_gpu else "CPU"
        if workers > _available(resource):
            raise ValueError(
                f"{workers} workers need a {resource} each, and Ray has {_available(resource)}: "
                f"set "
                "workers to that, or to 1 for no Ray at all"
            )
        failures = list(
            filter(None, _run_pool(folder, shards, load, workers, on_gpu, batch_tokens, progress))
        )
    if failures:
        raise RuntimeError(
            f"{failures[0]} (shards that are whole are kept: run 02 again, it goes on)"
        )


def _run_pool(
    folder: Path,
    shards: list[Shard],
    load: Callable[[], SignalsOf],
    workers: int,
    on_gpu: bool,
    batch_tokens: int,
    progress: Callable[[Iterable], Iterable],
) -> list[str]:
    """What went wrong with each shard, mostly nothing: ""."""
    import ray.data
    from ray.exceptions import OutOfMemoryError, RayActorError

    ray.data.DataContext.get_current().enable_progress_bars = False
    # Two shards at a time in each worker, since packing and compressing one takes about as long as
    # computing the next.
    pool = ray.data.ActorPoolStrategy(
        size=workers,
        max_concurrent_calls_per_actor=WRITERS,
        max_tasks_in_flight_per_actor=WRITERS,
        enable_true_multi_threading=True,
    )
    # `max_restarts` and its like are to go in Ray 2.64, with nothing named in their place yet.
    needs = {"num_gpus": 1} if on_gpu else {"num_cpus": 1}
    rows = [{"shard": pickle.dumps(shard)} for shard in shards]
    written = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        ShardWorker,
        fn_constructor_args=(folder, load, batch_tokens),
        batch_size=1,
        batch_format="pyarrow",
        compute=pool,
        max_restarts=RESTARTS,
        max_task_retries=RESTARTS,
        **needs,
    )
    try:
        with closing(iter(written.iter_rows())) as results:
            return [row["failure"] for _, row in zip(progress(shards), results, strict=True)]
    except (RayActorError, OutOfMemoryError) as error:
        if getattr(
            error, "actor_init_failed", False
        ):  # `load` cannot even be unpickled there: no such module
            return [f"a worker did not start: {str(error).splitlines()[-1]}"]
        return [
            f"workers died more than {RESTARTS} times, killed or out of memory "
            f"({type(error).__name__})"
        ]


@contextmanager
def _muted() -> Iterator[None]:
    """Nothing to stdout and stderr: no option keeps Ray from telling of a dead worker, with the
    machine's address.

    A progress bar that was given its stream before, as 02's is, goes on.
    """
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        stderr = os.dup(2)  # Ray's C++ writes there
        os.dup2(nowhere.fileno(), 2)
        try:
            with warnings.catch_warnings(action="ignore"):
                yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


class ShardWorker:
    """An actor of the pool: loads the teacher once, then writes one shard a call.

    An error is handed back as text: raised, it would have Ray stop the other workers in the middle
    of their shards. After an error this worker writes nothing more, so that what is left passes by
    and the pool comes to its end.
    """

    def __init__(self, folder: Path, load: Callable[[], SignalsOf], batch_tokens: int) -> None:
        self.folder, self.batch_tokens, self.failure = folder, batch_tokens, ""
        self.teacher_is_free = Lock()  # of a model, one thread at a time
        torch.set_num_threads(1)  # the core that Ray reserves; OMP_NUM_THREADS may say more
        try:
            self.signals_of = load()
        except Exception as error:
            self.failure = _line(error)

    def __call__(self, batch: pa.Table) -> dict[str, list[str]]:
        shard = pickle.loads(batch["shard"][0].as_py())
        if not self.failure:
            try:
                write_shards(self.folder, [shard], self._signals, batch_tokens=self.batch_tokens)
            except Exception as error:
                self.failure = f"{shard.file}: {_line(error)}"
        return {"failure": [self.failure]}

    def _signals(self, batch: list[Example]) -> Iterable[Example]:
        with self.teacher_is_free:
            return self.signals_of(batch)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"

"""The teacher on several GPUs or machines: a pool of Ray actors, each with a teacher of its own.

A worker writes its shards into the folder that all machines see, with the same code as a single
process; only a line of text travels back. So a cache does not depend on how many workers made it.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from kd_utils.cache.writer import WRITERS, Shard, write_shards
from kd_utils.cluster.session import ray_running
from kd_utils.config.stages import CacheConfig
from kd_utils.models import devices, loading
from kd_utils.models.importance.sums import UnitSums
from kd_utils.teacher.extraction import TeacherSignals, signal_function
from kd_utils.tokens.encoding import Example

RESTARTS = 3  # of a worker that dies, and of the shard that it was writing


def shard_writer(
    config: CacheConfig,
    folder: Path,
    model: torch.nn.Module,
    teacher: str,
    how: dict[str, Any],
    progress: Callable[[Iterable], Iterable] = iter,
) -> Callable[[list[Shard]], None]:
    """The function that writes shards for `assemble_cache`: with `model` here, or with a pool of
    `config.workers` on the Ray cluster that the environment variable RAY_ADDRESS names, else on
    this machine; "none" stands for no Ray.

    Args:
        folder: the cache's; every machine of the cluster sees it at this path.
        model: the teacher, in eval mode, on its device.
        teacher: the name that `prepare_teacher` returned; workers load the teacher from there.
        how: arguments of `signal_function`.
        progress: wraps the list of shards, e.g. `tqdm`.
    """
    device = devices.choose_device(config.device)
    options: dict[str, Any] = {"batch_tokens": config.batch_tokens, "progress": progress}

    def write(shards: list[Shard]) -> None:
        workers = min(pool_size(config.workers, device), len(shards))
        if workers == 1:
            run = signal_function(model, **how)
            return write_shards(folder, shards, run, new_sums=run.new_sums, **options)
        dtype, place = devices.amp_dtype(device, config.precision), next(model.parameters()).device
        load = partial(
            load_signal_function, teacher, config.teacher_revision, device.type, dtype, how
        )
        # Each worker gets a whole GPU: this copy makes room, and returns to verify the cache.
        model.to("cpu")
        torch.cuda.empty_cache()
        try:
            write_shards_in_pool(
                folder, shards, load, workers=workers, on_gpu=device.type == "cuda", **options
            )
        finally:
            model.to(place)

    return write


def pool_size(workers: int, device: torch.device) -> int:
    """How many workers run the teacher; 1 means that this process does, without a pool.

    Args:
        workers: asked for; 0: one for each GPU of the Ray cluster or, without one, of this machine;
            one where RAY_ADDRESS is "none".
        device: where this process runs the teacher; "cpu", or one GPU by its number, means no pool.
    """
    if workers or device.type != "cuda" or device.index is not None:
        return workers or 1
    if (address := os.environ.get("RAY_ADDRESS", "local")) == "local":
        return torch.cuda.device_count()
    if address == "none":  # a sweep without Ray
        return 1
    with _muted(), ray_running(address):
        return max(1, _available("GPU"))


def _available(resource: str) -> int:
    """For how many workers the machines have one GPU or CPU each."""
    import ray

    return sum(int(node["Resources"].get(resource, 0)) for node in ray.nodes() if node["Alive"])


def load_signal_function(
    teacher: str, revision: str, device: str, dtype: torch.dtype, how: dict[str, Any]
) -> TeacherSignals:
    """Load the teacher from a folder or the hub, as a function from batches to signals."""
    return signal_function(
        loading.load_causal_lm(teacher, revision, dtype).to(device).eval(), **how
    )


def write_shards_in_pool(
    folder: Path,
    shards: list[Shard],
    load: Callable[[], TeacherSignals],
    *,
    workers: int,
    on_gpu: bool,
    batch_tokens: int,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Like `write_shards`, in several processes. What one was writing when it died is done again.

    Args:
        load: called once in each worker; can be pickled.
        on_gpu: each worker has a GPU of its own; otherwise a CPU core.

    Raises:
        ValueError: more workers than the machines have GPUs or cores, or no Ray cluster answers.
        RuntimeError: the first thing that went wrong in a worker, in one line; shards that are
            whole stay.
    """
    with _muted(), ray_running(os.environ.get("RAY_ADDRESS")):
        import ray
        from ray.util import ActorPool

        resource = "GPU" if on_gpu else "CPU"
        if workers > (available := _available(resource)):
            raise ValueError(
                f"{workers} workers need one {resource} each, but Ray has {available}: set workers "
                f"to {available}, or to 1 to run without Ray"
            )
        worker = ray.remote(
            num_gpus=int(on_gpu),
            num_cpus=int(not on_gpu),
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            # Packing and compressing a shard takes about as long as computing the next one.
            max_concurrency=WRITERS,
        )(ShardWorker)
        actors = [worker.remote(folder, load, batch_tokens) for _ in range(workers)]
        results = ActorPool(actors * WRITERS).map_unordered(
            lambda actor, shard: actor.write.remote(shard), shards
        )
        try:
            failures = [failure for _, failure in zip(progress(shards), results, strict=True)]
        except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
            failures = [
                f"a worker was killed or ran out of memory more than {RESTARTS} times: lower "
                "batch_tokens"
            ]
            if getattr(error, "actor_init_failed", False):  # it has no module that `load` needs
                failures = [f"a worker did not start: {str(error).splitlines()[-1]}"]
        finally:
            for actor in actors:
                ray.kill(actor)
    if failure := next(filter(None, failures), ""):
        raise RuntimeError(f"{failure} (complete shards are kept: run 02 again to resume)")


@contextmanager
def _muted() -> Iterator[None]:
    """Discard stdout and stderr: Ray reports a dead worker with its machine's address, and no
    option prevents it. A progress bar that has its stream already, as in 02, is not affected.
    """
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        stderr = os.dup(2)  # which Ray's C++ side writes to
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


class ShardWorker:
    """An actor of the pool: loads the teacher once, then writes shards.

    It returns an error as text instead of raising it, so that the other workers finish the shards
    that they are writing. After an error it writes nothing more, and the rest of the shards pass.
    """

    def __init__(self, folder: Path, load: Callable[[], TeacherSignals], batch_tokens: int) -> None:
        self.folder, self.load, self.batch_tokens = folder, cache(load), batch_tokens
        self.failure = ""
        self.teacher_is_free = Lock()  # one thread at a time uses a model
        torch.set_num_threads(1)  # the core that Ray reserves; OMP_NUM_THREADS may say more

    def write(self, shard: Shard) -> str:
        """Write one shard; return what went wrong in this worker so far, or ""."""
        if not self.failure:
            try:
                options: Any = {"batch_tokens": self.batch_tokens, "new_sums": self._new_sums}
                write_shards(self.folder, [shard], self._signals, **options)
            except Exception as error:
                self.failure = (
                    f"{shard.file}: {type(error).__name__}: {' '.join(str(error).split())}"
                )
        return self.failure

    def _signals(self, batch: list[Example], sums: UnitSums | None = None) -> Iterable[Example]:
        with self.teacher_is_free:
            return self.load()(batch, sums)

    def _new_sums(self) -> UnitSums | None:
        with self.teacher_is_free:
            return self.load().new_sums()

"""The Ray engine: actors of Ray Data, each with one warm model, that scan shards wherever there is
room in a cluster.

Every actor runs the function that the local engine runs, and commits what it has scanned itself;
one row per shard comes back, which is the shard's entry in the manifest. A shard whose actor or
node dies is scanned again. Should two actors scan one shard (of a node that was thought dead), each
commits it whole, and as the same model judges the same batches the later one replaces the earlier
one with the same records.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import socket
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import latentguard
from latentguard import errors
from latentguard.errors import MissingExtraError, ModelError, UsageError
from latentguard.files import ArrayRecord
from latentguard.files.addresses import is_address, shown
from latentguard.scan.entry import Entry
from latentguard.scan.judges import Judges
from latentguard.scan.judging import Judging
from latentguard.scan.local import ATTEMPTS, check_errors
from latentguard.scan.options import RunOptions
from latentguard.scan.record import ScanRecord
from latentguard.scan.run import RUN, Run, fail_unit, scan_unit
from latentguard.scan.shard import Shard
from latentguard.scan.store import Store, open_store
from latentguard.scan.unit import entry_name
from latentguard.text import first_line

if TYPE_CHECKING:
    import numpy as np
    import ray.data

AT_ONCE = 2
"""Shards that an actor has in hand: it reads one while it scores another."""

MAX_BLOCKS = 10_000
"""Tasks of a run; beyond that, each has several shards."""

_PATIENCE = 20.0

Noted = Callable[[Entry], None]
"""Called with the entry of each shard that is done."""


def _nobody(entry: Entry) -> None:
    """Does nothing."""


@dataclass(frozen=True)
class Pool:
    """How many actors there are, and what each one needs.

    actors: the fewest and the most; None is what the cluster has room for. cpus, gpus: of one
    actor, which may be fractions; gpus None is one GPU where the cluster has any.

    Raises UsageError for invalid values.
    """

    actors: tuple[int, int] | None = None
    cpus: float = 1.0
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.actors is not None and not 1 <= self.actors[0] <= self.actors[1]:
            raise UsageError(f"actors must be MIN:MAX with 1 <= MIN <= MAX, got {self.actors}")
        for name, value in (("cpus", self.cpus), ("gpus", self.gpus)):
            if value is not None and not 0 <= value < math.inf:
                raise UsageError(f"{name} per actor must be 0 or more, got {value}")
        if self.gpus is not None and self.gpus > 1 and self.gpus % 1:
            raise UsageError(f"gpus per actor must be whole above 1, got {self.gpus}")
        if self.cpus == 0 and not self.gpus:
            raise UsageError("an actor must need some CPU or GPU")


def run_ray(
    run: Run,
    judging: Judging,
    pool: Pool | None = None,
    *,
    max_errors: int | None = None,
    noted: Noted = _nobody,
) -> None:
    """Scan what is left of a run's task, on a Ray cluster, and close it.

    The cluster is the one of this process, of `RAY_ADDRESS`, or one that runs on this machine;
    where there is none, one is started here and stopped again. Its nodes must have latentguard, and
    see the same files and the run's place under the same names.

    Args:
        max_errors: as in `run_local`.
        noted: called with the entry of each shard, as they are done.

    Raises:
        MissingExtraError: Ray is not installed.
        TooManyErrorsError, OSError: as `run_local`, also for what happens on a node.
        UsageError: there is no cluster at the address, it has no room for an actor, its nodes lack
            files or have another model than this one, or actors die whatever they scan.
    """
    need_ray()
    with run.at_work(judging):
        check_errors(run, max_errors)
        if run.pending():
            driver = _Driver(run, judging, pool or Pool(), max_errors, noted)
            with _cluster():
                while run.pending():
                    _scan(run, judging, driver)


def _scan(run: Run, judging: Judging, driver: _Driver) -> None:
    """Scan what is left, and give up what kills actors."""
    pending = run.pending()
    driver.scan(pending, AT_ONCE)
    # Which of the shards that an actor had in hand has killed it is known once each is alone.
    lost = [shard for shard in pending if shard.number not in run.done]
    if lost:
        driver.scan(lost, 1)
    left = [shard for shard in lost if shard.number not in run.done]
    if len(left) > ATTEMPTS and len(left) == len(lost):
        raise UsageError(
            f"{len(left):,} shards were not scanned, because every actor that tried died: see the "
            "logs of Ray for the reason (usually memory); --resume continues"
        )
    for shard in left:
        reason = f"{ATTEMPTS} processes that scanned only this shard died"
        driver.note(fail_unit(run.store, shard, run.options, judging, reason))


def need_ray() -> None:
    """Raises MissingExtraError where Ray Data is not installed."""
    try:
        import ray.data  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"the Ray engine needs {error.name}, which is not installed: "
            "pip install 'latentguard[ray]'"
        ) from error


# -- the cluster -----------------------------------------------------------------------------


@contextmanager
def _cluster() -> Iterator[None]:
    """The cluster of this process while the block runs. Raises UsageError where none answers."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    said = os.environ.get("RAY_ADDRESS")
    _check_address(said or "")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        if said == "local":
            raise ConnectionError
        ray.init(address=said or "auto", **quiet)
    except ConnectionError as error:
        if said not in (None, "", "local"):
            raise _no_cluster(said) from error
        # Rows are all that its object store holds.
        ray.init(
            address="local",
            include_dashboard=False,
            object_store_memory=128 << 20,
            _node_ip_address="127.0.0.1",
            **quiet,
        )
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(said: str) -> None:
    """Raises UsageError for a port where nobody listens: Ray itself would wait for ever."""
    found = re.fullmatch(r"\[?([^/]+?)\]?:(\d{1,5})", said)
    if found is None:
        return
    try:
        socket.create_connection((found[1], int(found[2])), timeout=_PATIENCE).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(said) from error


def _no_cluster(said: str) -> UsageError:
    return UsageError(f"no Ray cluster answers at RAY_ADDRESS={said}")


@dataclass(frozen=True)
class _Sizes:
    """A pool as this cluster can have it."""

    least: int
    most: int
    first: int
    gpus: float


def _sizes(pool: Pool, device: str | None, shards: int) -> _Sizes:
    """Raises UsageError where there is no room for an actor, and nobody said that there will be."""
    import ray

    has = ray.cluster_resources()  # type: ignore[no-untyped-call]
    gpus = pool.gpus
    if gpus is None:
        gpus = 1.0 if has.get("GPU", 0) >= 1 and device != "cpu" else 0.0
    room = [has.get(name, 0) // need for name, need in (("CPU", pool.cpus), ("GPU", gpus)) if need]
    fit = int(min(room))
    if pool.actors is None and fit == 0:
        raise UsageError(
            f"the Ray cluster has {has.get('CPU', 0):g} CPUs and {has.get('GPU', 0):g} GPUs, too "
            f"few for an actor with {pool.cpus:g} and {gpus:g}: ask for less, or, if the cluster "
            "grows, give the number of actors (--actors MIN:MAX)"
        )
    least, most = pool.actors or (1, fit)
    most = min(most, shards)
    least = min(least, most)
    return _Sizes(least, most, max(least, min(most, fit)), gpus)


# -- the driver ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Job:
    """What every actor must know. Ray wants what it can hash, and so it is equal to itself alone.

    folder: where relative paths begin; None where all are whole.
    """

    place: str
    options: RunOptions
    folder: str | None
    version: str
    previews: bool | Literal["late"]


class _Driver:
    def __init__(
        self, run: Run, judging: Judging, pool: Pool, max_errors: int | None, noted: Noted
    ) -> None:
        self._run, self._pool, self._noted = run, pool, noted
        self._max_errors = max_errors
        self._models: dict[str, tuple[str, str]] = {}
        for entry in run.done.values():
            self._check_models(entry)
        self._job = _Job(
            place=run.place,
            options=run.options,
            folder=_folder(run),
            version=latentguard.__version__,
            previews=judging.previews,
        )

    def scan(self, shards: Sequence[Shard], at_once: int) -> None:
        """Scan shards, `at_once` of them in each actor; those whose actors died too often are not
        done behind it."""
        for row in _rows(self._dataset(shards, at_once)):
            if row["failure"]:
                raise _received(row["failure"])
            self.note(Entry.from_json(row["entry"]))

    def note(self, entry: Entry) -> None:
        """A shard is done. What a lost node had sent already may come again."""
        if entry.number in self._run.done:
            return
        self._check_models(entry)
        self._run.note(entry)
        self._noted(entry)
        check_errors(self._run, self._max_errors)

    def _dataset(self, shards: Sequence[Shard], at_once: int) -> ray.data.Dataset:
        from ray.data import ActorPoolStrategy, DataContext, from_items

        sizes = _sizes(self._pool, self._job.options.device, len(shards))
        job = self._job
        if not sizes.gpus and job.options.device is None:
            job = replace(job, options=replace(job.options, device="cpu"))
        context = DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.max_errored_blocks = -1
        context.target_max_block_size = 1 << 20
        # An actor with all that it may have in hand is busy: time for another one.
        context.autoscaling_config.actor_pool_util_upscaling_threshold = 1.0
        with DataContext.current(context), warnings.catch_warnings():
            # ray_remote_args_fn goes in Ray 2.64, and until then nothing else bounds retries.
            warnings.simplefilter("ignore")
            rows = [{"shard": shard.to_json()} for shard in shards]
            return from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map_batches(
                _Scanner,
                fn_constructor_args=(job,),
                batch_size=1,
                batch_format="numpy",
                compute=ActorPoolStrategy(
                    min_size=sizes.least,
                    max_size=sizes.most,
                    initial_size=sizes.first,
                    max_tasks_in_flight_per_actor=at_once,
                    max_concurrent_calls_per_actor=at_once,
                    enable_true_multi_threading=True,
                ),
                num_cpus=self._pool.cpus,
                num_gpus=sizes.gpus,
                ray_remote_args_fn=_restarts,
            )

    def _check_models(self, entry: Entry) -> None:
        """Raises UsageError where nodes have different models of one space."""
        for space, model in entry.models.items():
            known = self._models.setdefault(space, model)
            if known != model:
                raise UsageError(
                    f"{space} latents are judged by {known[0]} ({known[1][:12]}) on one node and "
                    f"by {model[0]} ({model[1][:12]}) on another: name the model (--model)"
                )


def _restarts() -> dict[str, Any]:
    """An actor comes back as often as it must; a shard is tried `ATTEMPTS` times."""
    return {"max_restarts": -1, "max_task_retries": ATTEMPTS - 1}


def _rows(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    """The rows of a dataset as they come."""
    for batch in dataset.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(names, values, strict=True))


def _folder(run: Run) -> str | None:
    names: Iterable[str] = (name for shard in run.shards for name in shard.files)
    given = [run.place, *([run.options.model] if run.options.model.endswith(".onnx") else [])]
    for name in (*given, *names):
        if not is_address(name) and not Path(name).is_absolute():
            return os.getcwd()
    return None


# -- an actor --------------------------------------------------------------------------------


class _Queued(Judging):
    """Judges in one thread of the process, whoever asks: one batch at a time."""

    def __init__(
        self,
        judges: Judges,
        previews: bool | Literal["late"],
        taxonomies: Sequence[str],
        thread: ThreadPoolExecutor,
    ) -> None:
        super().__init__(judges, previews, taxonomies=taxonomies)
        self._thread = thread

    def judge(self, batch: Sequence[ArrayRecord]) -> list[ScanRecord]:
        return self._thread.submit(super().judge, batch).result()


class _Scanner:
    """What runs in an actor: it takes shards and returns entries of the manifest.

    Errors are returned as rows, too, because Ray would treat an exception as a dead actor.
    """

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._failure: Exception | None = None
        try:
            self._open()
        except Exception as error:  # raised by the driver, who knows its kind
            self._failure = error

    def _open(self) -> None:
        job = self._job
        node = os.uname().nodename
        if job.version != latentguard.__version__:
            raise UsageError(
                f"node {node} has latentguard {latentguard.__version__}, not {job.version}"
            )
        if job.folder is not None:
            try:
                os.chdir(job.folder)
            except OSError as error:
                raise UsageError(
                    f"node {node} has no folder {job.folder}, where paths begin: give addresses, "
                    "or whole paths that all nodes share"
                ) from error
        self._store: Store = open_store(job.place)
        self._judges = job.options.judges()
        said = self._store.read(RUN)
        if said is None:
            raise UsageError(
                f"node {node} does not see the run in {job.place}: name a folder that all nodes "
                "share, or an address such as s3://..."
            )
        if json.loads(said)["options"] != json.loads(
            json.dumps(job.options.identity(self._judges))
        ):
            raise ModelError(
                f"node {node} has a different model or space than this machine under these names"
            )
        self._thread = ThreadPoolExecutor(1)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`shard`, one of them, to `entry` and `failure`."""
        import numpy as np

        entry = failure = b""
        try:
            entry = self._scan(Shard.from_json(str(batch["shard"][0]))).to_json()
        except Exception as error:  # as in __init__
            failure = _sent(error)
        values = {"entry": entry, "failure": failure}
        return {name: np.array([value], dtype=object) for name, value in values.items()}

    def _scan(self, shard: Shard) -> Entry:
        if self._failure is not None:
            raise self._failure
        done = self._done(shard)
        if done is not None:
            return done
        job = self._job
        judging = _Queued(self._judges, job.previews, job.options.taxonomies, self._thread)
        return scan_unit(self._store, shard, job.options, judging)

    def _done(self, shard: Shard) -> Entry | None:
        """The entry of a shard that an actor committed before it died."""
        data = self._store.read(entry_name(shard.number))
        with suppress(ValueError):
            if data is not None:
                entry = Entry.from_json(data)
                return entry if entry.files == tuple(map(shown, shard.files)) else None
        return None


def _sent(error: Exception) -> bytes:
    """An exception on its way to the driver: its kind, and what it was made of."""
    made = [error.errno, error.strerror, error.filename] if isinstance(error, OSError) else []
    said = {"kind": type(error).__name__, "message": str(error), "made": made}
    return json.dumps(said, default=str).encode("ascii")


def _received(data: bytes) -> Exception:
    """The exception that an actor met, of its own kind where that is one of this package's."""
    said = json.loads(data)
    if said["made"]:
        return OSError(*said["made"])
    kind = getattr(errors, said["kind"], None)
    if isinstance(kind, type) and issubclass(kind, errors.LatentGuardError):
        return kind(said["message"])
    return RuntimeError(f"{said['kind']}: {first_line(said['message'], 'no message')}")

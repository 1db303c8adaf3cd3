"""Candidates on several GPUs or machines: the one file that knows Ray.

Each actor loads the swept model once and takes candidates as it gets free; results are the files that a sweep in one
process writes, so OUT, the models and the banks must lie where all machines see them.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from resta.errors import RequestError, RestaError, UnansweredError
from resta.redeval.progress import RunOptions
from resta.sweep.measure import REFERENCES, Measure, Sweep, Worker, asked_words
from resta.sweep.search import Job

CONNECT_S = 10.0
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # actors without a GPU keep the devices that their machine shows
}


@contextmanager
def on_cluster(sweep: Sweep, options: RunOptions, *, address: str, workers: int | None) -> Iterator[Measure]:
    """Measure the references, and yield what measures candidates side by side.

    The first failure ends the sweep; what was answered is kept.

    Args:
        sweep: what to measure.
        options: how; only the limits and notes are used, since no terminal is shared.
        address: "local" for a cluster of this machine alone, "auto" for the one that it is part of, or a head's.
        workers: models loaded at once; by default one per GPU of the cluster, or one where there is none.

    Raises:
        RequestError: Ray is not installed.
        UnansweredError: no cluster answers, or a worker was lost.
        RestaError: as in one process.
    """
    with _cluster(address) as ray:
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        count = workers or max(1, gpus)
        # Shares that always fit, whatever machine a GPU is in: a worker that finds no place would be waited for.
        share = 1 / math.ceil(count / gpus) if gpus else 0.0
        threads = max(1, int(resources.get("CPU", 1)) // count)
        actor = ray.remote(num_cpus=0, num_gpus=share, scheduling_strategy="SPREAD")(_Actor)
        silent: dict[str, Any] = {"connections": options.connections, "retries": options.retries}
        silent |= {"timeout_s": options.timeout_s, "judge_device": options.judge_device}
        silent |= {"max_failures": options.max_failures, "sitting": options.sitting}
        from ray.util import ActorPool

        pool = ActorPool([actor.remote(sweep, silent, threads) for _ in range(count)])

        def measure(jobs: Sequence[str | Job]) -> None:
            results = pool.map_unordered(lambda actor, job: actor.run.remote(job), list(jobs))
            for done, (name, error) in enumerate(results, 1):
                if error is not None:
                    raise error
                options.note(f"{name} is measured ({done} of {len(jobs)})")

        measure(REFERENCES)  # first, since whether a candidate is hopeless depends on them
        yield measure


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Yield Ray, connected and quiet: no dashboard, no usage reports, no log lines of workers."""
    os.environ.update(QUIET)
    try:
        import ray
    except ImportError as error:
        raise RequestError("--ray needs Ray: pip install 'resta[ray]'") from error
    try:
        _check_reachable(address)
        ray.init(
            address=address,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            configure_logging=False,
            runtime_env={"env_vars": QUIET},
        )
    except (OSError, ValueError) as error:
        raise UnansweredError(f"--ray {address}: no cluster answers: {error}") from error
    try:
        yield ray
    except ray.exceptions.RayError as error:
        # What a worker raised ends with the exception itself; what befell it begins with it.
        place = -1 if isinstance(error, ray.exceptions.RayTaskError) else 0
        reason = str(error).strip().splitlines()[place]
        raise UnansweredError(f"a worker of the cluster was lost ({reason}); what was answered is kept") from error
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise OSError or ValueError where nothing listens: Ray itself would wait for minutes and end the process."""
    if address in ("local", "auto"):
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    socket.create_connection((host, int(port)), timeout=CONNECT_S).close()


class _Actor:
    """A worker in a process of its own; expected failures travel as values, so that they arrive as they are."""

    def __init__(self, sweep: Sweep, limits: dict[str, Any], threads: int):
        import torch

        os.umask(0o077)
        torch.set_num_threads(threads)
        self._worker = Worker(sweep, RunOptions(**limits))

    def run(self, job: str | Job) -> tuple[str, RestaError | None]:
        """Measure a reference, by its role, or a candidate; return its name and what went wrong."""
        name = job if isinstance(job, str) else asked_words(*job)
        try:
            if isinstance(job, str):
                self._worker.reference(job)
            else:
                self._worker.candidate(*job)
        except RestaError as error:
            return name, error
        return name, None

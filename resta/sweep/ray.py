"""Candidates on several GPUs or machines: the one file that knows Ray.

Each actor loads the swept model once and takes candidates as it gets free; results are the files that a sweep in one
process writes, so OUT, the models and the banks must lie where all machines see them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from resta.errors import MissingExtraError, RestaError
from resta.redeval.run import Conditions
from resta.sweep.candidates import Candidate
from resta.sweep.run import REFERENCES, Sweep, Worker

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # actors without a GPU keep the devices that their machine shows
}


def carry_out_with_ray(sweep: Sweep, conditions: Conditions, *, address: str, workers: int | None) -> None:
    """Measure all that is missing on a cluster. The first failure ends the sweep; what was answered is kept.

    Args:
        sweep: what to measure.
        conditions: how; only the limits and notes are used, since no terminal is shared.
        address: "local" for a cluster of this machine alone, "auto" for the one that it is part of, or a head's.
        workers: models loaded at once; by default one per GPU of the cluster, or one where there is none.

    Raises:
        MissingExtraError: Ray is not installed.
        RestaError: as in one process.
    """
    with _cluster(address) as ray:
        gpus = int(ray.cluster_resources().get("GPU", 0))
        count = workers or max(1, gpus)
        share = min(1.0, gpus / count)
        actor = ray.remote(num_cpus=1, num_gpus=share)(_Actor)
        silent: dict[str, Any] = {"connections": conditions.connections, "retries": conditions.retries}
        silent |= {"timeout_s": conditions.timeout_s, "judge_device": conditions.judge_device}
        from ray.util import ActorPool

        actors = [actor.remote(sweep, silent) for _ in range(count)]
        pool = ActorPool(actors)
        for jobs in (REFERENCES, sweep.candidates):  # whether a candidate is hopeless depends on the references
            results = pool.map_unordered(lambda actor, job: actor.run.remote(job), list(jobs))
            for done, (name, error) in enumerate(results, 1):
                if error is not None:
                    raise error
                conditions.note(f"{name} is measured ({done} of {len(jobs)})")


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Yield Ray, connected and quiet: no dashboard, no usage reports, no log lines of workers."""
    os.environ.update(QUIET)
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("--ray needs Ray: pip install 'resta[ray]'") from error
    ray.init(
        address=address,
        include_dashboard=False if address == "local" else None,
        log_to_driver=False,
        configure_logging=False,
        runtime_env={"env_vars": QUIET},
    )
    try:
        yield ray
    finally:
        ray.shutdown()


class _Actor:
    """A worker in a process of its own; expected failures travel as values, so that they arrive as they are."""

    def __init__(self, sweep: Sweep, limits: dict[str, Any]):
        os.umask(0o077)
        self._worker = Worker(sweep, Conditions(**limits))

    def run(self, job: str | Candidate) -> tuple[str, RestaError | None]:
        """Measure a reference, by its role, or a candidate; return its name and what went wrong."""
        try:
            if isinstance(job, str):
                self._worker.reference(job)
                return job, None
            self._worker.candidate(job)
            return job.name, None
        except RestaError as error:
            return job if isinstance(job, str) else job.name, error

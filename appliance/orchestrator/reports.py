"""How we are, as the orchestrator hears it: the nodepool's status, and what machine and runners have to do."""

import asyncio
import logging
import platform
import time
from collections.abc import Sequence

from clarifai_grpc.grpc.api import resources_pb2
from clarifai_grpc.grpc.api.status import status_code_pb2 as codes
from google.protobuf.timestamp_pb2 import Timestamp

from appliance.core.machine import Usage
from appliance.engine import gpu
from appliance.orchestrator.central import TRY_AGAIN, Central, CentralError
from appliance.orchestrator.work import Place, Work

_log = logging.getLogger(__name__)

_AGAIN_S = 60.0
"""Seconds after which what has not changed is said again: another appliance of the nodepool may have said otherwise."""

_NOT_FOR_LONG = frozenset({0, codes.CONN_KEY_INVALID, codes.CONN_KEY_NOT_FOUND, *TRY_AGAIN})
"""Codes of a refusal that is not for good: unreachable, a PAT that was revoked, too many calls."""

_STATUS = resources_pb2.Nodepool.NodepoolStatus


class Reports:
    """Says it when it has changed, and every minute."""

    def __init__(self, *, gpus: bool) -> None:
        """Args: gpus: whether there may be any that are ours."""
        self._gpus = gpus
        self._said: tuple[int, str] | None = None
        self._said_at = self._measured_at = float("-inf")
        self._usage = Usage()
        self._begun = time.monotonic()
        self._metrics_wanted = True

    def status_was_posted(self, status: int, why: str) -> None:
        """Somebody else has said this of us."""
        self._said, self._said_at = (status, why), time.monotonic()

    async def post(self, central: Central, place: Place, status: int, why: str, work: Sequence[Work]) -> None:
        """Say what is to be said now. Raises: CentralError."""
        now = time.monotonic()
        if self._said != (status, why) or now - self._said_at >= _AGAIN_S:
            await self._post_status(central, place, status, why)
        if now - self._measured_at >= _AGAIN_S:
            self._measured_at = now
            await self._post_metrics(central, place, work, last=False)

    async def last(self, central: Central, place: Place, work: Sequence[Work]) -> None:
        """Say that we go. Raises: CentralError."""
        await self._post_metrics(central, place, work, last=True)
        await self._post_status(central, place, _STATUS.NODEPOOL_STATUS_PENDING, "The appliance is stopping.")

    async def _post_status(self, central: Central, place: Place, status: int, why: str) -> None:
        await central.call(
            "PostNodepoolStatus",
            user_app_id=resources_pb2.UserAppIDSet(user_id=place.user_id),
            compute_cluster_id=place.compute_cluster_id,
            nodepool_id=place.nodepool_id,
            status=status,
            status_description=why,
        )
        self.status_was_posted(status, why)

    async def _post_metrics(self, central: Central, place: Place, work: Sequence[Work], *, last: bool) -> None:
        """One entry for the machine, and one for each runner; not again where the orchestrator does not want them.

        Raises: CentralError: it cannot be reached.
        """
        if not self._metrics_wanted:
            return
        readings = await _gpus() if self._gpus else []
        user = resources_pb2.UserAppIDSet(user_id=place.user_id)
        machine = resources_pb2.ComputePlaneMetrics(
            meta=resources_pb2.ComputeSourceMetadata(
                user_app_id=user,
                compute_cluster_user_id=place.user_id,
                compute_cluster_id=place.compute_cluster_id,
                nodepool_id=place.nodepool_id,
            ),
            cloud="local",
            instance_type="local",
            runtime_s=int(time.monotonic() - self._begun),
            timestamp=_now(),
            hostname=platform.node(),
            gpu_metrics=readings,
            cpu_metrics=[self._machine()],
            is_final_metrics=last,
        )
        entries = [machine]
        for each in work:
            runner = resources_pb2.ComputePlaneMetrics()
            runner.CopyFrom(machine)
            runner.meta.user_app_id.app_id = each.runner.app_id
            runner.meta.model_id = each.runner.key.model_id
            runner.meta.model_version_id = each.runner.version_id
            runner.meta.runner_id = each.runner.id
            entries.append(runner)
        try:
            await central.call("PostComputePlaneMetrics", compute_plane_metrics=entries)
        except CentralError as error:
            if error.code in _NOT_FOR_LONG:
                raise
            self._metrics_wanted = False
            _log.info("the orchestrator wants no figures of the machine: %s", error)

    def _machine(self) -> resources_pb2.CpuMetrics:
        busy, memory = self._usage.cpus(), self._usage.memory()
        return resources_pb2.CpuMetrics(
            timestamp=_now(),
            cpu_utilization_pct=100.0 * busy / self._usage.all_cpus,
            memory_utilization_pct=100.0 * memory / self._usage.all_memory,
            millicores=round(1000 * busy),
            memory_bytes=memory,
        )


async def _gpus() -> list[resources_pb2.GpuMetrics]:
    return [
        resources_pb2.GpuMetrics(
            uuid=reading.gpu.uuid,
            model_name=reading.gpu.name,
            utilization_pct=100.0 * (reading.utilization or 0.0),
            memory_utilization_pct=100.0 * (reading.memory_used or 0) / (reading.memory_total or 1),
        )
        for reading in await asyncio.to_thread(gpu.readings)
    ]


def _now() -> Timestamp:
    stamp = Timestamp()
    stamp.GetCurrentTime()
    return stamp

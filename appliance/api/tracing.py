"""Which calls are traced, and where they go when they have ended. Costs nothing while traces are off: `on` is all that
is asked, and nothing of OpenTelemetry is imported."""

import asyncio
from typing import TYPE_CHECKING

from appliance.api import status
from appliance.api.context import Context
from appliance.core.config import Traces
from appliance.core.errors import ConfigError
from appliance.core.metrics import Metrics
from appliance.core.timing import HEADER, Timing, trace_of
from appliance.core.types import Call

if TYPE_CHECKING:
    from appliance.api.otlp import Exporter

_GOOD = (status.SUCCESS.code, status.MIXED.code)


def check_traces(settings: Traces) -> None:
    """Raises: ConfigError: what is configured cannot be done."""
    if settings.endpoint is None:
        return
    try:
        from appliance.api import otlp
    except ImportError as error:
        raise ConfigError(
            f"traces.endpoint is set, and the packages for it are not here ({error}): pip install "
            "'inference-appliance[traces]', or unset it."
        ) from error
    otlp.destination(settings)


class Tracing:
    """The traces of one process. Used on the event loop's thread."""

    def __init__(self, settings: Traces, metrics: Metrics) -> None:
        self._count = metrics.traces.labels
        self._exporter: Exporter | None = None
        self.on = False
        """Whether calls may be traced."""
        self.configure(settings)

    def configure(self, settings: Traces) -> None:
        """Take over a configuration that `check_traces` found good; its files are read anew."""
        self._settings = settings
        self.on = settings.endpoint is not None
        if not self.on:
            if self._exporter is not None:
                asyncio.get_running_loop().run_in_executor(None, self._exporter.close)
                self._exporter = None
        elif self._exporter is not None:
            self._exporter.settings = settings
        else:
            from appliance.api.otlp import Exporter

            self._dropped = self._count("dropped")
            self._exporter = Exporter(settings, self._count("sent"), self._count("failed"))

    async def close(self) -> None:
        """Send what waits, and end; for two seconds at most."""
        exporter, self._exporter, self.on = self._exporter, None, False
        if exporter is not None:
            await asyncio.to_thread(exporter.close)

    def timing(self, call: Call, begun: float) -> Timing | None:
        """Begin to note a call's times, or a stream's message's; None: nobody wants to know them."""
        trace = trace_of(call.metadata, self._settings.sample) if self.on else None
        asked = call.metadata.get(HEADER) == "1"
        call.timing = Timing(begun, trace, asked=asked) if asked or trace is not None else None
        return call.timing

    def ended(self, timing: Timing, method: str, call: Call, req_id: str, context: Context | None) -> None:
        """A call whose times were noted has ended; if it is traced, its spans are sent. They have no content of its."""
        exporter, trace = self._exporter, timing.trace
        if exporter is None or trace is None or not trace.sampled:
            return
        from appliance.api.otlp import Traced

        about: dict[str, str | int] = {
            "rpc.method": method,
            "appliance.peer": call.peer,
            "appliance.req_id": req_id,
            "appliance.code": timing.code,
        }
        if context is not None:
            model, version = context.model
            inputs = sum(context.inputs.values())
            about |= {"appliance.principal": context.grant.name}
            about |= {"appliance.model": model, "appliance.version": version} if model else {}
            about |= {"appliance.inputs": inputs} if inputs else {}
        if not exporter.take(Traced(trace, timing, method, timing.code in _GOOD, about)):
            self._dropped.inc()

"""The process of a front: talks to clients, decodes, encodes; models run in the engines' processes."""

import asyncio
import logging
import socket

from appliance.api.keys import KeyStore
from appliance.core import config as configuration
from appliance.core import logs
from appliance.core.channel import Body
from appliance.core.config import Config
from appliance.daemon import child
from appliance.daemon.answering import Answering
from appliance.daemon.certificates import CertificateFiles
from appliance.daemon.checks import check_urls
from appliance.daemon.serving import Serving

_log = logging.getLogger(__name__)

_LOOK_S = 1.0


class FrontProcess(Answering):
    """Answers clients."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self._ready = False
        self._readiness: dict[str, object] = {"ready": False, "phase": "starting", "not_ready": {}}

    def _open(self) -> None:
        self._certificates = CertificateFiles(self._config)
        self._serving = Serving(
            self._config,
            self._catalog,
            self._workflows,
            self._metrics,
            lambda: (self._ready, self._readiness),
            self._certificates,
            KeyStore(self._config.auth.keys_file),
            self._limits,
        )
        self._api = self._serving.api
        self._tasks.append(asyncio.create_task(self._look()))

    async def _look(self) -> None:
        """Once a second: certificates that changed."""
        while True:
            try:
                await asyncio.to_thread(self._certificates.refresh)
            except Exception:
                # One bad look must not end the watch.
                _log.exception("a front's second-by-second look failed")
            await asyncio.sleep(_LOOK_S)

    def _take_catalog(self, body: Body, descriptors: list[int]) -> None:
        super()._take_catalog(body, descriptors)
        self._ready, self._readiness = body["ready"], body["readiness"]
        self._serving.publish(body["ready"], body["models"])

    async def _listen(self, body: Body, descriptors: list[int]) -> Body:
        """Answer what comes to these sockets. Raises: ConfigError."""
        sockets: dict[str, list[socket.socket]] = {}
        for name, descriptor in zip(body["sockets"], descriptors, strict=True):
            sockets.setdefault(name, []).append(socket.socket(fileno=descriptor))
        await self._serving.listen(sockets)
        return {"ports": dict(self._serving.ports), "transport": self._serving.transport}

    async def _configure(self, body: Body, descriptors: list[int]) -> None:
        """Take over a configuration. Raises: ApplianceError: nothing of it was taken over."""
        config: Config = configuration.of_data(body["config"])

        def read() -> KeyStore:
            keys = KeyStore(config.auth.keys_file)
            check_urls(config)
            self._certificates.reload(config)
            return keys

        keys = await asyncio.to_thread(read)
        self._config = config
        self._serving.configure(config, keys)
        self._workflows.settings = config.catalog
        self._workflows.wake()
        logs.limit(config.log.rate)
        self._metrics.sample()

    async def _drain(self, body: Body, descriptors: list[int]) -> None:
        """See `Serving.drain`."""
        await self._serving.drain(self._now, lambda: self._channel.tell("shut"))
        self._tell_calls()
        self._metrics.sample()


def main() -> None:
    """The process's life."""
    child.return_large_blocks()
    child.run("front", FrontProcess)


if __name__ == "__main__":
    main()

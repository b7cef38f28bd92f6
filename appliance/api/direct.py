"""Predictions for protocols beside Clarifai's: payloads in, results out, and no message in between.

What holds for PostModelOutputs holds here: who may use a model, how many inputs a request has, what memory they take.
"""

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from appliance.api import status
from appliance.api.context import Context
from appliance.api.limits import check_input_count
from appliance.api.quick import Begin
from appliance.api.replies import Reply
from appliance.catalog.view import Running, Version, View
from appliance.core.config import Config
from appliance.core.errors import ApplianceError, InputError, ModelError, UnknownModel
from appliance.core.types import Endpoint, Payload, PredictOptions, Result
from appliance.tasks.servable import Servable

Handler: TypeAlias = Callable[[Context, bytes], Awaitable[Reply]]
"""Answers a call's body."""


class Maker(Protocol):
    """What makes endpoints of handlers; see `service.Api`."""

    def door(self, name: str, handler: Handler, begin: Begin | None = None) -> Endpoint:
        """A unary call; `begin` takes the usual one the quick way."""

    def door_stream(self, name: str, handler: Handler, told: Callable[[ApplianceError], bytes]) -> Endpoint:
        """A stream."""


class ModelName(NamedTuple):
    """Which model and version a caller names; empty parts were not said."""

    user_id: str
    app_id: str
    model_id: str
    version_id: str = ""

    @classmethod
    def parse(cls, text: str, version: str = "") -> "ModelName":
        """`model`, where one model of the appliance has that id, or `user/app/model`. Raises: UnknownModel."""
        parts = text.split("/")
        if len(parts) == 1 and text:
            return cls("", "", text, version)
        if len(parts) == 3 and all(parts):
            return cls(parts[0], parts[1], parts[2], version)
        raise UnknownModel(f"{text[:200]!r} names no model; a model is called `model` or `user/app/model` here.")


class Direct:
    """The catalog's servables, for those who bring payloads."""

    def __init__(self, config: Config, repository: View[Servable]) -> None:
        self.config = config
        self._repository = repository

    def running(self, name: ModelName) -> Running[Servable]:
        """What answers for a name. Raises: UnknownModel, NotReady, NotDeployed."""
        return self._repository.use(name.user_id, name.app_id, name.model_id, name.version_id)

    @contextlib.contextmanager
    def serving(self, context: Context, name: ModelName) -> Iterator[Servable]:
        """The servable that answers for a name; within the block no swap takes it away.

        Raises: UnknownModel, NotReady, NotDeployed, NotPermitted.
        """
        with self.running(name) as servable:
            context.reach(servable.key, servable.version)
            context.grant.check_model(servable.key)
            yield servable

    async def results(
        self, context: Context, servable: Servable, payloads: Sequence[Payload], options: PredictOptions
    ) -> list[Result]:
        """One result a payload, in order; all of them or none.

        Raises: NoInputs, TooManyInputs. The error of the first payload that has one; of several it says which.
        """
        limits = self.config.limits
        check_input_count(len(payloads), limits)
        results: list[Result] = []
        for index, answer in enumerate(await servable.predict(payloads, options, context, limits)):
            if isinstance(answer, ApplianceError):
                raise _placed(answer, index, len(payloads))
            results.append(answer)
        context.count(status.SUCCESS.code, len(results))
        return results

    def versions(self, context: Context) -> list[Version[Servable]]:
        """All versions of the models that the caller may use, but those held back; newest first for each model."""
        return [
            version
            for bundle in self._repository.bundles
            if bundle.key is not None and context.grant.allows(bundle.key)
            for version in self._repository.offered(bundle)
        ]

    def versions_of(self, context: Context, name: ModelName) -> list[Version[Servable]]:
        """A model's versions, newest first; only the named one if one is. Raises: UnknownModel, NotPermitted."""
        bundle = self._repository.find(name.user_id, name.app_id, name.model_id)
        assert bundle.key is not None
        context.grant.check_model(bundle.key)
        if name.version_id:
            return [self._repository.version(bundle, name.version_id)]
        return self._repository.offered(bundle)


def _placed(error: ApplianceError, index: int, count: int) -> ApplianceError:
    """The error with its input's place, counted from 0, where there are several."""
    if count == 1 or not isinstance(error, InputError | ModelError):
        return error
    # Not by its constructor: some build their sentence of values.
    placed = type(error).__new__(type(error), f"Input {index} of {count}: {error}")
    vars(placed).update(vars(error))
    return placed

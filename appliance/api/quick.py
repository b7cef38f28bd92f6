"""What requests on the quick way share: one input, submitted here and now, whose answer the loop will have soon.

A protocol's `Begin` reads a body and submits its input, or leaves the call to the ordinary way; `service` takes the
steps around it, and replies with what `Begun` makes of the outcome.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from appliance.api.context import Context
from appliance.api.replies import Reply
from appliance.catalog.view import Running
from appliance.core.config import Limits
from appliance.core.types import Payload, PredictOptions
from appliance.engine.batcher import Outcome
from appliance.engine.inline import Waiter
from appliance.tasks.base import Decoded
from appliance.tasks.servable import Answer, Servable


@dataclass(slots=True)
class Begun:
    """A request of one input that is with the model; its servable is held until `let_go`."""

    context: Context
    running: Running[Servable]
    row: Decoded
    options: PredictOptions
    write: Callable[[Answer], Reply]

    def reply(self, outcome: Outcome) -> Reply:
        """The reply. Raises: ApplianceError: when there is none but an error."""
        return self.write(self.running.servable.answer(self.row, outcome, self.options, self.context))

    def let_go(self) -> None:
        """The servable is not needed any more."""
        self.running.let_go()


Begin: TypeAlias = Callable[[Context, bytes, Waiter], Begun | None]
"""Submits the one small input that a body asks about, to a model that answers at once; the waiter is told the outcome,
once and later than now.

Returns None, or raises, for every request that is not so simple, or is at fault; nothing has happened then, but that
the context's memory may have grown.
"""


def begin(
    context: Context,
    running: Running[Servable],
    payload: Payload,
    options: PredictOptions,
    limits: Limits,
    waiter: Waiter,
    write: Callable[[Answer], Reply],
) -> Begun | None:
    """The last step of every `Begin`: after it nothing may fail, as the input is submitted.

    Args:   write: makes the reply of the answer. Raises: ApplianceError: when there is none but an error.
    Raises: ApplianceError: and nothing is submitted.
    """
    servable = running.servable
    row = servable.ask(payload, options, context, limits, waiter)
    if row is None:
        return None
    running.hold()
    context.reach(servable.key, servable.version)
    return Begun(context, running, row, options, write)

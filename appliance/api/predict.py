"""PostModelOutputs, GenerateModelOutputs, StreamModelOutputs: inputs in, one output an input out.

`post` answers every request of the first RPC, `generate` and `converse` those of the other two. `begin` takes the short
way with the usual one: a single small input for a model whose runs are so short that the loop does them itself;
whatever is unusual it leaves to `post`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TypeAlias

from clarifai_grpc.grpc.api import resources_pb2, service_pb2

from appliance.api import messages, methods, quick, replies, status, values
from appliance.api.cache import PredictCache
from appliance.api.context import Context
from appliance.api.downloads import Downloads
from appliance.api.limits import check_input_count
from appliance.api.placement import Ids, chosen
from appliance.api.questions import Conversation, Question, Rpc, options_of, understand
from appliance.api.quick import Begun
from appliance.api.replies import Reply, ReplyWriter, Written
from appliance.api.varints import Pieces
from appliance.catalog.view import View
from appliance.core.config import Config
from appliance.core.errors import ApplianceError, readable
from appliance.core.memory import Reservation
from appliance.core.metrics import Metrics
from appliance.core.types import ConceptScores, MethodKind, PredictOptions, Returned
from appliance.engine.inline import Waiter
from appliance.tasks.servable import Answer, Servable

_LARGE = 1 << 20
"""Bytes of a request from which its values are read on a thread, so that the loop gets its turns."""

_WRITTEN = 10
"""Bytes that a byte of a value takes while it is written: a message for each number, and then the bytes of all."""

Answered: TypeAlias = Reply | service_pb2.MultiOutputResponse


class Predictions:
    """The predict RPCs over the catalog's servables."""

    def __init__(self, config: Config, repository: View[Servable], metrics: Metrics) -> None:
        self.config = config
        self._repository = repository
        self._downloads = Downloads(metrics)
        self._cache = PredictCache(metrics)
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Take over a new configuration."""
        self.config = config
        self._downloads.configure(config)
        self._cache.configure(config.cache)

    def forget_gone(self) -> None:
        """Forget the answers of servables that are not served any more."""
        served = (version.servable for bundle in self._repository.bundles for version in bundle.versions.values())
        self._cache.keep_only({servable.serial for servable in served if servable is not None})

    def begin(self, context: Context, body: bytes, waiter: Waiter) -> Begun | None:
        """PostModelOutputs on the quick way; see `quick.Begin`."""
        request = service_pb2.PostModelOutputsRequest.FromString(body)
        inputs = request.inputs
        if len(inputs) != 1 or request.HasField("runner_selector"):
            return None
        if request.use_predict_cache and self._cache.limit:
            return None
        given = inputs[0]
        data = given.data
        if data.HasField("metadata") or data.parts:  # where a method is named, or called
            return None
        ids = request.user_app_id
        version = self._repository.answering(ids.user_id, ids.app_id, request.model_id, request.version_id)
        running = version.running
        assert running is not None, "a ready version has one"
        servable = running.servable
        if not context.grant.allows(servable.key) or servable.task.kind == "values":
            return None
        options, unknown = options_of(request, servable, servable.task.method, self.config.limits)
        payload = messages.payload_of(servable.task.kind, data)
        if unknown or isinstance(payload, messages.UrlInput):
            return None
        writer = servable.companion(ReplyWriter)
        write = partial(_reply_of_one, context, given, writer, writer.brief_of_ready(version))
        return quick.begin(context, running, payload, options, self.config.limits, waiter, write)

    async def post(self, context: Context, request: service_pb2.PostModelOutputsRequest) -> Answered:
        """Predict on all inputs of a request.

        Raises: ApplianceError: when the request as a whole cannot be answered.
        """
        (reply,) = await self._predict(context, request, Rpc.POST)
        return reply

    async def generate(self, context: Context, request: service_pb2.PostModelOutputsRequest) -> Sequence[Answered]:
        """Call a method that streams what it returns: a reply for each element. Any other method gives one reply.

        Raises: ApplianceError: likewise.
        """
        return await self._predict(context, request, Rpc.GENERATE)

    def converse(
        self, keep: Callable[[str], Reservation]
    ) -> Callable[[Context, service_pb2.PostModelOutputsRequest], Awaitable[Sequence[Answered]]]:
        """The answers to the messages of one stream; what it returns raises ApplianceError, likewise.

        Args:    keep: a reservation of a principal's share that lasts as long as the stream.
        """
        conversation = Conversation(keep)

        async def answer(context: Context, request: service_pb2.PostModelOutputsRequest) -> Sequence[Answered]:
            return await self._predict(context, request, Rpc.STREAM, conversation)

        return answer

    async def _predict(
        self,
        context: Context,
        request: service_pb2.PostModelOutputsRequest,
        rpc: Rpc,
        conversation: Conversation | None = None,
    ) -> Sequence[Answered]:
        check_input_count(len(request.inputs), self.config.limits)
        ids = request.user_app_id
        asked = Ids(ids.user_id, ids.app_id, request.model_id, request.version_id)
        meant = chosen(request.runner_selector, asked, context.grant, self.config, self._repository)
        with self._repository.use(*meant) as servable:
            context.reach(servable.key, servable.version)
            context.grant.check_model(servable.key)
            if methods.method_name(request.inputs[0].data) == methods.GET_SIGNATURES:
                return [_signatures(context, request, servable)]
            given = (request, servable, self.config.limits, rpc, conversation, context.contents)
            if context.memory.count < _LARGE:
                questions, unknown = understand(*given)
            else:  # lists of a million numbers take seconds
                questions, unknown = await asyncio.to_thread(understand, *given)
            if conversation is not None:
                conversation.reserve(context.principal)
            writer, key = servable.companion(ReplyWriter), servable.key
            # Now, as the model may be gone from the catalog afterwards.
            bundle = self._repository.find(key.user_id, key.app_id, key.model_id)
            brief = writer.brief(bundle.versions.get(servable.version))
            answers = await self._answer(context, servable, questions, cached=request.use_predict_cache)
            if len(questions) == 1 and questions[0].method.kind is MethodKind.GENERATE:
                found = []
                for each in _elements(answers[0]):
                    element = await _written(context, questions, [each])
                    made = _reply(context, request, writer, brief, questions, element, unknown)
                    context.memory.grow(len(made.body))  # all of them are held until the last is sent
                    found.append(made)
                    await asyncio.sleep(0)
                return found
            written = await _written(context, questions, answers)
            return [_reply(context, request, writer, brief, questions, written, unknown)]

    # ---- answering ----

    async def _answer(
        self, context: Context, servable: Servable, questions: Sequence[Question], *, cached: bool
    ) -> list[Answer]:
        """Fetch what lies behind URLs, then predict; inputs with equal options go together."""
        await self._fetch_all(context, questions)
        groups: dict[tuple[str, PredictOptions], list[int]] = {}
        for index, question in enumerate(questions):
            groups.setdefault((question.method.name, question.options), []).append(index)
        answers: list[Answer | None] = [None] * len(questions)

        async def answer(asked: tuple[str, PredictOptions], members: list[int]) -> None:
            method, options = asked
            payloads = [questions[index].payload for index in members]
            run = partial(servable.predict, options=options, ticket=context, limits=self.config.limits, method=method)
            results = await (self._cache.answers(context, servable, asked, payloads, run) if cached else run(payloads))
            for index, result in zip(members, results, strict=True):
                answers[index] = result

        if len(groups) == 1:  # the usual case needs no tasks
            await answer(*groups.popitem())
            return answers  # type: ignore[return-value]  # every place has been filled
        # Groups share the queue, so that inputs with options of their own are still one batch.
        jobs = [asyncio.ensure_future(answer(asked, members)) for asked, members in groups.items()]
        try:
            await asyncio.gather(*jobs)
        finally:
            for job in jobs:
                job.cancel()
        return answers  # type: ignore[return-value]  # every place has been filled

    async def _fetch_all(self, context: Context, questions: Sequence[Question]) -> None:
        links = [(question, link, put) for question in questions for link, put in question.links]
        if links:
            payloads = await self._downloads.payloads(context, [link for _, link, _ in links])
            for (question, _, put), payload in zip(links, payloads, strict=True):
                if isinstance(payload, ApplianceError):
                    question.payload = payload
                else:
                    put(payload)


def _reply_of_one(
    context: Context, given: resources_pb2.Input, writer: ReplyWriter, brief: bytes, answer: Answer
) -> Reply:
    req_id = context.req_id
    if isinstance(answer, ApplianceError):
        context.count(status.row_of(answer).code)
        return replies.reply(replies.error_output(given, answer, req_id), 1, [answer], "", req_id)
    context.count(status.SUCCESS.code)
    success = replies.success(req_id)
    return replies.good_reply(writer.output(writer.head(brief, success), given, answer), success)


async def _written(
    context: Context, questions: Sequence[Question], answers: Sequence[Answer]
) -> Sequence[Answer | Written]:
    """The answers; large values as bytes already: a million numbers take seconds, and much memory meanwhile.

    Raises: Overloaded: that is not free.
    """
    found: list[Answer | Written] = list(answers)
    for index, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        if isinstance(answer, Returned) and not values.is_small(answer.value):
            context.memory.grow(_WRITTEN * await asyncio.to_thread(values.weight, answer.value))
            write = partial(replies.written, answer, question.method.returns, pythonic=question.pythonic)
            found[index] = await asyncio.to_thread(write)
    return found


def _reply(
    context: Context,
    request: service_pb2.PostModelOutputsRequest,
    writer: ReplyWriter,
    brief: bytes,
    questions: Sequence[Question],
    answers: Sequence[Answer | Written],
    unknown: Sequence[str],
) -> Reply:
    head = writer.head(brief, replies.success(context.req_id))
    outputs: Pieces = []
    failures = []
    for given, question, answer in zip(request.inputs, questions, writer.scored(answers), strict=True):
        if isinstance(answer, ApplianceError):
            outputs += replies.error_output(given, answer, context.req_id)
            failures.append(answer)
            context.count(status.row_of(answer).code)
        else:
            outputs += writer.output(head, given, answer, question.method.returns, pythonic=question.pythonic)
    if len(failures) < len(answers):
        context.count(status.SUCCESS.code, len(answers) - len(failures))
    note = readable(f"The model has no concept {', '.join(unknown[:20])}.") if unknown else ""
    return replies.reply(outputs, len(answers), failures, note, context.req_id)


def _elements(answer: Answer) -> Sequence[Answer]:
    """What a method that streams returned, one by one; an error is the only one."""
    if isinstance(answer, ApplianceError):
        return [answer]
    assert isinstance(answer, Returned), "what declared methods give"
    return [each if isinstance(each, ConceptScores) else Returned(each) for each in answer.value]


def _signatures(
    context: Context, request: service_pb2.PostModelOutputsRequest, servable: Servable
) -> service_pb2.MultiOutputResponse:
    output = resources_pb2.Output(
        id=messages.new_id(), status=status.success(context.req_id), created_at=messages.now()
    )
    messages.fill_input(output, request.inputs[0])
    output.data.text.raw = methods.signatures_json(offer.task.method for offer in servable.offers.values())
    return service_pb2.MultiOutputResponse(status=status.success(context.req_id), outputs=[output])

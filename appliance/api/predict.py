"""PostModelOutputs, GenerateModelOutputs, StreamModelOutputs: inputs in, one output an input out.

`post` answers every request. `begin` takes the short way with the usual one: a single small input for a model whose
runs are so short that the loop does them itself; whatever is unusual it leaves to `post`.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from clarifai_grpc.grpc.api import resources_pb2, service_pb2

from appliance.api import messages, methods, replies, status
from appliance.api.cache import PredictCache
from appliance.api.context import Context
from appliance.api.downloads import Downloads
from appliance.api.limits import Asked, check_input_count, options_for
from appliance.api.replies import Reply, ReplyWriter
from appliance.catalog.repository import Repository, Running
from appliance.core.config import Config
from appliance.core.errors import ApplianceError, NotPermitted, PlacementUnknown, RequestError
from appliance.core.metrics import Metrics
from appliance.core.types import Payload, PredictOptions
from appliance.engine.batcher import Outcome
from appliance.engine.inline import Waiter
from appliance.tasks.base import Decoded
from appliance.tasks.servable import Answer, Servable


@dataclass(slots=True)
class _Question:
    """One input, understood: what the task takes, how its answer is cut, and in which form it is given back."""

    payload: Payload | messages.UrlInput | ApplianceError
    options: PredictOptions
    pythonic: bool


@dataclass(slots=True)
class Begun:
    """A request of one input that is with the model; its servable is held until `let_go`."""

    context: Context
    given: resources_pb2.Input
    options: PredictOptions
    running: Running[Servable]
    row: Decoded
    writer: ReplyWriter
    brief: bytes

    def reply(self, outcome: Outcome) -> Reply:
        """The reply. Raises: ApplianceError: when there is none but an error."""
        answer = self.running.servable.answer(self.row, outcome, self.options, self.context)
        req_id = self.context.req_id
        if isinstance(answer, ApplianceError):
            self.context.count(status.row_of(answer).code)
            return replies.reply([replies.error_output(self.given, answer, req_id)], [answer], "", req_id)
        self.context.count(status.SUCCESS.code)
        success = replies.success(req_id)
        output = self.writer.output(self.writer.head(self.brief, success), self.given, answer)
        return replies.good_reply((output,), success)

    def let_go(self) -> None:
        """The servable is not needed any more."""
        self.running.let_go()


class Predictions:
    """The predict RPCs over the catalog's servables."""

    def __init__(self, config: Config, repository: Repository[Servable], metrics: Metrics) -> None:
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

    def begin(self, context: Context, request: service_pb2.PostModelOutputsRequest, waiter: Waiter) -> Begun | None:
        """Submit the one small input of a request to a model that the loop runs itself; its answer comes soon.

        Args:    waiter: is told the outcome, once and later than now.
        Returns: None for every request that is not so simple; nothing has happened then, but that the context's memory
            may have grown.
        Raises: ApplianceError: the request, or its input, is at fault; likewise.
        """
        inputs = request.inputs
        if len(inputs) != 1 or request.HasField("runner_selector"):
            return None
        if request.use_predict_cache and self._cache.limit:
            return None
        given = inputs[0]
        data = given.data
        if data.HasField("metadata"):  # where a method is named
            return None
        ids = request.user_app_id
        version = self._repository.answering(ids.user_id, ids.app_id, request.model_id, request.version_id)
        running = version.running
        assert running is not None, "a ready version has one"
        servable = running.servable
        if not context.grant.allows(servable.key):
            return None
        options, unknown = self._options(request, servable)
        payload = messages.payload_of(servable.task.kind, data)
        if unknown or isinstance(payload, messages.UrlInput):
            return None
        writer = _writer(servable)
        brief = writer.brief_of_ready(version)
        row = servable.ask(payload, options, context, self.config.limits, waiter)
        if row is None:
            return None
        running.hold()
        context.model = (servable.key.model_id, servable.version)
        return Begun(context, given, options, running, row, writer, brief)

    async def post(
        self, context: Context, request: service_pb2.PostModelOutputsRequest
    ) -> Reply | service_pb2.MultiOutputResponse:
        """Predict on all inputs of a request.

        Raises: ApplianceError: when the request as a whole cannot be answered.
        """
        check_input_count(len(request.inputs), self.config.limits)
        _check_selector(request.runner_selector)
        ids = request.user_app_id
        with self._repository.use(ids.user_id, ids.app_id, request.model_id, request.version_id) as servable:
            context.model = (servable.key.model_id, servable.version)
            if not context.grant.allows(servable.key):
                raise NotPermitted(f"Principal {context.grant.name!r} may not use model {servable.key}.")
            if methods.method_name(request.inputs[0].data) == methods.GET_SIGNATURES:
                return _signatures(context, request, servable)
            questions, unknown = self._questions(request, servable)
            writer, key = _writer(servable), servable.key
            # Now, as the model may be gone from the catalog afterwards.
            bundle = self._repository.find(key.user_id, key.app_id, key.model_id)
            brief = writer.brief(bundle.versions.get(servable.version))
            answers = await self._answer(context, servable, questions, cached=request.use_predict_cache)
            return _reply(context, request, writer, brief, questions, answers, unknown)

    # ---- understanding ----

    def _options(
        self, request: service_pb2.PostModelOutputsRequest, servable: Servable
    ) -> tuple[PredictOptions, list[str]]:
        """What the request as a whole asks for, and the selected concepts that the model does not have.

        Raises: InvalidArgument.
        """
        limits = self.config.limits
        if request.HasField("model"):
            return options_for(_asked_by_request(request), servable.concepts, limits)
        return _usual_options(limits.concepts_default), []

    def _questions(
        self, request: service_pb2.PostModelOutputsRequest, servable: Servable
    ) -> tuple[list[_Question], list[str]]:
        """Each input as a question, and the selected concepts that the model does not have.

        Raises: InvalidArgument, UnknownMethod: these hold for the request as a whole.
        """
        limits = self.config.limits
        options, unknown = self._options(request, servable)
        questions = []
        for given in request.inputs:
            name = methods.method_name(given.data)
            pythonic = bool(name)
            chosen = options
            try:
                payload: Payload | messages.UrlInput | ApplianceError
                if pythonic:
                    arguments = methods.arguments(servable.task.method, name, given.data)
                    chosen, missing = options_for(methods.asked_by_arguments(arguments), servable.concepts, limits)
                    unknown += [text for text in missing if text not in unknown]
                    main = arguments.get(servable.task.method.arguments[0].name, resources_pb2.Data())
                    payload = messages.payload_of_arguments(servable.task.kind, main, dict(arguments))
                else:
                    payload = messages.payload_of(servable.task.kind, given.data)
            except RequestError as error:
                payload = error
            questions.append(_Question(payload, chosen, pythonic))
        return questions, unknown

    # ---- answering ----

    async def _answer(
        self, context: Context, servable: Servable, questions: Sequence[_Question], *, cached: bool
    ) -> list[Answer]:
        """Fetch what lies behind URLs, then predict; inputs with equal options go together."""
        await self._fetch_all(context, questions)
        groups: dict[PredictOptions, list[int]] = {}
        for index, question in enumerate(questions):
            groups.setdefault(question.options, []).append(index)
        answers: list[Answer | None] = [None] * len(questions)

        async def answer(options: PredictOptions, members: list[int]) -> None:
            payloads = [_payload(questions[index]) for index in members]
            run = partial(servable.predict, options=options, ticket=context, limits=self.config.limits)
            results = await (
                self._cache.answers(context, servable, options, payloads, run) if cached else run(payloads)
            )
            for index, result in zip(members, results, strict=True):
                answers[index] = result

        if len(groups) == 1:  # the usual case needs no tasks
            await answer(*groups.popitem())
            return answers  # type: ignore[return-value]  # every place has been filled
        # Groups share the queue, so that inputs with options of their own are still one batch.
        jobs = [asyncio.ensure_future(answer(options, members)) for options, members in groups.items()]
        try:
            await asyncio.gather(*jobs)
        finally:
            for job in jobs:
                job.cancel()
        return answers  # type: ignore[return-value]  # every place has been filled

    async def _fetch_all(self, context: Context, questions: Sequence[_Question]) -> None:
        links = [(q, q.payload) for q in questions if isinstance(q.payload, messages.UrlInput)]
        if links:
            payloads = await self._downloads.payloads(context, [link for _, link in links])
            for (question, _), payload in zip(links, payloads, strict=True):
                question.payload = payload


def _reply(
    context: Context,
    request: service_pb2.PostModelOutputsRequest,
    writer: ReplyWriter,
    brief: bytes,
    questions: Sequence[_Question],
    answers: Sequence[Answer],
    unknown: Sequence[str],
) -> Reply:
    head = writer.head(brief, replies.success(context.req_id))
    outputs, failures = [], []
    for given, question, answer in zip(request.inputs, questions, answers, strict=True):
        if isinstance(answer, ApplianceError):
            outputs.append(replies.error_output(given, answer, context.req_id))
            failures.append(answer)
            context.count(status.row_of(answer).code)
        else:
            outputs.append(writer.output(head, given, answer, pythonic=question.pythonic))
            context.count(status.SUCCESS.code)
    note = f"The model has no concept {', '.join(unknown[:20])}." if unknown else ""
    return replies.reply(outputs, failures, note, context.req_id)


def _writer(servable: Servable) -> ReplyWriter:
    if not isinstance(servable.companion, ReplyWriter):
        servable.companion = ReplyWriter(servable)
    return servable.companion


@lru_cache(maxsize=16)
def _usual_options(concepts_default: int) -> PredictOptions:
    """What `options_for` makes of a request that asks for nothing."""
    return PredictOptions(max_concepts=concepts_default)


def _payload(question: _Question) -> Payload | ApplianceError:
    assert not isinstance(question.payload, messages.UrlInput)
    return question.payload


def _asked_by_request(request: service_pb2.PostModelOutputsRequest) -> Asked:
    """`output_config` from both places; what the model version says wins over the deprecated place (PROTOCOL 0.5)."""
    new = request.model.model_version.output_info.output_config
    old = request.model.output_info.output_config
    select = new.select_concepts or old.select_concepts
    return Asked(
        max_concepts=new.max_concepts or old.max_concepts,
        min_value=new.min_value or old.min_value,
        select=tuple((concept.id, concept.name) for concept in select),
    )


def _check_selector(selector: resources_pb2.RunnerSelector) -> None:
    """A request that names a place must have named this one. Raises: PlacementUnknown."""
    for kind in ("deployment", "nodepool", "runner"):
        name = getattr(selector, kind).id
        if name:
            raise PlacementUnknown(kind, name)


def _signatures(
    context: Context, request: service_pb2.PostModelOutputsRequest, servable: Servable
) -> service_pb2.MultiOutputResponse:
    output = resources_pb2.Output(
        id=messages.new_id(), status=status.success(context.req_id), created_at=messages.now()
    )
    messages.fill_input(output, request.inputs[0])
    output.data.text.raw = methods.signatures_json(servable.task.method)
    return service_pb2.MultiOutputResponse(status=status.success(context.req_id), outputs=[output])

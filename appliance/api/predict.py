"""PostModelOutputs, GenerateModelOutputs, StreamModelOutputs: inputs in, one output an input out."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from clarifai_grpc.grpc.api import resources_pb2, service_pb2

from appliance.api import messages, methods, status
from appliance.api.context import Context
from appliance.api.limits import Asked, check_input_count, options_for
from appliance.catalog.repository import Repository
from appliance.core.config import Config
from appliance.core.errors import ApplianceError, NotPermitted, PlacementUnknown, RequestError
from appliance.core.types import Payload, PredictOptions
from appliance.media.fetch import fetch
from appliance.tasks.servable import Answer, Servable, Ticket


@dataclass(slots=True)
class _Question:
    """One input, understood: what the task takes, how its answer is cut, and in which form it is given back."""

    payload: Payload | messages.UrlInput | ApplianceError
    options: PredictOptions
    pythonic: bool


class Predictions:
    """The predict RPCs over the catalog's servables."""

    def __init__(self, config: Config, repository: Repository[Servable]) -> None:
        self.config = config
        self._repository = repository

    async def post(
        self, context: Context, request: service_pb2.PostModelOutputsRequest
    ) -> service_pb2.MultiOutputResponse:
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
            template = self._template(servable)
            answers = await self._answer(context, servable, questions)
            return self._response(context, request, servable, template, questions, answers, unknown)

    async def generate(
        self, context: Context, request: service_pb2.PostModelOutputsRequest
    ) -> AsyncIterator[service_pb2.MultiOutputResponse]:
        """The same answer as a stream of one message: these tasks have no parts to stream."""
        yield await self.post(context, request)

    # ---- understanding ----

    def _questions(
        self, request: service_pb2.PostModelOutputsRequest, servable: Servable
    ) -> tuple[list[_Question], list[str]]:
        """Each input as a question, and the selected concepts that the model does not have.

        Raises: InvalidArgument, UnknownMethod: these hold for the request as a whole.
        """
        limits = self.config.limits
        options, unknown = options_for(_asked_by_request(request), servable.concepts, limits)
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

    async def _answer(self, context: Context, servable: Servable, questions: Sequence[_Question]) -> list[Answer]:
        """Fetch what lies behind URLs, then predict; inputs with equal options go together."""
        await self._fetch_all(context, questions)
        groups: dict[PredictOptions, list[int]] = {}
        for index, question in enumerate(questions):
            groups.setdefault(question.options, []).append(index)
        ticket = Ticket(context.grant.name, context.deadline, context.memory)
        answers: list[Answer | None] = [None] * len(questions)

        async def answer(options: PredictOptions, members: list[int]) -> None:
            payloads = [_payload(questions[index]) for index in members]
            results = await servable.predict(payloads, options, ticket, self.config.limits)
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
        async def replace(question: _Question, link: messages.UrlInput) -> None:
            try:
                body = await fetch(link.url, self.config.urls, self.config.limits.image_size)
                question.payload = link.finish(body)
            except RequestError as error:
                question.payload = error
            else:
                context.memory.grow(len(body))

        links = [(q, q.payload) for q in questions if isinstance(q.payload, messages.UrlInput)]
        # A few at a time: 128 inputs of 20 MB each must not arrive at once.
        gate = asyncio.Semaphore(8)

        async def gated(question: _Question, link: messages.UrlInput) -> None:
            async with gate:
                await replace(question, link)

        try:
            async with asyncio.TaskGroup() as group:
                for question, link in links:
                    group.create_task(gated(question, link))
        except ExceptionGroup as failed:
            # The budget, say: one of them speaks for the request.
            raise failed.exceptions[0] from None

    def _template(self, servable: Servable) -> resources_pb2.Output:
        """What all outputs share; made before predicting, as the model may be gone from the catalog afterwards."""
        output = resources_pb2.Output()
        key = servable.key
        version = self._repository.find(key.user_id, key.app_id, key.model_id).versions.get(servable.version)
        if version is not None:
            output.model.CopyFrom(messages.model_brief(version))
        return output

    @staticmethod
    def _response(
        context: Context,
        request: service_pb2.PostModelOutputsRequest,
        servable: Servable,
        template: resources_pb2.Output,
        questions: Sequence[_Question],
        answers: Sequence[Answer],
        unknown: Sequence[str],
    ) -> service_pb2.MultiOutputResponse:
        template.created_at.CopyFrom(messages.now())
        template.status.CopyFrom(status.success(context.req_id))
        response = service_pb2.MultiOutputResponse()
        good = 0
        for given, question, answer in zip(request.inputs, questions, answers, strict=True):
            output = response.outputs.add()
            if isinstance(answer, ApplianceError):
                messages.fill_error(output, given, answer, context.req_id)
            else:
                output.CopyFrom(template)
                output.id = messages.new_id()
                messages.fill_input(output, given)
                fill = messages.fill_return if question.pythonic else messages.fill_data
                fill(output.data, answer, servable.concepts, servable.key.app_id)
                good += 1
            context.inputs[output.status.code] += 1
        note = f"The model has no concept {', '.join(unknown[:20])}." if unknown else ""
        messages.conclude(response, good, note, context.req_id)
        return response


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

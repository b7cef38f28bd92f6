"""Runs inside an environment with the stock OpenAI client. Prints what came back as JSON.

Usage: script_openai.py BASE_URL ROOT_CERTIFICATE PAT [CLIENT_CERTIFICATE CLIENT_KEY]
"""

import asyncio
import json
import ssl
import sys

import openai

base_url, root, pat, *pair = sys.argv[1:]
SENTENCE = "tester/tests/models/sentence"


def trust():
    """The root alone, and who we are where that is asked for."""
    context = ssl.create_default_context(cafile=root)
    if pair:
        context.load_cert_chain(*pair)
    return context


def client(**options):
    """As its users write it, but for the root certificate."""
    options = {"api_key": pat, "base_url": f"{base_url}/v2/ext/openai/v1", **options}
    return openai.OpenAI(http_client=openai.DefaultHttpxClient(verify=trust()), **options)


def failure(call):
    """What the client raises."""
    try:
        return f"no error: {call()}"
    except openai.APIStatusError as error:
        return {"kind": type(error).__name__, "status": error.status_code, "code": error.code, "text": error.message}


async def asynchronous():
    """The same with the other client, three at once."""
    http_client = openai.DefaultAsyncHttpxClient(verify=trust())
    async with openai.AsyncOpenAI(
        api_key=pat, base_url=f"{base_url}/v2/ext/openai/v1", http_client=http_client
    ) as made:
        found = await asyncio.gather(*[made.embeddings.create(model=SENTENCE, input=text) for text in ("good", "bad")])
        models = [model.id async for model in made.models.list()]
        return [reply.data[0].embedding for reply in found], models


with client() as plain:
    texts = ["good model", "the quick brown fox"]
    replies = [plain.embeddings.create(model=SENTENCE, input="good") for _ in range(2)]
    several = plain.embeddings.create(model=SENTENCE, input=texts)
    floats = plain.embeddings.create(model=SENTENCE, input=texts, encoding_format="float", dimensions=4)
    by_url = plain.embeddings.create(model=f"https://clarifai.com/{SENTENCE}", input="good")
    picture = "data:image/png;base64," + sys.stdin.read().strip()
    both, models = asyncio.run(asynchronous())
    results = {
        "version": openai.__version__,
        "models": [model.id for model in plain.models.list()],
        "model": plain.models.retrieve(SENTENCE).id,
        "model_by_url": plain.models.retrieve(f"https://clarifai.com/{SENTENCE}/versions/1").id,
        "one": replies[0].data[0].embedding,
        "again": replies[1].data[0].embedding,
        "several": [entry.embedding for entry in several.data],
        "floats": [entry.embedding for entry in floats.data],
        "by_url": by_url.data[0].embedding,
        "tokens": several.usage.prompt_tokens,
        "picture": plain.embeddings.create(model="tester/tests/models/vector", input=picture).data[0].embedding,
        "request_id": replies[0]._request_id,
        "async": both,
        "async_models": models,
        "unknown": failure(lambda: plain.embeddings.create(model="tester/tests/models/nothing", input="good")),
        "tokens_in": failure(lambda: plain.embeddings.create(model=SENTENCE, input=[1, 2, 3])),
        "dimensions": failure(lambda: plain.embeddings.create(model=SENTENCE, input="good", dimensions=2)),
        "chat": failure(
            lambda: plain.chat.completions.create(model=SENTENCE, messages=[{"role": "user", "content": "good"}])
        ),
        "responses": failure(lambda: plain.responses.create(model=SENTENCE, input="good")),
    }
with client(api_key="0" * 64) as wrong:
    results["wrong_key"] = failure(lambda: wrong.models.list())
print(json.dumps(results))

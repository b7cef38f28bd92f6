"""Runs inside an environment with the stock Triton client: gRPC or HTTP. Prints what came back as JSON.

Usage: script_triton.py grpc|http HOST:PORT ROOT_CERTIFICATE PAT [CLIENT_CERTIFICATE CLIENT_KEY] < PICTURE
"""

import asyncio
import json
import queue
import ssl
import sys
from importlib.metadata import version

import numpy as np
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as grpc_aio
import tritonclient.http as httpclient
import tritonclient.http.aio as http_aio
from tritonclient.utils import InferenceServerException

wire, address, root, pat, *pair = sys.argv[1:]
PICTURE = sys.stdin.buffer.read()
HEADERS = {"authorization": f"Key {pat}"}
PREFIX = "tester/tests/"


def trust():
    """The root alone, and who we are where that is asked for."""
    context = ssl.create_default_context(cafile=root)
    if pair:
        context.load_cert_chain(*pair)
    return context


if wire == "grpc":
    kind, aio = grpcclient, grpc_aio
    OPTIONS = {"url": address, "ssl": True, "root_certificates": root}
    if pair:
        OPTIONS |= {"certificate_chain": pair[0], "private_key": pair[1]}
    AIO_OPTIONS = OPTIONS
else:
    kind, aio = httpclient, http_aio
    OPTIONS = {"url": f"{address}/kserve", "ssl": True, "ssl_context_factory": trust}
    AIO_OPTIONS = {"url": f"{address}/kserve", "ssl": True, "ssl_context": trust()}


def tensor(module, name, array, datatype, **options):
    """An input with its values."""
    made = module.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, **options)
    return made


def floats(module, **options):
    """The two inputs of `pair`."""
    a, b = np.array([[1, 2], [3, 4]], np.float32), np.array([[5, 6], [7, 8]], np.float32)
    return [tensor(module, "a", a, "FP32", **options), tensor(module, "b", b, "FP32", **options)]


def failure(call):
    """What the client raises."""
    try:
        return f"no error: {call()}"
    except InferenceServerException as error:
        return {"status": error.status(), "text": error.message()}


def infer(client, model, inputs, **options):
    """An inference with our key. The HTTP client writes into the headers it is given: each call has its own."""
    return client.infer(model, inputs, headers=dict(HEADERS), **options)


def texts(result, name):
    """The elements of a BYTES output."""
    return [[element.decode() for element in row] for row in result.as_numpy(name).tolist()]


def metadata(client, model):
    """As JSON, whichever client gives it."""
    options = {"as_json": True} if wire == "grpc" else {}
    return client.get_model_metadata(model, headers=HEADERS, **options)


def streamed(client):
    """Three requests on one stream, the second one bad."""
    answers = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)), headers=HEADERS)
    found = []
    for model in ("pair", "nothing", "pair"):
        client.async_stream_infer(model, floats(kind), request_id=model)
        result, error = answers.get(timeout=60)
        found.append(result.as_numpy("sum").tolist() if error is None else error.message())
    client.stop_stream()
    return found


async def asynchronous():
    """Three at once, on the asynchronous client."""
    async with aio.InferenceServerClient(**AIO_OPTIONS) as client:
        calls = [client.infer(PREFIX + "pair", floats(aio), headers=dict(HEADERS)) for _ in range(3)]
        ready = await client.is_model_ready("pair", headers=HEADERS)
        return ready, [result.as_numpy("product").tolist() for result in await asyncio.gather(*calls)]


client = kind.InferenceServerClient(**OPTIONS)
image = tensor(kind, "image", np.array([PICTURE, PICTURE], np.object_), "BYTES")
column = tensor(kind, "text", np.array([["the good model"], ["bad"]], np.object_), "BYTES")
integers = np.array([[-(2**63), 0, 2**63 - 1]], np.int64)
halves = np.array([[0.5, -2, 65504]], np.float16)
truths = np.array([[True, False, True]])
product = [kind.InferRequestedOutput("product")]
results = {
    "version": version("tritonclient"),
    "live": client.is_server_live(),
    "ready": client.is_server_ready(),
    "model_ready": client.is_model_ready("pair", headers=HEADERS),
    "version_ready": client.is_model_ready(PREFIX + "pair", "1", headers=HEADERS),
    "metadata": metadata(client, PREFIX + "pair"),
    "index": client.get_model_repository_index(headers=HEADERS, **({"as_json": True} if wire == "grpc" else {})),
    "sum": infer(client, "pair", floats(kind)).as_numpy("sum").tolist(),
    "full_name": infer(client, PREFIX + "pair", floats(kind), model_version="1").as_numpy("product").tolist(),
    "one_output": [
        output["name"]
        for output in json.loads(
            json.dumps(
                infer(client, "pair", floats(kind), outputs=product, request_id="seven").get_response(
                    **({"as_json": True} if wire == "grpc" else {})
                )
            )
        )["outputs"]
    ],
    "int64": infer(client, "int64", [tensor(kind, "x", integers, "INT64")]).as_numpy("y").tolist() == integers.tolist(),
    "fp16": infer(client, "fp16", [tensor(kind, "x", halves, "FP16")]).as_numpy("y").tolist() == halves.tolist(),
    "bool": infer(client, "bool", [tensor(kind, "x", truths, "BOOL")]).as_numpy("y").tolist() == truths.tolist(),
    "values": infer(client, "colours", [image]).as_numpy("values").tolist(),
    "concepts": texts(infer(client, "colours", [image]), "concepts"),
    "two": texts(infer(client, "colours", [image], parameters={"max_concepts": 2}), "concepts"),
    "texts": texts(infer(client, "topic", [column]), "concepts"),
    "embedding": infer(client, "vector", [image]).as_numpy("embedding").tolist(),
    "unknown": failure(lambda: infer(client, "nothing", floats(kind))),
    "shape": failure(
        lambda: infer(client, "pair", [tensor(kind, "a", np.zeros((2, 3), np.float32), "FP32"), floats(kind)[1]])
    ),
    "picture": failure(
        lambda: infer(client, "colours", [tensor(kind, "image", np.array([b"no picture"], np.object_), "BYTES")])
    ),
    "no_key": failure(lambda: client.infer("pair", floats(kind))),
    "classification": failure(
        lambda: infer(client, "colours", [image], outputs=[kind.InferRequestedOutput("values", class_count=2)])
    ),
    "async": asyncio.run(asynchronous()),
}
if wire == "grpc":
    results["stream"] = streamed(client)
else:
    json_inputs = floats(kind, binary_data=False)
    json_output = [kind.InferRequestedOutput("sum", binary_data=False)]
    results["json"] = infer(client, "pair", json_inputs, outputs=json_output).as_numpy("sum").tolist()
    pending = [client.async_infer("pair", floats(kind), headers=dict(HEADERS)) for _ in range(2)]
    results["pending"] = [call.get_result().as_numpy("sum").tolist() for call in pending]
    results["compressed"] = failure(lambda: infer(client, "pair", floats(kind), request_compression_algorithm="gzip"))
client.close()
print(json.dumps(results))

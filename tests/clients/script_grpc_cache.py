"""Runs inside an environment with the stock clarifai-grpc and SDK: `use_predict_cache`. Prints what came back as JSON.

Usage: script_grpc_cache.py BASE_URL ROOT_CERTIFICATE PICTURE; the key is in CLARIFAI_PAT.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import clarifai
from clarifai_grpc.channel.clarifai_channel import ClarifaiChannel
from clarifai_grpc.grpc.api import resources_pb2, service_pb2, service_pb2_grpc

base_url, root, picture = sys.argv[1:4]

channel = ClarifaiChannel.get_grpc_channel(base=urlsplit(base_url).netloc, root_certificates_path=root)
stub = service_pb2_grpc.V2Stub(channel)
request = service_pb2.PostModelOutputsRequest(
    user_app_id=resources_pb2.UserAppIDSet(user_id="appliance", app_id="main"),
    model_id="digits",
    inputs=[resources_pb2.Input(data=resources_pb2.Data(image=resources_pb2.Image(base64=Path(picture).read_bytes())))],
    use_predict_cache=True,
)
metadata = (("authorization", f"Key {os.environ['CLARIFAI_PAT']}"),)
replies = [stub.PostModelOutputs(request, metadata=metadata, timeout=60) for _ in range(3)]
sources = [path.read_text(encoding="utf-8") for path in Path(clarifai.__file__).parent.rglob("*.py")]
print(
    json.dumps(
        {
            "codes": [reply.status.code for reply in replies],
            "same": all(reply.outputs[0].data == replies[0].outputs[0].data for reply in replies),
            "sdk_knows_it": any("predict_cache" in source for source in sources),
            "sources": len(sources),
            "versions": {name: version(name) for name in ("clarifai", "clarifai-grpc", "grpcio")},
        }
    )
)

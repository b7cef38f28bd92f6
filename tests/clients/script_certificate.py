"""Runs inside an environment with the stock clarifai-grpc: a call with a client certificate and no key.

Usage: script_certificate.py HOST:PORT ROOT_CERTIFICATE PICTURE [KEY CERTIFICATE]. Prints a JSON string: the first
concept's name, or gRPC's code and what the reply says.
"""

import json
import sys
from pathlib import Path

import grpc
from clarifai_grpc.channel.clarifai_channel import ClarifaiChannel
from clarifai_grpc.grpc.api import resources_pb2, service_pb2, service_pb2_grpc

target, root, picture, *pair = sys.argv[1:]
# The stub works only once a stock channel was made in this process.
ClarifaiChannel.get_grpc_channel(base=target, root_certificates_path=root).close()
credentials = grpc.ssl_channel_credentials(Path(root).read_bytes(), *(Path(file).read_bytes() for file in pair))
request = service_pb2.PostModelOutputsRequest(
    user_app_id=resources_pb2.UserAppIDSet(user_id="appliance", app_id="main"),
    model_id="digits",
    inputs=[resources_pb2.Input(data=resources_pb2.Data(image=resources_pb2.Image(base64=Path(picture).read_bytes())))],
)
with grpc.secure_channel(target, credentials) as channel:
    try:
        reply = service_pb2_grpc.V2Stub(channel).PostModelOutputs(request, timeout=30)
        said = (
            reply.outputs[0].data.concepts[0].name if reply.outputs else f"{reply.status.code} {reply.status.details}"
        )
    except grpc.RpcError as error:
        said = f"{error.code().name}"
print(json.dumps(said))

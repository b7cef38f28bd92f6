"""A runner by hand, for tests of the centre: registers the least that it needs, does with items what it is told."""

import queue
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from clarifai_grpc.grpc.api import resources_pb2, service_pb2
from clarifai_grpc.grpc.api.status import status_code_pb2, status_pb2
from support.appliance import Client

USER_APP = resources_pb2.UserAppIDSet(user_id="acme", app_id="plant")
CLUSTER, NODEPOOL, DEPLOYMENT = "site", "hall-1", "prod"


def ok(reply: Any) -> Any:
    """The reply, once it is a success."""
    assert reply.status.code == status_code_pb2.SUCCESS, reply.status
    return reply


def cluster() -> Any:
    """A cluster as local runners need it."""
    return resources_pb2.ComputeCluster(id=CLUSTER, cluster_type="local-dev", key=resources_pb2.Key(id="a-token"))


def nodepool() -> Any:
    """A nodepool of one machine."""
    return resources_pb2.Nodepool(id=NODEPOOL, instance_types=[resources_pb2.InstanceType(id="m")], max_instances=1)


def worker(version: str, model: str = "echo") -> Any:
    """A worker that runs a version."""
    model_version = resources_pb2.ModelVersion(id=version)
    return resources_pb2.Worker(
        model=resources_pb2.Model(id=model, user_id="acme", app_id="plant", model_version=model_version)
    )


def deployment(version: str) -> Any:
    """A deployment of the version in the nodepool."""
    place = resources_pb2.Nodepool(
        id=NODEPOOL, compute_cluster=resources_pb2.ComputeCluster(id=CLUSTER, user_id="acme")
    )
    return resources_pb2.Deployment(id=DEPLOYMENT, worker=worker(version), nodepools=[place])


def new_version(client: Client) -> str:
    """One more version of the model; its id."""
    version = resources_pb2.ModelVersion(
        pretrained_model_config=resources_pb2.PretrainedModelConfig(local_dev=True),
        method_signatures=[resources_pb2.MethodSignature(name="predict")],
    )
    posted = service_pb2.PostModelVersionsRequest(user_app_id=USER_APP, model_id="echo", model_versions=[version])
    return str(ok(client.call("PostModelVersions", posted)).model.model_version.id)


def register(client: Client, *, deployed: bool = True) -> tuple[str, str]:
    """Cluster, nodepool, app, model, version, runner and deployment; the runner's id and the version's."""
    s, at = service_pb2, {"compute_cluster_id": CLUSTER, "user_app_id": USER_APP}
    ok(
        client.call(
            "PostComputeClusters", s.PostComputeClustersRequest(user_app_id=USER_APP, compute_clusters=[cluster()])
        )
    )
    ok(client.call("PostNodepools", s.PostNodepoolsRequest(**at, nodepools=[nodepool()])))
    ok(client.call("PostApps", s.PostAppsRequest(user_app_id=USER_APP, apps=[resources_pb2.App(id="plant")])))
    ok(client.call("PostModels", s.PostModelsRequest(user_app_id=USER_APP, models=[resources_pb2.Model(id="echo")])))
    version = new_version(client)
    runners = [resources_pb2.Runner(worker=worker(version), num_replicas=1)]
    made = ok(client.call("PostRunners", s.PostRunnersRequest(**at, nodepool_id=NODEPOOL, runners=runners)))
    if deployed:
        posted = s.PostDeploymentsRequest(user_app_id=USER_APP, deployments=[deployment(version)])
        ok(client.call("PostDeployments", posted))
    return made.runners[0].id, version


def predict_request(text: str = "x", **more: Any) -> Any:
    """A predict request with one text."""
    data = resources_pb2.Data(text=resources_pb2.Text(raw=text))
    return service_pb2.PostModelOutputsRequest(
        user_app_id=USER_APP, model_id="echo", inputs=[resources_pb2.Input(data=data)], **more
    )


def at_deployment(id: str = DEPLOYMENT) -> Any:
    """Names a deployment in a request."""
    return resources_pb2.RunnerSelector(deployment=resources_pb2.Deployment(id=id, user_id="acme"))


def at_nodepool(id: str = NODEPOOL) -> Any:
    """Names a nodepool in a request."""
    place = resources_pb2.Nodepool(id=id, compute_cluster=resources_pb2.ComputeCluster(id=CLUSTER, user_id="acme"))
    return resources_pb2.RunnerSelector(nodepool=place)


@dataclass
class HandStream:
    """One stream of ProcessRunnerItems."""

    call: Any
    runner_id: str
    _outgoing: "queue.Queue[Any]" = field(default_factory=queue.Queue)

    def next(self) -> Any:
        """The next message of the centre."""
        return next(self.call)

    def item(self) -> Any:
        """The next item."""
        (item,) = self.next().runner_items
        return item

    def say(self, item_id: str = "", code: int = status_code_pb2.SUCCESS, *texts: str) -> None:
        """Send one message, with an output for each text."""
        outputs = [
            service_pb2.RunnerItemOutput(
                multi_output_response=service_pb2.MultiOutputResponse(
                    status=status_pb2.Status(code=status_code_pb2.SUCCESS),
                    outputs=[resources_pb2.Output(data=resources_pb2.Data(text=resources_pb2.Text(raw=text)))],
                )
            )
            for text in texts
        ]
        self._outgoing.put(
            service_pb2.PostRunnerItemOutputsRequest(
                user_app_id=USER_APP,
                compute_cluster_id=CLUSTER,
                nodepool_id=NODEPOOL,
                runner_id=self.runner_id,
                runner_replica_id="replica-1",
                runner_item_id=item_id,
                runner_item_outputs=outputs,
                status=status_pb2.Status(code=code),
            )
        )

    def answer(self, text: str) -> Any:
        """Take an item, answer it, and half-close. Returns the item."""
        item = self.item()
        self.say(item.id, status_code_pb2.SUCCESS, text)
        self.end()
        return item

    def end(self) -> None:
        """Half-close it."""
        self._outgoing.put(None)

    def ended(self) -> Any:
        """How the centre ended it: a gRPC code."""
        try:
            for _ in self.call:
                pass
        except grpc.RpcError as error:
            return error.code()
        return grpc.StatusCode.OK


@contextmanager
def stream(client: Client, runner_id: str) -> Iterator[HandStream]:
    """Open a stream and say hello; it is cancelled at the end."""
    made = HandStream(None, runner_id)
    made.call = client.stub.ProcessRunnerItems(iter(made._outgoing.get, None), metadata=client.metadata)
    made.say(code=status_code_pb2.RUNNER_STREAM_START)
    try:
        yield made
    finally:
        made.end()
        made.call.cancel()

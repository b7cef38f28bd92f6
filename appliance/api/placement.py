"""Where this appliance stands in Clarifai's terms: one nodepool of a compute cluster, a deployment a model, a runner a
servable. The only module that says which ids these have; whoever registers the appliance elsewhere asks here.

A request may name a place (`runner_selector`). Ours is taken, and says which model is meant where the request does not;
any other one is refused, as the caller wanted it to run elsewhere (PROTOCOL 2.2, 5.5).
"""

import hashlib
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from clarifai_grpc.grpc.api import resources_pb2

from appliance.api.auth import Grant
from appliance.catalog.view import Bundle, State, Version, View
from appliance.core.config import Config
from appliance.core.errors import (
    DeploymentDisabled,
    NotPermitted,
    PlacementMismatch,
    PlacementUnknown,
    UnknownModel,
)
from appliance.core.types import ModelKey
from appliance.tasks.servable import Servable

_LONGEST_ID = 64
_NO_ID = re.compile(r"[^A-Za-z0-9._-]+")


class Ids(NamedTuple):
    """Which model is meant, as `Repository.use` takes it: an empty user or app id is any, "" the newest version."""

    user_id: str
    app_id: str
    model_id: str
    version_id: str


@dataclass(frozen=True, slots=True)
class Deployed:
    """A deployment: an id, and which model it means. `user_id` and `app_id` may be "" for the only one there is."""

    id: str
    ids: Ids

    @property
    def named(self) -> str:
        """The model, as the configuration names it."""
        return "/".join(part or "*" for part in self.ids[:3])


class Places:
    """The ids of this appliance, by its configuration and catalog of now. Cheap to make; made anew when asked."""

    def __init__(self, config: Config, repository: View[Servable]) -> None:
        self._config = config
        self._repository = repository
        self.user_id = config.placement.user_id or config.catalog.user_id
        self.compute_cluster_id = config.placement.compute_cluster_id
        self.nodepool_id = config.placement.nodepool_id or host_id(platform.node())

    # ---- what there is ----

    def deployments(self) -> list[Deployed]:
        """Those of the configuration, then one for each model of the catalog, by its bundle's name; an id is there
        once, and the configuration has the first word."""
        found = {
            table.id: Deployed(table.id, Ids(table.user_id or "", table.app_id or "", table.model, table.version or ""))
            for table in self._config.deployment
        }
        for bundle in self._repository.bundles:
            if bundle.key is not None:
                own = self.deployment_id(bundle.key)
                found.setdefault(own, Deployed(own, Ids(*_parts(bundle.key), "")))
        return list(found.values())

    def deployment_id(self, key: ModelKey) -> str:
        """The id of a model's own deployment: the model's id, made distinct where user or app is not the usual one."""
        catalog = self._config.catalog
        if (key.user_id, key.app_id) == (catalog.user_id, catalog.app_id):
            return key.model_id
        owner = f"-{hashlib.sha256(f'{key.user_id}/{key.app_id}'.encode()).hexdigest()[:8]}"
        return key.model_id[: _LONGEST_ID - len(owner)].rstrip("._-") + owner

    def runners(self) -> Iterator[tuple[str, Version[Servable]]]:
        """Id and version of every servable that answers."""
        for bundle in self._repository.bundles:
            for version in self._repository.versions(bundle):
                if version.ready:
                    yield self.runner_id(version), version

    def runner_id(self, version: Version[Servable]) -> str:
        """32 hex digits, the same after every restart."""
        parts = (self.user_id, self.compute_cluster_id, self.nodepool_id, *_parts(version.config.key), version.id)
        return hashlib.sha256("/".join(parts).encode()).hexdigest()[:32]

    # ---- asking ----

    def is_ours(self, user_id: str, grant: Grant) -> bool:
        """Whether a place of that user may be this one: SDKs name the caller, the model's owner, or nobody."""
        return (
            user_id in ("", "me", self.user_id, self._config.catalog.user_id)
            or user_id == grant.user_id(self._config.catalog.user_id)
            or any(b.key is not None and b.key.user_id == user_id and grant.allows(b.key) for b in self._bundles())
        )

    def check_nodepool(self, user_id: str, cluster_id: str, nodepool_id: str, grant: Grant) -> None:
        """See that it is this one; what is "" was not said. Raises: PlacementUnknown."""
        if cluster_id not in ("", self.compute_cluster_id):
            raise PlacementUnknown("compute_cluster", cluster_id)
        if nodepool_id not in ("", self.nodepool_id):
            raise PlacementUnknown("nodepool", nodepool_id)
        if not self.is_ours(user_id, grant):
            kind, name = ("nodepool", nodepool_id) if nodepool_id else ("compute_cluster", cluster_id)
            raise PlacementUnknown(kind, name or "?", user_id)

    def deployment(self, user_id: str, deployment_id: str, grant: Grant) -> Deployed:
        """Raises: PlacementUnknown. NotPermitted: its model is not the caller's to use."""
        found = next((deployed for deployed in self.deployments() if deployed.id == deployment_id), None)
        if found is None:
            raise PlacementUnknown("deployment", deployment_id)
        if not self.is_ours(user_id, grant):
            raise PlacementUnknown("deployment", deployment_id, user_id)
        if not grant.allows(self.key_of(found)):
            raise NotPermitted(f"Principal {grant.name!r} may not use deployment {deployment_id!r}.")
        return found

    def runner(self, runner_id: str, grant: Grant) -> Version[Servable]:
        """Raises: PlacementUnknown. NotPermitted: its model is not the caller's to use."""
        version = next((version for known, version in self.runners() if known == runner_id), None)
        if version is None:
            raise PlacementUnknown("runner", runner_id)
        if not grant.allows(version.config.key):
            raise NotPermitted(f"Principal {grant.name!r} may not use runner {runner_id!r}.")
        return version

    def key_of(self, deployed: Deployed) -> ModelKey:
        """The model that a deployment means; where there is none, as it would be called."""
        user_id, app_id, model_id, _ = deployed.ids
        for bundle in self._bundles():
            key = bundle.key
            if key and key.model_id == model_id and user_id in ("", key.user_id) and app_id in ("", key.app_id):
                return key
        return ModelKey(user_id or self._config.catalog.user_id, app_id or self._config.catalog.app_id, model_id)

    def version_of(self, deployed: Deployed) -> Version[Servable]:
        """The version that a deployment stands for now, whether it is ready or not.

        Raises: DeploymentDisabled: its model is not here, or held back. NotReady: the catalog is still being read.
        """
        try:
            bundle = self._repository.find(*deployed.ids[:3])
        except UnknownModel as error:
            raise DeploymentDisabled(f"Deployment {deployed.id!r} means model {deployed.named}. {error}") from error
        try:
            return self._repository.version(bundle, deployed.ids.version_id)
        except UnknownModel as error:
            held = [v.id for v in self._repository.versions(bundle) if v.state is State.HELD]
            why = f"version {', '.join(held)} held back by a rollback" if held else "none"
            raise DeploymentDisabled(
                f"Deployment {deployed.id!r} has nothing to serve: {error} On this appliance: {why}."
            ) from error

    def _bundles(self) -> list[Bundle[Servable]]:
        return self._repository.bundles


def chosen(
    selector: resources_pb2.RunnerSelector, asked: Ids, grant: Grant, config: Config, repository: View[Servable]
) -> Ids:
    """Which model a request means that names a place beside (or instead of) a model.

    Args:    asked: what the request itself says; its model id may be "".
    Raises:  PlacementUnknown: not a place of ours. PlacementMismatch: ours, and for another model. NotPermitted.
        DeploymentDisabled: ours, and its model is held back or gone. NotReady: the catalog is still being read.
    """
    if not selector.ByteSize():
        return asked
    places = Places(config, repository)
    for nodepool in (selector.nodepool, selector.runner.nodepool):
        cluster = nodepool.compute_cluster
        if nodepool.ByteSize():
            places.check_nodepool(cluster.user_id, cluster.id, nodepool.id, grant)
    if selector.deployment.id:
        deployed = places.deployment(selector.deployment.user_id, selector.deployment.id, grant)
        version = places.version_of(deployed)
        pinned = version.id if deployed.ids.version_id else ""
        asked = _narrowed("deployment", deployed.id, asked, version.config.key, pinned)
    if selector.runner.id:
        version = places.runner(selector.runner.id, grant)
        asked = _narrowed("runner", selector.runner.id, asked, version.config.key, version.id)
    return asked


def _narrowed(kind: str, name: str, asked: Ids, key: ModelKey, version_id: str) -> Ids:
    """What was asked for, where that place runs it. Raises: PlacementMismatch: it does not."""
    serves = str(key) + (f" version {version_id}" if version_id else "")
    wanted = Ids(*_parts(key), asked.version_id or version_id)
    # Without a model the place says which one: the user and app beside it are then those of the place.
    same = not asked.model_id or all(a in ("", w) for a, w in zip(asked[:3], wanted[:3], strict=True))
    if not same or (version_id and asked.version_id not in ("", version_id)):
        text = "/".join(part or "*" for part in asked[:3]) if asked.model_id else str(key)
        raise PlacementMismatch(kind, name, serves, text + (f" version {asked.version_id}" if asked.version_id else ""))
    return wanted


@lru_cache(maxsize=4)
def host_id(name: str) -> str:
    """A machine's name as an id: its first label, with what an id may not hold left out; "appliance" for nothing."""
    label = _NO_ID.sub("-", name.partition(".")[0])[:_LONGEST_ID].strip("._-")
    return label or "appliance"


def _parts(key: ModelKey) -> tuple[str, str, str]:
    return key.user_id, key.app_id, key.model_id

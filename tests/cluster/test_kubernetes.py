"""Kubernetes manifests: valid by schema, restricted, and telling one story."""

import importlib.resources
import json
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import jsonpatch
import kubernetes_validate
import pytest
import ray
import yaml
from jsonschema import Draft202012Validator, ValidationError
from referencing import Registry, Resource
from typer.main import get_command

from svdmerge.cli import app
from svdmerge.recipe import parse_recipe

CLUSTER = Path(__file__).parents[2] / "cluster"
VERSION = "1.34"
OURS = Path(__file__).with_name("custom-resources.schema.yaml")
MANIFESTS = sorted([*CLUSTER.glob("kubernetes/*/*.yaml"), *CLUSTER.glob("monitoring/*.yaml")])
# Kustomize's own: read in the test of what they name.
PARTS = {"kustomization.yaml", "images.yaml", "fixed-size.yaml"}


def documents(*, of: str = "") -> list[dict[str, Any]]:
    """All manifests, or those of one kind; the caller may change them."""
    return [deepcopy(d) for d in _read() if not of or d["kind"] == of]


@cache
def _read() -> list[dict[str, Any]]:
    return [
        document
        for path in MANIFESTS
        if path.name not in PARTS
        for document in yaml.safe_load_all(path.read_text())
    ]


def one(kind: str) -> dict[str, Any]:
    (found,) = documents(of=kind)
    return found


@cache
def validator(kind: str) -> Draft202012Validator:
    """Of a kind that Kubernetes does not have by itself."""
    folder = importlib.resources.files(kubernetes_validate) / "kubernetes-json-schema"
    core = folder / f"v{VERSION}.0-local-strict" / "_definitions.json"
    schemas = yaml.safe_load(OURS.read_text()), json.loads(core.read_text())
    registry = Registry().with_resources(
        [(schema["$id"], Resource.from_contents(schema)) for schema in schemas]
    )
    return Draft202012Validator({"$ref": f"{schemas[0]['$id']}#/$defs/{kind}"}, registry=registry)


def validate(document: dict[str, Any]) -> None:
    """Raise ValidationError, also for fields that no schema knows."""
    if document["apiVersion"].split("/")[0] in ("ray.io", "monitoring.coreos.com"):
        validator(document["kind"]).validate(document)
    else:
        kubernetes_validate.validate(document, VERSION, strict=True)


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """The spec of every pod in a manifest."""
    if isinstance(value, dict):
        if "containers" in value:
            yield value
        for part in value.values():
            yield from pods(part)
    elif isinstance(value, list):
        for part in value:
            yield from pods(part)


def patched_job() -> dict[str, Any]:
    """The job as Kueue gets it."""
    patch = yaml.safe_load((CLUSTER / "kubernetes/kueue/fixed-size.yaml").read_text())
    return jsonpatch.apply_patch(one("RayJob"), patch)


@pytest.mark.parametrize("document", [*documents(), patched_job()], ids=lambda d: d["kind"])
def test_manifests_are_valid(document: dict[str, Any]) -> None:
    validate(document)


@pytest.mark.parametrize("kind", ["RayCluster", "RayJob", "CronJob", "NetworkPolicy"])
def test_a_misspelt_field_would_not_pass(kind: str) -> None:
    document = one(kind)
    document["spec"]["concurencyPolicy"] = "Forbid"
    with pytest.raises(ValidationError):
        validate(document)
    document = one(kind)
    for pod in pods(document):
        pod["restartPolice"] = "Never"
        with pytest.raises(ValidationError):
            validate(document)


@pytest.mark.parametrize("path", sorted(CLUSTER.glob("kubernetes/*/kustomization.yaml")), ids=str)
def test_kustomizations_name_what_is_there(path: Path) -> None:
    read = yaml.safe_load(path.read_text())
    patches = [patch["path"] for patch in read.get("patches", [])]
    named = [*read["resources"], *read.get("configurations", []), *patches]
    assert all((path.parent / name).exists() for name in named)
    files = {p.name for p in path.parent.iterdir()} - {path.name}
    assert files == {name for name in named if not name.startswith("..")}
    for images in read.get("configurations", []):
        kinds = {i["kind"] for i in yaml.safe_load((path.parent / images).read_text())["images"]}
        assert kinds <= {"RayCluster", "RayJob"}


def test_every_pod_is_held_to_little() -> None:
    """Pod security's `restricted`, requests and limits, no more of Kubernetes' API than needed."""
    for document in documents():
        for pod in pods(document):
            assert pod["securityContext"]["runAsNonRoot"] is True
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in pod["containers"]:
                context, resources = container["securityContext"], container["resources"]
                assert context["allowPrivilegeEscalation"] is False
                assert context["capabilities"] == {"drop": ["ALL"]}
                assert {"cpu", "memory"} <= set(resources["requests"])
                assert resources["limits"]["memory"] == resources["requests"]["memory"]
    accounts = {a["metadata"]["name"]: a for a in documents(of="ServiceAccount")}
    used = {pod["serviceAccountName"] for document in documents() for pod in pods(document)}
    assert used == set(accounts)
    with_api = {name for name, a in accounts.items() if a["automountServiceAccountToken"]}
    assert with_api == {"svdmerge-head"}
    assert "annotations" not in accounts["svdmerge-submitter"]["metadata"]


def test_the_job_runs_on_a_cluster_like_the_one_that_stays() -> None:
    cluster, job = one("RayCluster")["spec"], one("RayJob")["spec"]
    assert job["rayClusterSpec"] == cluster
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["autoscalerOptions"]["version"] == "v2"
    # Autoscaler v2: a pod for each of Ray's nodes, once.
    assert {pod["restartPolicy"] for pod in pods(cluster)} == {"Never"}
    assert job["backoffLimit"] > 0


def test_kueue_gets_a_job_of_a_fixed_size() -> None:
    job = patched_job()
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "svdmerge"}
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert "enableInTreeAutoscaling" not in job["spec"]["rayClusterSpec"]
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] > 0


def test_tick_never_runs_twice_at_once_and_finds_the_head() -> None:
    spec, cluster = one("CronJob")["spec"], one("RayCluster")
    assert spec["concurrencyPolicy"] == "Forbid"
    (container,) = next(pods(spec))["containers"]
    head = f"http://{cluster['metadata']['name']}-head-svc:8265"
    assert head in container["command"]
    secret = container["env"][1]["valueFrom"]["secretKeyRef"]
    assert secret == {"name": cluster["metadata"]["name"], "key": "auth_token"}


def test_commands_and_recipe_of_the_manifests_are_svdmerges() -> None:
    commands = set(get_command(app).commands)  # type: ignore[attr-defined]
    (tick,) = next(pods(one("CronJob")))["containers"]
    told = [one("RayJob")["spec"]["entrypoint"].split(), tick["args"]]
    for program, option, form, command, recipe, *address in told:
        assert (program, option, form) == ("svdmerge", "--log-format", "json")
        assert command in commands | {"tick"}
        assert address == ["--address", "auto"]
        (mount,) = next(pods(one("RayCluster")))["containers"][0]["volumeMounts"]
        assert recipe == f"{mount['mountPath']}/recipe.yml"
    parse_recipe(yaml.safe_load(one("ConfigMap")["data"]["recipe.yml"]))


def test_what_selects_pods_finds_them() -> None:
    def labels(value: Any) -> Iterator[dict[str, str]]:
        if isinstance(value, dict):
            if "spec" in value and "containers" in value["spec"]:
                yield value["metadata"]["labels"]
            for part in value.values():
                yield from labels(part)
        elif isinstance(value, list):
            for part in value:
                yield from labels(part)

    submits, rays = ({"app.kubernetes.io/part-of": "svdmerge", "app.kubernetes.io/component": part}
                     for part in ("submitter", "ray"))  # fmt: skip
    assert list(labels(one("CronJob"))) == [submits]
    assert list(labels(one("RayCluster"))) == [rays] * 3
    assert submits in list(labels(one("RayJob")))
    assert one("PodMonitor")["spec"]["selector"]["matchLabels"] == rays
    policy = one("NetworkPolicy")["spec"]
    assert policy["podSelector"]["matchLabels"] == rays
    assert policy["ingress"][1]["from"][0]["podSelector"]["matchLabels"] == submits
    (head, *_) = pods(one("RayCluster"))
    ports = {p["name"]: p["containerPort"] for p in head["containers"][0]["ports"]}
    assert policy["ingress"][1]["ports"][0]["port"] == ports["dashboard"]
    assert policy["ingress"][2]["ports"][0]["port"] == ports["metrics"]
    assert one("PodMonitor")["spec"]["podMetricsEndpoints"][0]["port"] in ports

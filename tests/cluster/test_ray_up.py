"""`ray up` files, by Ray's own validator and against its defaults' traps; rights; the image."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
FILES = sorted(CLUSTER.glob("ray-up/*.yaml"))
DOCKERFILE = (CLUSTER / "Dockerfile").read_text()


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A file as `ray up` reads it, Ray's defaults filled in."""
    read = prepare_config(yaml.safe_load(request.param.read_text()))
    validate_config(read)
    return read


def test_both_clouds_are_there() -> None:
    assert [path.stem for path in FILES] == ["aws", "gcp"]


def test_a_misspelt_key_would_not_pass(config: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        validate_config(config | {"idle_timeout_minute": 5})


def test_workers_are_spot_machines_and_the_head_is_not(config: dict[str, Any]) -> None:
    types = {
        name: json.dumps(kind["node_config"])
        for name, kind in config["available_node_types"].items()
    }
    spot = re.compile(r'"MarketType": "spot"|"preemptible": true')
    assert config["head_node_type"] == "head"
    assert not spot.search(types["head"])
    assert spot.search(types["worker"])
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0
    # A run looks at what machines there are before it asks for more.
    assert config["available_node_types"]["worker"]["min_workers"] > 0


def test_none_of_rays_defaults_that_we_do_not_want_is_left(config: dict[str, Any]) -> None:
    head, worker = (" ".join(config[f"{n}_start_ray_commands"]) for n in ("head", "worker"))
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in json.dumps(config)
    assert "RAY_AUTH_MODE=token" in head
    assert "RAY_AUTH_MODE=token" in worker
    assert config["provider"]["cache_stopped_nodes"] is False
    setup = " ".join([*config["head_setup_commands"], *config["worker_setup_commands"]])
    assert "constraints.txt" in setup
    assert "nightly" not in setup
    assert "ray-wheels" not in setup
    # Autoscaler v2 is what `ray up` starts by itself, unless this says otherwise.
    assert "enable_autoscaler_v2" not in json.dumps(config)


def test_machines_have_roles_of_their_own(config: dict[str, Any]) -> None:
    given = {
        name: json.dumps(
            [kind["node_config"].get(k) for k in ("IamInstanceProfile", "serviceAccounts")]
        )
        for name, kind in config["available_node_types"].items()
    }
    assert "svdmerge-head" in given["head"]
    assert "svdmerge-worker" in given["worker"]


@pytest.mark.parametrize("name", ["aws-bucket", "aws-autoscaler"])
def test_policies_are_well_formed_and_give_no_more_than_they_name(name: str) -> None:
    import boto3
    from moto import mock_aws

    text = (CLUSTER / f"iam/{name}.json").read_text().replace("ACCOUNT", "123456789012")
    with mock_aws():  # which reads a policy's grammar as AWS does
        boto3.client("iam").create_policy(PolicyName=name, PolicyDocument=text)
    for statement in json.loads(text)["Statement"]:
        assert all("*" not in action for action in statement["Action"])
        looks = all(":Describe" in action for action in statement["Action"])
        assert looks or statement["Resource"] != "*"


def test_only_the_store_and_outputs_are_written() -> None:
    policy = json.loads((CLUSTER / "iam/aws-bucket.json").read_text())
    recipe = yaml.safe_load((CLUSTER / "kubernetes/shared/recipe.yaml").read_text())
    read = yaml.safe_load(recipe["data"]["recipe.yml"])
    writes = [s for s in policy["Statement"] if "s3:PutObject" in s["Action"]]
    (statement,) = writes
    allowed = [r.removeprefix("arn:aws:s3:::").rstrip("*/") for r in statement["Resource"]]
    assert allowed == [read[k].removeprefix("s3://") for k in ("store", "out")]


def test_the_role_on_gcp_gives_objects_alone() -> None:
    role = yaml.safe_load((CLUSTER / "iam/gcp-bucket-role.yaml").read_text())
    kinds = {p.rsplit(".", 1)[0] for p in role["includedPermissions"]}
    assert kinds == {"storage.objects", "storage.multipartUploads"}


def test_the_image_holds_the_tested_versions_and_runs_as_nobody_in_particular() -> None:
    installs = re.findall(r"pip install (.*)", DOCKERFILE)
    assert len(installs) == 4
    assert all("-c constraints.txt" in line for line in installs)
    stages = re.findall(r"^FROM base AS (\w+)$", DOCKERFILE, flags=re.MULTILINE)
    assert stages == ["cpu", "gpu"]
    assert re.findall(r"^USER (\S+)", DOCKERFILE, flags=re.MULTILINE) == ["1000", "1000"]
    for copied in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, flags=re.MULTILINE):
        assert all((ROOT / name).exists() for name in copied.split())
        ignored = (CLUSTER / "Dockerfile.dockerignore").read_text()
        assert all(f"!{name}" in ignored for name in copied.split())

"""What all tests share: checked shapes, one Ray, an S3 in this process, quiet Hypothesis."""

import logging
import os
from collections.abc import Generator

import pytest
import torch
from fake_hub import Hub, serving
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Before Ray or botocore is imported anywhere: both read the environment on import or first use.
os.environ |= {
    "RAY_AUTH_MODE": "disabled",
    "RAY_task_oom_retries": "1",
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
    "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
}

# Shapes and types in these signatures are executed. Before any of them is imported.
install_import_hook(["svdmerge.core", "svdmerge.peers"], "beartype.beartype")
torch.set_num_threads(1)
settings.register_profile(
    "svdmerge",
    deadline=None,
    derandomize="CI" in os.environ,
    # A temporary folder is shared by the examples of one test, on purpose.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("svdmerge")


@pytest.fixture(scope="session")
def s3_server() -> Generator[str]:
    """An S3 in this process: its address. Processes started after it find it too."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_uri(s3_server: str) -> str:
    """A fresh bucket."""
    import boto3

    name = f"bucket-{os.urandom(6).hex()}"
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket=name)
    return f"s3://{name}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Generator[Hub]:
    """A hub that this process's libraries take for the real one."""
    from huggingface_hub import HfFileSystem, constants

    with serving() as found:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, found.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", found.token)
        HfFileSystem.clear_instance_cache()
        yield found
        HfFileSystem.clear_instance_cache()


@pytest.fixture
def memory_uri() -> str:
    """A fresh folder of this process's memory filesystem."""
    return f"memory://test-{os.urandom(6).hex()}"


@pytest.fixture(scope="session")
def ray_session(s3_server: str) -> Generator[None]:
    """One Ray of two CPUs for the whole run; its workers see the S3 of `s3_server`."""
    del s3_server
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()

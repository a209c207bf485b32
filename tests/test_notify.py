"""Notification: told what happened, tried again, never the reason for a failure, no secret out."""

import json
import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from merging import Bench, micro_bench, micro_model

from svdmerge import notify
from svdmerge.errors import CheckpointError, RecipeError
from svdmerge.rollback import rollback
from svdmerge.tick import tick

SECRET = "T0/B1/s3cr3t"


@dataclass
class Hook:
    """What was posted, and statuses to answer with next."""

    address: str = ""
    told: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    statuses: list[int] = field(default_factory=list[int])


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Generator[Hook]:
    found = Hook()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = found.statuses.pop(0) if found.statuses else 200
            if status == 200:
                found.told.append(json.loads(body))
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found.address = f"http://127.0.0.1:{server.server_address[1]}/{SECRET}"
    monkeypatch.setattr(notify._post.retry, "wait", lambda state: 0.0)  # type: ignore[attr-defined]
    yield found
    server.shutdown()
    server.server_close()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return micro_bench(tmp_path)


def test_releases_refusals_rollbacks_and_failures_are_told_once(hook: Hook, bench: Bench) -> None:
    raw = {"models": [f"{bench.root}/source-*"], "tick": {"webhook": hook.address}}
    recipe = bench.recipe(**raw)
    tick(recipe, address="none")
    tick(recipe, address="none")
    micro_model(bench.root / "source-9", seed=9, base=bench.base)
    tick(recipe, address="none")
    rollback(recipe)
    (bench.root / "source-0").mkdir()
    tick(recipe, address="none")
    tick(recipe, address="none")
    (bench.base / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        tick(recipe, address="none")
    statuses = [m["status"] for m in hook.told]
    assert statuses == ["released", "released", "released", "refused", "failed"]
    assert hook.told[1]["release"]["added"] == [str(bench.root / "source-9")]
    for file in bench.root.rglob("*"):
        assert file.is_dir() or SECRET.encode() not in file.read_bytes(), file


def test_a_webhook_that_fails_is_tried_again_and_then_only_told(hook: Hook, bench: Bench) -> None:
    assert notify.post(hook.address, {}) is None
    hook.statuses = [500, 503]
    assert notify.post(hook.address, {}) is None
    hook.statuses = [500, 500, 404]
    recipe = bench.recipe(tick={"webhook": hook.address})
    (warning,) = tick(recipe, address="none").warnings
    assert warning == "the webhook at 127.0.0.1 was not told: HTTP 404"
    nobody = "http://127.0.0.1:1/s3cr3t"
    assert notify.post(nobody, {}) == "the webhook at 127.0.0.1 was not told: URLError"


def test_the_address_may_stand_in_the_environment(
    hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_HOOK", hook.address)
    assert notify.post("$MY_HOOK", {"a": 1}) is None
    assert hook.told == [{"a": 1}]
    told = notify.post("$NO_HOOK", {})
    assert told is not None
    assert "$NO_HOOK, which is not set" in told


def test_what_is_no_address_is_refused_without_telling_it(bench: Bench) -> None:
    with pytest.raises(RecipeError, match="http") as refused:
        bench.recipe(tick={"webhook": f"file:///{SECRET}"})
    assert SECRET not in str(refused.value)

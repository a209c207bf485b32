"""Notification by webhook: tried a few times, and never the reason for a failure."""

import json
import os
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_exponential

TIMEOUT_S = 10.0
# Three tries within some seconds: what lasts longer is not worth a tick's waiting.
TRIES = 3


def post(address: str, message: dict[str, Any]) -> str | None:
    """Post a message as JSON; what went wrong, if it was not taken.

    Only the address's host is ever told: its path and query are often secrets. `$NAME` is read from
    the environment.
    """
    url = os.environ.get(address[1:], "") if address.startswith("$") else address
    host = urlsplit(url).hostname or f"{address}, which is not set"
    try:
        _post(url, json.dumps(message, default=str).encode())
    except urllib.error.HTTPError as error:
        return f"the webhook at {host} was not told: HTTP {error.code}"
    except Exception as error:  # whatever it is: a message is not worth a failed tick
        return f"the webhook at {host} was not told: {type(error).__name__}"
    return None


@retry(
    stop=stop_after_attempt(TRIES),
    wait=wait_exponential(multiplier=0.5, max=5.0),
    retry=retry_if_exception_type(OSError),  # the network's, and HTTP statuses of errors
    reraise=True,
)
def _post(url: str, data: bytes) -> None:
    if not url.startswith(("http://", "https://")):
        raise ValueError("no address")
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data=data, headers=headers)
    with urllib.request.urlopen(request, timeout=TIMEOUT_S):
        pass

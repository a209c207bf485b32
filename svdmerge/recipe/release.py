"""The recipe's `gate` and `tick` sections: what is released, and how."""

import re
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    Field,
)

from svdmerge.recipe.sections import Section
from svdmerge.recipe.tune import TuneConfig


class GateConfig(Section):
    """What a merge must hold to become the current release."""

    margin: Annotated[float, Field(ge=0)] = 0.01
    """How much worse than the current release's its measure may be: a share of the examples told
    right, or nats per token."""
    examples: TuneConfig | None = None
    """What it is measured on, as in `tune`, whose examples are the default."""


def _webhook(value: str) -> str:
    # Not told: an address of this kind is a secret.
    if not re.match(r"https?://[^/]|\$\w+$", value):
        raise ValueError("expected an http(s) URL, or $NAME of an environment variable")
    return value


class TickConfig(Section):
    """Re-merging as sources appear, change and go."""

    unfit: Literal["stop", "skip"] = "stop"
    """Where a source cannot be used: no release, or one without it; it is told either way."""
    keep: Annotated[int, Field(ge=2)] = 10
    """Last releases whose models are kept."""
    releases: str | None = None
    """Folder of the release records; `releases` in the store by default."""
    webhook: Annotated[str, AfterValidator(_webhook)] | None = None
    """Where releases, refusals and failures are posted as JSON; $NAME is read from the environment.
    """

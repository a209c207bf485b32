"""Where things lie in the store and outputs, and what keys cover. Imports nothing heavy."""

import hashlib
import json
from collections.abc import Iterable

# Of every record and schema in the store. It is part of all keys: another version starts afresh.
SCHEMA_VERSION = 3

# Components per batch: the unit of depth and of reading. Winners of a source are few (about 5 of
# 384 on real deltas), so a block is small, yet wide enough for level-3 BLAS in iterative solvers.
BLOCK = 16

# What an output claims; written last, so that what has one is whole.
MANIFEST = "svdmerge_manifest.json"


def base_key(revision: str, *, solver: str) -> str:
    """Key of all components of a base: its revision and what their numbers depend on."""
    fields = [SCHEMA_VERSION, revision, solver]
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:32]


def group_key(parameters: Iterable[str]) -> str:
    """Digest of the names of matrices that travel together."""
    return hashlib.sha256("\0".join(parameters).encode()).hexdigest()[:16]


def commits_path(base: str, source: str) -> str:
    """Folder of a source's commits."""
    return f"commits/{base}/{source}"


def components_path(base: str, source: str) -> str:
    """Folder of a source's shards."""
    return f"components/{base}/{source}"


def run_path(plan_hash: str) -> str:
    """Folder of a run."""
    return f"runs/{plan_hash}"


def scratch_path(name: str) -> str:
    """Folder of what tasks hand to each other; removed at the end."""
    return f"scratch/{name}"

"""The Arrow schemas are a contract: a store written today is read by tomorrow's release."""

import pyarrow as pa
import pytest

from svdmerge.storage import schema

# A change here is a change of what stores hold: raise SCHEMA_VERSION in storage/layout.py with it.
CONTRACT = {
    "SHARD": """
parameter: string not null
index: int32 not null
kind: string not null
class_group: int32
s: float not null
u: large_list<item: float not null> not null
vh: large_list<item: float not null> not null
""",
    "SPECTRUM": """
parameter: string not null
sha256: string not null
m: int64 not null
n: int64 not null
fro: double not null
base_fro: double
bound: double not null
noise: double not null
first: int32 not null
solver: string not null
s: large_list<item: float not null> not null
""",
    "SELECTION": """
parameter: string not null
rank: int32 not null
source: string not null
index: int32 not null
s: float not null
salience: double not null
sha256: string not null
""",
    "PROVENANCE": """
parameter: string not null
rank: int32 not null
model: string not null
source: string not null
weight: double not null
index: int32 not null
s: float not null
salience: double not null
sha256: string not null
""",
}


def test_no_schema_is_without_a_contract() -> None:
    found = {name for name, value in vars(schema).items() if isinstance(value, pa.Schema)}
    assert found == set(CONTRACT)


@pytest.mark.parametrize("name", CONTRACT)
def test_a_schema_is_what_the_contract_says(name: str) -> None:
    got: pa.Schema = getattr(schema, name)
    lines = [f"{f.name}: {f.type}{'' if f.nullable else ' not null'}" for f in got]
    assert lines == CONTRACT[name].strip().splitlines()


@pytest.mark.parametrize("name", CONTRACT)
def test_a_schema_carries_its_name_and_version(name: str) -> None:
    got: pa.Schema = getattr(schema, name)
    assert got.metadata == {b"svdmerge_schema": f"{name.lower()}/{schema.VERSION}".encode()}


def test_the_version_is_that_of_the_contract() -> None:
    assert schema.VERSION == 3

"""How shares, sizes and rows are written in a recipe."""

import contextlib
import re
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PositiveInt,
)

_UNITS = (
    {"": 1, "B": 1}
    | {f"{p}iB": 1 << (10 * i) for i, p in enumerate("KMGT", start=1)}
    | {f"{p}B": 10 ** (3 * i) for i, p in enumerate("KMGT", start=1)}
)


def parse_share(value: object) -> int | float:
    """`10%` -> 0.1, `0.1` -> 0.1, `38` -> 38: a share of the rank is a float, a count an int."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*([-+0-9.eE]+)\s*(%?)\s*", value)):
        text, percent = match.groups()
        with contextlib.suppress(ValueError):
            value = float(text) / 100 if percent else float(text) if "." in text else int(text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"got {value!r}; expected a share such as 10% or a number such as 38")
    if isinstance(value, float) and not 0 < value <= 1:
        raise ValueError(f"got {value:.6g} as a share; expected more than 0 % and at most 100 %")
    if value <= 0:
        raise ValueError(f"got {value}; expected at least 1")
    return value


def parse_bytes(value: object) -> int:
    """`2GiB` -> 2147483648."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMGT]?i?B?)\s*", str(value))
    if not match or match[2] not in _UNITS or (size := int(float(match[1]) * _UNITS[match[2]])) < 1:
        raise ValueError(f"got {value!r}; expected a size such as 2GiB or 500MB")
    return size


def parse_shard_size(value: object) -> int | str:
    """`5GB` -> 5000000000, `base` as it is."""
    return "base" if value == "base" else parse_bytes(value)


def parse_density(value: object) -> float:
    """`20%` -> 0.2, `0.2` -> 0.2, `1` -> 1.0: a share, of entries."""
    share = parse_share(value)
    if share > 1:
        raise ValueError(f"got {value!r}; expected a share such as 20% or 0.2")
    return float(share)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRows:
    """Rows first..stop-1 of a tensor, all from `first` on where `stop` is None."""

    tensor: str
    first: int = 0
    stop: int | None = None


def parse_rows(text: str) -> TensorRows:
    """`a.weight[0:768]` -> those rows of a.weight; `a.weight` -> all of them."""
    found = re.fullmatch(r"(.+)\[(\d*):(\d*)\]", text)
    if not found:
        return TensorRows(tensor=text)
    name, first, stop = found.groups()
    return TensorRows(tensor=name, first=int(first or 0), stop=int(stop) if stop else None)


# What may be written, for the schema that editors read.
_Percent = Annotated[str, Field(pattern=r"^\s*[-+0-9.eE]+\s*%?\s*$")]
_Size = Annotated[str, Field(pattern=r"^\s*[0-9.]+\s*([KMGT]i?)?B?\s*$")]
Density = Annotated[float, BeforeValidator(parse_density, json_schema_input_type=float | _Percent)]
Share = Annotated[
    int | float, BeforeValidator(parse_share, json_schema_input_type=int | float | _Percent)
]
Bytes = Annotated[int, BeforeValidator(parse_bytes, json_schema_input_type=PositiveInt | _Size)]
ShardSize = Annotated[
    int | Literal["base"],
    BeforeValidator(parse_shard_size, json_schema_input_type=PositiveInt | _Size | Literal["base"]),
]

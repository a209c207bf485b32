"""LoRA adapters as differences of a base's tensors, still in factors; headers only.

Read are PEFT's layout and the key styles of kohya's and diffusers' trainers. What an adapter holds
that is no low-rank difference (DoRA's magnitudes, LoHa, LoKr, trained tokens) is refused by name.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn, cast

from svdmerge.errors import CheckpointError
from svdmerge.storage.adapter_names import LOW_RANK, Half, half_of, kohya_module
from svdmerge.storage.architecture import BaseNames
from svdmerge.storage.checkpoint import MAX_CONFIG_BYTES, TensorRef, read_header
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.low_rank import LowRank, Stack

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MERGE = "Merge it into its base (`merge_and_unload().save_pretrained(...)`) and list that model."


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter's differences and the tensors that it replaces whole, by the base's names."""

    low_rank: Mapping[str, LowRank]
    whole: Mapping[str, TensorRef]
    """Perhaps of other shapes, as embeddings with tokens added."""
    unplaced: tuple[str, ...]
    """What it saved whole for modules that the base does not have, such as a head."""
    digest: str
    """What its immutable revision follows from."""


def adapter_file(place: Folder) -> tuple[Folder, str] | None:
    """Folder and weights file of an adapter at a place; None if what lies there is none.

    A place is a folder, PEFT's or one with a trainer's only file, or such a file.
    """
    names = place.names()
    if place.stat() is None and CONFIG in names:
        if WEIGHTS in names:
            return place, WEIGHTS
        raise CheckpointError(
            f"{place.uri}: has {CONFIG} and no {WEIGHTS}",
            "Only adapters in safetensors are read." if "adapter_model.bin" in names else "",
            "Save it again with `save_pretrained(folder, safe_serialization=True)`.",
        )
    if place.stat() is not None:
        folder, names = place.parent, [place.name]
    else:
        folder, names = place, [n for n in names if n.endswith(".safetensors")]
    if len(names) != 1 or not names[0].endswith(".safetensors"):
        return None
    tensors, _, _ = read_header(folder, names[0])
    halves = {half_of(name)[1] for name in tensors}
    return (folder, names[0]) if halves & LOW_RANK else None


def open_adapter(folder: Folder, file: str, *, base: BaseNames) -> Adapter:
    """The adapter in a file, for a base.

    Raises:
        CheckpointError: half of a pair is missing, ranks contradict each other or the
            configuration, a layer is none of the base's, or it is no LoRA.
    """
    tensors, header, stat = read_header(folder, file)
    config = _config(folder) if folder.stat(CONFIG) is not None else None
    place = f"{folder.uri}/{file}"
    pairs: dict[str, dict[Half, TensorRef]] = {}
    whole: dict[str, TensorRef] = {}
    for name, ref in tensors.items():
        module, half = half_of(name)
        if half is Half.FOREIGN:
            _refuse(place, name)
        elif half is Half.WHOLE:
            whole[module] = ref
        else:
            pairs.setdefault(module, {})[half] = ref
    if not pairs:
        raise CheckpointError(f"{place}: holds no LoRA layer", "", "Check the path.")
    found = [
        delta
        for module, parts in sorted(pairs.items())
        for delta in _deltas(place, module, parts, config=config, base=base)
    ]
    low_rank = {delta.tensor: delta for delta in _oriented(place, found, base.shapes, config)}
    if len(low_rank) < len(found):
        raise CheckpointError(f"{place}: two of its layers belong to one tensor of the base")
    placed = {name: base.tensor(name) for name in whole}
    return Adapter(
        low_rank=low_rank,
        whole={tensor: whole[name] for name, tensor in placed.items() if tensor},
        unplaced=tuple(sorted(name for name, tensor in placed.items() if not tensor)),
        # As of checkpoints: places matter where versions are times.
        digest="\0".join(
            [
                folder.uri if folder.is_local else "",
                str(stat.size),
                stat.version,
                header,
                json.dumps(config, sort_keys=True),
            ]
        ),
    )


def _refuse(place: str, name: str) -> NoReturn:
    raise CheckpointError(
        f"{place}: {name} is no part of a LoRA",
        "DoRA, LoHa, LoKr, trained tokens and the like are no low-rank differences.",
        _MERGE,
    )


def _config(folder: Folder) -> dict[str, Any]:
    place = f"{folder.uri}/{CONFIG}"
    try:
        config = json.loads(folder.read(CONFIG, start=0, stop=MAX_CONFIG_BYTES))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{place}: not valid", str(error), "Fetch it again.") from None
    config = cast(dict[str, Any], config)
    kind = str(config.get("peft_type", "LORA")).upper()
    if kind != "LORA" or config.get("use_dora"):
        raise CheckpointError(
            f"{place}: is a {'DoRA' if config.get('use_dora') else kind} adapter",
            "Only LoRA is a low-rank difference of the base.",
            _MERGE,
        )
    return config


def _deltas(
    place: str,
    module: str,
    parts: Mapping[Half, TensorRef],
    *,
    config: Mapping[str, Any] | None,
    base: BaseNames,
) -> Iterator[LowRank]:
    """A layer's difference, and that of its bias if it has one; or those of a stack of experts."""
    embeds = Half.TOKENS in parts or Half.VECTORS in parts
    halves = (Half.TOKENS, Half.VECTORS) if embeds else (Half.DOWN, Half.UP)
    down, up = (parts.get(half) for half in halves)
    if down is None or up is None:
        have, lack = ("B", "A") if down is None else ("A", "B")
        raise CheckpointError(
            f"{place}: {module} has lora_{have} and no lora_{lack}",
            "Half of a layer is missing.",
            "Fetch or save the adapter again.",
        )
    if len(down.shape) < 2 or len(up.shape) < 2 or up.shape[1] != down.shape[0] or not up.shape[1]:
        raise CheckpointError(
            f"{place}: {module} has lora_A {list(down.shape)} and lora_B {list(up.shape)}",
            "Their ranks differ.",
            "Do not use this adapter unless you know who wrote it.",
        )
    spelt = kohya_module(module)
    tensor = base.tensor(f"{spelt or module}.weight", flattened=spelt is not None)
    if tensor is None:
        yield from _of_experts(place, module, down, up, config=config, base=base)
        return
    scale = _scale(place, module, rank=down.shape[0], config=config)
    alpha = parts.get(Half.ALPHA)
    if alpha is not None:
        if alpha.numel != 1:
            raise CheckpointError(f"{place}: {module}: alpha is {list(alpha.shape)}, not a number")
        scale = 1.0 / down.shape[0]
    yield LowRank(
        tensor=tensor, up=up, down=down, scale=scale, alpha=alpha, transposed=embeds
    )  # fmt: skip
    if (bias := parts.get(Half.BIAS)) is not None:
        name = f"{tensor.removesuffix('.weight')}.bias"
        if base.shapes.get(name) != bias.shape:
            raise CheckpointError(
                f"{place}: {module} adds a bias of {list(bias.shape)}",
                f"The base has no such bias {name}.",
                _MERGE,
            )
        yield LowRank(tensor=name, up=bias, down=None, scale=scale)


def _of_experts(
    place: str,
    module: str,
    down: TensorRef,
    up: TensorRef,
    *,
    config: Mapping[str, Any] | None,
    base: BaseNames,
) -> Iterator[LowRank]:
    """The differences of experts' matrices, which PEFT adapts as one parameter of their module.

    A second parameter's layer is wrapped around the first's; which is whose, shapes tell.
    """
    owner = module.replace(".base_layer", "")
    stack = base.stack(owner, down=down.shape, up=up.shape)
    if stack is None:
        raise CheckpointError(
            f"{place}: {module} is no layer of the base",
            f"Expected a tensor such as {next(iter(base.shapes), '')}.",
            "Check that the adapter is of this base; layers that transformers names otherwise than"
            " the base's files are found if it is installed.",
        )
    experts = stack.shape[0]
    leaf = stack.name.rpartition(".")[2]
    scale = _scale(place, f"{owner}.{leaf}", rank=down.shape[0] // experts, config=config)
    for part in stack.parts:
        rows = up.shape[0] if part.expert is None else part.rows
        yield LowRank(
            tensor=part.tensor, up=up, down=down, scale=scale, transposed=stack.transposed,
            stack=Stack(experts=experts, expert=part.expert, first=part.first, rows=rows),
        )  # fmt: skip


def _scale(place: str, module: str, *, rank: int, config: Mapping[str, Any] | None) -> float:
    """What PEFT multiplies B A by. Raises: CheckpointError, if the configuration lies."""
    if config is None:
        return 1.0
    told = _pattern(place, config.get("rank_pattern"), module, config.get("r", rank))
    alpha = _pattern(place, config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
    if told != rank or not _is_number(alpha):
        raise CheckpointError(
            f"{place}: {module} has rank {rank}",
            f"Its {CONFIG} says rank {told} and alpha {alpha}.",
            "Do not use this adapter unless you know who wrote it.",
        )
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _is_number(alpha: object) -> bool:
    # Python's own JSON takes NaN, infinities, and integers of any length.
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        return False
    return abs(alpha) <= sys.float_info.max


def _pattern(place: str, patterns: object, module: str, default: Any) -> Any:
    """The value of the first pattern that a module's name ends with, as PEFT matches them.

    Raises: CheckpointError, if a pattern is none.
    """
    found = cast(dict[str, Any], patterns) if isinstance(patterns, dict) else {}
    return next((v for p, v in found.items() if _ends_with(place, module, p)), default)


def _ends_with(place: str, module: str, pattern: str) -> bool:
    # By Arrow's RE2, whose time is linear: `re` takes for ever with some patterns.
    import pyarrow
    from pyarrow import compute

    arrow: Any = compute  # its functions are made as it is imported
    try:
        return arrow.match_substring_regex(
            pyarrow.scalar(module), pattern=rf"^(.*\.)?({pattern})$"
        ).as_py()
    except (pyarrow.ArrowInvalid, UnicodeError) as error:
        raise CheckpointError(
            f"{place}: {CONFIG} has the pattern {pattern[:80]!r}",
            str(error),
            "Write it as names of modules, or as a plain regular expression.",
        ) from None


def _oriented(
    place: str,
    found: list[LowRank],
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any] | None,
) -> Iterator[LowRank]:
    """The differences, each with the way that the base stores its layer.

    Shapes tell it but for square layers: there the others of the adapter do, for PEFT's
    `fan_in_fan_out` is that of the last layer it made; it decides where all are square. Embeddings
    are always the other way round.
    """
    ways = {d.tensor: _ways(d, shapes[d.tensor]) for d in found}
    layers = [d.tensor for d in found if d.down and not d.stack and not d.transposed]
    told = {next(iter(ways[name])) for name in layers if len(ways[name]) == 1}
    usual = told.pop() if len(told) == 1 else bool((config or {}).get("fan_in_fan_out"))
    for delta in found:
        fits = ways[delta.tensor]
        if not fits:
            up, down = delta.up.shape, delta.down.shape if delta.down else ()
            raise CheckpointError(
                f"{place}: {delta.tensor}: lora_A {list(down)} and lora_B {list(up)} do not fit",
                f"The base's tensor is {list(shapes[delta.tensor])}.",
                "Check that the adapter is of this base.",
            )
        way = next(iter(fits)) if len(fits) == 1 else delta.transposed or usual
        yield replace(delta, transposed=way)


def _ways(delta: LowRank, shape: tuple[int, ...]) -> set[bool]:
    """Whether a layer may be stored as it is (False) or transposed (True)."""
    if delta.down is None:
        return {False}
    if delta.stack is not None:
        return {delta.transposed}
    up, down = delta.up.shape, delta.down.shape
    ways: set[bool] = set()
    if shape == (up[0], *down[1:]) and all(x == 1 for x in up[2:]):
        ways.add(False)
    if len(up) == len(down) == 2 and shape == (down[1], up[0]):
        ways.add(True)
    return ways

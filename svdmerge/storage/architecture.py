"""Where a model class of transformers keeps what is in a checkpoint's files, and under what name.

Adapters are named after the class. Since transformers 5 some classes rename layers (ViT), and
stack the matrices that files hold expert by expert, gate and up together (Mixtral, Qwen's
mixtures). Its own table of conversions tells; no weight is made or read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

from svdmerge.storage.adapter_names import resolve

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A tensor of the files, in a tensor of the class."""

    tensor: str
    expert: int | None
    """Which matrix of the class's stack it is of; None if it is all of that tensor."""
    first: int
    """Its first row in that matrix, 0 if it is all."""
    rows: int
    """How many it has there, 0 if it is all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassTensor:
    """A tensor of the class."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    """Of the files; what is no stack has one."""
    transposed: bool
    """Whether a stack is (experts, in, out) and not (experts, out, in)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseNames:
    """A base's tensors by the names that adapters give them: the files', or the class's."""

    shapes: Shapes
    """Of the files' tensors."""
    config: Mapping[str, Any]

    def tensor(self, name: str, *, flattened: bool = False) -> str | None:
        """The files' tensor that a name stands for; None if there is none, or more than one."""
        if (found := resolve(name, self.shapes, flattened=flattened)) is not None:
            return found
        own = self._class_tensors()
        found = resolve(name, own, flattened=flattened)
        parts = own[found].parts if found else ()
        return parts[0].tensor if len(parts) == 1 and parts[0].expert is None else None

    def stack(
        self, module: str, *, down: tuple[int, ...], up: tuple[int, ...]
    ) -> ClassTensor | None:
        """The stack in a module of experts that factors (experts * rank, in) and
        (out, rank * experts) are of; None if there is none, or more than one."""
        found = [t for t in self._stacks(module) if _fits(t, down=down, up=up)]
        return found[0] if len(found) == 1 else None

    def _stacks(self, module: str) -> list[ClassTensor]:
        own = {n: t for n, t in self._class_tensors().items() if len(t.shape) == 3}
        ends = {name.rpartition(".")[0] for name in own}
        owner = resolve(module, ends)
        return [t for name, t in own.items() if name.rpartition(".")[0] == owner]

    def _class_tensors(self) -> Mapping[str, ClassTensor]:
        return _class_tensors(json.dumps(self.config, sort_keys=True), tuple(self.shapes.items()))


def _fits(tensor: ClassTensor, *, down: tuple[int, ...], up: tuple[int, ...]) -> bool:
    experts, rows, columns = tensor.shape
    m, n = (columns, rows) if tensor.transposed else (rows, columns)
    return down[1] == n and up[0] == m and down[0] == up[1] and down[0] % experts == 0


@lru_cache(maxsize=4)
def _class_tensors(
    config: str, shapes: tuple[tuple[str, tuple[int, ...]], ...]
) -> Mapping[str, ClassTensor]:
    """Tensors of the class that the configuration names; none if transformers does not build it."""
    model = _empty(json.loads(config))
    return {} if model is None else class_tensors(model, dict(shapes))


def _empty(config: dict[str, Any]) -> Any:
    """The model without weights; None if it is none of transformers', or that is not installed."""
    named = config.get("architectures")
    try:
        import torch
        import transformers

        kind = getattr(transformers, cast(list[str], named)[0])
        fields = {k: v for k, v in config.items() if k != "auto_map"}  # remote code stays out
        with torch.device("meta"):
            return kind(transformers.AutoConfig.for_model(**fields))
    except Exception:  # whatever a configuration from outside makes of a constructor
        return None


def class_tensors(model: Any, shapes: Shapes) -> dict[str, ClassTensor]:
    """Where the tensors of a transformers model lie in files with tensors of these shapes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    held = model.state_dict()
    transforms: list[Any] = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern: dict[str, dict[str | None, list[str]]] = {}
    for name in sorted(shapes, key=dot_natural_key):
        own, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, held)
        if own in held:
            by_pattern.setdefault(own, {}).setdefault(pattern, []).append(name)
    found: dict[str, ClassTensor] = {}
    for own, named in by_pattern.items():
        shape = tuple(held[own].shape)
        if parts := _parts(named, converters, shape=shape, shapes=shapes):
            module = model.get_submodule(own.rpartition(".")[0])
            transposed = bool(getattr(module, "is_transposed", False))
            found[own] = ClassTensor(name=own, shape=shape, parts=parts, transposed=transposed)
    return found


def _parts(
    named: Mapping[str | None, list[str]], converters: list[Any], *, shape: tuple[int, ...],
    shapes: Shapes,
) -> tuple[Part, ...]:  # fmt: skip
    """The files' tensors that one of the class is made of; none if it is made in another way than
    by stacking experts and, in every expert, rows."""
    if list(named) == [None]:
        same = [name for name in named[None] if shapes[name] == shape]
        return tuple(Part(tensor=name, expert=None, first=0, rows=0) for name in same)
    taken = [c.source_patterns for c in converters if set(c.source_patterns) >= set(named)]
    patterns = taken[0] if taken else ()
    parts: list[Part] = []
    first = 0
    for pattern in patterns:
        names = named.get(pattern, [])
        height = shapes[names[0]][0] if names else 0
        parts += [
            Part(tensor=name, expert=i, first=first, rows=height) for i, name in enumerate(names)
        ]
        first += height
    like = all(shapes[p.tensor] == (p.rows, *shape[2:]) for p in parts)
    is_stack = len(shape) == 3 and first == shape[1] and len(parts) == shape[0] * len(patterns)
    return tuple(parts) if like and is_stack else ()

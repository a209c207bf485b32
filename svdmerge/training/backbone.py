"""The backbone: a module built from a configuration, filled with a checkpoint's weights.

No hub and no remote code: the module comes from transformers or from a callable the recipe names,
the weights from our own reader, so any fsspec URI works.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from svdmerge.errors import SvdmergeError, TrainingError
from svdmerge.recipe import TuneConfig
from svdmerge.storage.architecture import ClassTensor, class_tensors
from svdmerge.storage.checkpoint import FLOATING, Checkpoint

Inputs = Tensor | dict[str, Tensor]

# Buffers that older checkpoints store and newer modules compute.
COMPUTED = ("position_ids", "token_type_ids", "rotary_emb.inv_freq")
# Modules of a transformers model that mean-pooled features never pass through.
UNUSED_MODULES = ("pooler.",)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Backbone:
    """A module, and how checkpoint names map to its own.

    It stays in eval mode: with a few thousand trained values and frozen weights, dropout would only
    add noise, and features would differ between training and use.
    """

    module: nn.Module
    names: Mapping[str, str]
    """Of the checkpoint's tensors that are the backbone's, the module's names; a head has none."""
    unused: tuple[str, ...]
    """Module names that may be absent from a checkpoint, for features do not depend on them."""
    pooled: bool
    """Whether the module's own output is the features; else tokens or patches are averaged."""
    stacks: Mapping[str, ClassTensor] = field(default_factory=dict[str, ClassTensor])
    """The module's tensors that the checkpoint holds in parts, as experts, by name."""

    def features(self, inputs: Inputs) -> Tensor:
        """Features (b, d)."""
        if self.pooled:
            return _checked(self._output(inputs))
        if isinstance(inputs, Tensor):
            hidden = self._output(inputs).last_hidden_state
            # Of patches (b, t, d), or of a convolution's maps (b, d, h, w).
            return _checked(hidden.mean(dim=1) if hidden.dim() == 3 else hidden.mean(dim=(2, 3)))
        hidden = self._output(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        # At least one: a text of no tokens must not divide by zero.
        return _checked((hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0))

    def logits(self, inputs: dict[str, Tensor]) -> Tensor:
        """A language model's scores of each next token (b, t, vocabulary)."""
        out = self._output(**inputs)
        logits: object = getattr(out, "logits", out)
        shape = (*inputs["input_ids"].shape,)
        if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != shape:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise TrainingError(
                f"the language model returned {got}",
                f"Expected scores of each next token, ({shape[0]}, {shape[1]}, vocabulary).",
                "Set `model` to a causal language model, as transformers:AutoModelForCausalLM.",
            )
        return logits

    def _output(self, *inputs: Inputs, **columns: Tensor) -> Any:
        """What the module returns; whatever a module of anyone's raises is told as ours."""
        try:
            return self.module(*inputs, **columns)
        except (SvdmergeError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            for x in inputs:
                columns |= {"inputs": x} if isinstance(x, Tensor) else x
            shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in columns.items())
            raise TrainingError(
                f"the backbone fails on {shapes}",
                f"{type(error).__name__}: {error}",
                "Check that `task`, `input` and `model` fit each other and the base model.",
            ) from error

    def module_name(self, name: str) -> str:
        """The module's name of a checkpoint's tensor."""
        return self.names.get(name, name)


def _checked(features: object) -> Tensor:
    if not isinstance(features, Tensor) or features.dim() != 2:
        got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise TrainingError(
            f"the backbone returned {got}",
            "Expected one row of features per example, (examples, features).",
            "Return a 2-D tensor from its forward.",
        )
    return features


def build_backbone(config: TuneConfig, *, base: Checkpoint) -> Backbone:
    """The backbone of a base model's architecture, in eval mode, its weights not yet loaded.

    Raises:
        TrainingError: `model` names nothing that can be built, building it failed, or the module
            has a tensor that the base lacks, or the other way round.
    """
    module = build_module(config.model, base.config, origin=base.reference)
    is_transformers = config.model.startswith("transformers:")
    shapes = {name: ref.shape for name, ref in base.tensors.items()}
    own = class_tensors(module, shapes) if is_transformers else {}
    stacks = {name: tensor for name, tensor in own.items() if len(tensor.parts) > 1}
    parts = {part.tensor for tensor in stacks.values() for part in tensor.parts}
    names = _names(module, base) if is_transformers else {n: n for n in base.tensors}
    backbone = Backbone(
        module=module.eval().float(),
        names={name: own for name, own in names.items() if name not in parts},
        stacks=stacks,
        unused=UNUSED_MODULES if is_transformers else (),
        pooled=not is_transformers,
    )
    _check_names(backbone, base=base)
    return backbone


def build_module(model: str, config: Mapping[str, Any], *, origin: str) -> nn.Module:
    """What `transformers:CLASS` or `package.module:callable` builds from a configuration.

    Raises:
        TrainingError: it cannot be imported, or building failed.
    """
    library, _, attribute = model.partition(":")
    try:
        factory = getattr(importlib.import_module(library), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise TrainingError(
            f"model: {model}: cannot be imported ({error})",
            "Expected `transformers:CLASS` or `package.module:callable`.",
            "Install the package, or correct the name.",
        ) from error
    build = _from_transformers if library == "transformers" else _from_callable
    try:
        return build(factory, config)
    except Exception as error:
        raise TrainingError(
            f"model: {model}: cannot be built from {origin}'s config.json",
            f"{type(error).__name__}: {error}",
            "Check that the callable fits the base model.",
        ) from error


def _from_transformers(factory: Any, config: Mapping[str, Any]) -> nn.Module:
    from transformers import AutoConfig, PreTrainedModel

    fields = {k: v for k, v in config.items() if k != "auto_map"}  # remote code stays out
    known = AutoConfig.for_model(**fields)
    if isinstance(factory, type) and issubclass(factory, PreTrainedModel):
        return factory(cast(Any, known))
    return factory.from_config(known)


def _from_callable(
    factory: Callable[[dict[str, Any]], nn.Module], config: Mapping[str, Any]
) -> nn.Module:
    module = factory(dict(config))
    if not isinstance(module, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"got {type(module).__name__}, expected an nn.Module")
    return module


def _names(module: nn.Module, base: Checkpoint) -> dict[str, str]:
    """The module's names by checkpoint name.

    A checkpoint saved with a head carries the backbone's prefix, such as `bert.`, and what lies
    outside it is the head; a module with a head carries it too, whatever the checkpoint does.
    """
    renamings = _renamings(module)
    renamed = {name: _renamed(name, renamings) for name in base.tensors}
    prefix = f"{getattr(module, 'base_model_prefix', '')}."
    given = any(name.startswith(prefix) for name in renamed.values())
    own = any(name.startswith(prefix) for name in module.state_dict())
    if given and not own:
        return {n: r.removeprefix(prefix) for n, r in renamed.items() if r.startswith(prefix)}
    added = prefix if own and not given else ""
    return {n: added + r for n, r in renamed.items()}


def _renamings(module: nn.Module) -> list[Any]:
    """transformers' own renamings: some modules' names are no longer those in files.

    Experts are stacked otherwise; what else it computes is left out, and told as missing later.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    found: list[Any] = get_model_conversion_mapping(cast(Any, module))
    return [transform for transform in found if isinstance(transform, WeightRenaming)]


def _renamed(name: str, renamings: list[Any]) -> str:
    for renaming in renamings:
        name = renaming.rename_source_key(name)[0]
    return name


def lacking(checkpoint: Checkpoint, *, base: Checkpoint) -> list[str]:
    """Tensors of the base that a source lacks or has in another shape.

    The base's stand in for them: planning let them pass, so a policy keeps the base's anyway.
    """
    return [
        name
        for name, ref in base.tensors.items()
        if name not in checkpoint.tensors or checkpoint.tensors[name].shape != ref.shape
    ]


def load_weights(backbone: Backbone, *, checkpoint: Checkpoint, base: Checkpoint) -> None:
    """Fill the module with a checkpoint, in float32; what that lacks is the base's.

    Raises:
        TrainingError: a tensor has another shape than the module's.
    """
    expected = backbone.module.state_dict()
    absent = set(lacking(checkpoint, base=base))
    state: dict[str, Tensor] = {}
    for name, ref in base.tensors.items():
        target = expected.get(backbone.module_name(name))
        if target is None:
            continue
        if ref.shape != tuple(target.shape):
            raise TrainingError(
                f"{base.reference}: {name} has shape {list(ref.shape)}",
                f"The backbone expects {list(target.shape)}.",
                "Check that `model` fits the base model.",
            )
        own = ref if name in absent else checkpoint.tensors[name]
        tensor = own.read()
        floating = own.dtype in FLOATING
        state[backbone.module_name(name)] = tensor.to(torch.float32) if floating else tensor
    for name, stack in backbone.stacks.items():
        state[name] = torch.empty(stack.shape)
        for part in stack.parts:
            rows = slice(part.first, part.first + part.rows)
            held = base if part.tensor in absent else checkpoint
            state[name][part.expert, rows] = held.tensors[part.tensor].read().to(torch.float32)
    backbone.module.load_state_dict(state, strict=False)


def _check_names(backbone: Backbone, *, base: Checkpoint) -> None:
    expected = backbone.module.state_dict()
    given = {*backbone.names.values(), *backbone.stacks}
    missing = sorted(
        n
        for n in set(expected) - given - _tied(expected, given=given)
        if not n.startswith(backbone.unused or ("\0",))
    )
    unexpected = sorted(
        n
        for n in given - set(expected)
        if not n.endswith(COMPUTED) and not n.startswith(backbone.unused or ("\0",))
    )
    for names, kind in ((missing, "missing from"), (unexpected, "unknown to the backbone but in")):
        if names:
            raise TrainingError(
                f"{base.reference}: {names[0]} is {kind} the checkpoint",
                f"{len(names)} such tensors; the backbone has {len(expected)}.",
                "Set `model` to the class or callable whose tensors are named like the base's.",
            )


def _tied(tensors: Mapping[str, Tensor], *, given: set[str]) -> set[str]:
    """Names that share the memory of a given one, as an output layer tied to the embeddings."""
    held = {tensors[name].data_ptr() for name in given & set(tensors)}
    return {n for n, t in tensors.items() if t.numel() and t.data_ptr() in held}

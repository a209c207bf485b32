"""The merged or adapted model as a PEFT LoRA adapter, on the base; or the tuning on the merge.

Per matrix delta = U diag(s) Vh = B A with A = diag(sqrt|s|) Vh and B = U diag(sign(s) sqrt|s|), and
alpha = rank, so that PEFT's scaling alpha / rank is 1. PEFT itself is not needed to write one.

What is averaged goes along on the base: a LoRA layer's bias as the bias of its B (`lora_bias`), and
every other module with a changed tensor, such as a norm, whole (`modules_to_save`). Experts' biases
are saved whole, for PEFT's layers of stacks have none. On the merged model only the tuned matrices
differ, and nothing else is written.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import torch as files
from torch import Tensor, nn

from svdmerge.core.components import RankOneComponents, concatenate
from svdmerge.core.truncate import Truncated, truncated
from svdmerge.errors import OutputError
from svdmerge.storage.checkpoint import Checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.hf_model import put_file
from svdmerge.training.adapter import Adapted
from svdmerge.training.backbone import Backbone, build_backbone
from svdmerge.training.peft_experts import ExpertLayer, expert_layers
from svdmerge.training.peft_report import REPORT, PeftReport, rank_errors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_WAYS_OUT = "Export the full model or `peft-on-merged`, or keep that tensor the base's by a policy."


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Parts:
    """What differs from the model that the adapter is put on, by module."""

    lora: Mapping[str, RankOneComponents]
    """Differences of weights, as stored in the checkpoint."""
    experts: Mapping[str, RankOneComponents]
    """Differences of experts' matrices, which the module holds in stacks, by checkpoint name."""
    biases: Mapping[str, Tensor]
    """Differences of the biases of `lora`'s modules."""
    whole: Mapping[str, Tensor]
    """All tensors of the modules that are saved whole, by name."""
    modules: tuple[str, ...]
    """Those modules."""


def write_peft(
    folder: Folder, adapted: Adapted, *, on_merged: bool, rank: int | None = None
) -> PeftReport:
    """Write the adapter that makes the base, or the merged model, the adapted one; what it is.

    The modules are those of the class that `tune.model` names. With `rank`, each matrix keeps at
    most so many components, the best of that number.

    Raises:
        OutputError: a changed tensor belongs to the model itself and not to a module of it.
    """
    backbone = build_backbone(adapted.config, base=adapted.base)
    parts = _tuned(adapted, backbone) if on_merged else _adapted(adapted, backbone)
    cut: dict[str, Truncated] = {}
    if rank is not None:
        cut = {n: truncated(c, rank=rank) for n, c in {**parts.lora, **parts.experts}.items()}
        kept = {n: found.components for n, found in cut.items() if len(found.components)}
        parts = replace(
            parts,
            lora={n: c for n, c in kept.items() if n in parts.lora},
            experts={n: c for n, c in kept.items() if n in parts.experts},
        )
    stacks = list(expert_layers(parts.experts, backbone))
    tensors: dict[str, Tensor] = {}
    for layer in stacks:
        tensors |= {f"{layer.path}.lora_A.weight": layer.a, f"{layer.path}.lora_B.weight": layer.b}
    for path, components in parts.lora.items():
        a, b = _factors(components, backbone.module.get_submodule(path))
        tensors |= {f"{path}.lora_A.weight": a, f"{path}.lora_B.weight": b}
        if parts.biases:
            bias = parts.biases.get(path, torch.zeros(b.shape[0]))
            tensors[f"{path}.lora_B.bias"] = bias.to(torch.float32)
    tensors |= parts.whole
    named = {_PREFIX + name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    on = adapted.merged if on_merged else adapted.base
    config = _config(parts, stacks, backbone.module, on=on, task=str(adapted.config.task))
    written = [
        put_file(folder, WEIGHTS, files.save(named, metadata={"format": "pt"})),
        put_file(folder, CONFIG, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()),
    ]
    error, of_each = rank_errors({**parts.lora, **parts.experts}, cut)
    report = PeftReport(
        base=on.reference,
        merged=adapted.merged.reference,
        model=adapted.config.model,
        tuned=bool(adapted.changes),
        rank=rank,
        relative_error=error,
        matrices=of_each,
        whole=parts.modules,
        files={w.file: w.sha256 for w in written},
    )
    folder.put(REPORT, report.to_json())
    return report


def _tuned(adapted: Adapted, backbone: Backbone) -> _Parts:
    lora = {_owner(backbone.module_name(name)): c for name, c in adapted.changes.items()}
    return _Parts(lora=lora, experts={}, biases={}, whole={}, modules=())


def _adapted(adapted: Adapted, backbone: Backbone) -> _Parts:
    held = backbone.module.state_dict()
    # Tensors outside the backbone, such as an old head, are not of the model the adapter is put on.
    names = {n: backbone.module_name(n) for n in adapted.base.tensors}
    names = {n: own for n, own in names.items() if own in held}
    stacked = [part.tensor for stack in backbone.stacks.values() for part in stack.parts]
    experts = {n: c for n in stacked if (c := _components(n, adapted)) is not None}
    lora = {
        _owner(own): components
        for n, own in names.items()
        if (components := _difference(n, adapted, backbone.module, own)) is not None
    }
    weights = {f"{path}.weight" for path in lora}
    changed = [n for n, own in names.items() if own not in weights and _changed(n, adapted)]
    of_lora = {
        n
        for n in changed
        if _owner(names[n]) in lora and names[n].endswith(".bias") and not experts
    }
    modules = _closed(
        [_owner_of(n, names[n]) for n in changed if n not in of_lora], backbone.module
    )
    kept = {path: c for path, c in lora.items() if not _inside(path, modules)}
    return _Parts(
        lora=kept,
        experts=experts,
        biases={
            _owner(names[n]): _read(adapted.merged, n) - _read(adapted.base, n)
            for n in of_lora
            if _owner(names[n]) in kept
        },
        whole=_whole(adapted, backbone.module, names=names, modules=modules),
        modules=modules,
    )


def _difference(
    name: str, adapted: Adapted, model: nn.Module, own: str
) -> RankOneComponents | None:
    """Components of a layer's weight; None where LoRA cannot carry them, or there are none."""
    owner = _owner(own)
    if not owner or own != f"{owner}.weight" or not _carries(model.get_submodule(owner)):
        return None
    return _components(name, adapted)


def _components(name: str, adapted: Adapted) -> RankOneComponents | None:
    """Merged and tuned components of a matrix; None if there are none."""
    depth = adapted.factors.depth(name)
    parts = [adapted.factors.read(name, range(depth))] if depth else []
    parts += [adapted.changes[name]] if name in adapted.changes else []
    # The changed directions lead the merged ones: one value for both keeps the rank the merge's.
    if len(parts) == 2 and _shared(*parts):
        return _joined(*parts)
    return concatenate([p.to(torch.float64) for p in parts]) if parts else None


def _shared(merged: RankOneComponents, change: RankOneComponents) -> bool:
    k = min(len(merged), len(change))
    leading, tuned = merged.slice(0, k), change.slice(0, k)
    return torch.equal(leading.u, tuned.u) and torch.equal(leading.vh, tuned.vh)


def _joined(merged: RankOneComponents, change: RankOneComponents) -> RankOneComponents:
    longer = merged if len(merged) >= len(change) else change
    s = torch.zeros(len(longer), dtype=torch.float64)
    s[: len(merged)] += merged.s.to(torch.float64)
    s[: len(change)] += change.s.to(torch.float64)
    return RankOneComponents(u=longer.u.to(s.dtype), s=s, vh=longer.vh.to(s.dtype))


def _carries(module: nn.Module) -> bool:
    """Whether a LoRA layer exists for it whose product is the whole weight's difference."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear layer that stores its weight as (in, out)."""
    return type(module).__name__ == "Conv1D"


def _factors(components: RankOneComponents, module: nn.Module) -> tuple[Tensor, Tensor]:
    """A and B of a module, in float32."""
    c = components.to(torch.float64)
    root = c.s.abs().sqrt()
    a, b = root[:, None] * c.vh, c.u * (c.s.sign() * root)
    if _is_transposed(module):
        a, b = b.T, a.T
    if isinstance(module, nn.Conv2d):
        a = a.reshape(-1, *module.weight.shape[1:])
        b = b[:, :, None, None]
    return a.to(torch.float32).contiguous(), b.to(torch.float32).contiguous()


def _changed(name: str, adapted: Adapted) -> bool:
    base, merged = (model.tensors[name].read() for model in (adapted.base, adapted.merged))
    # What was only rounded to another `out_dtype` is the base's own.
    return name in adapted.changes or not torch.equal(base.to(merged.dtype), merged)


def _read(checkpoint: Checkpoint, name: str) -> Tensor:
    return checkpoint.tensors[name].read().to(torch.float64)


def _owner(name: str) -> str:
    """The module of a tensor."""
    return name.rpartition(".")[0]


def _owner_of(name: str, own: str) -> str:
    if owner := _owner(own):
        return owner
    raise OutputError(
        f"{name}: the merge changed it, and it belongs to no module that PEFT could save",
        "A PEFT adapter carries matrices, their biases, and whole modules.",
        _WAYS_OUT,
    )


def _closed(modules: Iterable[str], model: nn.Module) -> tuple[str, ...]:
    """The outermost of the modules, and all that PEFT takes for them: it compares endings.

    Raises:
        OutputError: one that it would take so lies in another; PEFT cannot load such an adapter.
    """
    wanted = _outermost(modules)
    names = [name for name, _ in model.named_modules() if name]
    found = {name for name in names if any(name.endswith(w) for w in wanted)}
    if nested := sorted(n for n in found if _inside(_owner(n), found)):
        raise OutputError(
            f"{nested[0]}: PEFT would save it twice, by itself and as a part of another module",
            f"It takes modules by the ending of their names; changed are {', '.join(wanted)}.",
            _WAYS_OUT,
        )
    return tuple(sorted(found))


def _outermost(modules: Iterable[str]) -> list[str]:
    wanted = set(modules)
    return sorted(m for m in wanted if not _inside(_owner(m), wanted))


def _inside(path: str, modules: Iterable[str]) -> bool:
    return any(path == m or path.startswith(f"{m}.") for m in modules)


def _whole(
    adapted: Adapted, model: nn.Module, *, names: Mapping[str, str], modules: Iterable[str]
) -> dict[str, Tensor]:
    """Every tensor of some modules, as it is in the adapted model."""
    given = {own: n for n, own in names.items()}
    found: dict[str, Tensor] = {}
    for path in modules:
        for leaf, start in model.get_submodule(path).state_dict().items():
            own = f"{path}.{leaf}"
            found[own] = _value(adapted, given[own]) if own in given else start.clone()
    return found


def _value(adapted: Adapted, name: str) -> Tensor:
    merged = adapted.merged.tensors[name].read()
    if name not in adapted.changes:
        return merged
    change = adapted.changes[name].to(torch.float64).dense().reshape(merged.shape)
    return (merged.to(torch.float64) + change).to(merged.dtype)


def _config(
    parts: _Parts, stacks: Sequence[ExpertLayer], model: nn.Module, *, on: Checkpoint, task: str
) -> dict[str, Any]:
    modules = {path: len(c) for path, c in parts.lora.items()}
    parameters = {layer.parameter: layer.rank for layer in stacks}
    ranks = modules | parameters
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    # PEFT takes every module whose name ends with a target's, and the first pattern that a name
    # ends with, unless that says that it is the whole name.
    also = [n for n, _ in model.named_modules() if any(n.endswith(f".{m}") for m in modules)]
    own = {f"^{path}": rank for path, rank in ranks.items() if rank != usual}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if task == "causal_lm" else None,
        "base_model_name_or_path": on.reference,
        "inference_mode": True,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": own,
        "alpha_pattern": own,
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": bool(parts.biases),
        "use_rslora": False,
        "target_modules": sorted(modules),
        "exclude_modules": sorted(set(also) - set(modules)) or None,
        "target_parameters": sorted(parameters) or None,
        "modules_to_save": list(parts.modules) or None,
        "fan_in_fan_out": any(_is_transposed(model.get_submodule(p)) for p in modules),
    }

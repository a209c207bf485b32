"""A model made decomposable: its projections found by name, or else by shape, and replaced."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from svdmerge.core.components import RankOneComponents
from svdmerge.core.factored import is_transposed, linear_of
from svdmerge.core.kind.gate import ClassGate, GateRows
from svdmerge.core.kind.layer import DecomposableLinear
from svdmerge.core.kind.start import at_random, even, from_matrix, groups_of
from svdmerge.core.svd import seed_of
from svdmerge.errors import RecipeError

# Query, key, value, output and both MLP projections, as the last words of a module's path. Those in
# ..._proj are Llama's, CLIP's and BART's; attention.q and its like DiT's and timm's.
_NAMES = re.compile(
    r"(^|\.)("
    r"attention\.(self|attention)\.(query|key|value)|attention\.output\.dense"  # BERT, ViT
    r"|(layers?\.\d+|layer\.\d+)\.((intermediate|output)\.dense|fc[12])"
    r"|attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj)"  # GPT-2; its c_attn is query, key and value
    r"|(self_attn|attn|attention|encoder_attn|cross_attn)\.([qkvo]|out|qkv)_proj"
    r"|mlp\.(gate|up|gate_up|down)_proj"
    r"|(SelfAttention|EncDecAttention)\.[qkvo]|DenseReluDense\.(wi|wi_0|wi_1|wo)"  # T5
    r"|(attn|attention|self_attention)\.([qkvo]|query|key|value|out(put)?|qkv|query_key_value|proj)"
    r"|(attention)\.(q|k|v|out)_lin|ffn\.lin[12]"  # DistilBERT
    r"|(mlp|ffn)\.(fc[12]|up|down|in|out|0|2)"
    r")$"
)
GATE = "class_gate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """How a model is made decomposable: the same split in every layer (arXiv 2408.07337)."""

    gate: ClassGate
    num_learngenes: int | float = 0.5
    """Components that every class uses: a count, or a share of the layer's rank min(m, n)."""
    num_tailors: int | float = 0.5
    """Components of all tailor groups together, split evenly among them; as above."""
    start: Literal["random", "svd"] = "random"
    """Random, at the scale of nn.Linear's start; or the SVD of the weights that are there."""
    seed: int = 0


def decomposable(model: nn.Module, spec: Spec) -> dict[str, DecomposableLinear]:
    """The layers that took the projections' places, by path; the gate is now `model.class_gate`.

    Replaced are the query, key, value, output and MLP projections, found by the names that
    transformers give them and by shape (see `projections`). Biases are kept.

    Raises:
        RecipeError: nothing to replace, ranks above a layer's, or fewer tailors than groups.
    """
    paths = projections(model)
    sizes = {path: sizes_of(_shape(model, path), spec=spec, path=path) for path in paths}
    layers = {path: _decomposed(model, path, sizes=sizes[path], spec=spec) for path in paths}
    for path, layer in layers.items():
        put(model, path, layer)
    model.add_module(GATE, GateRows(spec.gate).to(next(iter(layers.values())).s.device))
    return layers


def layers_of(model: nn.Module) -> dict[str, DecomposableLinear]:
    """The decomposable layers in a model, by path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, DecomposableLinear)}


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module in another's place."""
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def sizes_of(shape: tuple[int, int], *, spec: Spec, path: str) -> list[int]:
    """Learngenes, then tailors of each group, of an (m, n) layer.

    Raises:
        RecipeError: they are more than its rank, or a group, or the learngenes, get none.
    """
    rank, num_groups = min(shape), len(spec.gate.groups)
    learngenes, tailors = (
        int(k * rank + 1e-9) if isinstance(k, float) else k
        for k in (spec.num_learngenes, spec.num_tailors)
    )
    if learngenes + tailors > rank:
        raise RecipeError(
            f"{path}: {learngenes} learngenes and {tailors} tailors",
            f"A {shape[0]} x {shape[1]} layer has rank {rank}.",
            "Lower `learngenes` or `tailors`, or give shares of the rank.",
        )
    if tailors < num_groups or learngenes < 1:
        raise RecipeError(
            f"{path}: {learngenes} learngenes, and {tailors} tailors for {num_groups} groups",
            "There must be a learngene, and a tailor in every group.",
            "Raise `learngenes` or `tailors`, or use fewer groups.",
        )
    return [learngenes, *even(tailors, parts=num_groups)]


def projections(model: nn.Module) -> list[str]:
    """Paths of the projections, in the model's order: those that have a known name and, in the
    repeated blocks, those of the shapes (d, d) and (3d, d), and pairs (h, d) and (d, h), where the
    first may be of two halves (2h, d).

    Both, for a family may name some of its projections as others do, and the rest its own way.

    Raises:
        RecipeError: there are none, or torch's own attention would read replaced weights.
    """
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            raise RecipeError(
                f"{path}: is an nn.MultiheadAttention",
                "It reads its projections' weights itself, so they cannot be replaced.",
                "Use an attention with layers of its own for query, key, value and output.",
            )
    linear = [path for path, _ in model.named_modules() if path and _is_linear(model, path)]
    shaped = set(_by_shape(model, linear))
    if found := [path for path in linear if path in shaped or _NAMES.search(path)]:
        return found
    raise RecipeError(
        f"{type(model).__name__}: has no projection to replace",
        f"None of its {len(linear)} linear layers is one of a transformer by name or shape.",
        "Use a transformer, or name its layers as a known one does.",
    )


def _by_shape(model: nn.Module, linear: list[str]) -> Iterator[str]:
    """Of each block (child of a ModuleList), the layers of a transformer's shapes."""
    blocks = [
        f"{path}.{name}." if path else f"{name}."
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for name, _ in module.named_children()
    ]
    for block in blocks:
        inside = {p: _shape(model, p) for p in linear if p.startswith(block)}
        widths = {m for m, n in inside.values() if m == n}
        for path, (m, n) in inside.items():
            # Of an MLP; or of a gated one, whose first holds both halves: then (m, n) is its second
            # or its first. Not of (2d, d) and (d, d), which are no MLP.
            partners = {(n, m), (2 * n, m)} | ({(n, m // 2)} if m != 2 * n else set())
            pair = not partners.isdisjoint(inside.values()) and (m in widths or n in widths)
            if m == n or (m == 3 * n and n in widths) or pair:
                yield path


def _is_linear(model: nn.Module, path: str) -> bool:
    return isinstance(model.get_submodule(path), nn.Linear) or is_transposed(
        model, f"{path}.weight"
    )


def _shape(model: nn.Module, path: str) -> tuple[int, int]:
    """(m, n) = (outputs, inputs) of a linear layer."""
    weight = model.get_submodule(path).get_parameter("weight")
    first, second = weight.shape
    return (second, first) if is_transposed(model, f"{path}.weight") else (first, second)


def _decomposed(model: nn.Module, path: str, *, sizes: list[int], spec: Spec) -> DecomposableLinear:
    linear = linear_of(model, f"{path}.weight")
    assert linear is not None, path
    bias: Tensor | None = linear.bias
    components = _start(linear.weight.detach(), sizes=sizes, spec=spec, path=path)
    layer = DecomposableLinear(components, group=groups_of(sizes), bias=bias)
    return layer.to(linear.weight)


def _start(
    weight: Float[Tensor, "m n"], *, sizes: list[int], spec: Spec, path: str
) -> RankOneComponents:
    if spec.start == "svd":
        return from_matrix(weight, sizes=sizes)
    m, n = weight.shape
    # Seeded by name and shape: the same layer starts alike whatever else the model has.
    seed = seed_of(path, m=m, n=n, block=0) ^ spec.seed
    used = torch.tensor(sizes, dtype=torch.float32) @ spec.gate.rows().T
    return at_random(
        m, n,
        num_components=sum(sizes),
        num_active=float(used.mean()),
        # Of a layer that starts at zero, such as a branch that is switched off: nn.Linear's.
        variance=float(weight.square().mean()) or None,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip

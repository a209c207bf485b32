"""Names in adapter files: which layer of the base a tensor belongs to, and which part it is."""

import re
from collections.abc import Iterable
from enum import StrEnum


class Half(StrEnum):
    """What a tensor of an adapter is."""

    DOWN = "down"  # A, (rank, in)
    UP = "up"  # B, (out, rank)
    TOKENS = "tokens"  # A of an embedding, (rank, tokens)
    VECTORS = "vectors"  # B of an embedding, (dimensions, rank)
    ALPHA = "alpha"  # a scalar
    BIAS = "bias"  # what B adds
    WHOLE = "whole"  # a tensor that takes the place of the base's
    FOREIGN = "foreign"  # of another kind of adapter


# What only adapters have.
LOW_RANK = frozenset({Half.DOWN, Half.UP, Half.TOKENS, Half.VECTORS})
# Endings of keys, PEFT's first. `default` stands in files that were not saved by PEFT itself.
_ENDINGS = (
    (re.compile(r"\.lora_A(\.default)?\.weight$"), Half.DOWN),
    (re.compile(r"\.lora_B(\.default)?\.weight$"), Half.UP),
    (re.compile(r"\.lora_B(\.default)?\.bias$"), Half.BIAS),
    (re.compile(r"\.lora_embedding_A(\.default)?$"), Half.TOKENS),
    (re.compile(r"\.lora_embedding_B(\.default)?$"), Half.VECTORS),
    (re.compile(r"\.(lora_down|lora\.down|lora_linear_layer\.down)\.weight$"), Half.DOWN),
    (re.compile(r"\.(lora_up|lora\.up|lora_linear_layer\.up)\.weight$"), Half.UP),
    (re.compile(r"(?<=_lora)\.down\.weight$"), Half.DOWN),
    (re.compile(r"(?<=_lora)\.up\.weight$"), Half.UP),
    (re.compile(r"\.alpha$"), Half.ALPHA),
)
_FOREIGN = re.compile(
    r"lora_magnitude_vector|dora_scale|hada_|lokr_|lora_mid|trainable_tokens"
    r"|token_adapter|lora_[AB]\b|lora_(up|down)\b|oft_|ia3_|vera_"
)
# Of models inside pipelines, and of wrappers.
_PREFIXES = ("base_model.model.", "unet.", "transformer.", "text_encoder.", "text_encoder_2.")
# What PEFT puts around a module whose tensors it saves whole.
_WRAPPED = re.compile(r"\.(base_layer|modules_to_save\.default)\.")
_KOHYA = re.compile(r"^lora_(unet|te\d?|transformer|prior_unet)_")


def half_of(key: str) -> tuple[str, Half]:
    """The layer that a key names, as far as the file tells, and which part of it."""
    for ending, half in _ENDINGS:
        if match := ending.search(key):
            return _module(key[: match.start()]), half
    if _FOREIGN.search(key):
        return key, Half.FOREIGN
    return _module(_WRAPPED.sub(".", key)), Half.WHOLE


def _module(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            break
    # diffusers' attention processors: attn1.processor.to_q_lora is the layer attn1.to_q.
    if match := re.fullmatch(r"(.*)\.processor\.(to_\w+?)_lora", name):
        name = f"{match[1]}.{'to_out.0' if match[2] == 'to_out' else match[2]}"
    return name


def kohya_module(module: str) -> str | None:
    """A layer as kohya's trainers spell it, dots as underscores; None if it is spelt otherwise."""
    return _KOHYA.sub("", module) if _KOHYA.match(module) else None


def resolve(name: str, known: Iterable[str], *, flattened: bool = False) -> str | None:
    """The base's tensor that a name stands for; None if there is none, or more than one.

    Adapters name layers from the class they were trained in (`bert.encoder...`), bases from their
    own: either may have parts in front that the other lacks.
    """
    plain = {k: k.removesuffix(".weight").replace(".", "_") + ".weight" for k in known}
    spelt = plain if flattened else {k: k for k in plain}
    exact = [k for k, v in spelt.items() if v == name]
    if exact:
        return exact[0] if len(exact) == 1 else None
    mark = "_" if flattened else "."
    ends = [k for k, v in spelt.items() if f"{mark}{v}".endswith(f"{mark}{name}")]
    ends = ends or [k for k, v in spelt.items() if f"{mark}{name}".endswith(f"{mark}{v}")]
    return ends[0] if len(ends) == 1 else None

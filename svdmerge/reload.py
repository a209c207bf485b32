"""A model opened by the libraries that its users have, and run on a fixed input."""

import contextlib
import tempfile
from collections.abc import Generator, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from svdmerge.claims import Unchecked
from svdmerge.core.delta import all_finite
from svdmerge.errors import OutputError, SvdmergeError
from svdmerge.storage.checkpoint import read_header
from svdmerge.storage.filesystem import Folder

# Pixels of a side where a configuration does not say.
IMAGE_SIZE = 224


def run_transformers(place: str, *, model: str | None = None) -> tuple[str, tuple[Tensor, ...]]:
    """The class that opened a folder or hub id, and what it gives for a fixed input.

    `model` names the class; by default the configuration's `architectures` do.

    Raises:
        Unchecked: transformers is missing, or knows neither the model nor an input for it.
        OutputError: it cannot be opened or run, or what it gives is not finite.
    """
    with _told("transformers"), _opened(place, model=model) as module:
        return type(module).__name__, _outputs(module)


def run_peft(adapter: str, *, on: str, model: str) -> tuple[str, tuple[Tensor, ...]]:
    """The same of an adapter, on the model that it is for.

    Raises:
        Unchecked: PEFT is missing, or as `run_transformers`.
        OutputError: as that, or PEFT leaves a tensor of the adapter out.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError:
        raise Unchecked("PEFT is not installed: pip install 'svdmerge[peft]'") from None
    with _told("PEFT"), _opened(on, model=model) as module, _local(adapter) as place:
        name = type(module).__name__
        adapted: Any = PeftModel.from_pretrained(module, place)
        given = read_header(Folder.at(place), "adapter_model.safetensors")[0].keys()
        taken: Mapping[str, Tensor] = get_peft_model_state_dict(adapted)
        if odd := sorted(given ^ taken.keys()):
            raise OutputError(f"PEFT and the adapter do not agree on {odd[0]}")
        return name, _outputs(adapted)


@contextlib.contextmanager
def _told(library: str) -> Generator[None]:
    """Whatever a library raises of anyone's model is told as the model's fault."""
    try:
        yield
    except (SvdmergeError, Unchecked, MemoryError):
        raise
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise OutputError(f"{library} fails: {type(error).__name__}: {first}") from error


@contextlib.contextmanager
def _opened(place: str, *, model: str | None) -> Generator[Any]:
    try:
        import transformers
        from transformers.utils import logging
    except ImportError:
        raise Unchecked("transformers is not installed: pip install 'svdmerge[hf]'") from None
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it says of weights, `verify` says itself
    logging.disable_progress_bar()
    try:
        with _local(place) as path:
            try:
                config: Any = transformers.AutoConfig.from_pretrained(path)
            except (OSError, ValueError, KeyError):
                raise Unchecked("its config.json names no model of transformers") from None
            kind = _class_of(transformers, config, model)
            yield kind.from_pretrained(path, use_safetensors=True, dtype=torch.float32).eval()
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def _class_of(transformers: Any, config: Any, model: str | None) -> Any:
    """A class of transformers alone: neither remote code nor a name of anything else."""
    if model is not None and not model.startswith("transformers:"):
        raise Unchecked(f"{model} is no class of transformers")
    named = model.partition(":")[2] if model else next(iter(config.architectures or []), "")
    found = getattr(transformers, named, None) if named else None
    known = isinstance(found, type) and (
        issubclass(found, transformers.PreTrainedModel) or found.__name__.startswith("AutoModel")
    )
    return found if known else transformers.AutoModel


@contextlib.contextmanager
def _local(place: str) -> Generator[str]:
    """A path to a folder, copied here if it is elsewhere; a hub id as it is."""
    folder = Folder.at(place)
    if "://" not in place or folder.is_local:
        yield folder.path() if folder.exists() else place
        return
    with tempfile.TemporaryDirectory(prefix="svdmerge-") as path:
        for name in folder.find():
            Folder.at(path).put_scratch(name, folder.read(name))
        yield path


def _outputs(module: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found = tuple(_tensors(module(**_fixed_input(module))))
    if not found or not all(all_finite(tensor) for tensor in found):
        raise OutputError("on a fixed input it gives NaN or Inf" if found else "it gives nothing")
    return found


def _fixed_input(module: Any) -> dict[str, Tensor]:
    """Token ids or an image, always the same."""
    config, takes = module.config, module.main_input_name
    if takes == "input_ids":
        size = int(config.get_text_config().vocab_size)
        # (2, 8): short enough for any position table.
        ids = {"input_ids": (torch.arange(16) * 7 % size).reshape(2, 8)}
        return ids | ({"decoder_input_ids": ids["input_ids"]} if config.is_encoder_decoder else {})
    if takes == "pixel_values":
        side = getattr(config, "image_size", None) or IMAGE_SIZE
        height, width = (side, side) if isinstance(side, int) else tuple(side)
        shape = (1, int(getattr(config, "num_channels", 3)), height, width)
        return {"pixel_values": torch.linspace(-1, 1, shape[1] * height * width).reshape(shape)}
    raise Unchecked(f"it opens; for what it takes, {takes}, there is no fixed input")


def _tensors(output: object) -> Iterator[Tensor]:
    """Every floating-point tensor in what a model returned."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in cast(Mapping[str, object], output).values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in cast("tuple[object, ...]", output):
            yield from _tensors(value)

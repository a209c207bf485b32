"""A source model as a recipe names it: a checkpoint, an adapter on the base, or one on another."""

import hashlib
from dataclasses import replace

from svdmerge.errors import CheckpointError
from svdmerge.storage.adapter import adapter_file, open_adapter
from svdmerge.storage.architecture import BaseNames
from svdmerge.storage.checkpoint import Checkpoint, open_checkpoint
from svdmerge.storage.filesystem import Folder
from svdmerge.storage.model_ref import parse_reference, pinned


def open_source(reference: str, *, base: Checkpoint) -> tuple[Checkpoint, tuple[str, ...]]:
    """The source, and the names of what it saved that has no place in the base.

    An adapter on the base itself is read alone: its factors, and what it saved whole. On another
    model it comes on top of that model's difference.

    Raises:
        CheckpointError: as `open_checkpoint` and `open_adapter`.
    """
    ref = parse_reference(reference)
    place = Folder.at(pinned(ref.adapter or ref.model))
    found = adapter_file(place)
    if found is None and ref.adapter is None:
        return open_checkpoint(reference), ()
    if found is None:
        raise CheckpointError(
            f"{ref.adapter}: is no LoRA adapter",
            "Expected adapter_config.json with adapter_model.safetensors, or one such file.",
            "Check the part of the reference after its `+`.",
        )
    model = base if ref.adapter is None else open_checkpoint(ref.model)
    folder, file = found
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    adapter = open_adapter(folder, file, base=BaseNames(shapes=shapes, config=base.config))
    alone = model.revision == base.revision
    digest = hashlib.sha256(f"{adapter.digest}\0{'' if alone else model.revision}".encode())
    source = replace(
        model,
        reference=reference,
        folder=folder if alone else model.folder,
        tensors=dict(adapter.whole) if alone else {**model.tensors, **adapter.whole},
        low_rank=adapter.low_rank,
        is_partial=alone,
        revision=digest.hexdigest()[:32],
    )
    return source, adapter.unplaced

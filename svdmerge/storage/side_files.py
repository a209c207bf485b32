"""What an output takes from the base besides weights: configuration and tokenizer files."""

import json
from typing import Any

from svdmerge.errors import CheckpointError
from svdmerge.storage.checkpoint import Checkpoint
from svdmerge.storage.filesystem import Folder

# Of configurations and tokenizers; the largest vocabularies stay well below.
MAX_SIDE_FILE_BYTES = 100 << 20
SIDE_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
# Where the base was tuned or merged by svdmerge, its claims are not the output's, and a PEFT
# configuration would make loaders apply an adapter to it.
NOT_COPIED = ("_manifest.json", "tune.json", "targets.json", "adapter_config.json")


def copy_side_files(base: Checkpoint, out: Folder) -> list[str]:
    """Configuration and tokenizer files copied from the base's folder; their names."""
    found = base.folder.names()
    # An index of other weights (.bin, a variant) would point at files that are not there.
    skipped = (".index.json", *NOT_COPIED)
    names = [n for n in found if n.endswith(SIDE_SUFFIXES) and not n.endswith(skipped)]
    if "modules.json" in names:  # sentence-transformers keep their pooling in folders named there
        names += [f"{path}/config.json" for path in _module_folders(base) if path in found]
    copied: list[str] = []
    for name in names:
        stat = base.folder.stat(name)
        if stat is not None and stat.size <= MAX_SIDE_FILE_BYTES:
            out.put(name, _unquantised(base) if name == "config.json" else base.folder.read(name))
            copied.append(name)
    return copied


def _unquantised(base: Checkpoint) -> bytes:
    """The base's configuration, without a quantisation that the output does not have."""
    if "quantization_config" not in base.config:
        return base.folder.read("config.json")
    config = {k: v for k, v in base.config.items() if k != "quantization_config"}
    return (json.dumps(config, indent=2) + "\n").encode()


def _module_folders(base: Checkpoint) -> list[str]:
    """What a `modules.json` names; the caller takes only what lies directly in the base's folder.

    Raises:
        CheckpointError: it is not valid JSON.
    """
    try:
        modules = json.loads(base.folder.read("modules.json"))
    except ValueError as error:
        raise CheckpointError(
            f"{base.folder.uri}/modules.json: not valid JSON", str(error), "Fetch it again."
        ) from None
    listed: list[Any] = modules if isinstance(modules, list) else []
    return [str(m["path"]) for m in listed if isinstance(m, dict) and m.get("path")]

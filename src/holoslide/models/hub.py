"""Models by name: a folder on this machine, or `hub:owner/name[@revision]` on the Hugging Face hub.

Only the card and the weights are fetched, and neither holds code: YAML, and safetensors.
"""

from __future__ import annotations

from pathlib import Path

from holoslide.errors import CheckpointError

PREFIX = "hub:"
FILES = ["model.yaml", "model.safetensors", "config.yaml"]


def model_folder(source: str | Path, *, cache: Path | None = None) -> Path:
    """The folder of a model, fetched first if `source` names one of a hub.

    `cache` is where the hub's files are kept (default: the hub library's own place). CheckpointError if there is
    no such model, or none can be fetched; a folder is given back as it is.
    """
    name = str(source)
    if not name.startswith(PREFIX):
        return Path(source)
    repository, _, revision = name.removeprefix(PREFIX).partition("@")
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError as error:
        raise CheckpointError(name, "needs huggingface-hub", "pip install 'holoslide[hub]'") from error
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision or None, cache_dir=cache, allow_patterns=FILES
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        line = " ".join(str(error).split())[:200]
        remedy = "give hub:owner/name, check the connection, or download the folder and give its path"
        raise CheckpointError(name, f"cannot be fetched ({line})", remedy) from error
    return Path(str(folder))

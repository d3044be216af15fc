"""A folder for what the user typed: a local folder, or a Hugging Face Hub id that is downloaded first."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path


def local_folder(source: str | os.PathLike[str], patterns: Sequence[str]) -> Path:
    """The local folder of `source`; of a Hub id, only files that match `patterns` are downloaded.

    Raises FileNotFoundError when `source` is neither a folder nor a Hub id that can be fetched.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if not isinstance(source, str) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise FileNotFoundError(f"{source}: no such folder")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(source, allow_patterns=list(patterns)))
    except (ImportError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise FileNotFoundError(
            f"{source}: no such folder, and not fetched from the Hub ({type(error).__name__}: {reason})"
        ) from error

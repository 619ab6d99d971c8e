"""Files that are whole or not there, and where the library keeps its own."""

import os
from pathlib import Path


def write_whole(file: Path, content: str | bytes) -> None:
    """Replaces a file in one go, so that a kill or a full disk leaves the old one or the new one."""
    part = file.with_suffix(".part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(file)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def cache_folder() -> Path:
    """`$JMETA_CACHE`, else `jmeta` in `$XDG_CACHE_HOME`, else `~/.cache/jmeta`; nothing is kept where that is `off`."""
    folder = os.environ.get("JMETA_CACHE")
    if folder == "off":
        return Path(os.devnull) / "off"
    if folder:
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jmeta"

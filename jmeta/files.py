"""Files that are whole or not there."""

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

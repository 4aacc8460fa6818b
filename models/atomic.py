"""Files that are written whole or not at all."""

import os
import tempfile
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to a temporary name beside `path`, then rename it.

    Whatever happens, `path` is afterwards the old file, the new one, or still missing. The bytes
    are made beforehand, so that a full disk is an OSError here and nowhere inside a library.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # as open() would have made it; mkstemp is private
        temporary.replace(path)
    except OSError as e:
        e.filename = str(path)  # a full disk names no file, and a rename the temporary one
        raise
    finally:
        temporary.unlink(missing_ok=True)

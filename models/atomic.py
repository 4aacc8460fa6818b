"""Files that are written whole or not at all, and their hashes."""

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


def file_sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder whose files move to `out` when the block succeeds, and vanish when it does not."""
    missing = [parent for parent in (out, *out.parents) if not parent.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out) as folder:
            try:
                yield Path(folder)
                for path in sorted(Path(folder).iterdir()):
                    path.replace(out / path.name)
            except OSError as e:
                # Named after where the file was to go.
                if e.filename and Path(e.filename).parent == Path(folder):
                    e.filename = str(out / Path(e.filename).name)
                raise
    except BaseException:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise

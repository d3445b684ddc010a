"""Files from public mirrors: found in a cache or downloaded, by digest, whole or not at all."""

import gzip
import os
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from threading import Thread

PATIENCE = 3.0  # seconds until a mirror that says nothing counts as silent: all are asked at once
STALLED = 15.0  # seconds without a byte, after which a download counts as broken
ROUNDS = 2  # how often each mirror may fail at one file
GZIP = b"\x1f\x8b"
SILENT = f"does not offer it within {PATIENCE:g} s"

_given_up: dict[str, str] = {}  # mirrors that this process does not ask again, and why
_heard: set[str] = set()  # mirrors that have answered this process


def cache() -> Path:
    """The folder of this user for what has been downloaded."""
    import pooch  # here and below: its import takes 0.2 s, which only downloads need

    return Path(pooch.os_cache("diffedu"))


def fetch(name: str, digest: str, mirrors: Sequence[str], folder: Path) -> Path:
    """The file `name` in `folder`, downloaded there first unless it is there with that digest.

    A mirror is the address that comes before `name` and ".gz"; digest, the SHA-256 of the uncompressed
    content. The mirrors are tried in turn, twice; what has another digest is refused. Nothing but a file
    with the right digest ever bears its name. Raises ConnectionError, with the reason for every mirror, if
    none gives the file; this process then does not ask those mirrors again, see `forget`.
    """
    import pooch

    path = folder / name
    with suppress(OSError):  # what cannot be read is as good as absent
        if os.path.isfile(path) and pooch.file_hash(str(path)) == digest:
            return path
    _listen(mirrors, name)
    problems = {mirror: _given_up.get(mirror, "") for mirror in mirrors}
    for mirror in ROUNDS * [mirror for mirror in mirrors if mirror in _heard and mirror not in _given_up]:
        try:
            return Path(pooch.retrieve(f"{mirror}{name}.gz", digest, name, folder, downloader=_download))
        except (OSError, ValueError) as error:
            problems[mirror] = " ".join(str(error).split())
    _given_up.update(problems)
    if set(problems.values()) <= {SILENT}:
        raise ConnectionError(f"{name} is not in the cache and no mirror offers it within {PATIENCE:g} s")
    reasons = "; ".join(f"{mirror}: {problem}" for mirror, problem in problems.items())
    raise ConnectionError(f"{name} is not in the cache and no mirror gives it ({reasons})")


def forget() -> None:
    """Let the next `fetch` ask every mirror anew."""
    _given_up.clear()
    _heard.clear()


def _listen(mirrors: Sequence[str], name: str) -> None:
    """Ask the mirrors that are not known yet, all at once, and give up those that do not answer in time.

    In threads: a timeout of the connection covers neither the look-up of the name nor further addresses.
    """
    import pooch

    def ask(mirror: str) -> None:
        with suppress(OSError, ValueError):
            head = pooch.HTTPDownloader(timeout=PATIENCE)
            if head(f"{mirror}{name}.gz", None, None, check_only=True):
                _heard.add(mirror)

    unknown = [mirror for mirror in mirrors if mirror not in _heard and mirror not in _given_up]
    threads = [Thread(target=ask, args=(mirror,), daemon=True) for mirror in unknown]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    _given_up.update({mirror: SILENT for mirror in unknown if mirror not in _heard})


def _download(url: str, output: str, _: object) -> None:
    """Write the uncompressed content of url to the file `output`: the form in which pooch wants it."""
    import pooch

    received = BytesIO()
    pooch.HTTPDownloader(progressbar=True, chunk_size=1 << 16, timeout=STALLED)(url, received, None)
    content = received.getvalue()
    try:  # a server may have taken the compression off on the way
        content = gzip.decompress(content) if content.startswith(GZIP) else content
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"sends a damaged file: {error}") from error
    Path(output).write_bytes(content)

"""Make .venv and install requirements.txt into it; do nothing when it is already right.

Runs under the system's Python with the standard library alone. A digest of the pins, written into
the environment as the very last step, tells a finished environment from a half-made one.
"""

import contextlib
import hashlib
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "diffedu-stamp"


def digest() -> str:
    """What the environment depends on: the interpreter, the pins, the package's own metadata."""
    text = sys.implementation.cache_tag or ""
    for name in ("requirements.txt", "pyproject.toml"):
        text += (ROOT / name).read_text()
    return f"{sys.implementation.cache_tag} {hashlib.sha256(text.encode()).hexdigest()}"


def stamp() -> str:
    """What a finished environment was made for; empty for an unfinished one or none."""
    whole = STAMP.is_file() and (VENV / "bin" / "python").exists()
    return STAMP.read_text() if whole else ""


@contextlib.contextmanager
def lock() -> Iterator[None]:
    """Let one process at a time work on .venv."""
    import fcntl

    with (ROOT / "requirements.txt").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield


def make(found: str, wanted: str) -> None:
    """Create .venv, or bring a finished one of the same interpreter up to the new pins."""
    start = time.monotonic()
    if found.split(" ")[0] == wanted.split(" ")[0]:
        print("Bringing .venv up to the changed pins ...", flush=True)
        STAMP.unlink()
    else:
        print("Making .venv and installing requirements.txt, a few minutes ...", flush=True)
        shutil.rmtree(VENV, ignore_errors=True)
        try:
            venv.create(VENV, with_pip=True)
        except subprocess.CalledProcessError:
            shutil.rmtree(VENV, ignore_errors=True)
            sys.exit("This Python cannot make environments. On Debian: apt-get install python3-venv")
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    pip += ["--disable-pip-version-check", "--no-input", "-r", "requirements.txt"]
    try:
        failed = subprocess.run(pip, cwd=ROOT).returncode
    except KeyboardInterrupt:
        sys.exit("Interrupted; the next command makes .venv anew.")
    if failed:
        sys.exit("Installing requirements.txt failed; pip's message stands above.")
    STAMP.write_text(wanted)
    print(f".venv is ready ({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    if sys.version_info < (3, 11):
        sys.exit(f"Python 3.11 or newer is needed; this one is {sys.version.split()[0]}.")
    if stamp() != digest():
        with lock():
            if stamp() != digest():  # another process may have made it meanwhile
                make(stamp(), digest())

"""Against servers of our own on this machine: no test here asks any other."""

import gzip
import hashlib
import os
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from threading import Thread

import pytest
import requests

from diffedu import mirrors

NAME = "some-digits"
CONTENT = bytes(range(256)) * 400
DIGEST = hashlib.sha256(CONTENT).hexdigest()
PACKED = gzip.compress(CONTENT)
FLIPPED = CONTENT[:5000] + bytes([CONTENT[5000] ^ 1]) + CONTENT[5001:]
# What a bad mirror sends, by its path
DAMAGED = {
    "flipped": gzip.compress(FLIPPED),
    "flipped-inside": PACKED[:100] + bytes([PACKED[100] ^ 1]) + PACKED[101:],
    "halved": PACKED[: len(PACKED) // 2],
    "page": b"<html>Please log in to this network</html>",
    "empty": b"",
}


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        if self.path.startswith("/silent/"):
            time.sleep(1.5)
        self.start(403 if self.path.startswith("/forbidden/") else 200, len(PACKED))

    def do_GET(self):
        mirror = self.path.split("/")[1]
        self.server.asked.append(mirror)
        if mirror == "gone":
            return self.start(404, 0)
        body = DAMAGED.get(mirror, CONTENT if mirror == "unpacked" else PACKED)
        if mirror == "once" and self.server.asked.count("once") == 1:
            body = DAMAGED["flipped"]
        self.start(200, len(body))
        self.wfile.write(body[: len(body) // 2] if mirror == "broken-off" else body)
        return None

    def start(self, status, length):
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    mirrors.forget()
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        server.mirror = lambda path: f"http://127.0.0.1:{server.server_address[1]}/{path}/"
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
    mirrors.forget()


def fetch(server, folder, *paths):
    return mirrors.fetch(NAME, DIGEST, [server.mirror(path) for path in paths], folder)


@pytest.mark.parametrize("path", ["good", "unpacked"])
def test_a_file_is_downloaded_once(path, server, tmp_path, monkeypatch):
    folder = tmp_path / "new" / "folder"
    file = fetch(server, folder, path)
    assert file == folder / NAME
    assert file.read_bytes() == CONTENT
    assert [p.name for p in folder.iterdir()] == [NAME]
    # then it needs no mirror, in this process or, as if in another one, with all of them gone
    assert fetch(server, folder, path) == file
    mirrors.forget()
    monkeypatch.setattr(requests, "get", None)
    monkeypatch.setattr(requests, "head", None)
    assert mirrors.fetch(NAME, DIGEST, [], folder) == file
    assert fetch(server, folder, path) == file
    assert server.asked == [path]


@pytest.mark.parametrize("bad", [*DAMAGED, "broken-off", "gone"])
def test_after_a_bad_mirror_comes_the_next(bad, server, tmp_path):
    assert fetch(server, tmp_path, bad, "good").read_bytes() == CONTENT
    assert server.asked == [bad, "good"]
    assert [p.name for p in tmp_path.iterdir()] == [NAME]


@pytest.mark.parametrize("bad", [*DAMAGED, "broken-off", "gone"])
def test_with_bad_mirrors_alone_nothing_is_left_and_the_reasons_are_told(bad, server, tmp_path):
    with pytest.raises(ConnectionError) as error:
        fetch(server, tmp_path, bad, "gone")
    assert list(tmp_path.iterdir()) == []
    assert server.asked == [bad, "gone", bad, "gone"]
    message = str(error.value)
    assert "\n" not in message
    assert f"{NAME} is not in the cache and no mirror gives it" in message
    assert f"{server.mirror('gone')}: 404 Client Error" in message
    why = {"flipped-inside": "damaged file", "halved": "damaged file", "gone": "404", "broken-off": "broken"}
    assert why.get(bad, f"expected {DIGEST} but got").lower() in message.lower()
    # this process does not ask again, and says the same, until it is told to
    with pytest.raises(ConnectionError, match="404 Client Error"):
        fetch(server, tmp_path, bad, "gone")
    assert len(server.asked) == 4
    mirrors.forget()
    assert fetch(server, tmp_path, "gone", "good").read_bytes() == CONTENT


def test_a_mirror_that_fails_once_is_tried_again(server, tmp_path):
    assert fetch(server, tmp_path, "once").read_bytes() == CONTENT
    assert server.asked == ["once", "once"]


@pytest.mark.parametrize("damage", [CONTENT[:-1], FLIPPED, b""])
def test_a_damaged_file_in_the_cache_is_replaced_and_never_returned(damage, server, tmp_path):
    (tmp_path / NAME).write_bytes(damage)
    with pytest.raises(ConnectionError):
        fetch(server, tmp_path, "gone")
    mirrors.forget()
    assert fetch(server, tmp_path, "good").read_bytes() == CONTENT
    assert [p.name for p in tmp_path.iterdir()] == [NAME]


def test_silent_mirrors_cost_little_and_once(server, tmp_path, monkeypatch):
    monkeypatch.setattr(mirrors, "PATIENCE", 1.0)
    names = ("silent", "silent/2", "silent/3", "silent/4")
    before = time.monotonic()
    with pytest.raises(ConnectionError, match=r"no mirror offers it within 1 s$"):
        fetch(server, tmp_path, *names)
    assert time.monotonic() - before < 3  # all at once; the import of pooch is in it
    before = time.monotonic()
    with pytest.raises(ConnectionError, match="no mirror offers it"):
        fetch(server, tmp_path, *names)
    assert time.monotonic() - before < 1
    assert fetch(server, tmp_path, *names, "good").read_bytes() == CONTENT
    assert server.asked == ["good"]


@pytest.mark.parametrize("bad", ["http://127.0.0.1:1/", "http://no.such.host.invalid/", "http://["])
def test_without_a_network_there_is_no_wait(bad, server, tmp_path):
    before = time.monotonic()
    with pytest.raises(ConnectionError, match=r"no mirror offers it within 3 s$"):
        mirrors.fetch(NAME, DIGEST, [bad, server.mirror("forbidden")], tmp_path)
    assert time.monotonic() - before < 6
    assert server.asked == []


def test_an_interrupted_download_leaves_the_folder_as_it_was(server, tmp_path, monkeypatch):
    class Interrupted(BytesIO):
        def write(self, chunk):
            raise KeyboardInterrupt

    (tmp_path / NAME).write_bytes(FLIPPED)
    with monkeypatch.context() as patched:
        patched.setattr(mirrors, "BytesIO", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch(server, tmp_path, "good")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [(NAME, FLIPPED)]
    assert fetch(server, tmp_path, "good").read_bytes() == CONTENT


def test_a_folder_that_cannot_be_written_is_named(server, tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ConnectionError, match=rf"no mirror gives it \(.*{tmp_path}/file"):
        fetch(server, tmp_path / "file" / "folder", "good")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_read_only_folder_is_read_but_not_filled(server, tmp_path):
    fetch(server, tmp_path, "good")
    tmp_path.chmod(0o500)
    try:
        assert fetch(server, tmp_path, "gone").read_bytes() == CONTENT
        if os.geteuid() != 0:  # nothing is read-only for root
            with pytest.raises(ConnectionError, match=rf"Permission denied.*{tmp_path}"):
                mirrors.fetch("other", DIGEST, [server.mirror("good")], tmp_path)
    finally:
        tmp_path.chmod(0o700)
    assert [p.name for p in tmp_path.iterdir()] == [NAME]


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert mirrors.cache().name == "diffedu"
    assert not mirrors.cache().exists()

"""download.py against a server on this machine that resumes or not, breaks off or lies, and hostile archives."""

import gzip
import hashlib
import http.server
import io
import random
import resource
import shutil
import tarfile
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

import download
import runs
from download import extract, fetch

CONTENT = random.Random(0).randbytes(3 * 2**20 + 17)
MD5 = hashlib.md5(CONTENT).hexdigest()
Usage = namedtuple("Usage", "total used free")


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; what is special is in the path: /range, /plain (no Range), /cut (half), /shifted, /long, ..."""

    seen: list[tuple[str, str | None]]

    def do_GET(self) -> None:
        wanted = self.headers["Range"]
        self.seen.append((self.path, wanted))
        if self.path == "/gone":
            self.send_error(404)
            return
        if self.path == "/silent":
            time.sleep(1)
        start = 0
        if wanted and self.path != "/plain":
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            claimed = start - 5 if self.path == "/shifted" else start
            self.send_header("Content-Range", f"bytes {claimed}-{len(CONTENT) - 1}/{len(CONTENT)}")
            start = claimed
        else:
            self.send_response(200)
        body = CONTENT[start:]
        if self.path == "/long":
            body += b"more"
        if self.path == "/changed":
            body = bytes(len(body))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.path == "/cut" else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    """A server on a free loopback port; `.seen` lists (path, Range) of the requests, `.url` is its root."""
    handler = type("Handler", (Server,), {"seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.seen, server.url = handler.seen, f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# fetch


def test_a_file_is_fetched_once(tmp_path: Path, server: http.server.HTTPServer) -> None:
    for _ in range(2):
        fetch(f"{server.url}/range", tmp_path / "deep" / "file.tar", len(CONTENT), MD5)
    assert (tmp_path / "deep" / "file.tar").read_bytes() == CONTENT
    assert listing(tmp_path / "deep") == ["file.tar"]
    assert server.seen == [("/range", None)]


def test_a_file_of_other_content_is_replaced(tmp_path: Path, server: http.server.HTTPServer) -> None:
    (tmp_path / "file").write_bytes(bytes(len(CONTENT)))
    fetch(f"{server.url}/range", tmp_path / "file", len(CONTENT), MD5, progress=False)
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize(("path", "asked"), [("/range", "bytes=1000-"), ("/plain", "bytes=1000-")])
def test_a_part_is_continued_or_read_again_where_the_server_cannot(
    tmp_path: Path, server: http.server.HTTPServer, path: str, asked: str
) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    fetch(server.url + path, tmp_path / "file", len(CONTENT), MD5)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.seen == [(path, asked)]


def test_a_server_that_continues_elsewhere_is_not_believed(tmp_path: Path, server: http.server.HTTPServer) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    with pytest.raises(OSError, match=r"stopped at 1,000 .* another part than the one asked for"):
        fetch(f"{server.url}/shifted", tmp_path / "file", len(CONTENT), MD5)
    assert (tmp_path / "file.part").read_bytes() == CONTENT[:1000]


def test_a_part_longer_than_the_file_is_dropped_and_a_whole_one_only_checked(
    tmp_path: Path, server: http.server.HTTPServer
) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT + b"x")
    fetch(f"{server.url}/range", tmp_path / "file", len(CONTENT), MD5)
    (tmp_path / "file").rename(tmp_path / "file.part")
    fetch(f"{server.url}/range", tmp_path / "file", len(CONTENT), MD5)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.seen == [("/range", None)]


def test_a_broken_connection_keeps_what_came_and_the_next_call_resumes(
    tmp_path: Path, server: http.server.HTTPServer
) -> None:
    for _ in range(3):
        with pytest.raises(OSError, match=r"stopped at [\d,]+ of 3,145,745 bytes .*; the same command") as error:
            fetch(f"{server.url}/cut", tmp_path / "file", len(CONTENT), MD5)
        assert "\n" not in str(error.value)
    have = len(CONTENT) - len(CONTENT) // 8
    assert abs((tmp_path / "file.part").stat().st_size - have) < 10
    fetch(f"{server.url}/range", tmp_path / "file", len(CONTENT), MD5)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert [request[1] is None for request in server.seen] == [True, False, False, False]


@pytest.mark.parametrize(("path", "reason"), [("/gone", "404"), ("/silent", "timed out"), ("/long", "more than")])
def test_network_errors_are_one_line(
    tmp_path: Path, server: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch, path: str, reason: str
) -> None:
    monkeypatch.setattr(download, "TIMEOUT_SECONDS", 0.3)
    with pytest.raises(OSError, match=rf"downloading http://\S+{path} stopped at 0 of 3,145,745 bytes \(.*{reason}"):
        fetch(server.url + path, tmp_path / "file", len(CONTENT), MD5)
    assert not (tmp_path / "file").exists()


def test_without_a_server_the_error_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"downloading http://127.0.0.1:9/x stopped at 0 of 5 bytes .*refused"):
        fetch("http://127.0.0.1:9/x", tmp_path / "file", 5, MD5)


def test_a_wrong_md5_deletes_the_download(tmp_path: Path, server: http.server.HTTPServer) -> None:
    with pytest.raises(ValueError, match=rf"/changed has md5 [0-9a-f]{{32}}, not {MD5}; the download is deleted"):
        fetch(f"{server.url}/changed", tmp_path / "file", len(CONTENT), MD5)
    assert listing(tmp_path) == []


def test_a_disk_without_room_is_noticed_before_the_download(
    tmp_path: Path, server: http.server.HTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**10, 0, len(CONTENT) - 500))
    with pytest.raises(OSError, match=r"GB free, file needs .* GB; make room"):
        fetch(f"{server.url}/range", tmp_path / "file", len(CONTENT), MD5)
    assert server.seen == []
    (tmp_path / "file.part").write_bytes(CONTENT[:500])  # now the rest fits
    fetch(f"{server.url}/range", tmp_path / "file", len(CONTENT), MD5)


def test_two_downloads_of_one_file_do_not_mix(tmp_path: Path, server: http.server.HTTPServer) -> None:
    slow = threading.Thread(target=fetch, args=(f"{server.url}/silent", tmp_path / "file", len(CONTENT), MD5))
    slow.start()
    while not server.seen:
        time.sleep(0.01)
    with pytest.raises(OSError, match=r"file.part is being downloaded by another process"):
        fetch(f"{server.url}/range", tmp_path / "file", len(CONTENT), MD5)
    slow.join()
    assert (tmp_path / "file").read_bytes() == CONTENT


# extract


def member(name: str, content: bytes | None = b"content", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content or b"")
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content or b""


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return path


GOOD = (member("set", None, type=tarfile.DIRTYPE), member("set/a.npy", b"a"), member("set/b.npy", b"b" * 5000))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archives_folder_becomes_the_target(tmp_path: Path, mode: str) -> None:
    archive = write_tar(tmp_path / "x.tar", *GOOD, mode=mode)
    extract(archive, tmp_path / "set")
    assert (tmp_path / "set" / "a.npy").read_bytes() == b"a"
    assert (tmp_path / "set" / "b.npy").read_bytes() == b"b" * 5000
    extract(archive, tmp_path / "new" / "set", ["set/b.npy"])
    assert listing(tmp_path / "new" / "set") == ["b.npy"]
    extract(archive, tmp_path / "other")
    assert listing(tmp_path / "other" / "set") == ["a.npy", "b.npy"]
    assert listing(tmp_path) == ["new", "other", "set", "x.tar"]


def test_an_archive_without_a_folder_is_unpacked_into_the_target(tmp_path: Path) -> None:
    extract(write_tar(tmp_path / "x.tar", member("a"), member("./b")), tmp_path / "set")
    assert listing(tmp_path / "set") == ["a", "b"]


HOSTILE = {
    "absolute": (member("/tmp/evil"), "'/tmp/evil' points out"),
    "parent": (member("../evil"), "'../evil' points out"),
    "hidden parent": (member("set/../../evil"), "points out"),
    "symlink": (member("set/l", None, type=tarfile.SYMTYPE, linkname="/etc"), "'set/l' is neither a plain file"),
    "hard link": (member("set/l", None, type=tarfile.LNKTYPE, linkname="set/a.npy"), "'set/l' is neither"),
    "fifo": (member("set/f", None, type=tarfile.FIFOTYPE), "'set/f' is neither"),
    "device": (member("set/d", None, type=tarfile.CHRTYPE, devmajor=1, devminor=3), "'set/d' is neither"),
    "twice": (member("set/a.npy", b"other"), "'set/a.npy' is there twice"),
    "twice, otherwise": (member("set//./a.npy", b"other"), "is there twice"),
    "too large": (member("set/big", bytes(20_000)), "'set/big' it has more than 10,000 bytes"),
    "escapes": (member("\x1b[31m/../x\nline"), "points out"),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("chosen", [None, ["set/a.npy"]])
def test_a_hostile_member_is_named_and_nothing_is_unpacked(tmp_path: Path, kind: str, chosen: list | None) -> None:
    hostile, message = HOSTILE[kind]
    archive = write_tar(tmp_path / "x.tar", *GOOD, hostile)
    with pytest.raises(ValueError, match=rf"x.tar is not a sound archive \(.*{message}.*delete it and") as caught:
        extract(archive, tmp_path / "set", chosen, limit_bytes=10_000)
    assert str(caught.value).isprintable()
    assert listing(tmp_path) == ["x.tar"]


def test_a_wanted_member_that_is_missing_is_named(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tar", *GOOD)
    for name in ("set/c.npy", "set"):
        with pytest.raises(ValueError, match=rf"\(it lacks {name}\)"):
            extract(archive, tmp_path / "set", [name])
    with pytest.raises(FileNotFoundError, match=r"no archive .*y.tar; download it first"):
        extract(tmp_path / "y.tar", tmp_path / "set")


def test_a_target_that_exists_is_kept(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tar", *GOOD)
    (tmp_path / "set").mkdir()
    with pytest.raises(ValueError, match=r"set exists already; delete or move it"):
        extract(archive, tmp_path / "set")
    assert listing(tmp_path / "set") == []


def test_a_disk_without_room_is_noticed_before_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_tar(tmp_path / "x.tar", *GOOD)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**10, 0, 5000))
    with pytest.raises(OSError, match=r"cannot unpack .*x.tar into .*: .* GB free, .* GB needed; make room"):
        extract(archive, tmp_path / "set")
    assert listing(tmp_path) == ["x.tar"]
    extract(archive, tmp_path / "set", ["set/b.npy"])


def test_what_a_killed_process_left_is_removed_and_a_living_one_refused(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "x.tar", *GOOD)
    left = tmp_path / ".set.unpacking"
    (left / "content" / "set").mkdir(parents=True)
    (left / "content" / "set" / "half").write_bytes(b"half")
    with runs.lock(left), pytest.raises(ValueError, match="in use by another process"):
        extract(archive, tmp_path / "set")
    assert (left / "content" / "set" / "half").exists()
    extract(archive, tmp_path / "set")
    assert listing(tmp_path / "set") == ["a.npy", "b.npy"]
    assert listing(tmp_path) == ["set", "x.tar"]


def raw_header(name: str, size: int, kind: bytes) -> bytes:
    """A tar header that claims a size that tarfile would not write."""
    info = tarfile.TarInfo(name)
    info.type = kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % (sum(block) % 2**18)
    return bytes(block)


BOMBS = {
    "name of a gigabyte": (
        gzip.compress(raw_header("x", 2**30, tarfile.GNUTYPE_LONGNAME) + bytes(2**26)), "a header claims too much"
    ),
    "pax header of a gigabyte": (
        gzip.compress(raw_header("x", 2**30, tarfile.XHDTYPE) + bytes(2**26)), "a header claims too much"
    ),
    "terabyte": (raw_header("x", 2**40, tarfile.REGTYPE) + bytes(1024), "'x' it has more than"),
    "negative size": (raw_header("x", -512, tarfile.REGTYPE) + bytes(1024), "'x' it has more than"),
    "negative name": (raw_header("x", -512, tarfile.GNUTYPE_LONGNAME) + bytes(1024), "a header claims too much"),
    "endless folders": (
        gzip.compress(b"".join(raw_header(f"{i}", 0, tarfile.DIRTYPE) for i in range(11_000))), "10,000 members"
    ),
    "names of names": (raw_header("x", 1, tarfile.GNUTYPE_LONGNAME) * 5000, "recursion"),
    "sparse": (raw_header("x", 0, tarfile.GNUTYPE_SPARSE) + bytes(1024), "'x' is neither a plain file"),
    "empty": (b"", "empty file"),
    "no tar": (b"x" * 5000, "invalid header"),
    "no gzip": (b"\x1f\x8bnothing", "Compressed file"),
    "a cut gzip": (gzip.compress(CONTENT)[:9000], "invalid header"),
    "zeros": (gzip.compress(bytes(2**26)), "it lacks set/a"),
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_costs_neither_time_nor_memory(tmp_path: Path, bomb: str) -> None:
    archive = tmp_path / "x.tar"
    content, message = BOMBS[bomb]
    archive.write_bytes(content)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(ValueError, match=rf"x.tar is not a sound archive \(.*{message}.*\); delete it and download"):
        extract(archive, tmp_path / "set", ["set/a"])
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KB
    assert listing(tmp_path) == ["x.tar"]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_random_damage_raises_only_documented_errors(tmp_path: Path, mode: str) -> None:
    archive, rng = tmp_path / "x.tar", random.Random(0)
    whole = write_tar(archive, *GOOD, mode=mode).read_bytes()
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3])):
            damaged[rng.randrange(min(len(whole), 2000))] = rng.randrange(256)
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(damaged)) :]
        archive.write_bytes(damaged)
        message = ""
        try:
            extract(archive, tmp_path / "set", ["set/a.npy", "set/b.npy"])
            shutil.rmtree(tmp_path / "set")
        except ValueError as error:
            message = str(error)
            refused += 1
        assert not message or ("x.tar" in message and "\n" not in message)
        assert listing(tmp_path) == ["x.tar"]
    assert refused > 60

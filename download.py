"""Downloads that can be continued, and archives that are checked before anything of them reaches the disk.

Used by data.py (CIFAR-10 and CIFAR-100) and corruptions.py (the official CIFAR-10-C and CIFAR-100-C).
"""

import fcntl
import gzip
import hashlib
import http.client
import io
import os
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

import runs

TIMEOUT_SECONDS = 30
CHUNK_BYTES = 2**20
MAX_UNPACKED_BYTES = 4 * 2**30
MAX_MEMBERS = 10_000


def fetch(url: str, path: str | Path, size: int, md5: str, progress: bool = True) -> None:
    """Download `url`, of `size` bytes and known md5 (32 hex digits), to `path`, unless it lies there whole.

    What has arrived is kept in `<path>.part`, and another call asks the server for the rest alone (HTTP Range; a server
    that sends everything again is read from the start). `path` appears by a rename after the md5 matched.
    Raises OSError with a one-line message when the disk has too little room, the network fails (calling again resumes)
    or another process downloads the same file, ValueError when what arrived is not the file that was asked for.
    """
    path = Path(path)
    if path.is_file() and path.stat().st_size == size and _md5(path) == md5:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with open(part, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(f"{part} is being downloaded by another process; wait for it") from None
        if _length(file) > size:
            file.truncate(0)
        needed, free = size - _length(file), shutil.disk_usage(path.parent).free
        if free < needed:
            have = f"{path.parent} has {free / 1e9:.1f} GB free"
            raise OSError(f"{have}, {path.name} needs {needed / 1e9:.1f} GB; make room")
        try:
            if needed:
                _receive(url, file, size, progress)
        except (OSError, http.client.HTTPException) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OSError(
                f"downloading {url} stopped at {_length(file):,} of {size:,} bytes ({reason}); the same command resumes"
            ) from error
        file.flush()
        os.fsync(file.fileno())
        if (found := _md5(part)) != md5:
            part.unlink()
            raise ValueError(f"{url} has md5 {found}, not {md5}; the download is deleted, try again later")
        os.replace(part, path)


def _receive(url: str, file: IO[bytes], size: int, progress: bool) -> None:
    """Append the bytes that `file` lacks. OSError or HTTPException when they do not come."""
    have = _length(file)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
        if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            raise OSError("the server sends another part than the one asked for")
        if response.status != 206 and have:  # this server does not resume
            file.truncate(0)
            have = 0
        name, quiet = Path(file.name).stem, None if progress else True
        with tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=name, disable=quiet) as bar:
            while chunk := response.read(CHUNK_BYTES):
                if (have := have + len(chunk)) > size:
                    file.truncate(0)
                    raise OSError("the server sends more than the file should have")
                file.write(chunk)
                bar.update(len(chunk))
    if have < size:
        raise OSError("the connection ended early")


def _length(file: IO[bytes]) -> int:
    file.flush()
    return os.fstat(file.fileno()).st_size


def _md5(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def extract(
    archive: str | Path, target: str | Path, members: Iterable[str] | None = None,
    limit_bytes: int = MAX_UNPACKED_BYTES,
) -> None:
    """Unpack a .tar or .tar.gz so that the folder `target` holds its files; `target` must not exist yet.

    members: the paths inside the archive to unpack (all of them must be there), None for everything. Where the archive
    puts all under one folder called like `target`, that folder becomes `target` rather than lying in it.
    Before anything is written, every member is checked: no absolute path, no '..', no name twice, nothing but plain
    files and folders, at most `limit_bytes` in all and room for them on the disk. The files are unpacked beside
    `target` and renamed in the end, so `target` is there whole or not at all.
    Raises ValueError naming the archive and the member at fault, FileNotFoundError, or OSError (a full disk).
    """
    archive, target = Path(archive), Path(target)
    if not archive.is_file():
        raise FileNotFoundError(f"no archive {archive}; download it first")
    if target.exists():
        raise ValueError(f"{target} exists already; delete or move it to unpack {archive} there")
    temporary = target.with_name(f".{target.name}.unpacking")
    with runs.lock(temporary):
        try:
            unpacked = temporary / "content"
            shutil.rmtree(unpacked, ignore_errors=True)  # left by a process that was killed
            _extract_checked(archive, unpacked, members, limit_bytes)
            inner = unpacked / target.name
            os.rename(inner if os.listdir(unpacked) == [target.name] and inner.is_dir() else unpacked, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


class _SmallReads(io.BufferedReader):
    """A file whose reads are small: tarfile would read a header's name field of any claimed length into memory."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= CHUNK_BYTES:
            raise tarfile.ReadError("a header claims too much")
        return super().read(size)


def _extract_checked(archive: Path, folder: Path, members: Iterable[str] | None, limit_bytes: int) -> None:
    try:
        with open(archive, "rb", buffering=0) as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            raw = gzip.GzipFile(fileobj=file) if zipped else file
            with _SmallReads(raw) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
                chosen = _check_members(tar, members, limit_bytes)
                needed, free = sum(member.size for member in chosen), shutil.disk_usage(folder.parent).free
                if free < needed:
                    raise OSError(f"{free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed; make room")
                folder.mkdir()
                tar.extractall(folder, members=chosen, filter="data")
    except Exception as error:  # damaged bytes can make gzip and tarfile raise nearly anything
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        if isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
            raise OSError(f"cannot unpack {archive} into {folder.parent.parent}: {reason}") from error
        raise ValueError(f"{archive} is not a sound archive ({reason}); delete it and download it again") from error


def _check_members(tar: tarfile.TarFile, wanted: Iterable[str] | None, limit_bytes: int) -> list[tarfile.TarInfo]:
    """The members to unpack, after a look at each header of the archive; ValueError at the first that is unsafe."""
    seen: dict[PurePosixPath, tarfile.TarInfo] = {}
    total = 0
    for member in tar:
        name, path = ascii(member.name)[:80], PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"member {name} points out of the folder")
        if not (member.isdir() or (member.isreg() and not member.issparse())):
            raise ValueError(f"member {name} is neither a plain file nor a folder")
        if path in seen and not member.isdir():
            raise ValueError(f"member {name} is there twice")
        total += max(member.size, 0)
        if member.size < 0 or total > limit_bytes or len(seen) >= MAX_MEMBERS:
            raise ValueError(f"with member {name} it has more than {limit_bytes:,} bytes or {MAX_MEMBERS:,} members")
        seen[path] = member
    if wanted is None:
        return list(seen.values())
    paths = [PurePosixPath(name) for name in wanted]
    for path in paths:
        if path not in seen or not seen[path].isreg():
            raise ValueError(f"it lacks {path}")
    return [seen[path] for path in paths]

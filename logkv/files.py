"""Names, locking, sync, rename: the only place that does any.

Everything that reaches a store's files from Python goes through a `Directory` or one of the functions below, so a
test can watch or fail each of it.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import re
import struct
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from logkv._core import Descriptor, data_end, filesystem_magic, free_blocks
from logkv.errors import Error, FormatError, LockedError, NotFoundError

LOCK = "LOCK"
MANIFEST = "MANIFEST"
MANIFEST_NEXT = "MANIFEST.tmp"
CONTROL = "control"
INDEX = "index"
INDEX_NEXT = "index.tmp"
BACKUP_BEGUN = "backup.tmp"
LOST_FOUND = "lost+found"

# What mapped files and their coherence between processes cannot be had from (magic numbers of statfs(2)).
NETWORK_FILE_SYSTEMS = {
    0x6969: "NFS", 0x517B: "SMB", 0xFF534D42: "CIFS", 0xFE534D42: "SMB2", 0x01021997: "9P", 0x5346414F: "AFS",
    0x73757245: "Coda", 0x00C36400: "Ceph",
}

# What overwrites in place: what was allocated takes every later store.  All others are taken to copy on write.
IN_PLACE = {0xEF53: "ext2, ext3, ext4", 0x01021994: "tmpfs", 0x858458F6: "ramfs"}
PART = 1 << 20           # bytes of a file that are copied at a time
LITTLE = 1 << 30        # bytes left, below which copying on write may find no room

# Why a file has no second name: another device, no such thing there, rights, too many.
NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.ENOENT}


def segment_name(number: int) -> str:
    """The file of a segment."""
    return f"{number:010d}.seg"


_is_segment = re.compile(r"(\d{10,20})\.seg").fullmatch


def segment_number(name: str) -> int | None:
    """The number of a segment's file, or None if the name is not one's."""
    match = _is_segment(name)
    return int(match[1]) if match and segment_name(int(match[1])) == name else None


def is_store_name(name: str) -> bool:
    """Whether LogKV gives a file this name."""
    return name in (LOCK, MANIFEST, MANIFEST_NEXT, CONTROL, INDEX, INDEX_NEXT, BACKUP_BEGUN, LOST_FOUND) \
        or segment_number(name) is not None


class Directory:
    """A store's directory.  Files are named relative to its descriptor, so it may be renamed while it is open."""

    fd = -1

    def __init__(self, path: str, *, create: bool = False, mode: int = 0o666) -> None:
        """Opens the directory; with `create` it is made if missing (its parent must be there).

        Raises NotFoundError, FormatError if the path is not a directory, Error (an OSError) for missing rights.
        """
        self.path = path
        self.mode = mode
        try:
            if create:
                try:
                    os.mkdir(path, mode | (mode & 0o444) >> 2)
                except FileExistsError:
                    pass
                else:
                    sync_directory_of(path)
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except NotADirectoryError:
            raise FormatError(errno.ENOTDIR, f"{path} is a file; a LogKV store is a directory", path) from None
        except FileNotFoundError:
            where = os.path.dirname(os.path.abspath(path))
            raise NotFoundError(errno.ENOENT, "there is no store" if os.path.isdir(where) else
                                f"there is no directory {where} to hold the store", path) from None
        except OSError as problem:
            raise Error(problem.errno, f"cannot open the store: {problem.strerror}", path) from None
        network = NETWORK_FILE_SYSTEMS.get(filesystem_magic(self.fd))
        if network:
            self.close()
            raise Error(errno.EOPNOTSUPP, f"LogKV does not work on network file systems ({network})", path)

    def again(self) -> Directory:
        """The same directory, whatever its path leads to now, with a descriptor of its own."""
        twin = object.__new__(Directory)
        twin.path, twin.mode = self.path, self.mode
        twin.fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
        return twin

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            close(fd)

    def __del__(self) -> None:
        self.close()

    def removed(self) -> bool:
        """Whether the directory has no name any more."""
        return os.fstat(self.fd).st_nlink == 0

    def identity(self) -> tuple[int, int]:
        """Device and inode."""
        status = os.fstat(self.fd)
        return status.st_dev, status.st_ino

    def names(self) -> list[str]:
        return os.listdir(self.fd)

    def open(self, name: str, *, writable: bool = False, create: bool = False, exclusive: bool = False) -> int:
        """A descriptor of a file in the directory."""
        flags = os.O_CLOEXEC | (os.O_RDWR if writable else os.O_RDONLY)
        if create:
            flags |= os.O_CREAT | (os.O_EXCL if exclusive else 0)
        return os.open(name, flags, self.mode, dir_fd=self.fd)

    def stat(self, name: str) -> os.stat_result:
        return os.stat(name, dir_fd=self.fd, follow_symlinks=False)

    def size(self, name: str) -> tuple[int, int]:
        """Bytes of a file, and bytes that it takes on the device; zeros if it is not there."""
        try:
            status = self.stat(name)
        except FileNotFoundError:
            return 0, 0
        return status.st_size, status.st_blocks * 512

    def read(self, name: str, most: int = 1 << 62) -> bytes:
        """A file's bytes, or the first `most`."""
        fd = self.open(name)
        try:
            return read_at(fd, min(os.fstat(fd).st_size, most), 0)
        finally:
            close(fd)

    def has_data(self, name: str, start: int) -> bool:
        """Whether a file has anything but zeros from an offset on."""
        fd = self.open(name)
        try:
            while piece := read_at(fd, 1 << 20, start):
                if piece.count(0) != len(piece):
                    return True
                start = _next_data(fd, start + len(piece))
            return False
        finally:
            close(fd)

    def rename(self, old: str, new: str) -> None:
        os.rename(old, new, src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def unlink(self, name: str) -> None:
        """Removes a file; one that is not there is fine."""
        try:
            os.unlink(name, dir_fd=self.fd)
        except FileNotFoundError:
            pass

    def link(self, other: Directory, name: str) -> bool:
        """Gives a file of another directory its name here too; False where that cannot be, or the file is gone."""
        try:
            os.link(name, name, src_dir_fd=other.fd, dst_dir_fd=self.fd)
        except OSError as problem:
            if problem.errno not in NO_LINK:
                raise
            return False
        return True

    def save_aside(self, label: str, parts: Callable[[], Iterable[bytes]]) -> str:
        """Writes bytes to a new file under `lost+found`, durably: under its name it is whole.  What was saved under the
        same label before stays, and is not written again if it is the same.  Returns the file's name in the directory.

        parts: gives the bytes, each time it is called.
        """
        self._make_lost_found()
        name, turn = f"{LOST_FOUND}/{label}", 1
        unfinished = name + ".tmp"
        while self._exists(name):
            if self._holds(name, parts()):
                return name
            turn += 1
            name = f"{LOST_FOUND}/{label}.{turn}"
        self.unlink(unfinished)
        fd = self.open(unfinished, writable=True, create=True, exclusive=True)
        try:
            end = 0
            for part in parts():
                write_at(fd, part, end)
                end += len(part)
            sync_data(fd)
        finally:
            close(fd)
        self.rename(unfinished, name)
        self._sync_lost_found()
        return name

    def move_aside(self, name: str) -> str:
        """Moves a whole file to `lost+found`, durably; returns its name there."""
        self._make_lost_found()
        aside, turn = f"{LOST_FOUND}/{name}", 1
        while self._exists(aside):
            turn += 1
            aside = f"{LOST_FOUND}/{name}.{turn}"
        self.rename(name, aside)
        self._sync_lost_found()
        return aside

    def _make_lost_found(self) -> None:
        try:
            os.mkdir(LOST_FOUND, self.mode | (self.mode & 0o444) >> 2, dir_fd=self.fd)
        except FileExistsError:
            pass

    def _sync_lost_found(self) -> None:
        fd = os.open(LOST_FOUND, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
        try:
            os.fsync(fd)
        finally:
            close(fd)
        self.sync()

    def _holds(self, name: str, parts: Iterable[bytes]) -> bool:
        """Whether a file is these bytes."""
        fd = self.open(name)
        try:
            end = 0
            for part in parts:
                if read_at(fd, len(part), end) != part:
                    return False
                end += len(part)
            return os.fstat(fd).st_size == end
        finally:
            close(fd)

    def _exists(self, name: str) -> bool:
        try:
            self.stat(name)
        except FileNotFoundError:
            return False
        return True

    def sync(self) -> None:
        """Makes created, renamed and removed names durable."""
        os.fsync(self.fd)


def close(fd: int) -> None:
    """Lets a descriptor go.  What a failure would say of its data is nothing new: what matters was synced.

    Allocates nothing: without memory it must work too.
    """
    try:
        os.close(fd)
    except OSError:
        pass


def sync_directory_of(path: str) -> None:
    """Makes the name of a new directory durable in its parent."""
    fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        close(fd)


def remove_directory(path: str) -> None:
    """Removes an empty directory."""
    os.rmdir(path)


def sync_data(fd: int) -> None:
    """Everything that was written to the file, through a mapping too, is on the device when this returns."""
    if hasattr(fcntl, "F_FULLFSYNC"):       # macOS, where fsync stops at the drive's cache
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(fd)


def copies_on_write(fd: int) -> bool:
    """Whether a page that the device has may need a new block when it is stored into."""
    return filesystem_magic(fd) not in IN_PLACE


def allocate(fd: int, size: int, *, start: int | None = None) -> None:
    """Makes the file at least `size` bytes long, really: where the file system overwrites in place, later
    stores into it cannot fail for lack of space.

    `start`: what it has already from there on too, for a copy may have left holes where zeros were.
    """
    status = os.fstat(fd)
    have = status.st_size
    if start is not None and status.st_blocks * 512 < have:
        have = min(start, have)
    if size > have:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, have, size - have)
        elif size > status.st_size:
            write_at(fd, bytes(size - status.st_size), status.st_size)


def free_space(fd: int, start: int) -> None:
    """What was allocated behind a file's end proper, `start`, goes back to the file system; the file's length stays, for
    readers have it mapped."""
    start = -(-start // 4096) * 4096
    length = os.fstat(fd).st_size - start
    if length > 0:
        free_blocks(fd, start, length)


def _next_data(fd: int, start: int) -> int:
    """Where a file goes on behind a hole, which reads as zeros; its end if it does not."""
    try:
        return os.lseek(fd, start, os.SEEK_DATA)
    except OSError as problem:
        return os.fstat(fd).st_size if problem.errno == errno.ENXIO else start


def write_at(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Writes all of `data`."""
    view = memoryview(data)
    while len(view):
        done = os.pwrite(fd, view, offset)
        view = view[done:]
        offset += done


def read_at(fd: int, size: int, offset: int) -> bytes:
    """Reads `size` bytes, or what there is."""
    parts = []
    while size:
        part = os.pread(fd, min(size, 1 << 30), offset)
        if not part:
            break
        parts.append(part)
        size -= len(part)
        offset += len(part)
    return b"".join(parts)


def parts_of(fd: int, start: int, stop: int) -> Iterator[bytes]:
    """The bytes of a range of a file, a part at a time; zeros for what the device cannot read."""
    while start < stop:
        size = min(PART, stop - start)
        try:
            part = read_at(fd, size, start)
        except OSError as problem:
            if problem.errno != errno.EIO:
                raise
            part = b"".join(_page_or_zeros(fd, at, min(4096, start + size - at)) for at in range(start, start + size, 4096))
        if not part:
            return
        yield part
        start += len(part)


def last_byte(fd: int, start: int, size: int) -> int:
    """Behind the last byte from `start` on that is not zero, in a file of this size; `start` if there is none."""
    end = data_end(fd, size)
    while end > start:
        begin = max(start, end - PART)
        if part := b"".join(parts_of(fd, begin, end)).rstrip(b"\0"):
            return begin + len(part)
        end = begin
    return start


def _page_or_zeros(fd: int, offset: int, size: int) -> bytes:
    try:
        return read_at(fd, size, offset)
    except OSError:
        return bytes(size)


# -- the writer's lock ------------------------------------------------------------------------------------------
#
# Byte 0 of LOCK is the lock.  Who waits for it locks the byte whose number is the time at which it began to wait, and
# takes its turn when no byte before that is locked.  A dead process keeps neither.

_SET, _GET = getattr(fcntl, "F_OFD_SETLK", 90), getattr(fcntl, "F_OFD_GETLK", 92)
_DARWIN = sys.platform == "darwin"
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.01      # seconds between two looks of one who waits
_PATIENCE = 1.0                                     # seconds with a first one who does not take the lock


def _flock(kind: int, start: int, length: int) -> bytes:
    """A `struct flock`."""
    if _DARWIN:
        return struct.pack("qqihh", start, length, 0, kind, os.SEEK_SET)
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)


def _kind(flock: bytes) -> int:
    kind: int = struct.unpack_from("h", flock, 20 if _DARWIN else 0)[0]
    return kind


def _try_lock(fd: int, byte: int) -> bool:
    """Takes the lock of a byte, unless another open file has it; it goes with the last descriptor of this one."""
    try:
        fcntl.fcntl(fd, _SET, _flock(fcntl.F_WRLCK, byte, 1))
    except OSError as problem:
        if problem.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _is_locked(fd: int, start: int, length: int) -> bool:
    return _kind(fcntl.fcntl(fd, _GET, _flock(fcntl.F_WRLCK, start, length))) != fcntl.F_UNLCK


def is_locked(fd: int) -> bool:
    """Whether another open file holds the writer's lock; takes nothing."""
    return _is_locked(fd, 0, 1)


def has_writer(directory: Directory) -> bool:
    """Whether another open file holds the writer's lock of a store; False where that cannot be known."""
    try:
        fd = directory.open(LOCK)
    except OSError:
        return False
    try:
        return is_locked(fd)
    except OSError:
        return False
    finally:
        close(fd)


def lock(directory: Directory, timeout: float) -> Descriptor:
    """Takes the writer's lock and returns what holds it, for `unlock`; waits for at most `timeout` seconds, first come,
    first served.

    Raises LockedError with the pid that the holder left in the file.
    """
    taken = Descriptor()
    with _forking:
        _locks.add(taken)
        taken.fd = fd = directory.open(LOCK, writable=True, create=True)
    try:
        if not (_try_lock(fd, 0) if timeout <= 0 else _wait_for_lock(fd, time.monotonic() + timeout)):
            raise _locked(directory, fd, timeout)
        os.ftruncate(fd, 0)
        write_at(fd, b"%d\n" % os.getpid(), 0)
    except BaseException:
        unlock(taken)
        raise
    return taken


def check_no_writer(directory: Directory) -> None:
    """Raises LockedError if another open file holds the writer's lock; changes nothing."""
    if has_writer(directory):
        fd = directory.open(LOCK)
        try:
            raise _locked(directory, fd, 0)
        finally:
            close(fd)


def _locked(directory: Directory, fd: int, timeout: float) -> LockedError:
    waited = f" (waited for {round(timeout, 2):g} s)" if timeout > 0 else ""
    if not is_locked(fd):
        return LockedError(errno.EAGAIN, f"others wait for {directory.path} and came first{waited}")
    text = read_at(fd, 32, 0).strip()
    pid = int(text) if text.isdigit() else None
    return LockedError(errno.EAGAIN, f"{directory.path} is being written by another process, pid {pid or 'unknown'}{waited}",
                       pid=pid)


_locks: weakref.WeakSet[Descriptor] = weakref.WeakSet()    # of this process, while it holds the lock or waits for it
_forking = threading.RLock()        # no fork comes between a descriptor and its note
os.register_at_fork(before=_forking.acquire, after_in_parent=_forking.release, after_in_child=_forking.release)


def unlock(taken: Descriptor) -> None:
    """Lets the writer's lock go, even if a child of a fork still has the open file."""
    try:
        if taken.fd >= 0:
            fcntl.fcntl(taken.fd, _SET, _flock(fcntl.F_UNLCK, 0, 1))
    except (OSError, MemoryError):
        pass                            # it goes with the descriptor
    finally:
        taken.close()


def forget_locks() -> None:
    """In the child of a fork: the locks are its parent's, and must not outlive that."""
    for taken in _locks:
        taken.close()


def _wait_for_lock(fd: int, deadline: float) -> bool:
    """Queues up, and takes the lock when it is this one's turn; False at the deadline.

    Who comes first and does not take a lock that is free for a second is passed over: it may have been stopped.
    """
    ticket = time.monotonic_ns()
    while not _try_lock(fd, ticket):
        ticket += 1
    pause, free_since = _SHORTEST_PAUSE, 0.0
    try:
        while True:
            now = time.monotonic()
            first = not _is_locked(fd, 1, ticket - 1)
            free_since = 0.0 if first or is_locked(fd) else free_since or now
            if (first or free_since and now - free_since > _PATIENCE) and _try_lock(fd, 0):
                return True
            if now >= deadline:
                return False
            time.sleep(max(0.0, min(pause, deadline - now)))
            pause = min(2 * pause, _LONGEST_PAUSE / 4 if first else _LONGEST_PAUSE)
    finally:
        fcntl.fcntl(fd, _SET, _flock(fcntl.F_UNLCK, ticket, 1))


# -- the system -------------------------------------------------------------------------------------------------

@functools.cache
def boot_id() -> bytes:
    """16 bytes that name this run of the system; zeros if it has no such name (then nothing is believed across
    processes that died)."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return bytes.fromhex(file.read().decode().strip().replace("-", ""))
    except (OSError, ValueError):
        return bytes(16)


@contextmanager
def full_disk_is_an_error(path: str, what: str) -> Iterator[None]:
    """An OSError inside comes out as an Error that says what was being done."""
    try:
        yield
    except Error:
        raise
    except OSError as problem:
        raise Error(problem.errno, f"cannot {what}: {problem.strerror}", path) from problem


"""Watching the engine: its system calls on names and files, and what it stores through mappings between them."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from logkv import files
from tests.proof.events import DIRECTORY, PAGE, Begun, Changed, Compacting, Durable, Event, Named, Returned, Synced, \
    SyncedNames, SyncFailed


class _Calls:
    """`os`, as `logkv.files` sees it while it is recorded."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if dir_fd is None or not flags & os.O_CREAT:
            return os.open(path, flags, mode, dir_fd=dir_fd)
        with self._recorder.call():
            fd = os.open(path, flags, mode, dir_fd=dir_fd)
            self._recorder.found(path)
            return fd

    def mkdir(self, path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        if dir_fd is None:
            return os.mkdir(path, mode)
        with self._recorder.call() as recorder:
            os.mkdir(path, mode, dir_fd=dir_fd)
            recorder.found_directory(path)

    def rename(self, old: str, new: str, **directories: int) -> None:
        with self._recorder.call() as recorder:
            os.rename(old, new, **directories)
            file = recorder.names.pop(old)
            recorder.names[new] = file
            recorder.events.append(Named(file, old, new))

    def unlink(self, name: str, *, dir_fd: int) -> None:
        with self._recorder.call() as recorder:
            os.unlink(name, dir_fd=dir_fd)
            recorder.events.append(Named(recorder.names.pop(name), name, None))

    def link(self, old: str, new: str, *, src_dir_fd: int, dst_dir_fd: int) -> None:
        with self._recorder.call() as recorder:
            os.link(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            recorder.found(new)

    def fdatasync(self, fd: int) -> None:
        self.fsync(fd)

    def fsync(self, fd: int) -> None:
        with self._recorder.call() as recorder:     # no need to really do it
            status = os.fstat(fd)
            if recorder.failing and status.st_ino in recorder.inodes:
                recorder.events.append(SyncFailed(recorder.inodes[status.st_ino]))
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            if not stat.S_ISDIR(status.st_mode):
                recorder.events.append(Synced(recorder.inodes[status.st_ino]))
            elif status.st_ino in recorder.directories:     # and not the one above
                recorder.events.append(SyncedNames(recorder.directories[status.st_ino]))

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        with self._recorder.call():
            return os.pwrite(fd, data, offset)

    def posix_fallocate(self, fd: int, offset: int, length: int) -> None:
        with self._recorder.call():
            os.posix_fallocate(fd, offset, length)

    def ftruncate(self, fd: int, length: int) -> None:
        with self._recorder.call():
            os.ftruncate(fd, length)


class Recorder:
    """Notes what happens to one store's files, while it is entered.  Files are known by their inodes, not names."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.directories = {path.stat().st_ino: ""}     # the store's own and what is below, by inode
        self.events: list[Event] = []
        self.names: dict[str, int] = {}
        self.inodes: dict[int, int] = {}
        self.meanwhile: Callable[[], None] | None = None    # what another thread does at every call
        self.failing = False                    # syncs of files
        self._fds: list[int] = []               # an inode that is held open is not given out again
        self._contents: list[bytes] = []

    def __enter__(self) -> Self:
        """What is there already is durable."""
        for found in sorted(self.path.rglob("*")):
            name = str(found.relative_to(self.path))
            if found.is_dir():
                self.found_directory(name)
            else:
                self.found(name)
        self.notice()
        self.events += [Synced(file) for file in self.inodes.values()]
        self.events += [SyncedNames(directory) for directory in self.directories.values()]
        self.start = len(self.events)           # here begins what is recorded
        files.os = _Calls(self)                 # type: ignore[assignment, attr-defined]
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        files.os = os                           # type: ignore[attr-defined]
        for fd in self._fds:
            os.close(fd)

    @contextmanager
    def call(self) -> Iterator[Recorder]:
        """Around a system call: what was stored before it comes before it.  Then another thread may come in."""
        self.notice()
        yield self
        self.notice()
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
            self.meanwhile = meanwhile

    def found(self, name: str) -> None:
        """A file has this name; noted if that is new."""
        if name in self.names:
            return
        fd = os.open(self.path / name, os.O_RDONLY)
        inode = os.fstat(fd).st_ino
        if inode in self.inodes:
            os.close(fd)
        else:
            self.inodes[inode] = len(self._fds)
            self._fds.append(fd)
            self._contents.append(b"")
        self.names[name] = self.inodes[inode]
        self.events.append(Named(self.names[name], None, name))

    def found_directory(self, name: str) -> None:
        """A directory has this name."""
        self.directories[os.stat(self.path / name).st_ino] = name
        self.events.append(Named(DIRECTORY, None, name))

    def notice(self) -> None:
        """Finds the pages that changed since the last time."""
        for file in sorted(set(self.names.values())):       # what has no name any more changes no more
            fd, before = self._fds[file], self._contents[file]
            size = os.fstat(fd).st_size
            after = os.pread(fd, size, 0)
            if before == after:
                continue
            pages = {}
            for at in range(0, size, PAGE):
                page, old = after[at:at + PAGE], before[at:at + PAGE]
                if page != old and (old or any(page)):      # what is new and zero is the size's doing
                    pages[at // PAGE] = page.ljust(PAGE, b"\0")
            self.events.append(Changed(file, size, pages))
            self._contents[file] = after

    def note(self, event: Begun | Returned | Durable | Compacting) -> None:
        """An operation begins or was acknowledged, or a part of one."""
        self.notice()
        self.events.append(event)

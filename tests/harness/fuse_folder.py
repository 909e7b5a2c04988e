"""A FUSE file system that passes everything on to a folder, but for what it is told to refuse. A script, to be run as root:

    python fuse_folder.py MOUNTPOINT FOLDER [rename] [replace] [sync] [order]

    rename   folders and files cannot be renamed
    replace  a folder is renamed onto one that holds something
    sync     the names in a folder cannot be synced
    order    a file takes bytes at its end alone, and is not given a length beforehand

It speaks the kernel's protocol (Linux, include/uapi/linux/fuse.h, 7.23 on) on /dev/fuse by itself, and ends with its mount.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import struct
import sys
from collections.abc import Callable

HEADER = struct.Struct("<IIQQIIIHH")
REPLY = struct.Struct("<IiQ")
ATTRIBUTES = struct.Struct("<6Q10I")
LOOKUP, FORGET, GETATTR, SETATTR, MKDIR, UNLINK, RMDIR, RENAME, LINK = 1, 2, 3, 4, 9, 10, 11, 12, 13
OPEN, READ, WRITE, STATFS, RELEASE, FSYNC, FLUSH, INIT, OPENDIR, READDIR = 14, 15, 16, 17, 18, 20, 25, 26, 27, 28
RELEASEDIR, FSYNCDIR, ACCESS, CREATE, INTERRUPT, BATCH_FORGET, RENAME2 = 29, 30, 34, 35, 36, 42, 45
SIZE_SET = 1 << 3
MAX_WRITE = 128 << 10


class Folder:
    """The requests, one method each: (node, what the request says) -> what is replied. An OSError is the reply else."""

    def __init__(self, root: str, refused: set[str]) -> None:
        self._paths = {1: root}
        self._refused = refused
        self.requests: dict[int, Callable[[int, bytes], bytes]] = {
            LOOKUP: lambda node, said: self._entry(self._below(node, said)),
            GETATTR: lambda node, said: self._attributes(self._paths[node]),
            SETATTR: self._change,
            MKDIR: lambda node, said: self._made(os.mkdir, node, said[8:]),
            UNLINK: lambda node, said: self._gone(os.unlink, node, said),
            RMDIR: lambda node, said: self._gone(os.rmdir, node, said),
            RENAME: lambda node, said: self._rename(node, said, 8),
            RENAME2: lambda node, said: self._rename(node, said, 16),
            LINK: self._link,
            OPEN: lambda node, said: struct.pack("<QII", os.open(self._paths[node], self._flags(said)), 0, 0),
            CREATE: self._create,
            READ: self._read,
            WRITE: self._write,
            STATFS: lambda node, said: struct.pack("<5Q4I24x", 1 << 20, 1 << 20, 1 << 20, 1 << 20, 1 << 20, 4096, 255, 4096, 0),
            RELEASE: lambda node, said: self._done(os.close(struct.unpack_from("<Q", said)[0])),
            FSYNC: lambda node, said: self._done(os.fsync(struct.unpack_from("<Q", said)[0])),
            FLUSH: lambda node, said: b"",
            OPENDIR: lambda node, said: bytes(16),
            READDIR: self._list,
            RELEASEDIR: lambda node, said: b"",
            FSYNCDIR: self._sync_names,
            ACCESS: lambda node, said: b"",
        }

    def _done(self, _: None) -> bytes:
        return b""

    def _below(self, node: int, name: bytes) -> str:
        return os.path.join(self._paths[node], name.rstrip(b"\0").decode())

    def _node(self, path: str) -> int:
        node = os.lstat(path).st_ino
        self._paths[node] = path
        return node

    def _stat(self, path: str) -> bytes:
        s = os.lstat(path)
        times = (int(s.st_atime), int(s.st_mtime), int(s.st_ctime))
        return ATTRIBUTES.pack(s.st_ino, s.st_size, s.st_blocks, *times, 0, 0, 0, s.st_mode, s.st_nlink, 0, 0, 0, 4096, 0)

    def _attributes(self, path: str) -> bytes:
        return struct.pack("<QII", 0, 0, 0) + self._stat(path)

    def _entry(self, path: str) -> bytes:
        return struct.pack("<4QII", self._node(path), 0, 0, 0, 0, 0) + self._stat(path)

    def _change(self, node: int, said: bytes) -> bytes:
        valid, _, _, size = struct.unpack_from("<IIQQ", said)
        path = self._paths[node]
        if valid & SIZE_SET:
            if "order" in self._refused and size > os.path.getsize(path):
                raise OSError(errno.EOPNOTSUPP, "a length beforehand")
            os.truncate(path, size)
        return self._attributes(path)

    def _made(self, make: Callable[[str], None], node: int, name: bytes) -> bytes:
        make(path := self._below(node, name))
        return self._entry(path)

    def _gone(self, remove: Callable[[str], None], node: int, name: bytes) -> bytes:
        remove(self._below(node, name))
        return b""

    def _rename(self, node: int, said: bytes, head: int) -> bytes:
        if "rename" in self._refused:
            raise OSError(errno.EOPNOTSUPP, "rename")
        target = struct.unpack_from("<Q", said)[0]
        old, new = said[head:].rstrip(b"\0").split(b"\0")
        source, to = self._below(node, old), self._below(target, new)
        if "replace" in self._refused and os.path.isdir(to):
            shutil.rmtree(to)
        os.rename(source, to)
        for known, path in self._paths.items():
            if path == source or path.startswith(source + "/"):
                self._paths[known] = to + path.removeprefix(source)
        return b""

    def _link(self, node: int, said: bytes) -> bytes:
        path = self._below(node, said[8:])
        os.link(self._paths[struct.unpack_from("<Q", said)[0]], path)
        return self._entry(path)

    def _flags(self, said: bytes) -> int:
        return int(struct.unpack_from("<I", said)[0]) & (os.O_ACCMODE | os.O_TRUNC | os.O_EXCL)

    def _create(self, node: int, said: bytes) -> bytes:
        path = self._below(node, said[16:])
        descriptor = os.open(path, self._flags(said) | os.O_CREAT, struct.unpack_from("<I", said, 4)[0])
        return self._entry(path) + struct.pack("<QII", descriptor, 0, 0)

    def _read(self, node: int, said: bytes) -> bytes:
        descriptor, offset, size = struct.unpack_from("<QQI", said)
        return os.pread(descriptor, size, offset)

    def _write(self, node: int, said: bytes) -> bytes:
        descriptor, offset, size = struct.unpack_from("<QQI", said)
        if "order" in self._refused and offset != os.fstat(descriptor).st_size:
            raise OSError(errno.EINVAL, "out of order")
        return struct.pack("<II", os.pwrite(descriptor, said[40 : 40 + size], offset), 0)

    def _sync_names(self, node: int, said: bytes) -> bytes:
        if "sync" in self._refused:
            raise OSError(errno.EINVAL, "sync of a folder")
        return b""

    def _list(self, node: int, said: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", said)
        path, found = self._paths[node], b""
        names = [".", "..", *sorted(os.listdir(path))]
        for number, name in enumerate(names[offset:], start=offset + 1):
            held = os.lstat(os.path.join(path, name))
            raw = name.encode()
            entry = struct.pack("<QQII", held.st_ino, number, len(raw), stat.S_IFMT(held.st_mode) >> 12) + raw
            entry += bytes(-len(entry) % 8)
            if len(found) + len(entry) > size:
                break
            found += entry
        return found


def serve(mountpoint: str, root: str, refused: set[str]) -> None:
    device = os.open("/dev/fuse", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if libc.mount(b"elastickpt-test", mountpoint.encode(), b"fuse", 0, options) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    folder = Folder(root, refused)
    while True:
        try:
            request = os.read(device, MAX_WRITE + 4096)
        except OSError as error:
            if error.errno == errno.ENODEV:  # it was unmounted
                return
            continue
        _, operation, unique, node, *_ = HEADER.unpack_from(request)
        said, code, reply = request[HEADER.size :], 0, b""
        if operation in (FORGET, BATCH_FORGET, INTERRUPT):
            continue
        if operation == INIT:
            ready = struct.pack("<4IHHIIHHI28x", 7, 31, 0, 0, 16, 16, MAX_WRITE, 1, 32, 0, 0)
            reply = ready
            print("ready", flush=True)
        else:
            try:
                handle = folder.requests.get(operation)
                if handle is None:
                    raise OSError(errno.ENOSYS, str(operation))
                reply = handle(node, said)
            except OSError as error:
                code, reply = -(error.errno or errno.EIO), b""
        os.write(device, REPLY.pack(REPLY.size + len(reply), code, unique) + reply)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], set(sys.argv[3:]))

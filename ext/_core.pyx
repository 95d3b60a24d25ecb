# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
# cython: embedsignature=True, embedsignature.format=python, auto_pickle=False, autotestdict=False
# cython: freethreading_compatible=True
"""The C-speed part of LogKV: records, the offset hash index, the log scan.  It never sees a path.

Imports point one way: logkv.engine hands files to a `Log` as descriptors; a `Log` asks its owner (the engine)
for what only files can give: room, another segment, another index.  The handles at the end are the base classes of
`logkv.Store`, `Writer` and `Reader`.

Whoever changes the structs below holds the log's mutex (the GIL, where there is one), and reads are between `read_begin`
and `read_end`; what other threads and processes read is published by one aligned 8-byte store.
"""

cimport cython
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_Check, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.exc cimport PyErr_CheckSignals
from cpython.ref cimport PyObject
from cpython.unicode cimport PyUnicode_Check
from libc.errno cimport ENOMEM, ENOSPC, errno
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, qsort, realloc
from libc.string cimport memcmp, memcpy, memset
from posix.mman cimport (MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap)
from posix.unistd cimport close as close_descriptor, pwrite

from format cimport *
from platform cimport *

cdef extern from "interpreter.h":
    pass

import os

from logkv.errors import ClosedError, CorruptionError, Error, FormatError, ReadOnlyError

include "record.pxi"    # keys, values, encoding; status codes
include "log.pxi"       # Log: what one process has mapped of a store, and its state
include "settle.pxi"    # what a status asks for is done, or raised
include "index.pxi"     # find, insert, remove; an index as a whole
include "space.pxi"     # pages that take a store although the disk may be full
include "grow.pxi"      # a full shard gets more room
include "account.pxi"   # what of each segment is alive
include "segment.pxi"   # append: put, delete, marks
include "scan.pxi"      # recovery: replay records and footers
include "search.pxi"    # what is whole behind an end of the log, or behind damage
include "order.pxi"     # entries in key order: footers
include "compact.pxi"   # what is alive of old segments goes into a new one
include "rescue.pxi"    # what is intact of damaged segments goes into new ones
include "handle.pxi"    # what users hold: mapping methods and iterators
include "verify.pxi"    # reads everything, believes nothing

os.register_at_fork(after_in_child=forget_threads)
crc32c_setup()

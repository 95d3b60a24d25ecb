# Records in Python's terms: which objects are keys and values, and what a failed check says.

cdef extern from "Python.h":
    const char *PyUnicode_AsUTF8AndSize(object text, Py_ssize_t *size) except NULL


cdef enum Status:           # negative: not settled by memory alone, `settle` knows what to do
    MISSING = 0
    FOUND = 1
    UNMAPPED = -1           # a location whose segment, or whose end, this process has not mapped
    DAMAGED = -2            # a record that fails its check
    UNCHECKED = -3          # a shard whose checksum was not compared yet
    INDEX_GREW = -4         # the index names pages that this process has not mapped
    NEED_PAGES = -5         # the index file must be longer
    NO_MEMORY = -6
    NOT_A_PUT = -7          # the index points at a record that is none
    NO_ROOM = -8            # a shard that is being filled is too small
    LOOK_CLOSER = -9        # closed, or the index is being built
    REFUSED = -10           # no write is taken
    NEED_LOG_ROOM = -11     # the log's file must be longer
    CANNOT_WRITE = -12      # the system cannot make pages present, or has no room for a store into them
    CHANGED = -13           # by another thread, since it was looked at
    TIGHT = -14             # there is room in the log's file, but pages must be made writable first
    OUTDATED = -15          # the control page tells of another index or epoch


cdef struct Trouble:        # what a negative status is about
    uint64_t place          # a location, a page, or how much is needed
    uint64_t known          # bytes of the location's segment, or pages of the index, that were known then
    uint64_t indexes        # that the log had had when the place was read from one
    uint64_t doubted        # the place, plus 1, that no segment was found for: the slot is read once more
    int status              # of record_unpack, or an errno
    uint32_t expected, found


cdef enum ScanStatus:       # why a scan stopped, beside the codes of record_unpack
    SCAN_STOP = 16          # at the end that was given
    SCAN_VERSION = 17       # a version that does not rise
    SCAN_FOOTER = 18
    SCAN_IO_ERROR = 19


SCAN_REASONS = {
    RECORD_END: "end", RECORD_TRUNCATED: "truncated", RECORD_UNKNOWN: "unknown", RECORD_BAD_CRC: "checksum",
    RECORD_BAD_VALUE: "value checksum", SCAN_STOP: "stop", SCAN_VERSION: "version", SCAN_FOOTER: "footer",
    SCAN_IO_ERROR: "input/output error",
}
UNREADABLE = SCAN_REASONS[SCAN_IO_ERROR]    # the device does not give it
BAD_VALUE = SCAN_REASONS[RECORD_BAD_VALUE]  # the record is whole but for its value: its key is known


cdef struct Bytes:          # a borrowed run of bytes
    const uint8_t *data     # never NULL
    size_t size


cdef const uint8_t *NOTHING = <const uint8_t *> <const char *> b""


cdef inline int key_bytes(object key, Bytes *out) except -1:
    """A key's bytes: `bytes` as they are, `str` in UTF-8 (which CPython keeps with the object)."""
    cdef Py_ssize_t size
    if PyBytes_Check(key):
        out.data = <const uint8_t *> PyBytes_AS_STRING(key)
        out.size = PyBytes_GET_SIZE(key)
    elif PyUnicode_Check(key):
        out.data = <const uint8_t *> PyUnicode_AsUTF8AndSize(key, &size)
        out.size = size
    else:
        raise TypeError(f"a key must be bytes or str, not {type(key).__name__}")
    return 0


cdef inline int value_bytes(object value, Bytes *out, Py_buffer *view) except -1:
    """A value's bytes.  Returns 1 if `view` was taken and must be released."""
    cdef Py_ssize_t size
    if PyBytes_Check(value):
        out.data = <const uint8_t *> PyBytes_AS_STRING(value)
        out.size = PyBytes_GET_SIZE(value)
        return 0
    if PyUnicode_Check(value):
        out.data = <const uint8_t *> PyUnicode_AsUTF8AndSize(value, &size)
        out.size = size
        return 0
    try:
        PyObject_GetBuffer(value, view, PyBUF_SIMPLE)
    except BufferError as problem:
        raise TypeError(f"a value must be contiguous in memory: {problem}") from None
    except TypeError:
        raise TypeError(f"a value must be bytes, str or a contiguous buffer, not {type(value).__name__}") from None
    out.data = <const uint8_t *> view.buf
    out.size = view.len
    return 1


def encode_record(int kind, uint64_t version, bytes key, value, uint32_t salt, uint64_t offset) -> bytes:
    """One whole record, as it stands at `offset` (bytes) of a segment with this salt."""
    cdef const uint8_t[::1] data = value
    cdef size_t size = data.shape[0]
    cdef bytes out = PyBytes_FromStringAndSize(NULL, record_size(len(key), size))
    record_pack(<uint8_t *> PyBytes_AS_STRING(out), salt, offset, kind, version, PyBytes_AS_STRING(key),
                <uint32_t> len(key), &data[0] if size else NOTHING, <uint32_t> size)
    return out


def encode_link(uint64_t number, uint64_t end, uint64_t version, uint32_t salt) -> bytes:
    """The first record of a successor; it bears its predecessor's last version."""
    cdef continues_value link = continues_value(number, end, version)
    return encode_record(KIND_CONTINUES, version, b"", (<char *> &link)[:sizeof(link)], salt, SEGMENT_HEADER_BYTES)


def encode_segment_header(uint64_t number, uint64_t identity, bytes seed, uint32_t salt) -> bytes:
    """The 64 bytes that a segment begins with."""
    cdef segment_header header
    if len(seed) != 16:
        raise ValueError(f"a seed has 16 bytes, not {len(seed)}")
    segment_header_pack(&header, number, identity, <const uint8_t *> PyBytes_AS_STRING(seed), salt)
    return (<char *> &header)[:sizeof(header)]


def read_segment_header(bytes header) -> tuple | None:
    """(number, identity, seed, salt) of a header that is whole, else None.  Raises FormatError for one of a newer version."""
    cdef segment_header *h = <segment_header *> PyBytes_AS_STRING(header)
    if len(header) < SEGMENT_HEADER_BYTES or memcmp(h.magic, SEGMENT_MAGIC, 8) or \
            h.crc != crc32c(0, h, SEGMENT_HEADER_BYTES - 4):
        return None
    if h.format != FORMAT_VERSION or h.incompatible or h.read_compatible:
        raise FormatError(f"segment {h.number} was written by a newer version of LogKV (format {h.format})")
    return h.number, h.identity, (<char *> h.seed)[:16], h.salt


def segment_identity(bytes header) -> int | None:
    """Of which store a segment's header says that it is, checked or not; None for zeros, or less than a header."""
    cdef segment_header *h = <segment_header *> PyBytes_AS_STRING(header)
    if len(header) < SEGMENT_HEADER_BYTES or not any(header):
        return None
    return h.identity


def checksum(data, uint32_t begin=0, *, bint software=False) -> int:
    """CRC-32C of `data` (any contiguous buffer), continued from `begin`; `software` leaves the hardware aside."""
    cdef const uint8_t[::1] view = data
    cdef size_t size = view.shape[0]
    cdef const void *start = &view[0] if size else NULL
    return crc32c_software(begin, start, size) if software else crc32c(begin, start, size)


def key_hash(bytes seed, bytes key) -> int:
    """SipHash-1-3 of `key` under the 16 bytes of `seed`."""
    cdef uint64_t words[2]
    if len(seed) != 16:
        raise ValueError(f"a seed has 16 bytes, not {len(seed)}")
    memcpy(words, PyBytes_AS_STRING(seed), 16)
    return siphash13(words, PyBytes_AS_STRING(key), len(key))


def free_blocks(int fd, uint64_t offset, uint64_t length) -> None:
    """Gives the blocks of a part of a file back, which reads as zeros then; where that cannot be, nothing happens."""
    c_free_blocks(fd, offset, length)


def data_end(int fd, uint64_t size) -> int:
    """How far a file of `size` bytes has anything in it: behind are zeros that nobody wrote, which take no room on the device.
    What comes after a hole longer than any record does not count."""
    return c_data_end(fd, size, RECORD_LONGEST)


def filesystem_magic(int fd) -> int:
    """The kind of file system that a file is on, as statfs(2) numbers them; 0 if it is not known."""
    return c_filesystem_magic(fd)


@cython.final
cdef class Descriptor:
    """A file descriptor that goes with its last reference, also where there is no memory for a call in Python."""
    cdef object __weakref__
    cdef public int fd          # -1: none

    def __cinit__(self):
        self.fd = -1

    def close(self) -> None:
        """Lets it go, whatever the system says of that."""
        cdef int fd = self.fd
        self.fd = -1
        if fd >= 0:
            close_descriptor(fd)

    def __dealloc__(self):
        if self.fd >= 0:
            close_descriptor(self.fd)


FORMAT = FORMAT_VERSION
CHUNK = CHUNK_BYTES
CHUNKS = CHUNK_COUNT
CHUNK_UNITS = CHUNK_UNIT_SHIFT
PAGE = PAGE_BYTES
SEGMENT_HEADER = SEGMENT_HEADER_BYTES
SEGMENT_MIN = SEGMENT_MIN_BYTES
SEGMENT_MAX = SEGMENT_MAX_BYTES
RECORD_MAX = RECORD_LONGEST
CONTINUES_SIZE = record_size(0, sizeof(continues_value))
MARK_SIZE = record_size(0, sizeof(sync_mark_value))
FOOTER = KIND_FOOTER
CLEAR = KIND_CLEAR

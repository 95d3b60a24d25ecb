# The fuzzer's target `scan`.  Appended to the core when that is built for the fuzzer, and calls what the engine calls.
#
# The segment that is read ends where memory is poisoned, byte by byte, so that nothing is read behind it unseen.

cdef extern from "fuzz_input.h" nogil:
    const unsigned FUZZ_MERGED, FUZZ_FOOTER, FUZZ_BEHIND, FUZZ_ORDER, FUZZ_READ, FUZZ_CLEAN, FUZZ_WRITE
    const unsigned FUZZ_SEGMENT_MAX, FUZZ_INDEX_MAX, FUZZ_MAX
    ctypedef struct fuzz_head:
        uint32_t segment, end
        uint64_t version, what
    int fuzz_add_seed(const uint8_t *data, size_t size)
    size_t fuzz_make(uint8_t *out, uint64_t seed, uint64_t number)
    size_t fuzz_change(uint8_t *data, size_t size, uint64_t seed)
    void fuzz_poison(const void *start, size_t size)
    void fuzz_unpoison(const void *start, size_t size)

cdef extern from "fuzz_input.h":
    ctypedef int (*fuzz_callback)(const uint8_t *data, size_t size) noexcept
    int fuzz_guided(int argc, char **argv, fuzz_callback callback) except? -1


FUZZ_HEAD = sizeof(fuzz_head)
FUZZ_LONGEST = FUZZ_MAX
MOST_PAGES = 4096           # of an index; the inputs have some hundred keys
cdef uint64_t SHARED_BYTES = 128 << 10      # of the file that stands for a segment


class Wrong(Exception):
    """What was read contradicts itself."""


class FuzzOwner:
    """What a log asks its engine for; there is nothing more to be had than is mapped."""

    def __init__(self):
        self.log = self.index_fd = None

    def _map_location(self, location, known):
        return False

    def _index_changed(self):
        self.log.heed(self.log.signs)

    def _index_grew(self, known):
        return False

    def _index_pages(self, pages):
        if pages > MOST_PAGES:
            raise Wrong(f"an index of {pages} pages is asked for")
        if self.index_fd is not None:
            os.ftruncate(self.index_fd, pages * PAGE_BYTES)
        extend_index(self.log, self.index_fd, pages)

    def _index_damaged(self, why):
        raise CorruptionError(why)

    def _make_room(self, size):
        raise Error(ENOSPC, "no room")

    def _await_turn(self):
        raise Wrong("a read waits for ever")

    def _place_of(self, location):
        return None, None, location << 3


cdef int check_segment(const uint8_t *data, uint32_t size) except -1:
    """Its header, as an opening looks at it."""
    cdef segment_header *header = <segment_header *> data
    if size >= SEGMENT_HEADER_BYTES:
        try:
            check_header(header, 1, header.identity, True)
        except Error:
            pass
    return 0


cdef class Fuzz:
    """Runs inputs."""
    cdef:
        Log reader
        object owner
        int segment_fd, index_fd, control_fd
        uint8_t *segment            # where inputs are written
        uint8_t *input
        bytes empty                 # an index
        list keys                   # that are looked for

    def __cinit__(self, list keys):
        self.keys = keys
        self.segment_fd, self.index_fd, self.control_fd = [os.memfd_create("fuzz") for _ in range(3)]
        os.ftruncate(self.segment_fd, SHARED_BYTES)
        os.ftruncate(self.control_fd, PAGE_BYTES)
        self.segment = <uint8_t *> mmap(NULL, SHARED_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, self.segment_fd, 0)
        self.input = <uint8_t *> malloc(FUZZ_MAX)
        if self.segment == MAP_FAILED or self.input == NULL:
            raise MemoryError()
        self.owner = FuzzOwner()
        self.reader = self.new_log(self.owner, False)
        self.new_index()

    cdef Log new_log(self, owner, bint writable):
        log = owner.log = Log(owner, 0, bytes(16), writable)
        memset(self.segment, 0, SEGMENT_HEADER_BYTES)
        log.map_segment(self.segment_fd, 1, 0, SHARED_BYTES, SHARED_BYTES, 0)
        return log

    cdef int new_index(self) except -1:
        create_index(self.reader, None, 0, 1, 1, [0])
        self.empty = (<char *> self.reader.index.base)[:self.reader.index.pages * PAGE_BYTES]
        return 0

    cdef int load(self, Log log, const uint8_t *data, uint32_t size) except -1:
        """The segment of an input into where `log` reads it."""
        cdef Mapped *m = log.chunks[0]
        cdef segment_header *header = <segment_header *> self.segment
        fuzz_unpoison(m.base, SHARED_BYTES)
        memcpy(self.segment, data, size)
        if size < SEGMENT_HEADER_BYTES:
            memset(self.segment + size, 0, SEGMENT_HEADER_BYTES - size)
        log.identity = header.identity
        memcpy(log.seed, header.seed, 16)
        m.limit, m.data, m.salt, m.entries, m.count, m.row = size, size, header.salt, NULL, 0, &log.nowhere
        fuzz_poison(m.base + size, SHARED_BYTES - size)
        return 0

    cdef int one(self, const uint8_t *data, size_t size) except -1:
        """One execution."""
        cdef fuzz_head head
        cdef size_t index
        if size < sizeof(head):
            return 0
        memcpy(&head, data, sizeof(head))
        data += sizeof(head)
        size -= sizeof(head)
        head.segment = min(head.segment, min(size, <size_t> FUZZ_SEGMENT_MAX))
        check_segment(data, head.segment)
        index = (size - head.segment) // PAGE_BYTES * PAGE_BYTES
        if index:
            self.read_index(&head, data, data + head.segment, index)
        else:
            self.load(self.reader, data, head.segment)
            self.read_log(&head)
        return 0

    cdef int read_log(self, fuzz_head *head) except -1:
        cdef Log log = self.reader
        cdef uint64_t stop = head.end if head.end else <uint64_t> 1 << 62
        cdef bint merged = (head.what & FUZZ_MERGED) != 0
        if log.index.pages * PAGE_BYTES != <uint64_t> len(self.empty):
            self.new_index()
        memcpy(log.index.base, PyBytes_AS_STRING(self.empty), len(self.empty))
        log.seq = log.version = log.keys = 0
        log.chunks[0].row = row_of(log, 0)
        found = None
        log.build(True)
        try:
            if not head.what & FUZZ_FOOTER or replay_footer(log, 1, 0, head.end) is None:
                found = replay(log, 1, 0, SEGMENT_HEADER_BYTES, stop, head.version, merged)
        except Error:
            return 0
        finally:
            log.build(False)
        if head.what & FUZZ_READ:
            self.read_entries(log, found is not None)
        if head.what & FUZZ_BEHIND:
            surveyed = survey(log, 0, SEGMENT_HEADER_BYTES, stop, head.version, merged)
            if found is not None and found != surveyed:
                raise Wrong("a replay ends where a survey does not")
            self.look_behind(log, log.chunks[0].limit if found is None else found[1], head.version)
        if head.what & FUZZ_ORDER and found is not None:
            build_footer(log, 0, found[1])
        return 0

    cdef int read_entries(self, Log log, bint verified) except -1:
        """verified: the entries come from records that were read as a whole."""
        try:
            entries, lost = survey_index(log, True)
            if verified and (lost or len(entries) != 8 * log.keys):
                raise Wrong(f"{log.keys} keys, {len(entries) // 8} entries, {len(lost)} of them not found")
            pairs = StoreIterator(log, 2, None, None)
            while True:
                try:
                    for key, value in pairs:
                        if verified and len(key) > KEY_MAX:
                            raise Wrong("a key is too long")
                    break
                except Error:
                    if verified:
                        raise Wrong("a record that was read as a whole is damaged") from None
        except Error:
            if verified:
                raise Wrong("an entry of a record that was read as a whole cannot be read") from None
        return 0

    cdef int look_behind(self, Log log, uint64_t end, uint64_t version) except -1:
        cdef uint64_t limit = log.chunks[0].limit
        read_link(log, 0)
        find_mark(log, 0, end, version)
        find_record(log, 0, end, version)
        first_nonzero(log, 0, end, limit)
        whole = next_whole(log, 0, end, limit)
        if whole is not None:
            copy_records(log, 0, whole, limit, 1, SEGMENT_HEADER_BYTES)
        return 0

    cdef int read_index(self, fuzz_head *head, const uint8_t *segment, const uint8_t *index, size_t size) except -1:
        """A writer's and a reader's log take an index that says what it likes."""
        cdef index_header header
        cdef Log log
        cdef ReadHandle handle = WriteHandle()
        memcpy(&header, index, sizeof(header))
        owner = FuzzOwner()
        log = self.new_log(owner, (head.what & FUZZ_WRITE) != 0)
        try:
            self.load(log, segment, head.segment)
            if log.writable:
                log.map_control(self.control_fd)
                log.begin_control()
            os.ftruncate(self.index_fd, 0)
            os.ftruncate(self.index_fd, size)
            os.pwrite(self.index_fd, (<char *> index)[:size], 0)
            log.identity = header.identity
            handle._attach(log, None, None)
            if attach_index(log, self.index_fd, size, header.epoch, header.nonce, (head.what & FUZZ_CLEAN) != 0) is not None:
                return 0
            owner.index_fd = self.index_fd
            log.chunks[0].row = row_of(log, 0)
            self.ask(handle, log)
            if log.writable:
                self.change(handle, log)
        except Error:
            pass
        finally:
            fuzz_unpoison(log.chunks[0].base, SHARED_BYTES)
            log.close()
        return 0

    cdef int ask(self, ReadHandle handle, Log log) except -1:
        log.state
        index_facts(log)
        live_shares(log, [(1, 0, 1)])
        for key in self.keys:
            try:
                handle.get(key)
            except Error:
                pass
        try:
            len(handle)
        except Error:
            pass
        self.read_entries(log, False)
        return 0

    cdef int change(self, ReadHandle handle, Log log) except -1:
        """What a writer does that goes on with an index; it writes behind the input."""
        cdef uint64_t end = (log.chunks[0].limit + 7) & ~<uint64_t> 7
        if log.restore_state()[2] > VERSION_MAX:        # the engine builds another index
            return 0
        adopt_last(log, 0)
        restore_rows(log, [(1, 0, 1)])
        log.restore_state()
        fuzz_unpoison(log.chunks[0].base, SHARED_BYTES)
        memset(self.segment + log.chunks[0].limit, 0, SHARED_BYTES - log.chunks[0].limit)
        log.chunks[0].limit = SHARED_BYTES
        set_active(log, self.segment_fd, 1, 0, SHARED_BYTES, SHARED_BYTES, max(end, SEGMENT_HEADER_BYTES))
        for key in self.keys:
            handle.put(key, b"value")
            if handle.get(key) != b"value":
                raise Wrong("what was just put is not there")
            handle.delete(key)
        for number in range(100):
            handle.put(b"%d" % number, b"")
        add_row(log, 9)
        drop_row(log, 9)
        seal_index(log)
        return 0

    def run(self, uint64_t seed, uint64_t first, uint64_t count, uint64_t[:] progress) -> None:
        """Executions `first` to `first + count` of a seed; `progress[0]` is always the one that is under way."""
        cdef uint64_t number
        for number in range(first, first + count):
            progress[0] = number
            self.one(self.input, fuzz_make(self.input, seed, number))

    def run_input(self, bytes data) -> None:
        """One execution with these bytes."""
        self.one(<const uint8_t *> PyBytes_AS_STRING(data), len(data))

    def make(self, uint64_t seed, uint64_t number) -> bytes:
        """The bytes of an execution."""
        return (<char *> self.input)[:fuzz_make(self.input, seed, number)]


def add_seed(bytes data) -> bool:
    """A valid input that others are made of."""
    return fuzz_add_seed(<const uint8_t *> PyBytes_AS_STRING(data), len(data)) != 0


def change_input(bytes data, uint64_t seed) -> bytes:
    """Another input, made of this one."""
    cdef bytearray out = bytearray(data.ljust(FUZZ_MAX, b"\0"))
    return bytes(out[:fuzz_change(<uint8_t *> <char *> out, len(data), seed)])


cdef Fuzz guided


cdef int one_guided(const uint8_t *data, size_t size) noexcept:
    try:
        guided.one(data, size)
    except BaseException:
        import traceback

        traceback.print_exc()
        os.abort()
    return 0


def run_guided(Fuzz fuzz, list arguments) -> int:
    """libFuzzer's main loop, which ends the process; -1 if it is not linked.  arguments: its own, as bytes."""
    global guided
    cdef char *argv[64]
    cdef int count = 0
    guided = fuzz
    for argument in arguments[:63]:
        argv[count] = PyBytes_AS_STRING(argument)
        count += 1
    argv[count] = NULL
    return fuzz_guided(count, argv, one_guided)

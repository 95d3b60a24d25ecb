# Log: what one process has mapped of one store (control page, index, segments) and the state it works with.

cdef struct Mapped:         # a segment's mapping
    uint8_t *base
    uint64_t length         # that is mapped
    uint64_t limit          # bytes of the segment that the file is known to have
    uint64_t data           # behind that, they were zeros that nobody wrote, when it was mapped
    uint64_t origin         # location of the segment's first byte
    uint64_t run            # chunks
    uint32_t salt
    const footer_entry *entries     # of the segment's footer, once it was read and checked; NULL: not yet
    uint64_t count
    segment_row *row        # what of it is alive; `Log.nowhere` where nobody counts
    bint replaced           # what of it is alive is in another segment too
    bint dropped            # a Hold has it
    Mapped *next            # of `Log.mapped_segments`, or of a Hold


cdef struct Mapping:        # what is to be unmapped in the end
    void *address
    uint64_t length
    Mapping *next


cdef struct Index:          # replaced as a whole: whoever has loaded the pointer sees one index
    uint8_t *base
    index_header *header    # base again
    index_page *page        # and again: the state of the store as this index has it
    uint64_t mapped         # bytes
    uint64_t pages          # that are known to be there
    uint8_t *checked        # a byte a page where a shard begins: its checksum was compared; NULL: nothing left to compare
    uint64_t checked_pages
    segment_row *rows       # a writer's, or of an index that is built
    uint64_t row_count
    bint private            # in memory only, of this process


cdef struct Active:         # the segment that is appended to
    uint8_t *base
    int fd
    uint64_t number, capacity, origin
    uint64_t allocated      # bytes of the file that are really there
    uint64_t populated      # bytes whose pages are present
    uint64_t end            # of the log
    uint32_t salt


cdef uint64_t INDEX_RESERVE = 64 << 20


cdef Mapping *new_mapping() except NULL:
    cdef Mapping *mapping = <Mapping *> calloc(1, sizeof(Mapping))
    if mapping == NULL:
        raise MemoryError()
    return mapping


cdef void free_all(Mapped *m) noexcept nogil:
    cdef Mapped *following
    while m != NULL:
        following = m.next
        free(m)
        m = following


@cython.final
@cython.trashcan(True)
cdef class Hold:
    """As long as one of these lives, so does what was mapped when it was taken.

    The log has the newest; what is dropped hangs on the one that was the newest then, and that keeps all later ones.
    """
    cdef:
        Log log                 # once something hangs on it
        Hold following
        Mapped *gone

    def __dealloc__(self):
        cdef Mapped *m = self.gone
        cdef uint64_t i
        cdef Log log = self.log
        if m == NULL:
            return
        if log is not None and not log.closed:
            write_lock(&log.mutex)
            while m != NULL:
                for i in range(m.run):
                    if log.chunks[(m.origin >> CHUNK_UNIT_SHIFT) + i] == m:
                        atomic_store_pointer(<void **> &log.chunks[(m.origin >> CHUNK_UNIT_SHIFT) + i], NULL)
                m = m.next
            write_unlock(&log.mutex)
            await_reads()
            m = self.gone
            while m != NULL:
                log.unmap(m.base)
                m = m.next
        free_all(self.gone)


@cython.final
cdef class Log:
    """One process's view of a store: mapped files and, in a writer, the only state that changes them.

    Any thread may read at any time, between `read_begin` and `read_end`; what is mapped goes only after `await_reads`.
    Who changes something holds the mutex, and calls nothing of Python's under it.  Where there is a GIL it is both.
    What maps or unmaps is called under the owner's lock.

    `owner` is asked for what needs a path: `_map_location(location, known) -> bool`, `_index_changed()`,
    `_index_grew(known) -> bool`, `_index_pages(pages)`, `_index_damaged(why)`, `_make_room(bytes)`, `_sync_to(version)`,
    `_flush_later()`, `_await_turn()`, `_place_of(location)`.
    """
    cdef:
        object owner                # None: closed
        readonly shared_flag writable
        readonly uint64_t identity
        uint64_t seed[2]
        Mapped **chunks             # where a location leads; NULL: not mapped
        control_page *control       # NULL: there is none
        Index *index                # NULL: none yet
        write_mutex mutex
        readonly shared_word nonce  # what control said when the index was taken: its nonce,
        shared_word epoch           # the store's epoch,
        shared_word last_version    # the last version published,
        shared_word merges          # and how often segments had gone
        Active active
        uint64_t seq, version, keys
        Mapping *mappings           # C's own, for they are let go also where there is no memory
        readonly shared_word clears # how often all segments were let go
        shared_word moves           # of these, how often what was copied of an index cannot be told from what came since
        Mapped *mapped_segments
        Hold hold                   # on the mappings that there are
        segment_row nowhere
        str poison                  # why every write is refused since a sync failed, or None
        shared_flag refusing        # writes: poisoned, paused, closing, closed, or only reading
        shared_flag closing
        readonly shared_flag building   # the index is being filled: reads wait for the owner
        uint64_t attention          # closed or building: reads look closer
        readonly bint eager         # every write waits for owner._sync_to(version)
        uint64_t indexes            # how many there have been
        shared_word most_moved      # slots, by the growth of a shard
        uint64_t unsynced_since     # version of the first write after the last sync, 0: none
        uint64_t patience           # ns after which a write waits for the flush, 0: never
        readonly shared_flag closed
        bint copies                 # the file system copies on write: space.pxi
        bint tight                  # little room was left there
        uint64_t looked             # when that was
        uint64_t little             # bytes
        int volume                  # a file there

    def __cinit__(self, owner, uint64_t identity, bytes seed, bint writable):
        self.owner = owner
        self.identity = identity
        self.writable = writable
        self.refusing = not writable
        self.hold = Hold.__new__(Hold)
        write_mutex_init(&self.mutex)
        memcpy(self.seed, PyBytes_AS_STRING(seed), 16)
        self.chunks = <Mapped **> self.map_memory(CHUNK_COUNT * sizeof(Mapped *))

    def __dealloc__(self):
        self.release()

    cdef void release(self):
        cdef Index *index
        cdef Mapping *mapping
        write_lock(&self.mutex)
        self.closed = True
        self.refusing = True
        self.writable = False
        index = self.index
        atomic_store(&self.attention, True)
        write_unlock(&self.mutex)
        await_reads()
        self.chunks = NULL
        self.control = NULL
        self.index = NULL
        memset(&self.active, 0, sizeof(self.active))
        if index != NULL:
            free(index.checked)
            free(index)
        free_all(self.mapped_segments)
        self.mapped_segments = NULL
        while True:
            write_lock(&self.mutex)
            mapping = self.mappings
            if mapping != NULL:
                self.mappings = mapping.next
            write_unlock(&self.mutex)
            if mapping == NULL:
                break
            munmap(mapping.address, mapping.length)
            free(mapping)

    def close(self) -> None:
        """Unmaps everything.  Nothing may use this log afterwards; its handles look at `closed` first."""
        self.release()
        write_lock(&self.mutex)
        owner, self.owner = self.owner, None    # it goes, if nobody else has it, when the mutex is free again
        write_unlock(&self.mutex)

    cdef object asked(self):
        """The owner, for a question; raises ClosedError if there is none any more."""
        write_lock(&self.mutex)
        owner = self.owner
        write_unlock(&self.mutex)
        if owner is None:
            raise ClosedError("the store is closed")
        return owner

    def become_reader(self) -> None:
        """From here on nothing is written: in the child of a fork, where no other thread lives."""
        write_mutex_init(&self.mutex)
        self.writable = False
        self.refusing = True

    def stop_writes(self, str poisoned=None) -> None:
        """Refuses every later write: because a sync failed, `poisoned` says how, or because the store is closing.
        None is under way when this returns.  The first failure is the one that is told."""
        write_lock(&self.mutex)
        if poisoned is None:
            self.closing = True
        elif self.poison is None:
            self.poison = poisoned
        write_unlock(&self.mutex)
        self.pause(True)

    @property
    def poisoned(self) -> str | None:
        """Why every write is refused since a sync failed."""
        write_lock(&self.mutex)
        poison = self.poison
        write_unlock(&self.mutex)
        return poison

    def pause(self, bint paused) -> None:
        """While paused, writes call owner._await_turn() and try again.  None is under way when this returns."""
        write_lock(&self.mutex)
        self.refusing = paused or self.closing or self.poison is not None or not self.writable
        write_unlock(&self.mutex)

    def build(self, bint building) -> None:
        """While the index is being built, reads and writes of other threads call owner._await_turn()."""
        self.building = building
        atomic_store(&self.attention, building or self.closed)
        self.pause(building)
        if building:
            await_reads()

    cdef int check_open(self) except -1:
        if self.closed:
            raise ClosedError("the store is closed")
        return 0

    cdef int check_writer(self) except -1:
        self.check_open()
        if not self.writable:
            raise ReadOnlyError("the store is open for reading only")
        return 0

    cdef int check_change(self) except -1:
        """Before a store into the control page or the index's first page."""
        self.check_writer()
        cdef int problem = self.full_disk()
        if problem:
            raise_unwritable(problem)
        return 0

    cdef int full_disk(self) noexcept nogil:
        """An errno if a store into these pages would find no room, else 0."""
        cdef Trouble t
        return t.status if self.copies and make_writable(self, NULL, 0, &t) < 0 else 0

    # -- mappings ---------------------------------------------------------------------------------------

    cdef uint8_t *map_memory(self, uint64_t length) except NULL:
        self.check_open()
        cdef Mapping *mapping = new_mapping()
        mapping.address = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        mapping.length = length
        if mapping.address == MAP_FAILED:
            free(mapping)
            raise MemoryError(f"cannot reserve {length} bytes: {os.strerror(errno)}")
        return self.keep(mapping)

    cdef uint8_t *keep(self, Mapping *mapping) noexcept nogil:
        write_lock(&self.mutex)
        mapping.next = self.mappings
        self.mappings = mapping
        write_unlock(&self.mutex)
        return <uint8_t *> mapping.address

    cdef uint8_t *map_file(self, int fd, uint64_t wanted, uint64_t needed, uint64_t *mapped) except NULL:
        """Maps `wanted` bytes of a file that may grow, or what is `needed` where address space is short."""
        cdef int protection = PROT_READ | PROT_WRITE if self.writable else PROT_READ
        cdef int problem
        self.check_open()
        cdef Mapping *mapping = new_mapping()
        mapping.address = mmap(NULL, wanted, protection, MAP_SHARED, fd, 0)
        mapped[0] = wanted
        if mapping.address == MAP_FAILED and errno == ENOMEM and needed < wanted:
            mapping.address = mmap(NULL, needed, protection, MAP_SHARED, fd, 0)
            mapped[0] = needed
        if mapping.address == MAP_FAILED:
            problem = errno
            free(mapping)
            raise Error(problem, f"cannot map {wanted} bytes: {os.strerror(problem)}")
        mapping.length = mapped[0]
        return self.keep(mapping)

    def map_segment(self, int fd, uint64_t number, uint64_t chunk, uint64_t capacity, uint64_t size, uint32_t salt):
        """Makes a segment's records readable, up to `size` bytes of its file, which may be much longer than what is in it.
        May be called again when it grew.

        Raises FormatError if its header asks for features that this version does not have.
        """
        self.check_open()
        cdef uint64_t wanted = max(capacity, size), i
        cdef uint64_t run = (capacity >> CHUNK_SHIFT) + (capacity & (CHUNK_BYTES - 1) != 0)
        cdef uint64_t data = c_data_end(fd, size, RECORD_LONGEST)
        cdef Mapped *old
        cdef Mapped *new
        if run > CHUNK_COUNT or chunk > CHUNK_COUNT - run:
            raise FormatError(f"segment {number} lies beyond the end of the location space (chunk {chunk} of {CHUNK_COUNT})")
        if self.extend_segment(chunk, size, data):
            return
        new = <Mapped *> calloc(1, sizeof(Mapped))
        if new == NULL:
            raise MemoryError()
        try:
            new.base = self.map_file(fd, wanted, size, &new.length)
            if size >= SEGMENT_HEADER_BYTES:
                check_header(<segment_header *> new.base, number, self.identity, self.writable)
        except BaseException:
            free(new)
            raise
        new.limit, new.origin, new.run, new.salt = min(size, new.length), chunk << CHUNK_UNIT_SHIFT, run, salt
        new.data = data
        write_lock(&self.mutex)
        old = self.chunks[chunk]
        if old != NULL and old.dropped:
            old = NULL
        if old != NULL:
            new.replaced = old.replaced
            self.unlink(old)
            if self.active.base == old.base:
                self.active.base = new.base
        new.row = row_of(self, chunk)
        new.next = self.mapped_segments
        self.mapped_segments = new
        for i in range(run):
            atomic_store_pointer(<void **> &self.chunks[chunk + i], new)
        write_unlock(&self.mutex)
        if old != NULL:                 # where address space is short, a mapping grows by another one
            await_reads()
            self.unmap(old.base)
            free(old)

    cdef bint extend_segment(self, uint64_t chunk, uint64_t size, uint64_t data):
        """Whether so many bytes of a segment are mapped already; they are readable then."""
        write_lock(&self.mutex)
        cdef Mapped *m = self.chunks[chunk]
        cdef bint mapped = m != NULL and not m.dropped and m.length >= size
        if mapped:
            atomic_store(&m.data, max(m.data, data))
            atomic_store(&m.limit, max(m.limit, size))
        write_unlock(&self.mutex)
        return mapped

    cdef void unlink(self, Mapped *m) noexcept nogil:
        cdef Mapped **at = &self.mapped_segments
        while at[0] != m:
            at = &at[0].next
        at[0] = m.next

    def forget_segments(self, uint64_t before=CHUNK_COUNT, bint moved=False) -> None:
        """Another epoch: lets all segments before that chunk go, so that their space comes back.

        moved: the store was not cleared, but its records have other locations, or were repaired."""
        self.drop_segments([chunk for chunk in self.segments() if chunk < before])
        self.moves += moved
        self.clears += 1

    def drop_segments(self, list chunks) -> None:
        """No index leads to these segments any more: each mapping goes as soon as no iterator needs it."""
        self.check_open()
        cdef uint64_t chunk
        cdef Mapped *m
        cdef Hold hold, following = Hold.__new__(Hold)
        with cython.critical_section(self):
            hold = self.hold
            hold.log, hold.following = self, following
            self.hold = following
        for chunk in chunks:
            write_lock(&self.mutex)
            m = self.chunks[chunk]
            if m != NULL and not m.dropped:
                self.unlink(m)
                m.dropped = True
                m.row = &self.nowhere
                m.next = hold.gone
                hold.gone = m
            write_unlock(&self.mutex)

    cdef Hold current_hold(self):
        """What is mapped now stays as long as this lives, or until the log is closed."""
        with cython.critical_section(self):
            return self.hold

    def segments(self) -> list:
        """The first chunks of the segments that are mapped and were not dropped."""
        cdef list found = []
        cdef Mapped *m = self.mapped_segments
        while m != NULL:
            found.append(m.origin >> CHUNK_UNIT_SHIFT)
            m = m.next
        return found

    def mark_replaced(self, uint64_t chunk) -> None:
        """What of this segment is alive, another segment has too."""
        self.chunks[chunk].replaced = True

    cdef void unmap(self, void *address) noexcept nogil:
        cdef Mapping **at = &self.mappings
        cdef Mapping *mapping
        write_lock(&self.mutex)
        while at[0] != NULL and at[0].address != address:
            at = &at[0].next
        mapping = at[0]
        if mapping != NULL:
            at[0] = mapping.next
        write_unlock(&self.mutex)
        if mapping != NULL:
            munmap(mapping.address, mapping.length)
            free(mapping)

    def mapped(self, uint64_t chunk) -> int:
        """Bytes that are readable of the segment at this chunk."""
        self.check_open()
        return 0 if self.chunks[chunk] == NULL else atomic_load(&self.chunks[chunk].limit)

    @property
    def index_is_private(self) -> bool:
        """Whether the index is one of this process's own."""
        return self.index != NULL and self.index.private

    # -- control page -----------------------------------------------------------------------------------

    def map_control(self, int fd) -> None:
        """Maps the control page (4,096 bytes)."""
        cdef uint64_t mapped
        atomic_store_pointer(<void **> &self.control, self.map_file(fd, PAGE_BYTES, PAGE_BYTES, &mapped))

    def watch_space(self, int fd, uint64_t little) -> None:
        """The file system, on which this file stays open, copies on write: what is stored into is made writable before, by
        puts and deletes while less than `little` bytes are left."""
        self.copies = True
        self.volume = fd
        self.little = little

    def begin_control(self) -> None:
        """Fills a new control page: nothing in it is believed yet."""
        self.check_change()
        memset(self.control, 0, PAGE_BYTES)
        memcpy(self.control.magic, CONTROL_MAGIC, 8)
        self.control.format = FORMAT_VERSION
        self.control.identity = self.identity

    @property
    def trust(self) -> dict:
        """What the control page says of itself, or an empty dict if it says nothing that can be read."""
        cdef control_page *c = self.control
        cdef uint32_t crc
        if c == NULL or memcmp(c.magic, CONTROL_MAGIC, 8) or c.format != FORMAT_VERSION or c.identity != self.identity:
            return {}
        return {
            "clean": c.clean, "intact": c.clean == 0 or c.crc == control_crc(c),
            "boot": (<char *> c.boot)[:16],
            "device": c.device, "inode": c.inode, "index_inode": c.index_inode, "nonce": c.index_nonce,
            "manifests": [(c.manifest[i].generation, c.manifest[i].inode, c.manifest[i].ctime, c.manifest[i].noted)
                          for i in range(2)],
            "durable": (c.durable_number, c.durable_end),
            "sync_failed": c.sync_failed,
        }

    def trust_index(self, bytes boot, uint64_t device, uint64_t inode, uint64_t index_inode, uint64_t nonce) -> None:
        """Says under which circumstances the index is right; the nonce last, as readers wait for it."""
        self.check_change()
        memcpy(self.control.boot, PyBytes_AS_STRING(boot), 16)
        self.control.device = device
        self.control.inode = inode
        self.control.index_inode = index_inode
        self.nonce = nonce
        atomic_store(&self.control.index_nonce, nonce)

    def distrust_index(self) -> None:
        """No process takes the index from here on."""
        self.check_change()
        atomic_store(&self.control.index_nonce, 0)

    def note_manifest(self, bint coming, uint64_t generation, uint64_t inode, uint64_t ctime) -> None:
        """Vouches for a MANIFEST: the coming one before its rename, then the one in force.  On a full disk it may not: then
        the index is built anew after a kill."""
        self.check_writer()
        if self.full_disk():
            return
        cdef control_manifest *m = &self.control.manifest[coming]
        atomic_store(&m.generation, 0)
        atomic_store(&m.inode, inode)
        atomic_store(&m.ctime, ctime)
        atomic_store(&m.noted, clock_ns())
        atomic_store(&m.generation, generation)

    def mark_dirty(self) -> None:
        """Clears the clean mark; to be synced before the first store into log or index."""
        self.check_change()
        atomic_store(&self.control.clean, 0)

    def mark_clean(self, uint64_t generation) -> None:
        """Sets the clean mark, when log and index are on the device."""
        self.check_change()
        cdef control_page page = self.control[0]
        page.clean = generation
        self.control.crc = control_crc(&page)
        atomic_store(&self.control.clean, generation)

    def note_epoch(self, uint64_t epoch) -> None:
        """The store's epoch, or the one that it is about to begin: readers then look at the MANIFEST."""
        self.check_change()
        atomic_store(&self.control.epoch, epoch)

    def note_merge(self) -> None:
        """Segments have gone from the MANIFEST: readers let go of them, though on a full disk perhaps later."""
        self.check_writer()
        if self.full_disk():
            return
        atomic_store(&self.control.merges, self.control.merges + 1)

    @property
    def signs(self) -> tuple:
        """What the control page says to readers: (nonce of the index, epoch, last version, merges); zeros without one."""
        if self.control == NULL:
            return 0, 0, 0, 0
        return (atomic_load(&self.control.index_nonce), atomic_load(&self.control.epoch),
                atomic_load(&self.control.last_version), atomic_load(&self.control.merges))

    def heed(self, tuple signs) -> None:
        """Goes on with the index that is there until the control page says something else than this."""
        cdef uint64_t nonce, epoch, last_version, merges
        nonce, epoch, last_version, merges = signs
        self.nonce, self.epoch, self.last_version, self.merges = nonce, epoch, last_version, merges

    def heed_merges(self, uint64_t merges) -> None:
        """Of what the control page says, only this was heeded."""
        self.merges = merges

    def note_sync_failure(self, int number) -> None:
        if self.control != NULL and not populate(<uint8_t *> self.control, PAGE_BYTES, True):
            self.control.sync_failed = number

    def note_durable(self, uint64_t number, uint64_t end) -> None:
        """A sync has returned that covered the log up to there.  A full disk may leave it without that note."""
        self.check_writer()
        if not self.full_disk():
            self.control.durable_number = number
            self.control.durable_end = end

    # -- state ------------------------------------------------------------------------------------------

    cdef void load_state(self) noexcept nogil:
        """Makes the index's state this writer's."""
        cdef index_state s
        self.seq = read_state(self.index, &s)
        self.version, self.keys = s.version, s.keys

    def restore_state(self) -> tuple:
        """Takes the state from the index: (file number, end, last version) of the log that it belongs to."""
        self.check_open()
        self.load_state()
        cdef index_state *s = &self.index.page.state[self.seq & 1]
        return s.number, s.end, s.version

    def settle_state(self, uint64_t number, uint64_t end, uint64_t version) -> None:
        """States where the log ends now."""
        self.check_change()
        write_lock(&self.mutex)
        commit(self, number, end, version, NULL, 0, 0, self.active_live(), 0)
        write_unlock(&self.mutex)

    cdef uint64_t active_live(self) noexcept nogil:
        return self.chunks[self.active.origin >> CHUNK_UNIT_SHIFT].row.live

    @property
    def state(self) -> dict:
        """As of now: keys, last version, and where the log ends: file number and offset; `begun`: the next write may be in
        the index already.  Also while the index is being built."""
        cdef index_state s
        cdef Index *ix
        cdef bint there, begun = False
        read_begin()
        there = not self.closed
        if there:
            ix = current_index(self)
            read_state(ix, &s)
            begun = atomic_load(&ix.page.state[(s.seq + 1) & 1].seq) == s.seq + 1
        read_end()
        if not there:
            self.check_open()
        return {"keys": s.keys, "version": s.version, "number": s.number, "end": s.end, "begun": begun}

    @property
    def position(self) -> tuple:
        """(file number, end) of the log, in a writer."""
        self.check_open()
        write_lock(&self.mutex)
        cdef uint64_t number = self.active.number, end = self.active.end
        write_unlock(&self.mutex)
        return number, end

    @property
    def capacity(self) -> int:
        """Bytes that the active segment may have."""
        return self.active.capacity

    @property
    def allocated(self) -> int:
        """Bytes that the active segment's file has."""
        return self.active.allocated

    @property
    def reserved_end(self) -> int:
        """Bytes of the active segment up to here may hold an unfinished record."""
        self.check_writer()
        return self.control.reserved_end

    def set_sync(self, bint eager, uint64_t patience) -> None:
        """`eager`: a sync after every write.  `patience`: ns that a write may stay unsynced, 0: for ever."""
        self.eager = eager
        self.patience = patience

    def synced(self, uint64_t version) -> None:
        """A sync returned that covered all versions up to this one."""
        write_lock(&self.mutex)
        self.unsynced_since = 0 if self.version <= version else version + 1
        write_unlock(&self.mutex)


cdef uint64_t read_state(Index *index, index_state *out) noexcept nogil:
    """The current state block, read again if the writer changed it meanwhile; returns its number."""
    cdef uint64_t seq
    while True:
        seq = atomic_load(&index.page.seq)
        relaxed_copy(<uint64_t *> out, <uint64_t *> &index.page.state[seq & 1], sizeof(index_state) // 8)
        acquire_fence()
        if atomic_load(&index.page.seq) == seq:
            return seq


cdef int check_header(segment_header *header, uint64_t number, uint64_t identity, bint writable) except -1:
    """What a whole header says must fit; a damaged one says nothing, and the records tell for themselves."""
    if header.crc != crc32c(0, header, SEGMENT_HEADER_BYTES - 4):
        return 0
    if header.format != FORMAT_VERSION or header.incompatible or header.read_compatible and writable:
        raise FormatError(f"segment {number} was written by a newer version of LogKV (format {header.format}, features "
                          f"{header.incompatible:x}); this one knows format {FORMAT_VERSION}")
    if header.identity != identity:
        raise CorruptionError("a segment belongs to another store", segment=number, offset=32,
                              expected=f"identity {identity:016x}", found=f"{header.identity:016x}")
    return 0


def check_segment_header(bytes header, uint64_t number, uint64_t identity) -> None:
    """Raises FormatError for the header of a newer version, CorruptionError for one of another store."""
    if len(header) >= SEGMENT_HEADER_BYTES:
        check_header(<segment_header *> PyBytes_AS_STRING(header), number, identity, True)


cdef uint32_t control_crc(control_page *page) noexcept nogil:
    cdef uint32_t crc = crc32c(0, page, 12)
    crc = crc32c(crc, <uint8_t *> page + 16, CONTROL_NOTES - 16)
    return crc32c(crc, <uint8_t *> page + CONTROL_NOTES_END, PAGE_BYTES - CONTROL_NOTES_END)


cdef inline void commit(Log log, uint64_t number, uint64_t end, uint64_t version, uint64_t *slot, uint64_t value,
                        uint64_t previous, uint64_t live, uint64_t previous_live) noexcept nogil:
    """Publishes one change: the other state block, then the slot, then the block's number.

    A kill before the slot: the record behind the end is replayed.  After it: the index has the record and the
    block is whole, so it is made current (`adopt_last`).
    """
    cdef index_state *s = &log.index.page.state[(log.seq + 1) & 1]
    log.version = version
    release_fence()         # who sees something of this block sees that the other one has become current (`read_state`)
    relaxed_store(&s.number, number)
    relaxed_store(&s.end, end)
    relaxed_store(&s.version, version)
    relaxed_store(&s.keys, log.keys)
    relaxed_store(&s.live, live)
    relaxed_store(&s.previous, previous)
    relaxed_store(&s.previous_live, previous_live)
    atomic_store(&s.seq, log.seq + 1)
    if slot != NULL:
        atomic_store(slot, value)
    log.seq += 1
    atomic_store(&log.index.page.seq, log.seq)
    if log.writable and not log.building:
        atomic_store(&log.control.last_version, version)


def forget_threads() -> None:
    """In the child of a fork, where no other thread lives."""
    threads_after_fork()

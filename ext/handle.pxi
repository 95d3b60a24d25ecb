# What users hold.  The classes of logkv.store derive from these and keep the speed of their C slots.

cdef extern from "Python.h":
    PyObject *new_bytes "PyBytes_FromStringAndSize" (const char *data, Py_ssize_t size)
    void Py_DECREF(PyObject *thing)
    void Py_XDECREF(PyObject *thing)


cdef inline object owned(PyObject *thing):
    """An object from a reference that is ours."""
    cdef object taken = <object> thing
    Py_DECREF(thing)
    return taken


cdef inline object decoded(value, decode):
    return value if decode is None else decode(value)


cdef inline PyObject *opened(ReadHandle handle) except NULL:
    """The log, borrowed: it is the handle's for as long as that lives.  A count of references would be one that all
    threads share."""
    if handle.log is None or atomic_load(&handle.let_go):
        raise ClosedError("the store is closed")
    return <PyObject *> handle.log


cdef inline int fetch(Log log, Bytes key, PyObject **value, uint64_t *location) except -1:
    """As `find`; where it is FOUND, also its value as a new reference to bytes, unless `value` is NULL."""
    cdef uint64_t h
    cdef Probe p
    cdef Trouble t
    cdef int status = FOUND
    p.location = t.doubted = 0
    if key.size > KEY_MAX:
        log.check_open()
        return MISSING
    h = siphash13(log.seed, key.data, key.size)
    while True:
        read_begin()
        status = glance(log, status)
        if status == FOUND:
            status = probe(log, key.data, key.size, h, 0, &p, False, &t)
        if status == FOUND and value != NULL:
            status = copy_value(log, &p.record, value, &t)
        read_end()
        if status >= 0:
            break
        settle(log, status, &t)
    location[0] = p.location
    return status


cdef inline int find(Log log, Bytes key, uint64_t *location) except -1:
    """FOUND or MISSING, by one probe of the index and one look at the record."""
    return fetch(log, key, NULL, location)


cdef inline int copy_value(Log log, record_view *r, PyObject **value, Trouble *t) noexcept:
    """The value of a record that was read, as new bytes; a long one's checksum is compared here."""
    cdef int status = check_value(log, r, t)
    if status == FOUND:
        value[0] = new_bytes(<const char *> r.value, r.value_length)
        if value[0] == NULL:
            return NO_MEMORY
    return status


cdef inline int copy_key(record_view *r, PyObject **key) noexcept:
    """The key of a record that was read, as new bytes."""
    key[0] = new_bytes(<const char *> r.key, r.key_length)
    return FOUND if key[0] != NULL else NO_MEMORY


cdef uint64_t count_keys(Log log) except? -1:
    cdef index_state s
    cdef Trouble t
    cdef int status = FOUND
    while True:
        read_begin()
        status = glance(log, status)
        if status == FOUND:
            read_state(current_index(log), &s)
        read_end()
        if status == FOUND and s.keys > LOCATION_MASK:
            raise CorruptionError("the index has a wrong number of keys", expected="one for each location at most",
                                  found=str(s.keys))
        if status == FOUND:
            return s.keys
        settle(log, status, &t)


cdef class ReadHandle:
    """The reading half of a mapping of bytes to bytes, or to what a codec makes of them."""
    cdef:
        Log log                     # stays what it is: another thread may be using it
        uint64_t let_go             # this handle was closed
        object encode, decode       # of the values; None where they are bytes

    def __class_getitem__(cls, item):
        return cls

    def _attach(self, Log log, encode, decode) -> None:
        self.log = log
        self.encode, self.decode = encode, decode

    def _detach(self) -> None:
        atomic_store(&self.let_go, True)

    @property
    def closed(self) -> bool:
        """Whether this handle was closed."""
        return self.log is None or atomic_load(&self.let_go) != 0 or self.log.closed

    def __getitem__(self, key):
        cdef Bytes k
        cdef PyObject *value
        cdef uint64_t location
        key_bytes(key, &k)
        if fetch(<Log> opened(self), k, &value, &location) == MISSING:
            raise KeyError(key)
        return decoded(owned(value), self.decode)

    @cython.binding(False)      # CPython counts a reference to the handle, which threads may share, in calls of others
    def get(self, key, default=None):
        """The value of `key`, or `default`.

        One probe of the index and one read of the log; the record's checksum is compared.  Raises TypeError if the
        key is neither bytes nor str, CorruptionError if the record is damaged, ClosedError.
        """
        cdef Bytes k
        cdef PyObject *value
        cdef uint64_t location
        key_bytes(key, &k)
        if fetch(<Log> opened(self), k, &value, &location) == MISSING:
            return default
        return decoded(owned(value), self.decode)

    def __contains__(self, key):
        cdef Bytes k
        cdef uint64_t location
        key_bytes(key, &k)
        return find(<Log> opened(self), k, &location) == FOUND

    def __len__(self):
        return count_keys(<Log> opened(self))

    def __iter__(self):
        return self._iterate(0)

    def _iterate(self, int what, bint holding=True):
        """An iterator over keys (0), values (1) or pairs (2).  `holding`: it keeps the handle, which stays open so."""
        return StoreIterator(<Log> opened(self), what, self.decode, self if holding else None)


cdef class WriteHandle(ReadHandle):
    """The writing half."""

    def put(self, key, value) -> int:
        """Stores `value` under `key` and returns the write's version: nanoseconds since 1970 as of the system's last
        tick, strictly rising.

        Key: bytes or str of at most 65,535 bytes; value: bytes, str or a contiguous buffer of at most 4 GiB - 1.
        When it returns, every process sees the value, and it survives the death of this one; what else it survives
        is the store's `sync=`.  O(1); a full shard of the index is split by the put that meets it.  Raises
        TypeError, ValueError (too long), ReadOnlyError, ClosedError, and Error (an OSError) if the disk is full or a
        sync has failed; then nothing has changed.
        """
        cdef Bytes k, v
        cdef Py_buffer view
        cdef bint taken
        cdef Log log = <Log> opened(self)
        key_bytes(key, &k)
        if self.encode is not None:
            value = self.encode(value)
        taken = value_bytes(value, &v, &view)
        try:
            return put(log, k, v)
        finally:
            if taken:
                PyBuffer_Release(&view)

    def __setitem__(self, key, value):
        cdef Bytes k, v
        if self.encode is None and PyBytes_Check(value):
            key_bytes(key, &k)
            v.data, v.size = <const uint8_t *> PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value)
            put(<Log> opened(self), k, v)
        else:
            self.put(key, value)

    def delete(self, key) -> bool:
        """Removes `key`; False if it was not there.  Durability and errors as for `put`."""
        cdef Bytes k
        key_bytes(key, &k)
        return delete(<Log> opened(self), k, 0) != 0

    def __delitem__(self, key):
        if not self.delete(key):
            raise KeyError(key)

    def _pop(self, key) -> list:
        """[value] of a key that is deleted at once, or [].  One that cannot be decoded raises, and stays."""
        cdef Bytes k
        cdef PyObject *raw = NULL
        cdef uint64_t location, version
        cdef Log log = <Log> opened(self)
        check_writable(log)
        key_bytes(key, &k)
        while True:
            if fetch(log, k, &raw, &location) == MISSING:
                return []
            value = decoded(owned(raw), self.decode)
            version = delete(log, k, location)
            if version > CHANGED_VERSION:
                return [value]
            if version == 0:
                return []


cdef uint64_t PREFETCH_AHEAD = 12


@cython.final
cdef class StoreIterator:
    """Walks the index by hash prefix, a shard's locations at a time, in the order of the log.

    No overwrite and no split moves a key across the cursor: a key that is there all the time is seen once.  A key that
    changed since its shard was copied is looked up again; what compaction moved is read where it was.  Only where a writer
    that was opened meanwhile has moved all records (`Manifest.moved`), in the middle of a shard the next call raises Error.
    """
    cdef:
        Log log
        int what
        object decode           # of the values; None where they are bytes
        object handle           # that would be closed if nobody held it
        bint last               # the shard that was copied is the last one
        uint64_t cursor         # the first hash that was not copied yet
        uint64_t seq            # of the state when the shard was copied
        uint64_t clears, moves  # of the log
        uint64_t indexes        # of the log when the shard was copied
        uint64_t *locations
        size_t at, count, room
        Hold hold               # on what the locations lead to
        uint64_t doubted        # of the trouble that was settled last

    def __cinit__(self, Log log, int what, decode, handle):
        self.log = log
        self.what = what
        self.decode = decode
        self.handle = handle
        self.clears = log.clears
        self.moves = log.moves

    def __dealloc__(self):
        free(self.locations)

    def __iter__(self):
        return self

    def __next__(self):
        cdef PyObject *log = <PyObject *> self.log          # borrowed, as by `opened`
        with cython.critical_section(self):
            return self.following(<Log> log)

    cdef following(self, Log log):
        """Where `settle` waits, another thread may go on with this iterator: nothing is taken for as it was before."""
        cdef record_view r
        cdef Trouble t
        cdef Bytes key
        cdef PyObject *found_key = NULL
        cdef PyObject *found_value = NULL
        cdef uint64_t location
        cdef int status = FOUND
        t.doubted = 0
        while True:
            if self.clears != log.clears:           # what was copied is gone
                if self.moves != log.moves and self.at < self.count:
                    raise Error("the store was repaired, or gave out its locations anew, while this iterator was open: iterate again")
                self.at = self.count
                self.clears, self.moves = log.clears, log.moves
            if self.at >= self.count:
                if self.last:
                    self.hold = None
                    log.check_open()
                    raise StopIteration
                status = self.copy_shard(log, status)
                continue
            location = self.locations[self.at]
            read_begin()
            status = self.read(log, status, location, &r, &found_key, &found_value, &t)
            read_end()
            if status < 0 and status != CHANGED:
                try:
                    settle(log, status, &t)
                except BaseException:
                    self.at += 1                # the next call goes on behind this record
                    raise
                continue
            self.at += 1
            key_object = owned(found_key) if found_key != NULL else None
            found_key = NULL
            if status == CHANGED:               # since its shard was copied: it is looked up again
                key_bytes(key_object, &key)
                if self.what == 0:
                    if find(log, key, &location) == MISSING:
                        continue
                elif fetch(log, key, &found_value, &location) == MISSING:
                    continue
            if self.what == 0:
                return key_object
            value = owned(found_value)
            found_value = NULL
            value = decoded(value, self.decode)
            return value if self.what == 1 else (key_object, value)

    cdef inline int read(self, Log log, int settled, uint64_t location, record_view *r, PyObject **key,
                         PyObject **value, Trouble *t) noexcept:
        """What of a record is asked for; where something was written since its location was copied, its key: CHANGED."""
        cdef int status = glance(log, settled)
        cdef bint changed
        if status != FOUND:
            return status
        t.indexes = self.indexes
        if self.at + PREFETCH_AHEAD < self.count:
            prefetch_record(log, self.locations[self.at + PREFETCH_AHEAD])
        status = read_record(log, location, r, t)
        if status != FOUND:
            return status
        changed = atomic_load(&log.indexes) != self.indexes or atomic_load(&current_index(log).page.seq) != self.seq
        if (changed or self.what != 1) and copy_key(r, key) != FOUND:
            return NO_MEMORY
        if changed:
            return CHANGED
        if self.what != 0:
            status = copy_value(log, r, value, t)
            if status != FOUND:
                Py_XDECREF(key[0])
                key[0] = NULL
        return status

    cdef int copy_shard(self, Log log, int settled) except? -1:
        """FOUND: the next shard's locations are copied, in order.  Else the status that had to be settled first."""
        cdef Trouble t
        cdef int status
        cdef uint64_t cursor = self.cursor
        t.doubted = self.doubted
        self.hold = log.current_hold()
        read_begin()
        status = glance(log, settled)
        if status == FOUND:
            status = self.copy_now(log, &t)
        if status == FOUND:
            sort_locations(self.locations, self.locations + self.room, self.count)
            status = self.all_mapped(log, &t)
            if status != FOUND:
                self.cursor, self.last, self.count = cursor, False, 0
        read_end()
        if status == NEED_PAGES:
            free(self.locations)
            self.room = 0
            self.locations = <uint64_t *> malloc(2 * t.place * sizeof(uint64_t))
            if self.locations == NULL:
                raise MemoryError()
            self.room = t.place
        elif status != FOUND:
            settle(log, status, &t)
        self.doubted = t.doubted if status == UNMAPPED else 0
        return status

    cdef int all_mapped(self, Log log, Trouble *t) noexcept nogil:
        """Each segment must be mapped, as far as it is needed, before compaction can remove its file: the last record of each
        is read, from the last segment on.  What no segment was found for is left to who reads it."""
        cdef record_view r
        cdef Mapped *m
        cdef Mapped *following = NULL
        cdef size_t i
        t.indexes = self.indexes
        for i in range(self.count, 0, -1):
            m = <Mapped *> atomic_load_pointer(<void **> &log.chunks[self.locations[i - 1] >> CHUNK_UNIT_SHIFT])
            if m == NULL or m != following:
                following = m
                if read_record(log, self.locations[i - 1], &r, t) == UNMAPPED and not 0 < t.doubted <= t.place + 1:
                    return UNMAPPED
        return FOUND

    cdef int copy_now(self, Log log, Trouble *t) noexcept nogil:
        """The locations in the shard at the cursor, which goes on; NEED_PAGES if there is no room for them."""
        cdef uint64_t indexes = atomic_load(&log.indexes)
        cdef Index *ix = current_index(log)
        cdef uint64_t word, entry, bucket, value, after, seq = atomic_load(&ix.page.seq)
        cdef uint64_t *slots
        cdef uint8_t *shard
        cdef unsigned cls, i, depth
        cdef int status = find_entry(ix, self.cursor, &word, &entry, t)
        if status < 0:
            return status if atomic_load(&ix.header.directory) == word else CHANGED
        cls, depth = ENTRY_CLASS(entry), ENTRY_DEPTH(entry)
        if <size_t> SHARD_BUCKETS[cls] * BUCKET_SLOTS > self.room:
            t.place = <size_t> SHARD_BUCKETS[cls] * BUCKET_SLOTS
            return NEED_PAGES
        shard = ix.base + ENTRY_PAGE(entry) * PAGE_BYTES
        self.seq, self.indexes = seq, indexes
        self.at = self.count = 0
        for bucket in range(SHARD_BUCKETS[cls]):
            slots = bucket_at(shard, bucket)
            for i in range(BUCKET_SLOTS):
                value = atomic_load(slots + i)
                self.locations[self.count] = value & LOCATION_MASK
                self.count += value > SLOT_DELETED
        if atomic_load(&ix.header.directory) != word:
            self.count = 0
            return CHANGED
        after = (self.cursor >> (64 - depth)) + 1 if depth else 1
        self.last = after >> depth != 0
        self.cursor = after << (64 - depth) if depth else 0
        return FOUND


cdef inline void prefetch_record(Log log, uint64_t location) noexcept nogil:
    cdef Mapped *m = <Mapped *> atomic_load_pointer(<void **> &log.chunks[location >> CHUNK_UNIT_SHIFT])
    cdef uint8_t *p
    if m != NULL:
        p = m.base + ((location - m.origin) << LOCATION_UNIT_SHIFT)
        prefetch(p)
        prefetch(p + 64)
        prefetch(p + 128)


cdef void sort_locations(uint64_t *items, uint64_t *spare, size_t n) noexcept nogil:
    """By radix, 10 bits at a time: four passes, so the result is in `items`."""
    cdef size_t counts[1024]
    cdef size_t i, total, digit
    cdef unsigned shift, turn
    for turn in range(4):
        shift = turn * 10
        memset(counts, 0, sizeof(counts))
        for i in range(n):
            counts[(items[i] >> shift) & 1023] += 1
        total = 0
        for digit in range(1024):
            i = counts[digit]
            counts[digit] = total
            total += i
        for i in range(n):
            digit = (items[i] >> shift) & 1023
            spare[counts[digit]] = items[i]
            counts[digit] += 1
        items, spare = spare, items

# What users hold.  The classes of logkv.store derive from these and keep the speed of their C slots.

cdef inline bytes record_value(Log log, record_view *r, uint64_t location):
    """A record's value; a long one's checksum is compared here."""
    if r.value_length > VALUE_CRC_ABOVE:
        check_value(log, r, location)
    return PyBytes_FromStringAndSize(<const char *> r.value, r.value_length)


cdef inline object decoded(bytes value, decode):
    return value if decode is None else decode(value)


cdef int check_value(Log log, record_view *r, uint64_t location) except -1:
    cdef Chunk *chunk = &log.chunks[location >> CHUNK_UNIT_SHIFT]
    cdef uint64_t offset = (location - chunk.origin) << LOCATION_UNIT_SHIFT
    cdef int status = record_unpack(r, chunk.base + offset, chunk.limit - offset, chunk.salt, offset, True)
    if status != RECORD_OK:
        log.trouble_status = status
        log.trouble_expected, log.trouble_found = r.crc, r.found
        raise_damage(log, location)
    return 0


cdef inline int current(Log log) except -1:
    """Before every read: the handle is open, and the index is still the one to use."""
    cdef control_page *c
    if log is None:
        raise ClosedError("the store is closed")
    while log.attention:
        log.check_open()
        log.owner._await_turn()
    c = log.control
    if not log.writable and c != NULL and (
            atomic_load(&c.index_nonce) != log.nonce or atomic_load(&c.epoch) != log.epoch or
            log.index.private and atomic_load(&c.last_version) != log.last_version):
        log.owner._index_changed()
        log.check_open()
    return 0


cdef inline int find(Log log, Bytes key, Probe *p) except -1:
    """FOUND or MISSING, by one probe of the index and one look at the record."""
    cdef uint64_t h
    cdef int status
    if key.size > KEY_MAX:
        current(log)
        return MISSING
    while True:
        current(log)
        h = siphash13(log.seed, key.data, key.size)
        status = probe(log, key.data, key.size, h, 0, p, False)
        if status >= 0:
            return status
        settle(log, status)


cdef class ReadHandle:
    """The reading half of a mapping of bytes to bytes, or to what a codec makes of them."""
    cdef:
        Log log
        object encode, decode       # of the values; None where they are bytes

    def __class_getitem__(cls, item):
        return cls

    def _attach(self, Log log, encode, decode) -> None:
        self.log = log
        self.encode, self.decode = encode, decode

    def _detach(self) -> None:
        self.log = None

    @property
    def closed(self) -> bool:
        """Whether this handle was closed."""
        return self.log is None or self.log.closed

    def __getitem__(self, key):
        cdef Log log = self.log         # another thread may close this handle meanwhile
        cdef Bytes k
        cdef Probe p
        key_bytes(key, &k)
        if find(log, k, &p) == MISSING:
            raise KeyError(key)
        return decoded(record_value(log, &p.record, p.location), self.decode)

    def get(self, key, default=None):
        """The value of `key`, or `default`.

        One probe of the index and one read of the log; the record's checksum is compared.  Raises TypeError if the
        key is neither bytes nor str, CorruptionError if the record is damaged, ClosedError.
        """
        cdef Log log = self.log
        cdef Bytes k
        cdef Probe p
        key_bytes(key, &k)
        if find(log, k, &p) == MISSING:
            return default
        return decoded(record_value(log, &p.record, p.location), self.decode)

    def __contains__(self, key):
        cdef Log log = self.log
        cdef Bytes k
        cdef Probe p
        key_bytes(key, &k)
        return find(log, k, &p) == FOUND

    def __len__(self):
        cdef Log log = self.log
        current(log)
        if not log.writable:
            log.load_state()
        return log.keys

    def __iter__(self):
        return self._iterate(0)

    def _iterate(self, int what, bint holding=True):
        """An iterator over keys (0), values (1) or pairs (2).  `holding`: it keeps the handle, which stays open so."""
        cdef Log log = self.log
        current(log)
        return StoreIterator(log, what, self.decode, self if holding else None)


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
        cdef Log log = self.log
        if log is None:
            raise ClosedError("the store is closed")
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
        cdef Log log = self.log
        cdef Bytes k, v
        if log is not None and self.encode is None and PyBytes_Check(value):
            key_bytes(key, &k)
            v.data, v.size = <const uint8_t *> PyBytes_AS_STRING(value), PyBytes_GET_SIZE(value)
            put(log, k, v)
        else:
            self.put(key, value)

    def delete(self, key) -> bool:
        """Removes `key`; False if it was not there.  Durability and errors as for `put`."""
        cdef Log log = self.log
        cdef Bytes k
        if log is None:
            raise ClosedError("the store is closed")
        key_bytes(key, &k)
        return delete(log, k, None) != 0

    def __delitem__(self, key):
        if not self.delete(key):
            raise KeyError(key)

    def _pop(self, key) -> list:
        """[value] of a key that is deleted at once, or []."""
        cdef Bytes k
        cdef list popped = []
        cdef Log log = self.log
        if log is None:
            raise ClosedError("the store is closed")
        key_bytes(key, &k)
        if self.decode is not None:
            ReadHandle.get(self, key)           # a value that cannot be decoded raises here, and stays
        delete(log, k, popped)
        return [decoded(value, self.decode) for value in popped]


cdef uint64_t PREFETCH_AHEAD = 12


@cython.final
cdef class StoreIterator:
    """Walks the index by hash prefix, a shard's locations at a time, in the order of the log.

    No overwrite and no split moves a key across the cursor: a key that is there all the time is seen once.  A key that
    changed since its shard was copied is looked up again.
    """
    cdef:
        Log log
        int what
        object decode           # of the values; None where they are bytes
        object handle           # that would be closed if nobody held it
        bint last               # the shard that was copied is the last one
        uint64_t cursor         # the first hash that was not copied yet
        uint64_t seq            # of the state when the shard was copied
        uint64_t clears         # of the log
        uint64_t *locations
        size_t at, count, room

    def __cinit__(self, Log log, int what, decode, handle):
        self.log = log
        self.what = what
        self.decode = decode
        self.handle = handle
        self.clears = log.clears

    def __dealloc__(self):
        free(self.locations)

    def __iter__(self):
        return self

    def __next__(self):
        cdef record_view r
        cdef Probe p
        cdef Bytes key
        cdef uint64_t location
        cdef int status
        while True:
            current(self.log)
            if self.clears != self.log.clears:      # what was copied is gone
                self.at = self.count
                self.clears = self.log.clears
            if self.at >= self.count:
                if self.last:
                    raise StopIteration
                self.copy_shard()
                continue
            location = self.locations[self.at]
            if self.at + PREFETCH_AHEAD < self.count:
                prefetch_record(self.log, self.locations[self.at + PREFETCH_AHEAD])
            status = read_record(self.log, location, &r)
            if status < 0:
                try:
                    settle(self.log, status)
                except BaseException:
                    self.at += 1                # the next call goes on behind this record
                    raise
                continue
            self.at += 1
            if atomic_load(&self.log.index.page.seq) != self.seq:
                found = PyBytes_FromStringAndSize(<const char *> r.key, r.key_length)  # `find` may unmap the record
                key_bytes(found, &key)
                if find(self.log, key, &p) == MISSING:
                    continue
                r, location = p.record, p.location
            return self.item(&r, location)

    cdef inline object item(self, record_view *r, uint64_t location):
        cdef bytes key = None
        if self.what != 1:
            key = PyBytes_FromStringAndSize(<const char *> r.key, r.key_length)
            if self.what == 0:
                return key
        value = decoded(record_value(self.log, r, location), self.decode)
        return value if self.what == 1 else (key, value)

    cdef int copy_shard(self) except -1:
        cdef uint64_t word, entry, bucket, value, after
        cdef uint64_t *slots
        cdef uint8_t *shard
        cdef unsigned cls, i, depth
        cdef size_t room
        cdef int status
        while True:
            current(self.log)
            self.seq = atomic_load(&self.log.index.page.seq)
            status = find_entry(self.log, self.cursor, &word, &entry)
            if status < 0:
                if atomic_load(&self.log.index.header.directory) == word:
                    settle(self.log, status)
                continue
            cls, depth = ENTRY_CLASS(entry), ENTRY_DEPTH(entry)
            room = <size_t> SHARD_BUCKETS[cls] * BUCKET_SLOTS
            if room > self.room:
                free(self.locations)
                self.room = 0
                self.locations = <uint64_t *> malloc(2 * room * sizeof(uint64_t))
                if self.locations == NULL:
                    raise MemoryError()
                self.room = room
            shard = self.log.index.base + ENTRY_PAGE(entry) * PAGE_BYTES
            self.at = self.count = 0
            for bucket in range(SHARD_BUCKETS[cls]):
                slots = bucket_at(shard, bucket)
                for i in range(BUCKET_SLOTS):
                    value = atomic_load(slots + i)
                    self.locations[self.count] = value & LOCATION_MASK
                    self.count += value > SLOT_DELETED
            if atomic_load(&self.log.index.header.directory) == word:
                break
        sort_locations(self.locations, self.locations + self.room, self.count)
        after = (self.cursor >> (64 - depth)) + 1 if depth else 1
        self.last = after >> depth != 0
        self.cursor = after << (64 - depth) if depth else 0
        return 0


cdef inline void prefetch_record(Log log, uint64_t location) noexcept nogil:
    cdef Chunk *chunk = &log.chunks[location >> CHUNK_UNIT_SHIFT]
    cdef uint8_t *p = chunk.base + ((location - chunk.origin) << LOCATION_UNIT_SHIFT)
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

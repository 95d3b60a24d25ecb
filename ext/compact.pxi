# Compaction: what is alive of neighbouring sealed segments goes, in key order, into a new one; then the index follows.
#
# Neighbours in the log's order, so that every version in the output lies between those of the segments before and behind.
# Copying reads the index like any reader does.  A slot is changed only if it still points to the old copy.

cdef enum:
    MERGE_STEP = 4 << 20        # bytes of the output that are made at a time
    LOOK_AHEAD = 8              # entries whose records and slots are fetched ahead; a power of two


cdef struct Source:             # a sealed segment, read in the order of its keys
    const uint8_t *base
    uint64_t origin, end
    uint32_t salt
    const footer_entry *entries
    uint64_t count, at
    uint64_t prefix             # of the key at `at`
    record_view record          # at `at`
    uint64_t scanned            # entries that were looked up in the index
    uint64_t found[LOOK_AHEAD]  # those of them that count, from `first` to `last`; their records are on their way
    uint64_t first, last
    bint standing               # at an entry, or behind the last one


cdef footer_header *footer_of(Mapped *m, uint64_t end) noexcept nogil:
    """A sealed segment's footer, checked at its first use; NULL if it is not right.  It is shorter than the records that it
    lists, however long the file is."""
    cdef record_view r
    cdef footer_header *header
    cdef footer_entry *entries
    cdef uint64_t i, reach
    if m != NULL and m.entries != NULL:
        return (<footer_header *> m.entries) - 1
    if m == NULL or end + RECORD_HEADER_BYTES > m.limit or populate(m.base + end, RECORD_HEADER_BYTES, False):
        return NULL
    reach = record_reach(m.base + end)
    if reach > min(end, m.limit - end) or populate(m.base + end, reach, False) or \
            record_unpack(&r, m.base + end, m.limit - end, m.salt, end, True) != RECORD_OK:
        return NULL
    header = <footer_header *> r.value
    if r.kind != KIND_FOOTER or r.key_length or r.value_length < sizeof(footer_header) or \
            (r.value_length - sizeof(footer_header)) // sizeof(footer_entry) != header.entries:
        return NULL
    entries = <footer_entry *> (header + 1)
    for i in range(header.entries):
        if <uint64_t> entries[i].unit << LOCATION_UNIT_SHIFT >= end:
            return NULL
    m.entries, m.count = entries, header.entries
    return header


cdef inline uint64_t entry_size(const footer_entry *e) noexcept nogil:
    return <uint64_t> (e.size_kind & ((1 << FOOTER_SIZE_BITS) - 1)) << LOCATION_UNIT_SHIFT


cdef inline unsigned entry_kind(const footer_entry *e) noexcept nogil:
    return e.size_kind >> FOOTER_SIZE_BITS


cdef inline int load_record(Source *s, uint64_t at, bint whole) noexcept nogil:
    """The record of entry `at`, checked; `whole`: with a long value's own checksum."""
    cdef uint64_t offset = <uint64_t> s.entries[at].unit << LOCATION_UNIT_SHIFT
    cdef int status = record_unpack(&s.record, s.base + offset, s.end - offset, s.salt, offset, whole)
    if status == RECORD_OK:
        s.prefix = key_prefix(s.record.key, s.record.key_length)
    return status


cdef inline int order_of(Source *a, Source *b) noexcept nogil:
    """Of the keys that both stand at, as unsigned bytes."""
    cdef int order
    if a.prefix != b.prefix:
        return -1 if a.prefix < b.prefix else 1
    order = memcmp(a.record.key, b.record.key, min(a.record.key_length, b.record.key_length))
    return order if order else (a.record.key_length > b.record.key_length) - (a.record.key_length < b.record.key_length)


cdef uint64_t *slot_of(Index *ix, uint64_t h, uint64_t location, uint8_t **shard, int *status, Trouble *t) noexcept nogil:
    """The slot that points to a location, or NULL; then `status` is MISSING or what must be settled first."""
    cdef uint64_t word, entry, bucket, buckets, n, found, value = (h >> TAG_SHIFT << TAG_SHIFT) | location
    cdef uint64_t *slots
    cdef unsigned i
    cdef bint empty
    while True:
        status[0] = find_entry(ix, h, &word, &entry, t)
        if status[0] < 0:
            if atomic_load(&ix.header.directory) != word:
                continue
            return NULL
        shard[0] = ix.base + ENTRY_PAGE(entry) * PAGE_BYTES
        buckets = SHARD_BUCKETS[ENTRY_CLASS(entry)]
        bucket = home_bucket(h, ENTRY_CLASS(entry))
        for n in range(buckets):
            slots = bucket_at(shard[0], bucket)
            empty = False
            for i in range(BUCKET_SLOTS):
                found = atomic_load(slots + i)
                if found == value:
                    return slots + i
                empty |= found == SLOT_EMPTY
            if empty:
                break
            bucket = next_bucket(bucket, n, buckets)
        if atomic_load(&ix.header.directory) == word:
            status[0] = MISSING
            return NULL


@cython.final
cdef class Merge:
    """Copies what is alive of neighbouring sealed segments, in the order of their keys, and the tombstones that are needed.

    A tombstone is needed while a segment before them has a put of its key.
    """
    cdef:
        Log log
        Hold hold                   # on the sources' mappings
        Source *inputs              # in the log's order
        Source *older               # all sealed segments before them, the newest first
        size_t input_count, older_count
        bint unreadable             # an older segment's footer is not right: it may hold any key
        uint32_t salt
        uint64_t offset             # of the output: where its next record goes
        uint8_t *buffer
        size_t used, room
        uint64_t *moved             # for each record of the output: where it came from; 0: a tombstone
        footer_entry *entries       # and its entry in the footer
        uint64_t moved_room
        readonly uint64_t records       # of the output
        readonly uint64_t tombstones    # bytes of these among them
        readonly uint64_t done, total   # entries of the inputs

    def __cinit__(self, Log log, list inputs, list older, uint32_t salt):
        """inputs, older: (chunk, end) of sealed segments that are mapped, in the log's order.  salt: of the output.

        Raises CorruptionError if an input's footer is not right.
        """
        cdef size_t i
        self.log = log
        self.hold = log.current_hold()
        self.salt = salt
        self.offset = SEGMENT_HEADER_BYTES
        self.input_count = len(inputs)
        self.inputs = <Source *> calloc(len(inputs), sizeof(Source))
        self.older = <Source *> calloc(len(older) + 1, sizeof(Source))
        if self.inputs == NULL or self.older == NULL:
            raise MemoryError()
        for i, (chunk, end) in enumerate(inputs):
            if not self.begin(&self.inputs[i], chunk, end):
                path, number, offset = log.owner._place_of((<uint64_t> chunk << CHUNK_UNIT_SHIFT) + (<uint64_t> end >> 3))
                raise CorruptionError("a segment's footer is damaged", path=path, segment=number, offset=offset,
                                      expected="a footer", found="another record or a wrong checksum")
            self.total += self.inputs[i].count
        for chunk, end in reversed(older):
            if self.begin(&self.older[self.older_count], chunk, end):
                self.older_count += 1
            else:
                self.unreadable = True

    def __dealloc__(self):
        free(self.inputs)
        free(self.older)
        free(self.buffer)
        free(self.moved)
        free(self.entries)

    cdef bint begin(self, Source *s, uint64_t chunk, uint64_t end) noexcept:
        cdef Mapped *m = self.log.chunks[chunk]
        cdef footer_header *header = footer_of(m, end)
        if header == NULL:
            return False
        s.base, s.origin, s.end, s.salt = m.base, m.origin, end, m.salt
        s.entries, s.count = <footer_entry *> (header + 1), header.entries
        return True

    cdef int look_ahead(self, Source *s, Trouble *t) noexcept nogil:
        """Finds the next entries of a source that are alive, or tombstones, without a look at what is dead."""
        cdef const footer_entry *e
        cdef const uint8_t *record
        cdef uint8_t *shard
        cdef int status = FOUND
        while s.last - s.first < LOOK_AHEAD and s.scanned < s.count:
            e = &s.entries[s.scanned]
            if s.scanned + LOOK_AHEAD < s.count:
                prefetch_bucket(self.log, s.entries[s.scanned + LOOK_AHEAD].hash)
            if entry_kind(e) != KIND_PUT or \
                    slot_of(current_index(self.log), e.hash, s.origin + e.unit, &shard, &status, t) != NULL:
                record = s.base + (<uint64_t> e.unit << LOCATION_UNIT_SHIFT)
                prefetch(record)
                prefetch(record + 64)
                prefetch(record + 128)
                s.found[s.last & (LOOK_AHEAD - 1)] = s.scanned
                s.last += 1
            elif status < 0:
                return status
            s.scanned += 1
            self.done += 1
        return FOUND

    cdef int next_of(self, Source *s, Trouble *t) noexcept nogil:
        """Goes on to the next entry of a source that counts; DAMAGED if its record is."""
        cdef int status = self.look_ahead(s, t)
        if status < 0:
            return status
        s.at = s.count
        if s.first == s.last:
            return FOUND
        s.at = s.found[s.first & (LOOK_AHEAD - 1)]
        t.status = load_record(s, s.at, True)
        if t.status != RECORD_OK:
            t.place, t.expected, t.found = s.origin + s.entries[s.at].unit, s.record.crc, s.record.found
            return DAMAGED
        s.first += 1
        return FOUND

    def step(self) -> bytes:
        """The next records of the output, some MiB; b"" when there are no more.

        With the GIL released.  Raises CorruptionError if a record is damaged.
        """
        cdef Trouble t
        cdef int status = CHANGED
        self.used = 0
        while status != FOUND:
            self.log.check_open()
            with nogil:
                long_read_begin()
                status = LOOK_CLOSER if atomic_load(&self.log.attention) else self.fill(&t)
                long_read_end()
            if status == NEED_LOG_ROOM:
                self.make_room(t.place)
            elif status != FOUND:
                settle(self.log, status, &t)
        self.offset += self.used
        return self.buffer[:self.used] if self.used else b""

    cdef int make_room(self, size_t need) except -1:
        """For so many bytes and one record more."""
        cdef uint8_t *buffer = <uint8_t *> realloc(self.buffer, need)
        if buffer == NULL:
            raise MemoryError(f"no memory for {need} bytes of records")
        self.buffer, self.room = buffer, need
        if self.records >= self.moved_room:
            need = 2 * self.moved_room + 1024
            moved = <uint64_t *> realloc(self.moved, need * sizeof(uint64_t))
            if moved != NULL:
                self.moved = moved
            entries = <footer_entry *> realloc(self.entries, need * sizeof(footer_entry))
            if entries != NULL:
                self.entries = entries
            if moved == NULL or entries == NULL:
                raise MemoryError(f"no memory for the places of {need} records")
            self.moved_room = need
        return 0

    cdef int fill(self, Trouble *t) noexcept nogil:
        cdef Source *newest
        cdef Source *s
        cdef size_t i
        cdef int status
        while self.used < MERGE_STEP:
            newest = NULL
            for i in range(self.input_count):
                s = &self.inputs[i]
                if not s.standing:
                    status = self.next_of(s, t)
                    if status < 0:
                        return status
                    s.standing = True
                if s.at < s.count and (newest == NULL or order_of(s, newest) <= 0):
                    newest = s
            if newest == NULL:
                break
            if newest.record.kind == KIND_PUT or self.needed(newest):
                status = self.copy(newest, t)
                if status < 0:
                    return status
            for i in range(self.input_count):
                s = &self.inputs[i]
                if s != newest and s.at < s.count and order_of(s, newest) == 0:
                    s.standing = False
            newest.standing = False
        return FOUND

    cdef int copy(self, Source *s, Trouble *t) noexcept nogil:
        """The record that a source stands at."""
        cdef record_view *r = &s.record
        cdef footer_entry *e
        cdef uint64_t offset = self.offset + self.used
        if self.used + r.size > self.room or self.records >= self.moved_room:
            t.place = max(self.used + r.size, MERGE_STEP + (64 << 10))
            return NEED_LOG_ROOM
        record_pack(self.buffer + self.used, self.salt, offset, r.kind, r.version, r.key, r.key_length, r.value, r.value_length)
        e = &self.entries[self.records]
        e.hash = s.entries[s.at].hash
        e.unit = <uint32_t> (offset >> LOCATION_UNIT_SHIFT)
        e.size_kind = s.entries[s.at].size_kind
        self.moved[self.records] = s.origin + s.entries[s.at].unit if r.kind == KIND_PUT else 0
        self.used += r.size
        self.records += 1
        if r.kind == KIND_DELETE:
            self.tombstones += r.size
        return FOUND

    cdef bint needed(self, Source *s) noexcept nogil:
        """Whether a segment before the inputs has a put of the key; one that cannot be read has."""
        cdef Source *o
        cdef size_t i
        for i in range(self.older_count):
            o = &self.older[i]
            if not seek(o, s):
                return True
            if o.at < o.count and order_of(o, s) == 0:
                return o.record.kind == KIND_PUT or self.unreadable     # which may be behind that tombstone
        return self.unreadable

    def footer(self, uint64_t first, uint64_t last) -> bytes:
        """The output's, as it stands behind its records.  first, last: version of the segments that were merged."""
        return encode_footer(self.entries, self.records, first, last, self.salt, self.offset)

    def swing(self, uint64_t chunk, uint64_t first, uint64_t count) -> None:
        """Lets the index point to records `first` to `first + count` of the output, a sealed segment at `chunk` that is
        mapped and has a row, wherever it still points to where they came from."""
        cdef Mapped *m = self.log.chunks[chunk]
        cdef uint64_t i = first, stop = min(first + count, self.records)
        cdef Trouble t
        cdef int status
        while i < stop:
            write_lock(&self.log.mutex)
            status = MISSING
            while i < stop and status >= 0 and not self.log.refusing:
                if i + LOOK_AHEAD < stop:
                    prefetch_bucket(self.log, self.entries[i + LOOK_AHEAD].hash)
                if self.moved[i]:
                    status = swing_slot(self.log, m, &self.entries[i], self.moved[i], &t)
                i += status >= 0
            write_unlock(&self.log.mutex)
            if self.log.refusing:
                check_writable(self.log)
            if status < 0:
                settle(self.log, status, &t)


cdef bytes encode_footer(const footer_entry *entries, uint64_t count, uint64_t first, uint64_t last, uint32_t salt,
                         uint64_t offset):
    """Of a segment that has one record of each key."""
    cdef footer_header header = footer_header(first, last, count, count)
    value = (<char *> &header)[:sizeof(header)] + (<char *> entries)[:count * sizeof(footer_entry)]
    return encode_record(KIND_FOOTER, last, b"", value, salt, offset)


cdef bint seek(Source *o, Source *s) noexcept nogil:
    """Goes to the first entry of `o` that is not below the key of `s`: by steps that double, then by bisection.
    False if a record on the way cannot be read."""
    cdef uint64_t low = o.at, high = o.at, step = 1, middle
    while high < o.count:                   # what is below `low` is below the key
        if load_record(o, high, False) != RECORD_OK:
            return False
        if order_of(o, s) >= 0:
            break
        low = high + 1
        high += step
        step *= 2
    high = min(high, o.count)
    while low < high:
        middle = (low + high) // 2
        if load_record(o, middle, False) != RECORD_OK:
            return False
        if order_of(o, s) < 0:
            low = middle + 1
        else:
            high = middle
    o.at = low
    return low >= o.count or load_record(o, low, False) == RECORD_OK


cdef int swing_slot(Log log, Mapped *m, footer_entry *e, uint64_t old, Trouble *t) noexcept nogil:
    """With the mutex held.  A kill between any two stores: `finish_swing`."""
    cdef Index *ix = log.index
    cdef swing_note *note = &ix.page.swing
    cdef Mapped *from_ = log.chunks[old >> CHUNK_UNIT_SHIFT]
    cdef uint64_t size = entry_size(e), location = m.origin + e.unit
    cdef uint8_t *shard
    cdef int status
    cdef uint64_t *slot = slot_of(ix, e.hash, old, &shard, &status, t)
    if slot == NULL:
        return status
    if log.copies and make_writable(log, [Stretch(shard, SHARD_HEADER_BYTES), Stretch(<uint8_t *> slot, sizeof(uint64_t))],
                                    2, t) < 0:
        return CANNOT_WRITE
    atomic_store(&ix.page.state[log.seq & 1].previous, 0)   # the rows have the last put's change, and now get another
    release_fence()                                         # nothing of this note before the last one's end
    note.chunk = from_.origin >> CHUNK_UNIT_SHIFT
    note.live, note.previous_live = live_more(m.row.live, size), live_less(from_.row.live, size)
    atomic_store(&note.location, location)
    touch_shard(log, shard)
    atomic_store(slot, (e.hash >> TAG_SHIFT << TAG_SHIFT) | location)
    release_fence()
    relaxed_store(&m.row.live, note.live)
    relaxed_store(&from_.row.live, note.previous_live)
    atomic_store(&note.location, 0)
    return FOUND


cdef int finish_swing(Log log) except -1:
    """After a kill: if the slot was changed, the rows are too."""
    cdef swing_note *note = &log.index.page.swing
    cdef uint64_t location = note.location, h
    cdef uint8_t *shard
    cdef uint64_t *slot = NULL
    cdef record_view r
    cdef Mapped *m
    cdef Trouble t
    cdef int status
    if location == 0:
        return 0
    if location > LOCATION_MASK:            # it was damaged: nobody writes that
        atomic_store(&note.location, 0)
        return 0
    t.doubted = 0
    t.indexes = atomic_load(&log.indexes)
    while True:
        status = read_record(log, location, &r, &t)
        if status == FOUND:
            h = siphash13(log.seed, r.key, r.key_length)
            slot = slot_of(log.index, h, location, &shard, &status, &t)
        if status >= 0:
            break
        settle(log, status, &t)
    if slot != NULL:
        m = log.chunks[location >> CHUNK_UNIT_SHIFT]
        set_live(log, m.origin >> CHUNK_UNIT_SHIFT, note.live)
        set_live(log, note.chunk, note.previous_live)
    atomic_store(&note.location, 0)
    return 0


def swing_replaced(Log log, uint64_t chunk, uint64_t end, uint64_t first, uint64_t count) -> int:
    """Goes on with a merge that a kill interrupted: as `Merge.swing`, for each key whose slot points to a segment that is
    marked as replaced.  Returns how many records the output has; 0 if it is gone, for the store was emptied."""
    cdef Hold hold = log.current_hold()
    cdef Mapped *m = log.chunks[chunk]
    cdef Mapped *other
    cdef footer_header *footer = footer_of(m, end)
    cdef footer_entry *entries
    cdef uint64_t i = first, offset
    cdef record_view r
    cdef Probe p
    cdef Trouble t
    cdef int status
    if m == NULL:
        return 0
    if footer == NULL:
        path, number, offset = log.owner._place_of(m.origin + (end >> LOCATION_UNIT_SHIFT))
        raise CorruptionError("a segment's footer is damaged", path=path, segment=number, offset=offset,
                              expected="a footer", found="another record or a wrong checksum")
    entries = <footer_entry *> (footer + 1)
    t.doubted = 0
    while i < min(first + count, footer.entries):
        status = MISSING
        check_writable(log)
        write_lock(&log.mutex)
        offset = <uint64_t> entries[i].unit << LOCATION_UNIT_SHIFT
        if entry_kind(&entries[i]) == KIND_PUT:
            t.status = record_unpack(&r, m.base + offset, end - offset, m.salt, offset, False)
            if t.status != RECORD_OK:
                t.place, t.expected, t.found = m.origin + entries[i].unit, r.crc, r.found
                status = DAMAGED
            else:
                status = probe(log, r.key, r.key_length, entries[i].hash, 0, &p, False, &t)
            if status == FOUND:
                other = log.chunks[p.location >> CHUNK_UNIT_SHIFT]
                if other.replaced:
                    status = swing_slot(log, m, &entries[i], p.location, &t)
        write_unlock(&log.mutex)
        if status < 0:
            settle(log, status, &t)
        else:
            i += 1
    return footer.entries

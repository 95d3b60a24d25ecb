# Recovery: reads the log in order and tells how far it is whole.  The scan reports; the engine decides.

cdef struct Scan:
    const uint8_t *base     # of the segment
    uint64_t origin, offset, stop, version
    uint64_t data           # no record begins from there on, nothing is read ahead
    uint64_t populated, step
    uint32_t salt
    bint sorted             # by key: versions may fall


cdef struct Entry:          # of a batch that is on its way into the index
    uint64_t hash, location, size, end, version
    uint8_t kind


cdef enum:
    BATCH = 32


cdef uint64_t SCAN_FIRST = 16 << 10, SCAN_STEP = 4 << 20       # pages made present at a time


cdef inline uint64_t records_end(Mapped *m) noexcept nogil:
    """No record of a segment stands behind this, however long its file is: locations there are those of others."""
    return min(atomic_load(&m.limit), m.run << CHUNK_SHIFT)


cdef int begin_scan(Log log, Scan *s, uint64_t chunk, uint64_t start, uint64_t stop, uint64_t version) except -1:
    log.check_open()
    cdef Mapped *entry = log.chunks[chunk]
    if entry == NULL:
        raise ValueError(f"no segment is mapped at chunk {chunk}")
    s.base = entry.base
    s.origin = entry.origin
    s.salt = entry.salt
    s.offset = start
    s.stop = min(stop, records_end(entry))
    s.data = min(s.stop, atomic_load(&entry.data))
    s.version = version
    s.populated = start
    s.step = SCAN_FIRST
    s.sorted = False
    return 0


cdef bint make_present(Scan *s, uint64_t end) noexcept nogil:
    """A page that the device cannot read is an error here, and not a SIGBUS later."""
    cdef uint64_t ahead = min(max(end, min(s.populated + s.step, s.data)), s.stop)
    s.step = min(4 * s.step, SCAN_STEP)
    if populate(<uint8_t *> s.base + s.populated, ahead - s.populated, False):
        ahead = min(end, s.stop)                # what cannot be read may lie behind what is asked for
        s.step = PAGE_BYTES
        if populate(<uint8_t *> s.base + s.populated, ahead - s.populated, False):
            return False
    s.populated = ahead
    return True


cdef int raise_unreadable(Log log, uint64_t chunk, uint64_t offset) except -1:
    path, number, place = log.asked()._place_of((chunk << CHUNK_UNIT_SHIFT) + (offset >> LOCATION_UNIT_SHIFT))
    raise CorruptionError("the log cannot be read", path=path, segment=number, offset=place, expected="a record",
                          found=SCAN_REASONS[SCAN_IO_ERROR])


cdef inline int next_record(Scan *s, record_view *r) noexcept nogil:
    """The next whole record, RECORD_OK; or why there is none, and then the scan stands before it."""
    cdef int status
    cdef uint64_t end
    if s.offset >= s.stop:
        return SCAN_STOP
    if s.offset + RECORD_HEADER_BYTES > s.populated and not make_present(s, s.offset + RECORD_HEADER_BYTES):
        return SCAN_IO_ERROR
    if s.offset + RECORD_HEADER_BYTES < s.stop:
        end = s.offset + record_reach(s.base + s.offset)
        if end > s.populated and end <= s.stop and not make_present(s, end):
            return SCAN_IO_ERROR
    status = record_unpack(r, s.base + s.offset, s.stop - s.offset, s.salt, s.offset, True)
    if status != RECORD_OK:
        return status
    if r.kind == KIND_FOOTER:
        return SCAN_FOOTER
    if r.version > VERSION_MAX or \
            not s.sorted and r.version <= s.version and not (r.kind == KIND_CONTINUES and r.version == s.version):
        return SCAN_VERSION
    s.offset += r.size
    s.version = max(s.version, r.version)
    return RECORD_OK


cdef int apply_batch(Log log, Entry *batch, int n, uint64_t number, int *done, Trouble *t) noexcept nogil:
    """Does again what records say, from the `done`-th on; FOUND or a status to be settled."""
    cdef Entry *e
    cdef Probe p
    cdef int status
    cdef bint tight = log.copies and little_is_left(log)
    while done[0] < n:
        e = batch + done[0]
        p.slot = NULL
        status = MISSING
        if e.kind == KIND_PUT or e.kind == KIND_DELETE:
            status = probe(log, NULL, 0, e.hash, e.location, &p, True, t)
            if status == MISSING and e.kind == KIND_PUT and shard_is_full(&p):
                status = grow_shard(log, e.hash, t)
                if status >= 0:
                    continue
            if status < 0:
                return status
        if tight and make_change_writable(log, &p, 0, t) < 0:
            return CANNOT_WRITE
        if e.kind == KIND_PUT and not (status == FOUND and p.location == e.location):
            apply_put(log, &p, status, e.hash, e.location, e.size, number, e.end, e.version)
        elif e.kind == KIND_DELETE and status == FOUND:
            apply_delete(log, &p, e.location, number, e.end, e.version)
        else:
            commit(log, number, e.end, e.version, NULL, 0, 0, log.chunks[e.location >> CHUNK_UNIT_SHIFT].row.live, 0)
        done[0] += 1
    return FOUND


cdef int enter(Log log, Entry *batch, int n, uint64_t number) except -1:
    """A whole batch into the index, with what the index needs meanwhile."""
    cdef Trouble t
    cdef int done = 0, status
    t.doubted = 0
    while True:
        with nogil:
            status = apply_batch(log, batch, n, number, &done, &t)
        if status >= 0:
            return 0
        settle(log, status, &t)


def replay(Log log, uint64_t number, uint64_t chunk, uint64_t start, uint64_t stop, uint64_t version,
           bint merged=False) -> tuple:
    """Puts the records of a segment from `start` on into the index, until `stop` or the first that is not whole.

    merged: in the order of keys, as compaction writes them, not of versions.  Returns (reason, offset, last version, records).  The lines of the index are fetched for a batch at a time, and
    the GIL is released.
    """
    cdef Scan s
    cdef record_view r
    cdef Entry batch[BATCH]
    cdef Entry *e
    cdef int n, reason = RECORD_OK
    cdef uint64_t records = 0
    begin_scan(log, &s, chunk, start, stop, version)
    s.sorted = merged
    while reason == RECORD_OK:
        n = 0
        with nogil:
            while n < BATCH:
                e = &batch[n]
                e.location = s.origin + (s.offset >> LOCATION_UNIT_SHIFT)
                reason = next_record(&s, &r)
                if reason != RECORD_OK:
                    break
                e.kind, e.version, e.size, e.end = r.kind, r.version, r.size, s.offset
                if r.kind == KIND_PUT or r.kind == KIND_DELETE:
                    e.hash = siphash13(log.seed, r.key, r.key_length)
                    prefetch_bucket(log, e.hash)
                n += 1
        enter(log, batch, n, number)
        records += n
        if records & 0xffff < BATCH:
            PyErr_CheckSignals()
    return SCAN_REASONS[reason], s.offset, s.version, records


cdef inline void prefetch_bucket(Log log, uint64_t h) noexcept nogil:
    cdef uint64_t word, entry
    cdef Trouble t
    cdef Index *ix = current_index(log)
    if find_entry(ix, h, &word, &entry, &t) == FOUND:
        prefetch(bucket_at(ix.base + ENTRY_PAGE(entry) * PAGE_BYTES, home_bucket(h, ENTRY_CLASS(entry))))


def adopt_last(Log log, uint64_t chunk) -> None:
    """Completes an operation whose slot is set but whose state block was not made current by a kill."""
    log.check_open()
    cdef index_state *now = &log.index.page.state[log.seq & 1]
    cdef index_state *other = &log.index.page.state[(log.seq + 1) & 1]
    cdef Scan s
    cdef record_view r
    cdef Probe p
    cdef Trouble t
    cdef uint64_t location, h
    cdef int status
    begin_scan(log, &s, chunk, now.end, <uint64_t> -1, now.version)
    location = s.origin + (s.offset >> LOCATION_UNIT_SHIFT)
    if next_record(&s, &r) != RECORD_OK or (r.kind != KIND_PUT and r.kind != KIND_DELETE):
        return
    if other.seq != log.seq + 1 or other.number != now.number or other.end != s.offset or other.version != s.version:
        return
    h = siphash13(log.seed, r.key, r.key_length)
    t.doubted = 0
    while True:
        status = probe(log, r.key, r.key_length, h, 0, &p, False, &t)
        if status >= 0:
            break
        settle(log, status, &t)
    if (status == FOUND and p.location == location) if r.kind == KIND_PUT else status == MISSING:
        log.check_change()
        atomic_store(&log.index.page.seq, log.seq + 1)
        log.load_state()


def replay_footer(Log log, uint64_t number, uint64_t chunk, uint64_t end) -> tuple | None:
    """Puts a sealed segment's entries into the index from its footer, without reading values.

    Returns (records, first version, last version), or None if the footer is not right.
    """
    cdef Mapped *segment = log.chunks[chunk]
    cdef footer_header *header = footer_of(segment, end)
    cdef footer_entry *entries
    cdef Entry batch[BATCH]
    cdef Entry *e
    cdef uint64_t i
    cdef int n = 0
    if header == NULL:
        return None
    entries = <footer_entry *> (header + 1)
    for i in range(header.entries):
        e = &batch[n]
        e.hash = entries[i].hash
        e.location = segment.origin + entries[i].unit
        e.size = entry_size(&entries[i])
        e.kind = <uint8_t> entry_kind(&entries[i])
        e.end = end
        e.version = header.last_version
        prefetch_bucket(log, e.hash)
        n += 1
        if n == BATCH:
            enter(log, batch, n, number)
            n = 0
            if i & 0xffff < BATCH:
                PyErr_CheckSignals()
    enter(log, batch, n, number)
    commit(log, number, end, header.last_version, NULL, 0, 0, segment.row.live, 0)
    return header.records, header.first_version, header.last_version


def copy_records(Log log, uint64_t chunk, uint64_t start, uint64_t stop, uint32_t salt, uint64_t offset) -> bytes:
    """The puts and deletes from `start` to `stop`, written for `offset` of another segment; their versions stay."""
    cdef Scan s
    cdef record_view r
    cdef bytearray out = bytearray()
    cdef int reason
    begin_scan(log, &s, chunk, start, stop, 0)
    while True:
        reason = next_record(&s, &r)
        if reason != RECORD_OK:
            break
        if r.kind == KIND_PUT or r.kind == KIND_DELETE:
            out += encode_record(r.kind, r.version, (<char *> r.key)[:r.key_length], (<char *> r.value)[:r.value_length],
                                 salt, offset + len(out))
    if reason == SCAN_IO_ERROR:
        raise_unreadable(log, chunk, s.offset)
    return bytes(out)


def read_link(Log log, uint64_t chunk) -> tuple | None:
    """What a segment's first record, *continues*, says: (predecessor, its end, its last version); None without one."""
    cdef Scan s
    cdef record_view r
    cdef continues_value *link
    cdef int reason
    begin_scan(log, &s, chunk, SEGMENT_HEADER_BYTES, <uint64_t> -1, 0)
    reason = next_record(&s, &r)
    if reason == SCAN_IO_ERROR:
        raise_unreadable(log, chunk, SEGMENT_HEADER_BYTES)
    if reason != RECORD_OK or r.kind != KIND_CONTINUES or r.key_length or \
            r.value_length != sizeof(continues_value):
        return None
    link = <continues_value *> r.value
    return link.number, link.end, link.version


def survey(Log log, uint64_t chunk, uint64_t start, uint64_t stop, uint64_t version, bint merged=False) -> tuple:
    """Reads records without doing anything, as `replay` would: (reason, offset, last version, records)."""
    cdef Scan s
    cdef record_view r
    cdef uint64_t records = 0
    cdef int reason
    begin_scan(log, &s, chunk, start, stop, version)
    s.sorted = merged
    with nogil:
        while True:
            reason = next_record(&s, &r)
            if reason != RECORD_OK:
                break
            records += 1
    return SCAN_REASONS[reason], s.offset, s.version, records


def count_writes(Log log, uint64_t chunk, uint64_t start, uint64_t stop) -> tuple:
    """(puts and deletes, their aligned bytes) among the records from `start` to `stop`, as far as these are whole."""
    cdef Scan s
    cdef record_view r
    cdef uint64_t writes = 0, size = 0
    begin_scan(log, &s, chunk, start, stop, 0)
    with nogil:
        while next_record(&s, &r) == RECORD_OK:
            if r.kind == KIND_PUT or r.kind == KIND_DELETE:
                writes += 1
                size += r.size
    return writes, size

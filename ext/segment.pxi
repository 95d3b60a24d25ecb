# Appending to the active segment, through its mapping: no system call, visible to every process at once.

cdef enum:
    POPULATE_STEP = 1 << 20
    ZEROS_STEP = 256 << 10

cdef char ZEROS[ZEROS_STEP]

def set_active(Log log, int fd, uint64_t number, uint64_t chunk, uint64_t capacity, uint64_t allocated,
               uint64_t end) -> None:
    """The segment that is appended to, mapped before, and where its log ends."""
    log.check_writer()
    write_lock(&log.mutex)
    append_to(log, fd, number, chunk, capacity, allocated, end)
    write_unlock(&log.mutex)


cdef void append_to(Log log, int fd, uint64_t number, uint64_t chunk, uint64_t capacity, uint64_t allocated,
                    uint64_t end) noexcept nogil:
    cdef Mapped *m = log.chunks[chunk]
    log.active = Active(m.base, fd, number, capacity, m.origin, allocated, end, end, m.salt)


def set_allocated(Log log, uint64_t chunk, uint64_t allocated) -> None:
    """The active segment's file has grown."""
    log.check_writer()
    write_lock(&log.mutex)
    if log.active.origin == log.chunks[chunk].origin:       # else another thread has gone on to the next one
        log.active.allocated = max(log.active.allocated, allocated)
    write_unlock(&log.mutex)


cdef inline uint64_t next_version(Log log) noexcept nogil:
    cdef uint64_t now = clock_ns()
    return now if now > log.version else log.version + 1


cdef int populate_ahead(Log log, uint64_t need) noexcept nogil:
    """Makes the next pages present; an errno if that cannot be.

    With `sync="os"` zeros are written first: the system then takes large folios, a third of the cost of single
    pages; but a sync writes a whole folio for one byte, so not where every write or every few are synced.
    """
    cdef Active *a = &log.active
    cdef uint64_t step = min(max(need, POPULATE_STEP), a.allocated - a.end), done = 0
    cdef int problem = 0
    if step <= POPULATE_STEP and not log.eager and not log.patience:
        while done < step:              # where it fails, populating says why
            pwrite(a.fd, ZEROS, min(step - done, ZEROS_STEP), a.end + done)
            done += ZEROS_STEP
    problem = populate(a.base + a.end, step, True)
    if not problem:
        a.populated = a.end + step
    return problem


cdef int check_writable(Log log) except -1:
    """Waits until writes are taken; raises if they will not be."""
    while log.refusing:
        poisoned = log.poisoned
        if poisoned is not None:
            raise Error(poisoned)
        if log.closing or log.closed:
            raise ClosedError("the store is closed")
        if not log.writable:
            raise ReadOnlyError("the store is open for reading only")
        log.asked()._await_turn()
    return 0


cdef inline int find_room(Log log, uint64_t need, Trouble *t) noexcept nogil:
    """FOUND if a write is taken and its record fits behind the log's end."""
    return REFUSED if log.refusing else find_pages(log, need, t)


cdef inline int find_pages(Log log, uint64_t need, Trouble *t) noexcept nogil:
    """FOUND if a record fits behind the log's end, and its pages are there; TIGHT if they must be made writable."""
    if log.active.end + need > log.active.allocated:
        t.place = need
        return NEED_LOG_ROOM
    if log.copies and little_is_left(log):
        return TIGHT
    if log.active.end + need > log.active.populated:
        t.status = populate_ahead(log, need)
        if t.status:
            return CANNOT_WRITE
    return FOUND


cdef inline uint64_t write_record(Log log, uint8_t kind, Bytes key, Bytes value, uint64_t need) noexcept nogil:
    """Writes a record behind the log's end and returns its version.  It counts when the end has moved."""
    cdef Active *a = &log.active
    cdef uint64_t version = next_version(log)
    atomic_store(&log.control.reserved_end, a.end + need)
    release_fence()             # not a byte of the record before it
    record_pack(a.base + a.end, a.salt, a.end, kind, version, key.data, <uint32_t> key.size,
                value.data, <uint32_t> value.size)
    return version


cdef inline uint64_t move_end(Log log, uint64_t need) noexcept nogil:
    """The record behind the log's end is part of it now: returns its location.  A `commit` publishes it."""
    cdef uint64_t location = log.active.origin + (log.active.end >> LOCATION_UNIT_SHIFT)
    log.active.end += need
    return location


cdef uint64_t put(Log log, Bytes key, Bytes value) except 0:
    """Appends a put and publishes it."""
    cdef uint64_t need, version, h
    cdef Trouble t
    cdef int status
    prefetch(value.data + 64)           # a value that is not in the cache arrives while the key is hashed
    prefetch(value.data + value.size)
    if key.size > KEY_MAX:
        raise ValueError(f"a key has at most {KEY_MAX:,} bytes, this one has {key.size:,}")
    if value.size > VALUE_MAX:
        raise ValueError(f"a value has at most {VALUE_MAX:,} bytes, this one has {value.size:,}")
    need = record_size(key.size, value.size)
    h = siphash13(log.seed, key.data, key.size)
    t.doubted = 0
    while True:
        write_lock(&log.mutex)
        status = put_now(log, key, value, h, need, &version, &t)
        write_unlock(&log.mutex)
        if status >= 0:
            break
        settle(log, status, &t)
    if log.eager or log.patience:
        after_write(log, version)
    return version


cdef inline int put_now(Log log, Bytes key, Bytes value, uint64_t h, uint64_t need, uint64_t *version,
                        Trouble *t) noexcept nogil:
    """With the mutex held.  Where it fails, the record that was begun is zeros again."""
    cdef uint64_t location
    cdef Probe p
    cdef int status
    while True:
        status = find_room(log, need, t)
        if status != FOUND:
            return put_tightly(log, key, value, h, need, version, t) if status == TIGHT else status
        prefetch_bucket(log, h)         # its line arrives while the record is written
        version[0] = write_record(log, KIND_PUT, key, value, need)
        status = probe(log, key.data, key.size, h, 0, &p, True, t)
        if status == MISSING and shard_is_full(&p):
            status = grow_shard(log, h, t)
            if status >= 0:
                continue
        if status >= 0:
            break
        memset(log.active.base + log.active.end, 0, need)
        return status
    location = move_end(log, need)
    apply_put(log, &p, status, h, location, need, log.active.number, log.active.end, version[0])
    return FOUND


cdef int put_tightly(Log log, Bytes key, Bytes value, uint64_t h, uint64_t need, uint64_t *version,
                     Trouble *t) noexcept nogil:
    """The same in another order: nothing is stored before all of it can be."""
    cdef uint64_t location
    cdef Probe p
    cdef int status
    while True:
        status = probe(log, key.data, key.size, h, 0, &p, True, t)
        if status != MISSING or not shard_is_full(&p):
            break
        status = grow_shard(log, h, t)
        if status < 0:
            return status
    if status < 0:
        return status
    if make_change_writable(log, &p, need, t) < 0:
        return CANNOT_WRITE
    version[0] = write_record(log, KIND_PUT, key, value, need)
    location = move_end(log, need)
    apply_put(log, &p, status, h, location, need, log.active.number, log.active.end, version[0])
    return FOUND


cdef inline void apply_put(Log log, Probe *p, int found, uint64_t h, uint64_t location, uint64_t size,
                           uint64_t number, uint64_t end, uint64_t version) noexcept nogil:
    """Points the index at a put's record, in place of the one that `probe` found, if any."""
    cdef segment_row *row = log.chunks[location >> CHUNK_UNIT_SHIFT].row
    cdef segment_row *other = row
    cdef uint64_t previous = 0, live = live_more(row.live, size), previous_live = 0
    if found:
        previous = p.slot[0]
        other = log.chunks[p.location >> CHUNK_UNIT_SHIFT].row
        if other == row:
            live = previous_live = live_less(live, p.record.size)
        else:
            previous_live = live_less(other.live, p.record.size)
        touch_shard(log, p.shard)
    else:
        log.keys += 1
        claim_slot(log, p)
    commit(log, number, end, version, p.slot, (h >> TAG_SHIFT << TAG_SHIFT) | location, previous, live, previous_live)
    release_fence()             # a change that is not published is made again, and counted then
    relaxed_store(&row.live, live)
    if other != row:
        relaxed_store(&other.live, previous_live)


cdef inline void apply_delete(Log log, Probe *p, uint64_t location, uint64_t number, uint64_t end,
                              uint64_t version) noexcept nogil:
    """Takes the entry that `probe` found out of the index, because of the tombstone at `location`."""
    cdef segment_row *row = log.chunks[location >> CHUNK_UNIT_SHIFT].row
    cdef segment_row *other = log.chunks[p.location >> CHUNK_UNIT_SHIFT].row
    cdef uint64_t value = removed_value(p), previous_live = live_less(other.live, p.record.size)
    log.keys -= 1
    touch_shard(log, p.shard)
    commit(log, number, end, version, p.slot, value, p.slot[0], previous_live if other == row else row.live, previous_live)
    release_fence()
    relaxed_store(&other.live, previous_live)
    if value == SLOT_EMPTY:
        relaxed_store(&(<shard_header *> p.shard).used, (<shard_header *> p.shard).used - 1)


cdef uint64_t delete(Log log, Bytes key, uint64_t seen) except? 0:
    """Appends a tombstone; 0 if the key is not there.  `seen`, if it is not 0, is the location where its record must
    still be: CHANGED_VERSION if it is not."""
    cdef uint64_t need = record_size(key.size, 0), h, version
    cdef Trouble t
    cdef int status
    check_writable(log)
    if key.size > KEY_MAX:
        return 0
    h = siphash13(log.seed, key.data, key.size)
    t.doubted = 0
    while True:
        write_lock(&log.mutex)
        status = delete_now(log, key, h, need, seen, &version, &t)
        write_unlock(&log.mutex)
        if status == MISSING:
            return 0
        if status == CHANGED:
            return CHANGED_VERSION
        if status == FOUND:
            break
        settle(log, status, &t)
    if log.eager or log.patience:
        after_write(log, version)
    return version


cdef uint64_t CHANGED_VERSION = 1       # no version is so low


cdef inline int delete_now(Log log, Bytes key, uint64_t h, uint64_t need, uint64_t seen, uint64_t *version,
                           Trouble *t) noexcept nogil:
    """With the mutex held."""
    cdef Bytes nothing = Bytes(NOTHING, 0)
    cdef uint64_t location
    cdef Probe p
    cdef int status
    if log.refusing:
        return REFUSED
    status = probe(log, key.data, key.size, h, 0, &p, True, t)
    if status == FOUND and seen and p.location != seen:
        return CHANGED
    if status == FOUND:
        status = find_room(log, need, t)
    if status == TIGHT:
        status = make_change_writable(log, &p, need, t)
    if status != FOUND:
        return status
    version[0] = write_record(log, KIND_DELETE, key, nothing, need)
    location = move_end(log, need)
    apply_delete(log, &p, location, log.active.number, log.active.end, version[0])
    return FOUND


cdef int after_write(Log log, uint64_t version) except -1:
    """With `sync="always"`, and where a flush is due, the write waits for the device."""
    if log.eager:
        log.asked()._sync_to(version)
        return 0
    write_lock(&log.mutex)
    cdef uint64_t since = log.unsynced_since
    if since == 0:
        log.unsynced_since = version
    write_unlock(&log.mutex)
    if since == 0:
        log.asked()._flush_later()
    elif version > since and version - since > log.patience:
        log.asked()._sync_to(version)
    return 0


def append_mark(Log log, uint64_t number, uint64_t end, uint64_t covered) -> int:
    """Appends a sync mark, if it fits: a sync has returned that covered the log up to there, and all versions up to
    `covered`.  Returns up to which version nothing needs a sync: with the mark's, if nothing came before it."""
    log.check_writer()
    write_lock(&log.mutex)
    cdef uint64_t synced = mark_now(log, number, end, covered)
    write_unlock(&log.mutex)
    return synced


cdef uint64_t mark_now(Log log, uint64_t number, uint64_t end, uint64_t covered) noexcept nogil:
    """With the mutex held; also where writes are refused, for the last sync of a store that is closing."""
    cdef sync_mark_value mark = sync_mark_value(number, end)
    cdef Bytes key = Bytes(NOTHING, 0), value = Bytes(<uint8_t *> &mark, sizeof(mark))
    cdef bint quiet = log.version <= covered
    cdef uint64_t version
    cdef Trouble t
    cdef Probe none
    cdef int status = find_pages(log, MARK_BYTES, &t)
    none.slot = NULL
    if status == TIGHT:
        status = make_change_writable(log, &none, MARK_BYTES, &t)
    if status != FOUND:
        return covered
    version = write_record(log, KIND_SYNC_MARK, key, value, MARK_BYTES)
    move_end(log, MARK_BYTES)
    commit(log, log.active.number, log.active.end, version, NULL, 0, 0, log.active_live(), 0)
    return version if quiet else covered


def switch_segment(Log log, int fd, uint64_t number, uint64_t chunk, uint64_t capacity, uint64_t allocated) -> None:
    """Goes on in the successor, mapped and named in the MANIFEST: its first record says where the last one ended."""
    cdef Trouble t
    log.check_writer()
    if make_writable(log, [Stretch(log.chunks[chunk].base, PAGE_BYTES)], 1, &t) < 0:
        raise_unwritable(t.status)
    add_row(log, chunk)
    write_lock(&log.mutex)
    switch_now(log, fd, number, chunk, capacity, allocated)
    write_unlock(&log.mutex)


cdef void switch_now(Log log, int fd, uint64_t number, uint64_t chunk, uint64_t capacity, uint64_t allocated) noexcept nogil:
    cdef continues_value link = continues_value(log.active.number, log.active.end, log.version)
    cdef Active *a = &log.active
    append_to(log, fd, number, chunk, capacity, allocated, SEGMENT_HEADER_BYTES)
    a.populated = PAGE_BYTES
    atomic_store(&log.control.reserved_end, a.end + LINK_BYTES)
    release_fence()
    record_pack(a.base + a.end, a.salt, a.end, KIND_CONTINUES, log.version, NOTHING, 0, &link, sizeof(link))
    a.end += LINK_BYTES
    commit(log, number, a.end, log.version, NULL, 0, 0, log.active_live(), 0)


cdef uint64_t MARK_BYTES = MARK_SIZE, LINK_BYTES = CONTINUES_SIZE

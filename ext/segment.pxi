# Appending to the active segment, through its mapping: no system call, visible to every process at once.

cdef enum:
    POPULATE_STEP = 1 << 20
    ZEROS_STEP = 256 << 10

cdef char ZEROS[ZEROS_STEP]

def set_active(Log log, int fd, uint64_t number, uint64_t chunk, uint64_t capacity, uint64_t allocated,
               uint64_t end) -> None:
    """The segment that is appended to, mapped before, and where its log ends."""
    log.check_writer()
    cdef Chunk *entry = &log.chunks[chunk]
    log.active.base = entry.base
    log.active.fd = fd
    log.active.number = number
    log.active.capacity = capacity
    log.active.origin = entry.origin
    log.active.allocated = allocated
    log.active.populated = end
    log.active.end = end
    log.active.salt = entry.salt


def set_allocated(Log log, uint64_t chunk, uint64_t allocated) -> None:
    """The active segment's file has grown."""
    log.check_writer()
    log.active.base = log.chunks[chunk].base
    log.active.allocated = allocated


cdef inline uint64_t next_version(Log log) noexcept nogil:
    cdef uint64_t now = clock_ns()
    return now if now > log.version else log.version + 1


cdef int populate_ahead(Log log, uint64_t need) except -1:
    """Makes the next pages present.

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
    if problem:
        raise Error(problem, f"cannot write to segment {a.number}: {os.strerror(problem)}")
    a.populated = a.end + step
    return 0


cdef inline int check_writable(Log log) except -1:
    while log.refusing:
        if log.poisoned is not None:
            raise Error(log.poisoned)
        if log.closing or log.closed:
            raise ClosedError("the store is closed")
        if not log.writable:
            raise ReadOnlyError("the store is open for reading only")
        log.owner._await_turn()
    return 0


cdef inline bint has_room(Log log, uint64_t need) except -1:
    """Whether a record fits behind the log's end; if not, room was made and everything must be looked at again."""
    if log.active.end + need > log.active.allocated:
        log.owner._make_room(need)
        return False
    if log.active.end + need > log.active.populated:
        populate_ahead(log, need)
    return True


cdef inline uint64_t write_record(Log log, uint8_t kind, Bytes key, Bytes value, uint64_t need) noexcept nogil:
    """Writes a record behind the log's end and returns its version.  It counts when the end has moved."""
    cdef Active *a = &log.active
    cdef uint64_t version = next_version(log)
    atomic_store(&log.control.reserved_end, a.end + need)
    record_pack(a.base + a.end, a.salt, a.end, kind, version, key.data, <uint32_t> key.size,
                value.data, <uint32_t> value.size)
    return version


cdef inline uint64_t move_end(Log log, uint64_t need) noexcept nogil:
    """The record behind the log's end is part of it now: returns its location.  A `commit` publishes it."""
    cdef uint64_t location = log.active.origin + (log.active.end >> LOCATION_UNIT_SHIFT)
    log.active.end += need
    log.log_bytes += need
    return location


cdef uint64_t put(Log log, Bytes key, Bytes value) except 0:
    """Appends a put and publishes it.  Where it fails, the record that was begun is zeros again."""
    cdef uint64_t need, location, version, h
    cdef Probe p
    cdef int status
    prefetch(value.data + 64)           # a value that is not in the cache arrives while the key is hashed
    prefetch(value.data + value.size)
    if key.size > KEY_MAX:
        raise ValueError(f"a key has at most {KEY_MAX:,} bytes, this one has {key.size:,}")
    if value.size > VALUE_MAX:
        raise ValueError(f"a value has at most {VALUE_MAX:,} bytes, this one has {value.size:,}")
    need = record_size(key.size, value.size)
    h = siphash13(log.seed, key.data, key.size)
    while True:
        check_writable(log)
        if not has_room(log, need):
            continue
        prefetch_bucket(log, h)         # its line arrives while the record is written
        version = write_record(log, KIND_PUT, key, value, need)
        status = probe(log, key.data, key.size, h, 0, &p, True)
        if status == MISSING and shard_is_full(&p):
            status = grow_shard(log, h)
            if status >= 0:
                continue
        if status >= 0:
            break
        memset(log.active.base + log.active.end, 0, need)
        settle(log, status)
    location = move_end(log, need)
    apply_put(log, &p, status, h, location, need, log.active.number, log.active.end, version)
    if log.eager or log.patience:
        after_write(log, version)
    return version


cdef inline void apply_put(Log log, Probe *p, int found, uint64_t h, uint64_t location, uint64_t size,
                           uint64_t number, uint64_t end, uint64_t version) noexcept nogil:
    """Points the index at a put's record, in place of the one that `probe` found, if any."""
    cdef uint64_t previous = 0
    log.live_bytes += size
    if found:
        previous = p.slot[0]
        log.live_bytes -= p.record.size
        touch_shard(log, p.shard)
    else:
        log.keys += 1
        claim_slot(log, p)
    commit(log, number, end, version, p.slot, (h >> TAG_SHIFT << TAG_SHIFT) | location, previous)


cdef inline void apply_delete(Log log, Probe *p, uint64_t number, uint64_t end, uint64_t version) noexcept nogil:
    """Takes the entry that `probe` found out of the index."""
    cdef uint64_t value = removed_value(p)
    log.keys -= 1
    log.live_bytes -= p.record.size
    touch_shard(log, p.shard)
    commit(log, number, end, version, p.slot, value, p.slot[0])
    if value == SLOT_EMPTY:
        (<shard_header *> p.shard).used -= 1


cdef uint64_t delete(Log log, Bytes key, object popped) except? 0:
    """Appends a tombstone; 0 if the key is not there.  `popped`, a list, receives the value that goes."""
    cdef uint64_t need = record_size(key.size, 0), h, version
    cdef Bytes nothing = Bytes(NULL, 0)
    cdef Probe p
    cdef int status
    cdef object value = None
    check_writable(log)
    if key.size > KEY_MAX:
        return 0
    h = siphash13(log.seed, key.data, key.size)
    while True:
        check_writable(log)
        status = probe(log, key.data, key.size, h, 0, &p, True)
        if status < 0:
            settle(log, status)
            continue
        if status == MISSING:
            return 0
        if not has_room(log, need):
            continue
        if popped is None:
            break
        value = record_value(log, &p.record, p.location)
        break
    version = write_record(log, KIND_DELETE, key, nothing, need)
    move_end(log, need)
    apply_delete(log, &p, log.active.number, log.active.end, version)
    if popped is not None:
        popped.append(value)
    if log.eager or log.patience:
        after_write(log, version)
    return version


cdef int after_write(Log log, uint64_t version) except -1:
    """With `sync="always"`, and where a flush is due, the write waits for the device."""
    if log.eager:
        log.owner._sync_to(version)
    elif log.unsynced_since == 0:
        log.unsynced_since = version
        log.owner._flush_later()
    elif version - log.unsynced_since > log.patience:
        log.owner._sync_to(version)
    return 0


def append_mark(Log log, uint64_t number, uint64_t end, uint64_t covered) -> int:
    """Appends a sync mark, if it fits: a sync has returned that covered the log up to there, and all versions up to
    `covered`.  Returns up to which version nothing needs a sync: with the mark's, if nothing came before it."""
    cdef sync_mark_value mark = sync_mark_value(number, end)
    cdef Bytes key = Bytes(NULL, 0), value = Bytes(<uint8_t *> &mark, sizeof(mark))
    cdef uint64_t version, need = MARK_SIZE
    cdef bint quiet = log.version <= covered
    log.check_writer()
    if log.active.end + need > log.active.allocated:
        return covered
    if log.active.end + need > log.active.populated:
        populate_ahead(log, need)
    version = write_record(log, KIND_SYNC_MARK, key, value, need)
    move_end(log, need)
    commit(log, log.active.number, log.active.end, version, NULL, 0, 0)
    return version if quiet else covered


def switch_segment(Log log, int fd, uint64_t number, uint64_t chunk, uint64_t capacity, uint64_t allocated) -> None:
    """Goes on in the successor, mapped and named in the MANIFEST: its first record says where the last one ended."""
    cdef continues_value link = continues_value(log.active.number, log.active.end, log.version)
    cdef Active *a = &log.active
    cdef int problem
    log.check_writer()
    problem = populate(log.chunks[chunk].base, PAGE_BYTES, True)
    if problem:
        raise Error(problem, f"cannot write to segment {number}: {os.strerror(problem)}")
    set_active(log, fd, number, chunk, capacity, allocated, SEGMENT_HEADER_BYTES)
    a.populated = PAGE_BYTES
    atomic_store(&log.control.reserved_end, a.end + CONTINUES_SIZE)
    record_pack(a.base + a.end, a.salt, a.end, KIND_CONTINUES, log.version, NULL, 0, &link, sizeof(link))
    a.end += CONTINUES_SIZE
    log.log_bytes += CONTINUES_SIZE
    commit(log, number, a.end, log.version, NULL, 0, 0)

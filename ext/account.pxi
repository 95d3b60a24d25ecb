# What of each segment is alive: a row each in the index, right again after a kill between any two stores.
#
# A put or delete changes two rows at most.  What they are afterwards is in the state block that it publishes, so
# whoever takes over from a dead writer stores them again.  A segment's footer says what else there was.

cdef void find_rows(Index *ix) noexcept nogil:
    cdef uint64_t word = ix.page.rows
    ix.rows = <segment_row *> (ix.base + ROWS_PAGE(word) * PAGE_BYTES)
    ix.row_count = ROWS_PAGES(word) * ROWS_A_PAGE


cdef segment_row *row_of(Log log, uint64_t chunk) noexcept nogil:
    """The row of the segment that begins at a chunk; `nowhere` if there is none."""
    cdef uint64_t i
    if log.index != NULL and (log.writable or log.building):
        for i in range(log.index.row_count):
            if log.index.rows[i].chunk == chunk + 1:
                return &log.index.rows[i]
    return &log.nowhere


cdef void assign_rows(Log log) noexcept nogil:
    """With the mutex held: the rows are in another place now."""
    cdef Mapped *m = log.mapped_segments
    while m != NULL:
        m.row = row_of(log, m.origin >> CHUNK_UNIT_SHIFT)
        m = m.next


def add_row(Log log, uint64_t chunk) -> None:
    """A row for a segment, before the index points to it."""
    cdef Trouble t
    cdef int status
    while True:
        write_lock(&log.mutex)
        status = make_writable(log, NULL, 0, &t)
        if status == FOUND:
            status = add_row_now(log, chunk, &t)
        write_unlock(&log.mutex)
        if status >= 0:
            break
        settle(log, status, &t)


cdef int add_row_now(Log log, uint64_t chunk, Trouble *t) noexcept nogil:
    cdef Index *ix = log.index
    cdef segment_row *free_row = NULL
    cdef uint64_t i
    cdef int status
    for i in range(ix.row_count):
        if ix.rows[i].chunk == chunk + 1:
            return FOUND
        if ix.rows[i].chunk == 0 and free_row == NULL:
            free_row = &ix.rows[i]
    if free_row == NULL:
        status = grow_rows(log, t)
        return status if status < 0 else add_row_now(log, chunk, t)
    free_row.live = 0
    atomic_store(&free_row.chunk, chunk + 1)
    assign_rows(log)
    return FOUND


cdef int grow_rows(Log log, Trouble *t) noexcept nogil:
    """Twice as many rows in another place; one store makes them current."""
    cdef Index *ix = log.index
    cdef Extent *extents = NULL
    cdef uint64_t count = 0, pages = ROWS_PAGES(ix.page.rows), page
    cdef uint8_t *target
    cdef int status = used_extents(ix, &extents, &count, 1)
    if status < 0:
        return status
    page = claim_pages(extents, &count, 2 * pages)
    free(extents)
    t.place = page + 2 * pages
    if t.place > ix.pages:
        return NEED_PAGES
    target = ix.base + page * PAGE_BYTES
    if make_writable(log, [Stretch(target, 2 * pages * PAGE_BYTES)], 1, t) < 0:
        return CANNOT_WRITE
    memcpy(target, ix.rows, pages * PAGE_BYTES)
    memset(target + pages * PAGE_BYTES, 0, pages * PAGE_BYTES)
    atomic_store(&ix.page.rows, ROWS_WORD(page, 2 * pages))
    find_rows(ix)
    assign_rows(log)
    return FOUND


def drop_row(Log log, uint64_t chunk) -> None:
    """The segment is gone.  On a full disk its row may stay until the store is opened again."""
    cdef uint64_t i
    write_lock(&log.mutex)
    if not log.full_disk():
        for i in range(log.index.row_count):
            if log.index.rows[i].chunk == chunk + 1:
                atomic_store(&log.index.rows[i].chunk, 0)
        assign_rows(log)
    write_unlock(&log.mutex)


def restore_rows(Log log, list segments) -> None:
    """Makes the rows right after a kill: one for each of the segments [(number, chunk, chunks)], with what the last change
    was about to store into it."""
    cdef uint64_t i, chunk
    cdef index_state *s
    cdef set chunks = {chunk for _, chunk, _ in segments}
    log.check_writer()
    for i in range(log.index.row_count):
        chunk = log.index.rows[i].chunk
        if chunk and chunk - 1 not in chunks:
            log.index.rows[i].chunk = 0
    for chunk in chunks:
        add_row(log, chunk)
    finish_swing(log)
    for chunk, live in last_change(&log.index.page.state[log.seq & 1], segments):
        set_live(log, chunk, live)


cdef list last_change(index_state *s, list segments):
    """(chunk of a segment, its live word) after the last change, of one or two segments."""
    cdef uint64_t at = (s.previous & LOCATION_MASK) >> CHUNK_UNIT_SHIFT
    return [(chunk, s.previous_live) for _, chunk, run in segments if s.previous and chunk <= at < chunk + run] + \
        [(chunk, s.live) for number, chunk, _ in segments if number == s.number]


cdef void set_live(Log log, uint64_t chunk, uint64_t live) noexcept nogil:
    cdef uint64_t i
    for i in range(log.index.row_count):
        if log.index.rows[i].chunk == chunk + 1:
            log.index.rows[i].live = live


def live_shares(Log log, list segments) -> dict:
    """For the first chunk of each of the segments [(number, chunk, chunks)]: (records that the index points to, their
    aligned bytes)."""
    cdef segment_row *rows = NULL
    cdef Index *ix
    cdef index_state s
    cdef uint64_t count = 0, i
    cdef dict live
    cdef Trouble t
    cdef int status = CHANGED
    log.check_open()
    try:
        while status != FOUND:
            read_begin()
            ix = current_index(log)
            status = LOOK_CLOSER if atomic_load(&log.attention) else copy_rows(ix, &rows, &count, &t)
            if status == FOUND:
                read_state(ix, &s)
            read_end()
            if status == NEED_PAGES:
                free(rows)
                rows = <segment_row *> malloc(t.place * sizeof(segment_row))
                if rows == NULL:
                    raise MemoryError()
                count = t.place
            elif status < 0 and status != CHANGED:
                settle(log, status, &t)
        live = {rows[i].chunk - 1: rows[i].live for i in range(t.place) if rows[i].chunk}
        live.update(last_change(&s, segments))
        return {chunk: (live.get(chunk, 0) >> 32, (live.get(chunk, 0) & 0xffffffff) << 3) for _, chunk, _ in segments}
    finally:
        free(rows)


cdef int copy_rows(Index *ix, segment_row **rows, uint64_t *room, Trouble *t) noexcept nogil:
    cdef uint64_t word = atomic_load(&ix.page.rows), count = ROWS_PAGES(word) * ROWS_A_PAGE
    t.place, t.known = ROWS_PAGE(word) + ROWS_PAGES(word), atomic_load(&ix.pages)
    if t.place > t.known:
        return INDEX_GREW if atomic_load(&ix.page.rows) == word else CHANGED
    t.place = count
    if count > room[0]:
        return NEED_PAGES
    relaxed_copy(<uint64_t *> rows[0], <uint64_t *> (ix.base + ROWS_PAGE(word) * PAGE_BYTES),
                 count * sizeof(segment_row) // sizeof(uint64_t))
    acquire_fence()
    return FOUND if atomic_load(&ix.page.rows) == word else CHANGED

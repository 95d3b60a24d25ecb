# Where the file system copies on write, a page that was written back takes a new block at its next store, whatever was
# allocated; if the disk has none, the store is a SIGBUS.  So all pages that a change stores into are made writable before
# its first store; where there is no room an error says so.  They stay writable until they are written back.
#
# Puts and deletes do that only while little room is left.

cdef enum:
    LOOK_AGAIN_NS = 10_000_000
    PASSES = 8


cdef struct Stretch:        # of mapped memory
    uint8_t *start
    uint64_t length


cdef bint little_is_left(Log log) noexcept nogil:
    """Looked at now and then."""
    cdef uint64_t now = clock_ns()
    if now - log.looked > LOOK_AGAIN_NS:
        log.looked = now
        log.tight = free_bytes(log.volume) < log.little
    return log.tight


cdef int make_writable(Log log, Stretch *stretches, int n, Trouble *t) noexcept nogil:
    """FOUND if stores into these find room, and those that come with every change, else CANNOT_WRITE.

    A pass that had to do something is followed by another: what finds room for one page may write others back.
    """
    cdef uint64_t before
    cdef int turn
    for turn in range(PASSES):
        before = page_faults()
        t.status = touch(log, stretches, n)
        if t.status:
            return CANNOT_WRITE
        if not log.copies or page_faults() == before:
            return FOUND
    t.status = ENOSPC
    return CANNOT_WRITE


cdef int touch(Log log, Stretch *stretches, int n) noexcept nogil:
    """One pass; 0 or an errno."""
    cdef int i, problem = 0
    if log.copies:
        problem = populate(<uint8_t *> log.control, PAGE_BYTES, True)
        if not problem and log.index != NULL:
            problem = populate(log.index.base, PAGE_BYTES, True)
        if not problem and log.index != NULL and log.index.row_count:
            problem = populate(<uint8_t *> log.index.rows, log.index.row_count * sizeof(segment_row), True)
    for i in range(n):
        if not problem and stretches[i].length:
            problem = populate(stretches[i].start, stretches[i].length, True)
    return problem


cdef int make_change_writable(Log log, Probe *p, uint64_t need, Trouble *t) noexcept nogil:
    """Of a change that appends `need` bytes and stores into the slot that a probe has found, if any."""
    cdef Stretch stretches[4]
    stretches[0] = Stretch(log.active.base + log.active.end, need)
    if p.slot == NULL:
        return make_writable(log, stretches, 1, t)
    stretches[1] = Stretch(p.shard, SHARD_HEADER_BYTES)
    stretches[2] = Stretch(<uint8_t *> p.slot, sizeof(uint64_t))
    stretches[3] = Stretch(displaced_at(p.shard, p.cls, p.bucket), 1)
    return make_writable(log, stretches, 4, t)

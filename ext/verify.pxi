# Verification: everything is read, nothing is believed, nothing is changed.

def next_whole(Log log, uint64_t chunk, uint64_t start, uint64_t stop) -> int | None:
    """The offset of the first whole record from `start` on, at a multiple of 8; None if there is none."""
    cdef Scan s
    cdef record_view r
    cdef bint found = False
    begin_scan(log, &s, chunk, start, stop, 0)
    while s.offset + RECORD_HEADER_BYTES < s.stop:
        PyErr_CheckSignals()
        if not make_present(&s, s.offset + RECORD_HEADER_BYTES):
            return None
        with nogil:
            while s.offset + RECORD_HEADER_BYTES < s.populated:
                if (s.base + s.offset)[18] != 0 and s.offset + record_reach(s.base + s.offset) <= s.stop and \
                        record_unpack(&r, s.base + s.offset, s.stop - s.offset, s.salt, s.offset, False) == RECORD_OK:
                    found = True
                    break
                s.offset += 8
        if found:
            return s.offset
        if s.populated >= s.stop:
            break
    return None


def survey_index(Log log, bint searching) -> tuple:
    """(locations that entries lead to, sorted, 8 bytes each; those of entries that a search does not find).

    An entry whose record is damaged is listed and not searched for.  Without `searching` the second is empty.
    """
    cdef StoreIterator shards = StoreIterator(log, 0, None, None)
    cdef uint64_t clears = log.clears
    cdef uint64_t *found = NULL
    cdef uint64_t *grown
    cdef size_t n = 0, room = 0, i
    cdef record_view r
    cdef Probe p
    cdef Bytes key
    cdef list lost = []
    cdef int status
    try:
        while not shards.last:
            shards.copy_shard()
            if n + shards.count > room:
                room = 2 * room + shards.count
                grown = <uint64_t *> realloc(found, 2 * room * sizeof(uint64_t))
                if grown == NULL:
                    raise MemoryError("no memory for the locations of all entries")
                found = grown
            for i in range(shards.count):
                found[n] = shards.locations[i]
                n += 1
                if not searching:
                    continue
                if log.clears != clears:
                    raise ClosedError("the store was emptied")
                status = read_record(log, shards.locations[i], &r)
                if status == UNMAPPED:
                    settle(log, status)
                    status = read_record(log, shards.locations[i], &r)
                if status != FOUND:
                    continue
                copied = PyBytes_FromStringAndSize(<const char *> r.key, r.key_length)  # `find` may unmap the record
                key_bytes(copied, &key)
                if find(log, key, &p) != FOUND or p.location != shards.locations[i]:
                    lost.append(shards.locations[i])
            PyErr_CheckSignals()
        if n:
            sort_locations(found, found + room, n)
            room = n
            n = 1
            for i in range(1, room):        # one whose record is damaged stands in several places
                if found[i] != found[n - 1]:
                    found[n] = found[i]
                    n += 1
        return PyBytes_FromStringAndSize(<char *> found, n * sizeof(uint64_t)), lost
    finally:
        free(found)

# Verification: everything is read, nothing is believed, nothing is changed.

def survey_index(Log log, bint searching) -> tuple:
    """(locations that entries lead to, sorted, 8 bytes each; those of entries that a search does not find).

    An entry whose record is damaged is listed and not searched for.  Without `searching` the second is empty.
    """
    cdef StoreIterator shards = StoreIterator(log, 0, None, None)
    cdef uint64_t clears = log.clears
    cdef uint64_t *found = NULL
    cdef uint64_t *grown
    cdef size_t n = 0, room = 0, i
    cdef PyObject *key_object = NULL
    cdef Trouble t
    cdef Bytes key
    cdef uint64_t location
    cdef list lost = []
    cdef int status = FOUND
    t.doubted = 0
    try:
        while not shards.last:
            status = shards.copy_shard(log, status)
            if status != FOUND:
                continue
            if n + shards.count > room:
                room = 2 * room + shards.count
                grown = <uint64_t *> realloc(found, 2 * room * sizeof(uint64_t))
                if grown == NULL:
                    raise MemoryError("no memory for the locations of all entries")
                found = grown
            i = 0
            while i < shards.count:
                found[n] = shards.locations[i]
                if searching:
                    if log.clears != clears:
                        raise ClosedError("the store was emptied")
                    read_begin()
                    t.indexes = shards.indexes
                    status = key_at(log, found[n], &key_object, &t)
                    read_end()
                    if status == UNMAPPED or status == LOOK_CLOSER or status == NO_MEMORY:
                        settle(log, status, &t)
                        continue
                    if status == FOUND:
                        copied = owned(key_object)
                        key_bytes(copied, &key)
                        if find(log, key, &location) != FOUND or location != found[n]:
                            lost.append(found[n])
                n += 1
                i += 1
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


cdef int key_at(Log log, uint64_t location, PyObject **key, Trouble *t) noexcept:
    """The key of a record, as new bytes."""
    cdef record_view r
    cdef int status = LOOK_CLOSER if atomic_load(&log.attention) else read_record(log, location, &r, t)
    return copy_key(&r, key) if status == FOUND else status

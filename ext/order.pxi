# Key order: what makes every sealed segment a sorted table (SSTable).

cdef struct Sorted:
    uint64_t prefix         # eight bytes of the key, most significant first, behind those that all keys begin with
    uint32_t unit           # the record's offset / 8
    uint32_t size_kind


cdef inline uint64_t key_prefix(const uint8_t *key, size_t size) noexcept nogil:
    cdef uint64_t prefix = 0
    cdef size_t i
    for i in range(8):
        prefix = prefix << 8 | (key[i] if i < size else 0)
    return prefix


cdef inline int compare_keys(const uint8_t *base, bint exact, Sorted *a, Sorted *b) noexcept nogil:
    """Of two records whose keys were verified, by their keys as unsigned bytes.  exact: the prefixes say it all."""
    cdef Bytes x, y
    cdef int order
    if a.prefix != b.prefix:
        return -1 if a.prefix < b.prefix else 1
    if exact:
        return 0
    record_key(base + (<uint64_t> a.unit << LOCATION_UNIT_SHIFT), &x)
    record_key(base + (<uint64_t> b.unit << LOCATION_UNIT_SHIFT), &y)
    order = memcmp(x.data, y.data, min(x.size, y.size))
    return order if order else (x.size > y.size) - (x.size < y.size)


cdef inline void record_key(const uint8_t *p, Bytes *key) noexcept nogil:
    cdef record_view r
    record_peek(&r, p)
    key.data, key.size = r.key, r.key_length


cdef bint find_prefixes(const uint8_t *base, Sorted *items, size_t n) noexcept nogil:
    """Of each record in the order of the log.  Returns whether equal prefixes mean equal keys."""
    cdef Bytes first, key
    cdef size_t i, common = 0
    cdef bint equally_long = True
    for i in range(n):
        record_key(base + (<uint64_t> items[i].unit << LOCATION_UNIT_SHIFT), &key)
        if i == 0:
            first, common = key, key.size
        equally_long &= key.size == first.size
        common = min(common, key.size)
        while common and memcmp(first.data, key.data, common):
            common -= 1
    for i in range(n):
        record_key(base + (<uint64_t> items[i].unit << LOCATION_UNIT_SHIFT), &key)
        items[i].prefix = key_prefix(key.data + common, key.size - common)
    return equally_long and n > 0 and first.size <= common + sizeof(items[0].prefix)


cdef void merge_sort(const uint8_t *base, bint exact, Sorted *items, Sorted *spare, size_t n) noexcept nogil:
    """Stable, bottom-up, in runs that begin with eight by insertion; the result is in `items`."""
    cdef size_t run = 8, low = 0, middle, high, i, j, k
    cdef Sorted item
    cdef Sorted *source = items
    cdef Sorted *target = spare
    while low < n:
        for i in range(low + 1, min(low + run, n)):
            item = items[i]
            j = i
            while j > low and compare_keys(base, exact, &items[j - 1], &item) > 0:
                items[j] = items[j - 1]
                j -= 1
            items[j] = item
        low += run
    while run < n:
        low = 0
        while low < n:
            middle, high = min(low + run, n), min(low + 2 * run, n)
            i, j, k = low, middle, low
            while k < high:
                if i < middle and (j >= high or compare_keys(base, exact, &source[i], &source[j]) <= 0):
                    target[k] = source[i]
                    i += 1
                else:
                    target[k] = source[j]
                    j += 1
                k += 1
            low = high
        source, target = target, source
        run *= 2
    if source != items:
        memcpy(items, source, n * sizeof(Sorted))


def build_footer(Log log, uint64_t chunk, uint64_t end, tuple merged=None) -> tuple:
    """The footer of a segment whose records end at `end`: its newest record of each key, in key order.

    merged: first and last version of the segments that it was made of, which its footer gives in place of its own.

    Returns (the record as it stands at `end`, records in the segment, first version, last version, bytes of tombstones that
    it lists).

    O(n log n), with the GIL released.  Raises CorruptionError if a record before `end` is not whole.
    """
    cdef Scan s
    cdef record_view r
    cdef size_t n = 0, room = 1024, i, kept = 0
    cdef Trouble t
    cdef footer_header header
    cdef footer_entry *entry
    cdef uint64_t first, last
    cdef int reason = RECORD_OK
    cdef uint64_t offset
    cdef Sorted *items = <Sorted *> malloc(room * sizeof(Sorted))
    cdef Sorted *spare = NULL
    cdef uint64_t tombstones = 0
    cdef bint exact
    cdef bytes out
    memset(&header, 0, sizeof(header))
    begin_scan(log, &s, chunk, SEGMENT_HEADER_BYTES, end, 0)
    s.sorted = True
    try:
        with nogil:
            while items != NULL:
                offset = s.offset
                reason = next_record(&s, &r)
                if reason != RECORD_OK:
                    break
                header.first_version = min(header.first_version - 1, r.version - 1) + 1     # 0: none yet
                header.last_version = s.version
                header.records += 1
                if r.kind != KIND_PUT and r.kind != KIND_DELETE:
                    continue
                if n == room:
                    room *= 2
                    spare = <Sorted *> realloc(items, room * sizeof(Sorted))
                    if spare == NULL:
                        free(items)
                        items = NULL
                        break
                    items, spare = spare, NULL
                items[n].unit = <uint32_t> (offset >> LOCATION_UNIT_SHIFT)
                items[n].size_kind = <uint32_t> (r.size >> LOCATION_UNIT_SHIFT) | <uint32_t> r.kind << FOOTER_SIZE_BITS
                n += 1
            spare = <Sorted *> malloc((n + 1) * sizeof(Sorted))
            if items != NULL and spare != NULL and (reason == SCAN_STOP):
                exact = find_prefixes(s.base, items, n)
                merge_sort(s.base, exact, items, spare, n)
                for i in range(n):      # of equal keys the last in the log, and so in a stable order, is the newest
                    if i + 1 == n or compare_keys(s.base, exact, &items[i], &items[i + 1]) != 0:
                        items[kept] = items[i]
                        kept += 1
        if items == NULL or spare == NULL:
            raise MemoryError(f"no memory to sort the keys of a segment of {end} bytes")
        if reason != SCAN_STOP:
            t.place, t.status, t.expected, t.found = s.origin + (s.offset >> LOCATION_UNIT_SHIFT), reason, r.crc, r.found
            raise_damage(log, &t)
        header.entries = kept
        first, last = header.first_version, header.last_version
        if merged is not None:
            header.first_version, header.last_version = merged
        out = PyBytes_FromStringAndSize(NULL, sizeof(header) + kept * sizeof(footer_entry))
        memcpy(PyBytes_AS_STRING(out), &header, sizeof(header))
        entry = <footer_entry *> (PyBytes_AS_STRING(out) + sizeof(header))
        with nogil:
            for i in range(kept):
                if i + LOOK_AHEAD < kept:
                    prefetch(s.base + (<uint64_t> items[i + LOOK_AHEAD].unit << LOCATION_UNIT_SHIFT))
                record_peek(&r, s.base + (<uint64_t> items[i].unit << LOCATION_UNIT_SHIFT))
                entry[i].hash = siphash13(log.seed, r.key, r.key_length)
                entry[i].unit = items[i].unit
                entry[i].size_kind = items[i].size_kind
                if entry_kind(&entry[i]) == KIND_DELETE:
                    tombstones += entry_size(&entry[i])
        record = encode_record(KIND_FOOTER, header.last_version, b"", out, s.salt, end)
        return record, header.records, first, last, tombstones
    finally:
        free(items)
        free(spare)

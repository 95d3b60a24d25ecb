# Search: what stands behind an end of the log, or behind damage, at any multiple of 8.

cdef enum:
    WINDOW = 256 << 10          # bytes of which the checksums of all parts are known at a time
    CREDIT = 1 << 20            # bytes that may be checksummed one after the other, beyond those that were passed


@cython.final
cdef class Search:
    """The whole records of a stretch of a segment, whatever stands between them.

    Each place may say that a long record begins there.  So when more bytes were checksummed than passed, the checksums
    from one place on to each multiple of 8 are kept, and that of a record is made of two of them: its length costs
    nothing then.
    """
    cdef:
        Scan s                  # stands before the record that was found
        record_view r           # its header and key
        uint64_t start
        uint64_t spent          # bytes that were checksummed where no record was known to be
        uint32_t *sums          # checksums of what stands from `first` on
        uint64_t first, last

    def __cinit__(self, Log log, uint64_t chunk, uint64_t start, uint64_t stop):
        begin_scan(log, &self.s, chunk, start, stop, 0)
        self.start = start

    def __dealloc__(self):
        free(self.sums)

    cdef bint find(self) except -1:
        """Goes on to a record whose header and key are whole, if there is one.  Pages that the device cannot read are
        passed over."""
        cdef Scan *s = &self.s
        cdef bint found = False
        cdef uint64_t head
        while s.offset < s.data and s.offset + RECORD_HEADER_BYTES < s.stop and not found:
            PyErr_CheckSignals()
            head = s.offset + RECORD_HEADER_BYTES + 1
            if head > s.populated and not make_present(s, head):
                s.offset = s.populated = (s.offset // PAGE_BYTES + 1) * PAGE_BYTES
                continue
            with nogil:
                while s.offset + RECORD_HEADER_BYTES < s.populated:
                    found = may_be_record(s) and self.may_be_right() and record_unpack(
                        &self.r, s.base + s.offset, s.stop - s.offset, s.salt, s.offset, False) == RECORD_OK
                    if found:
                        break
                    s.offset += 8
        return found

    cdef bint may_be_right(self) noexcept nogil:
        """Whether the checksum is right, or it costs little to compute it."""
        cdef Scan *s = &self.s
        cdef const uint8_t *record = s.base + s.offset
        cdef uint64_t covered = record_covered(record), stop = s.offset + 4 + covered
        self.spent += covered
        if self.spent <= s.offset - self.start + CREDIT or \
                (s.offset < self.first or stop > self.last) and not self.move_window(stop):
            return True
        return (<uint32_t *> record)[0] == self.sum_to(stop) ^ \
            crc32c_shift(record_crc_begin(s.salt, s.offset) ^ self.sum_to(s.offset + 4), covered)

    cdef bint move_window(self, uint64_t stop) noexcept nogil:
        """It begins here, and reaches at least to `stop`."""
        cdef Scan *s = &self.s
        cdef uint64_t i
        if self.sums == NULL:
            self.sums = <uint32_t *> calloc(WINDOW // 8 + 1, sizeof(uint32_t))
            if self.sums == NULL:
                return False
        self.first, self.last = s.offset, max(stop, min(s.offset + WINDOW, s.populated))
        for i in range((self.last - self.first) // 8):
            self.sums[i + 1] = crc32c(self.sums[i], s.base + self.first + 8 * i, 8)
        return True

    cdef inline uint32_t sum_to(self, uint64_t offset) noexcept nogil:
        cdef uint64_t size = offset - self.first
        return crc32c(self.sums[size // 8], self.s.base + self.first + size // 8 * 8, size % 8)


cdef bint may_be_record(Scan *s) noexcept nogil:
    """By its kind, flags and lengths; what would be read of it without its value is present."""
    cdef const uint8_t *p = s.base + s.offset
    cdef uint64_t end
    if not 0 < p[18] <= KIND_FOOTER or p[19] & ~FLAGS_KNOWN or not record_flags_fit(p) or \
            record_reach(p) > s.stop - s.offset:
        return False
    end = s.offset + 4 + record_covered(p)
    return end <= s.populated or make_present(s, end)


def next_whole(Log log, uint64_t chunk, uint64_t start, uint64_t stop) -> int | None:
    """The offset of the first record from `start` on, at a multiple of 8, whose header and key are whole; None if there
    is none.  Pages that the device cannot read are passed over."""
    cdef Search search = Search(log, chunk, start, stop)
    return search.s.offset if search.find() else None


def find_record(Log log, uint64_t chunk, uint64_t start, uint64_t version) -> int | None:
    """Looks behind an end, at every multiple of 8, for whole records: the highest version of them, or None."""
    cdef Search search = Search(log, chunk, start, <uint64_t> -1)
    cdef Scan *s = &search.s
    cdef uint64_t highest = 0
    if s.offset < s.data and not make_present(s, s.data):
        raise_unreadable(log, chunk, start)
    while search.find():
        highest = max(highest, search.r.version)
        s.offset += search.r.size
    return highest if highest > version else None


def find_mark(Log log, uint64_t chunk, uint64_t start, uint64_t version) -> tuple | None:
    """Looks behind an invalid record, at every multiple of 8, for a sync mark of a higher version.

    Returns the (file number, end) that it names: a sync that returned covered the log up to there.
    """
    cdef Scan s
    cdef record_view r
    cdef sync_mark_value *mark
    cdef uint64_t number = 0, end = 0
    cdef bint found = False
    begin_scan(log, &s, chunk, start, <uint64_t> -1, version)
    if s.offset < s.data and not make_present(&s, s.data + MARK_BYTES):
        raise_unreadable(log, chunk, start)
    with nogil:
        while s.offset < s.data and s.offset + MARK_BYTES <= s.stop:
            if (s.base + s.offset)[18] == KIND_SYNC_MARK and \
                    record_unpack(&r, s.base + s.offset, MARK_BYTES, s.salt, s.offset, True) == RECORD_OK and \
                    r.key_length == 0 and r.value_length == sizeof(sync_mark_value) and r.version > version:
                mark = <sync_mark_value *> r.value
                if not found or mark.number > number or (mark.number == number and mark.end > end):
                    number, end, found = mark.number, mark.end, True
            s.offset += 8
    return (number, end) if found else None


def first_nonzero(Log log, uint64_t chunk, uint64_t start, uint64_t stop) -> tuple | None:
    """(first, behind the last) offset between `start` and `stop` that is not zero, or None."""
    cdef Mapped *segment = log.chunks[chunk]
    cdef uint64_t first, last
    stop = min(stop, records_end(segment), atomic_load(&segment.data)) if segment != NULL else 0
    first = start
    if start >= stop:
        return None
    if populate(segment.base + start, stop - start, False):
        raise_unreadable(log, chunk, start)
    with nogil:
        while first < stop and segment.base[first] == 0:
            if first & 7 == 0 and first + 8 <= stop and (<uint64_t *> (segment.base + first))[0] == 0:
                first += 8
            else:
                first += 1
        last = stop
        while last & 7 == 0 and last >= first + 8 and (<uint64_t *> (segment.base + last - 8))[0] == 0:
            last -= 8
        while last > first and segment.base[last - 1] == 0:
            last -= 1
    return (first, last) if first < last else None

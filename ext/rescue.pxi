# Rescue: what is intact of a damaged segment, in key order, and what is known of the records that are lost.
#
# A sealed segment's footer lists the hash of every key, so a lost record is known by that although its key cannot be read.

cdef struct Gone:               # a lost record of which at least the hash of its key is known
    uint64_t hash
    uint64_t position           # in the log: its segment's place there, then its offset / 8
    const uint8_t *record       # what is left of it,
    const uint8_t *stop         # and where its segment's file ends
    const uint8_t *older        # the newest intact record of the key before it; NULL: none
    uint8_t kind
    bint superseded             # a newer one is intact


cdef struct Piece:              # of a segment that is being written
    uint64_t prefix             # of its key
    uint64_t record             # its address; plus 1: a tombstone of its key


cdef int compare_hashes(const void *a, const void *b) noexcept nogil:
    cdef Gone *x = <Gone *> a
    cdef Gone *y = <Gone *> b
    if x.hash != y.hash:
        return -1 if x.hash < y.hash else 1
    return (x.position > y.position) - (x.position < y.position)


cdef int compare_positions(const void *a, const void *b) noexcept nogil:
    cdef Gone *x = <Gone *> a
    cdef Gone *y = <Gone *> b
    return (x.position > y.position) - (x.position < y.position)


cdef int compare_piece_keys(const Piece *x, const Piece *y) noexcept nogil:
    cdef record_view a, b
    cdef int order
    if x.prefix != y.prefix:
        return -1 if x.prefix < y.prefix else 1
    record_peek(&a, <const uint8_t *> (x.record & ~<uint64_t> 1))
    record_peek(&b, <const uint8_t *> (y.record & ~<uint64_t> 1))
    order = memcmp(a.key, b.key, min(a.key_length, b.key_length))
    return order if order else (a.key_length > b.key_length) - (a.key_length < b.key_length)


cdef int compare_pieces(const void *a, const void *b) noexcept nogil:
    """By key; of one key the tombstone comes last, else what stands last in the log."""
    cdef Piece *x = <Piece *> a
    cdef Piece *y = <Piece *> b
    cdef int order = compare_piece_keys(x, y)
    if order:
        return order
    if (x.record & 1) != (y.record & 1):
        return -1 if y.record & 1 else 1
    return (x.record > y.record) - (x.record < y.record)


cdef inline uint64_t position_of(uint64_t place, uint64_t offset) noexcept nogil:
    return place << 32 | offset >> LOCATION_UNIT_SHIFT


cdef bint read_lost_key(Log log, Gone *g, Bytes *key) noexcept nogil:
    """Its key, if its hash says that it is not damaged, or an intact record has it."""
    cdef record_view r
    if g.stop - g.record > RECORD_HEADER_BYTES and not populate(<uint8_t *> g.record, RECORD_HEADER_BYTES, False):
        record_peek(&r, g.record)
        if r.key + r.key_length <= g.stop and not populate(<uint8_t *> r.key, r.key_length, False) and \
                siphash13(log.seed, r.key, r.key_length) == g.hash:
            key.data, key.size = r.key, r.key_length
            return True
    if g.older != NULL:
        record_key(g.older, key)
    return g.older != NULL


@cython.final
cdef class Losses:
    """The lost records of a log that are known by the hashes of their keys: noted first, then compared with all that is
    intact, in the order of the log, then told.  48 bytes of memory each.

    `place`: of a segment in the log, from 0 on.
    """
    cdef:
        Log log
        Gone *gone
        size_t count, room

    def __cinit__(self, Log log):
        self.log = log

    def __dealloc__(self):
        free(self.gone)

    def __len__(self):
        return self.count

    cdef int add(self, uint64_t hash, uint64_t place, Mapped *m, uint64_t offset, uint8_t kind) except -1:
        cdef Gone *grown
        if self.count == self.room:
            grown = <Gone *> realloc(self.gone, (2 * self.room + 64) * sizeof(Gone))
            if grown == NULL:
                raise MemoryError(f"no memory for what is known of {self.count} lost records")
            self.gone, self.room = grown, 2 * self.room + 64
        self.gone[self.count] = Gone(hash, position_of(place, offset), m.base + offset, m.base + m.limit, NULL, kind, False)
        self.count += 1
        return 0

    def note_listed(self, uint64_t place, uint64_t chunk, uint64_t end, uint64_t start, uint64_t stop) -> None:
        """What a whole footer at `end` lists from `start` to `stop` is lost."""
        cdef Mapped *m = self.log.chunks[chunk]
        cdef footer_header *header = footer_of(m, end)
        cdef const footer_entry *entries = <footer_entry *> (header + 1)
        cdef uint64_t i, offset
        for i in range(header.entries):
            offset = <uint64_t> entries[i].unit << LOCATION_UNIT_SHIFT
            if start <= offset < stop:
                self.add(entries[i].hash, place, m, offset, <uint8_t> entry_kind(&entries[i]))

    def note_value(self, uint64_t place, uint64_t chunk, uint64_t offset) -> None:
        """The record at `offset` is whole but for its value."""
        cdef Mapped *m = self.log.chunks[chunk]
        cdef record_view r
        record_peek(&r, m.base + offset)
        self.add(siphash13(self.log.seed, r.key, r.key_length), place, m, offset, r.kind)

    def begin(self) -> None:
        """All are noted: of each key, only the newest counts."""
        cdef size_t i, kept = 0
        if self.count:
            qsort(self.gone, self.count, sizeof(Gone), compare_hashes)
        for i in range(self.count):
            if i + 1 == self.count or self.gone[i].hash != self.gone[i + 1].hash:
                self.gone[kept] = self.gone[i]
                kept += 1
        self.count = kept

    cdef inline void compare(self, uint64_t hash, uint64_t position, const uint8_t *record) noexcept nogil:
        """With an intact record: one before the lost one, or behind it."""
        cdef size_t low = 0, high = self.count, middle
        while low < high:
            middle = (low + high) // 2
            if self.gone[middle].hash < hash:
                low = middle + 1
            else:
                high = middle
        if low < self.count and self.gone[low].hash == hash:
            if position > self.gone[low].position:
                self.gone[low].superseded = True
            else:
                self.gone[low].older = record

    def look(self, uint64_t place, uint64_t chunk, list stretches) -> None:
        """Compares with the records of a segment in these stretches [(start, stop)], which are whole."""
        cdef Scan s
        cdef record_view r
        cdef uint64_t offset
        for start, stop in stretches:
            begin_scan(self.log, &s, chunk, start, stop, 0)
            s.sorted = True
            with nogil:
                while True:
                    offset = s.offset
                    if next_record(&s, &r) != RECORD_OK:
                        break
                    if r.kind == KIND_PUT or r.kind == KIND_DELETE:
                        self.compare(siphash13(self.log.seed, r.key, r.key_length), position_of(place, offset), s.base + offset)
            PyErr_CheckSignals()

    def look_listed(self, uint64_t place, uint64_t chunk, uint64_t end) -> None:
        """The same with what the whole footer of an intact segment lists."""
        cdef Mapped *m = self.log.chunks[chunk]
        cdef footer_header *header = footer_of(m, end)
        cdef const footer_entry *entries = <footer_entry *> (header + 1)
        cdef uint64_t i, offset
        with nogil:
            for i in range(header.entries):
                offset = <uint64_t> entries[i].unit << LOCATION_UNIT_SHIFT
                self.compare(entries[i].hash, position_of(place, offset), m.base + offset)

    def end(self) -> None:
        """Everything was looked at: what is superseded is forgotten, the rest is in the order of the log."""
        cdef size_t i, kept = 0
        for i in range(self.count):
            if not self.gone[i].superseded:
                self.gone[kept] = self.gone[i]
                kept += 1
        self.count = kept
        if self.count:
            qsort(self.gone, self.count, sizeof(Gone), compare_positions)

    cdef size_t first_from(self, uint64_t place, uint64_t offset) noexcept nogil:
        cdef size_t low = 0, high = self.count, middle
        while low < high:
            middle = (low + high) // 2
            if self.gone[middle].position < position_of(place, offset):
                low = middle + 1
            else:
                high = middle
        return low

    def told(self, uint64_t place, uint64_t start, uint64_t stop, size_t limit) -> tuple:
        """Of the lost values between two offsets: (keys that can be read, at most `limit`; how many others; how many have an
        older value)."""
        cdef size_t i = self.first_from(place, start)
        cdef list keys = []
        cdef uint64_t others = 0, older = 0
        cdef Bytes key
        while i < self.count and self.gone[i].position < position_of(place, stop):
            if self.gone[i].kind == KIND_PUT:
                older += self.has_older(&self.gone[i])
                if len(keys) < limit and read_lost_key(self.log, &self.gone[i], &key):
                    keys.append((<char *> key.data)[:key.size])
                else:
                    others += 1
            i += 1
        return keys, others, older

    cdef inline bint has_older(self, Gone *g) noexcept nogil:
        """Whether an older value would be served if nothing hid it."""
        return g.older != NULL and g.older[18] == KIND_PUT


@cython.final
cdef class Rescue:
    """Writes a segment as compaction does, in the order of keys: of one that is damaged the newest intact record of each key,
    and tombstones of keys whose newest is lost; or, without `stretches`, the values that these tombstones hide.

    Some 32 bytes of memory a record.
    """
    cdef:
        Log log
        Piece *pieces
        footer_entry *entries
        size_t count, room, at
        uint64_t offset, version
        public uint32_t salt            # of the output; to be set before the first step
        readonly uint64_t size          # of header and records
        readonly uint64_t tombstones    # bytes of these among them, when all are written
        readonly uint64_t first_version, last_version

    def __cinit__(self, Log log, Losses losses, uint64_t place, uint64_t chunk, list stretches, uint64_t version):
        """stretches: those [(start, stop)] of the segment at `chunk` that are whole.  version: that new tombstones get."""
        cdef size_t i
        self.log, self.version = log, version
        self.size = self.offset = SEGMENT_HEADER_BYTES
        if stretches is not None:
            self.collect(chunk, stretches)
        i = losses.first_from(place, 0)
        while i < losses.count and losses.gone[i].position < position_of(place + 1, 0):
            if losses.has_older(&losses.gone[i]) and (stretches is not None or losses.gone[i].kind == KIND_PUT):
                self.add(<uint64_t> losses.gone[i].older | (stretches is not None))
            i += 1
        with nogil:
            self.sort()
        self.entries = <footer_entry *> malloc((self.count + 1) * sizeof(footer_entry))
        if self.entries == NULL:
            raise MemoryError(f"no memory for the places of {self.count} records")

    def __dealloc__(self):
        free(self.pieces)
        free(self.entries)

    def __len__(self):
        return self.count

    cdef int add(self, uint64_t record) except -1:
        cdef Piece *grown
        cdef Bytes key
        if self.count == self.room:
            grown = <Piece *> realloc(self.pieces, (2 * self.room + 1024) * sizeof(Piece))
            if grown == NULL:
                raise MemoryError(f"no memory to sort {self.count} records")
            self.pieces, self.room = grown, 2 * self.room + 1024
        record_key(<const uint8_t *> (record & ~<uint64_t> 1), &key)
        self.pieces[self.count] = Piece(key_prefix(key.data, key.size), record)
        self.count += 1
        return 0

    cdef int collect(self, uint64_t chunk, list stretches) except -1:
        cdef Scan s
        cdef record_view r
        cdef const uint8_t *record
        for start, stop in stretches:
            begin_scan(self.log, &s, chunk, start, stop, 0)
            s.sorted = True
            while True:
                record = s.base + s.offset
                if next_record(&s, &r) != RECORD_OK:
                    break
                if r.kind == KIND_PUT or r.kind == KIND_DELETE:
                    self.add(<uint64_t> record)
            PyErr_CheckSignals()
        return 0

    cdef void sort(self) noexcept nogil:
        cdef size_t i, kept = 0
        if self.count:
            qsort(self.pieces, self.count, sizeof(Piece), compare_pieces)
        for i in range(self.count):
            if i + 1 == self.count or compare_piece_keys(&self.pieces[i], &self.pieces[i + 1]):
                self.pieces[kept] = self.pieces[i]
                self.size += self.view(&self.pieces[kept], NULL)
                kept += 1
        self.count = kept

    cdef uint64_t view(self, const Piece *piece, record_view *r) noexcept nogil:
        """The record that a piece becomes; returns its size."""
        cdef record_view own
        if r == NULL:
            r = &own
        record_peek(r, <const uint8_t *> (piece.record & ~<uint64_t> 1))
        if piece.record & 1:
            r.kind, r.value_length, r.version = KIND_DELETE, 0, self.version
        return record_size(r.key_length, r.value_length)

    def step(self) -> bytes:
        """The next records, some MiB; b"" when there are no more."""
        cdef size_t last = self.at
        cdef uint64_t size = 0
        cdef record_view r
        cdef footer_entry *e
        cdef uint8_t *p
        PyErr_CheckSignals()
        while last < self.count and size < MERGE_STEP:
            size += self.view(&self.pieces[last], NULL)
            last += 1
        out = PyBytes_FromStringAndSize(NULL, size)
        p = <uint8_t *> PyBytes_AS_STRING(out)
        with nogil:
            while self.at < last:
                size = self.view(&self.pieces[self.at], &r)
                record_pack(p, self.salt, self.offset, r.kind, r.version, r.key, r.key_length, r.value, r.value_length)
                e = &self.entries[self.at]
                e.hash = siphash13(self.log.seed, r.key, r.key_length)
                e.unit = <uint32_t> (self.offset >> LOCATION_UNIT_SHIFT)
                e.size_kind = <uint32_t> (size >> LOCATION_UNIT_SHIFT) | <uint32_t> r.kind << FOOTER_SIZE_BITS
                if r.kind == KIND_DELETE:
                    self.tombstones += size
                self.first_version = min(self.first_version - 1, r.version - 1) + 1     # 0: none yet
                self.last_version = max(self.last_version, r.version)
                self.offset += size
                p += size
                self.at += 1
        return out

    def footer(self, uint64_t first, uint64_t last) -> bytes:
        """As `Merge.footer`, when `step` has no more."""
        return encode_footer(self.entries, self.count, first, last, self.salt, self.offset)


def value_end(Log log, uint64_t chunk, uint64_t offset) -> int:
    """Where a record ends that is whole but for its value."""
    return offset + record_reach(log.chunks[chunk].base + offset)


def read_footer(Log log, uint64_t chunk, uint64_t end) -> tuple | None:
    """(first version, last version) as a whole footer at `end` gives them, else None."""
    cdef footer_header *header = footer_of(log.chunks[chunk], end)
    return None if header == NULL else (header.first_version, header.last_version)


def describe(Log log, uint64_t chunk, uint64_t start, uint64_t stop) -> tuple:
    """Reads whole records in any order of versions from `start` on: (why it stopped, where, records, lowest version, highest
    version, highest version of a put or delete, of a clear); 0 where there is none."""
    cdef Scan s
    cdef record_view r
    cdef uint64_t records = 0, first = 0, data = 0, clear = 0
    cdef int reason
    begin_scan(log, &s, chunk, start, stop, 0)
    s.sorted = True
    with nogil:
        while True:
            reason = next_record(&s, &r)
            if reason != RECORD_OK:
                break
            records += 1
            first = min(first - 1, r.version - 1) + 1       # 0: none yet
            if r.kind == KIND_PUT or r.kind == KIND_DELETE:
                data = max(data, r.version)
            elif r.kind == KIND_CLEAR:
                clear = max(clear, r.version)
    return SCAN_REASONS[reason], s.offset, records, first, s.version, data, clear

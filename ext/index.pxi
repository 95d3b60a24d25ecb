# The offset hash index: hash -> location, eight slots to a cache line; a tag match is confirmed in the log.
#
# Readers take no lock.  What they rely on: a slot changes by one aligned store, after its record is whole; an entry
# never moves within a shard; a shard that grows is copied, and the directory with it, and the word that names the
# directory is stored last.  So whoever finds that word unchanged after a search has searched the index as it was.

cdef struct Probe:
    record_view record
    uint64_t location
    uint64_t *slot          # FOUND: the key's slot.  MISSING: the first free one, NULL if there is none
    uint8_t *shard
    uint64_t bucket         # of that slot
    unsigned cls
    bint displaced          # the slot is not in the key's own bucket
    bint bucket_has_empty   # the slot's bucket has an empty slot beside it


cdef inline uint64_t home_bucket(uint64_t h, unsigned cls) noexcept nogil:
    return (<uint64_t> <uint32_t> h * SHARD_BUCKETS[cls]) >> 32


cdef inline uint64_t *bucket_at(uint8_t *shard, uint64_t bucket) noexcept nogil:
    return <uint64_t *> (shard + SHARD_HEADER_BYTES + bucket * BUCKET_BYTES)


cdef inline uint64_t next_bucket(uint64_t bucket, uint64_t n, uint64_t buckets) noexcept nogil:
    """Where a search goes on after its bucket `n` (from 0) was full: 1, 2, 3, ... further each time, so that full buckets
    do not grow together."""
    bucket += n + 1
    return bucket if bucket < buckets else bucket - buckets


cdef inline uint8_t *displaced_at(uint8_t *shard, unsigned cls, uint64_t bucket) noexcept nogil:
    return shard + SHARD_HEADER_BYTES + <uint64_t> SHARD_BUCKETS[cls] * BUCKET_BYTES + bucket


cdef inline uint64_t directory_pages(unsigned depth) noexcept nogil:
    return ((<uint64_t> 8 << depth) + PAGE_BYTES - 1) // PAGE_BYTES


cdef inline Index *current_index(Log log) noexcept nogil:
    return <Index *> atomic_load_pointer(<void **> &log.index)


cdef inline int glance(Log log, int settled) noexcept nogil:
    """First in every read: FOUND if the log is open and its index still the one to use.

    `settled`: the status that was settled just before, or FOUND.  Who has asked about an OUTDATED index reads what
    there is: while a writer clears the store the control page may be ahead.
    """
    cdef control_page *c
    if atomic_load(&log.attention):
        return LOOK_CLOSER
    if not log.writable and settled != OUTDATED:
        c = <control_page *> atomic_load_pointer(<void **> &log.control)
        if c != NULL and (atomic_load(&c.index_nonce) != log.nonce or atomic_load(&c.epoch) != log.epoch or
                          atomic_load(&c.merges) != log.merges or
                          current_index(log).private and atomic_load(&c.last_version) != log.last_version):
            return OUTDATED
    return FOUND


cdef inline int find_entry(Index *ix, uint64_t h, uint64_t *word, uint64_t *entry, Trouble *t) noexcept nogil:
    """The directory's entry for a hash, checked against what is mapped."""
    cdef unsigned depth
    cdef uint64_t page, pages = atomic_load(&ix.pages)
    word[0] = atomic_load(&ix.header.directory)
    depth = DIRECTORY_DEPTH(word[0])
    page = DIRECTORY_PAGE(word[0])
    t.place, t.known = page, pages
    if depth > DIRECTORY_DEPTH_MAX or page + directory_pages(depth) > pages:
        return INDEX_GREW
    entry[0] = atomic_load(<uint64_t *> (ix.base + page * PAGE_BYTES) + ((h >> 1) >> (63 - depth)))
    if ENTRY_CLASS(entry[0]) >= SHARD_CLASSES or ENTRY_DEPTH(entry[0]) > depth or \
            ENTRY_PAGE(entry[0]) + SHARD_PAGES[ENTRY_CLASS(entry[0])] > pages:
        t.place = ENTRY_PAGE(entry[0])
        return INDEX_GREW
    if ix.checked != NULL and ENTRY_PAGE(entry[0]) < ix.checked_pages and not atomic_load_byte(&ix.checked[ENTRY_PAGE(entry[0])]):
        t.place = ENTRY_PAGE(entry[0])
        return UNCHECKED
    return FOUND


cdef inline int read_record(Log log, uint64_t location, record_view *r, Trouble *t) noexcept nogil:
    """The record at a location: FOUND if header and key are right (a long value is not checked here)."""
    cdef Mapped *m = <Mapped *> atomic_load_pointer(<void **> &log.chunks[location >> CHUNK_UNIT_SHIFT])
    cdef uint64_t offset, limit
    cdef const uint8_t *p
    cdef int status
    t.place, t.known, t.status = location, 0, RECORD_TRUNCATED
    if m == NULL:
        return UNMAPPED
    offset = (location - m.origin) << LOCATION_UNIT_SHIFT
    t.known = limit = atomic_load(&m.limit)
    if offset >= limit:
        return UNMAPPED
    p = m.base + offset
    prefetch(p + 64)
    prefetch(p + 128)
    status = record_unpack(r, p, limit - offset, m.salt, offset, False)
    if status == RECORD_OK:
        return FOUND
    t.status, t.expected, t.found = status, r.crc, r.found
    # A reader may not know yet how long the file has become; a writer does, and so does who rebuilds an index.
    return UNMAPPED if status == RECORD_TRUNCATED and not (log.writable or log.building) else DAMAGED


cdef inline int check_value(Log log, record_view *r, Trouble *t) noexcept nogil:
    """Of a record that was read: FOUND if its value is right too; a long one has a checksum of its own."""
    cdef Mapped *m
    cdef uint64_t offset
    if r.value_length <= VALUE_CRC_ABOVE:
        return FOUND
    m = <Mapped *> atomic_load_pointer(<void **> &log.chunks[t.place >> CHUNK_UNIT_SHIFT])
    if m == NULL:
        return UNMAPPED
    offset = (t.place - m.origin) << LOCATION_UNIT_SHIFT
    t.status = record_unpack(r, m.base + offset, atomic_load(&m.limit) - offset, m.salt, offset, True)
    t.expected, t.found = r.crc, r.found
    return FOUND if t.status == RECORD_OK else DAMAGED


cdef inline int probe(Log log, const uint8_t *key, size_t size, uint64_t h, uint64_t own, Probe *p, bint writing,
                      Trouble *t) noexcept nogil:
    """Looks a key up.  With `writing` it also finds where a missing key would go.

    In a rebuild there is no key but the location of the record that is to be entered, `own` (else 0).
    """
    cdef Index *ix
    cdef uint64_t word, entry, value, bucket, n, buckets, tag = h >> TAG_SHIFT
    cdef uint64_t *slots
    cdef unsigned cls, i
    cdef int status
    cdef bucket_view view
    cdef bint again
    t.indexes = atomic_load(&log.indexes)
    ix = current_index(log)
    while True:
        again = False
        status = find_entry(ix, h, &word, &entry, t)
        if status < 0:
            if atomic_load(&ix.header.directory) != word:
                continue
            return status
        cls = ENTRY_CLASS(entry)
        p.shard = ix.base + ENTRY_PAGE(entry) * PAGE_BYTES
        p.cls = cls
        p.slot = NULL
        buckets = SHARD_BUCKETS[cls]
        bucket = home_bucket(h, cls)
        for n in range(buckets):
            slots = bucket_at(p.shard, bucket)
            view = bucket_look(slots, <uint32_t> tag)
            while view.match:
                i = lowest_bit(view.match)
                view.match &= view.match - 1
                value = atomic_load(slots + i)
                if value >> TAG_SHIFT != tag or value <= SLOT_DELETED:
                    again = True            # it has just changed
                    break
                p.location = value & LOCATION_MASK
                status = read_record(log, p.location, &p.record, t)
                if own and status != UNMAPPED:
                    status = compare_own(log, &p.record, status, h, p.location, own, t)
                elif status == FOUND:
                    status = p.record.key_length == size and memcmp(p.record.key, key, size) == 0
                if status == MISSING:
                    continue
                if atomic_load(&ix.header.directory) != word or status < 0 and atomic_load(slots + i) != value:
                    again = True            # it was true a moment ago
                    break
                if status < 0:
                    return status
                p.slot = slots + i
                p.bucket = bucket
                p.bucket_has_empty = view.empty != 0
                if p.record.kind != KIND_PUT and not own:
                    return NOT_A_PUT
                return FOUND
            if writing and p.slot == NULL and view.empty | view.deleted:
                p.slot = slots + lowest_bit(view.empty | view.deleted)
                p.bucket = bucket
                p.displaced = n != 0
            if view.empty or again:
                break
            bucket = next_bucket(bucket, n, buckets)
        if not again and atomic_load(&ix.header.directory) == word:
            return MISSING


cdef int compare_own(Log log, record_view *r, int status, uint64_t h, uint64_t location, uint64_t own,
                     Trouble *t) noexcept nogil:
    """In a rebuild: whether the entry at `location` is for the key of the record at `own`; FOUND or MISSING.

    A damaged record has the hash that its segment's footer gives.  Where there is none its entry stays beside the
    other, so that a get of it raises and never serves an older value.
    """
    cdef record_view mine
    cdef uint64_t hash_there
    if location == own:
        return FOUND
    if status == DAMAGED:
        return FOUND if footer_hash(log, location, &hash_there) and hash_there == h else MISSING
    if siphash13(log.seed, r.key, r.key_length) != h:
        return MISSING
    if read_record(log, own, &mine, t) == FOUND:
        return mine.key_length == r.key_length and memcmp(mine.key, r.key, r.key_length) == 0
    return FOUND


cdef bint footer_hash(Log log, uint64_t location, uint64_t *h) noexcept nogil:
    """What a footer that was read in this rebuild says of a record."""
    cdef Mapped *m = log.chunks[location >> CHUNK_UNIT_SHIFT]
    cdef uint64_t i
    if m != NULL and m.entries != NULL:
        for i in range(m.count):
            if m.entries[i].unit == location - m.origin:
                h[0] = m.entries[i].hash
                return True
    return False


cdef inline bint has_empty(uint64_t *slots) noexcept nogil:
    cdef unsigned i
    for i in range(BUCKET_SLOTS):
        if slots[i] == SLOT_EMPTY:
            return True
    return False


cdef inline bint shard_is_full(Probe *p) noexcept nogil:
    """Whether a missing key needs a larger shard: reusing a deleted slot does not."""
    if p.slot == NULL:
        return True
    return p.slot[0] == SLOT_EMPTY and (<shard_header *> p.shard).used >= shard_limit(p.cls)


cdef inline void touch_shard(Log log, uint8_t *shard) noexcept nogil:
    """Before the first store into a shard: its checksum is not true any more."""
    if (<shard_header *> shard).intact:
        atomic_store_word(&(<shard_header *> shard).intact, 0)
        release_fence()


cdef inline uint64_t *claim_slot(Log log, Probe *p) noexcept nogil:
    """Makes the free slot that `probe` found ready for its store."""
    touch_shard(log, p.shard)
    if p.displaced:
        displaced_at(p.shard, p.cls, p.bucket)[0] |= <uint8_t> (1 << (p.slot - bucket_at(p.shard, p.bucket)))
    if p.slot[0] == SLOT_EMPTY:
        relaxed_store(&(<shard_header *> p.shard).used, (<shard_header *> p.shard).used + 1)
    return p.slot


cdef inline uint64_t removed_value(Probe *p) noexcept nogil:
    """What stands in a slot after its entry went.  A full bucket may have sent keys on to others: a search
    must still pass it, so it keeps a mark; one with an empty slot has sent none."""
    return SLOT_EMPTY if p.bucket_has_empty else SLOT_DELETED


# -- an index as a whole ----------------------------------------------------------------------------------------

cdef void index_shape(uint64_t expected, unsigned *cls, unsigned *depth) noexcept nogil:
    """The smallest shape that takes so many keys without growing."""
    cls[0] = depth[0] = 0
    while cls[0] + 1 < SHARD_CLASSES and expected > shard_limit(cls[0]) // 8 * 7:
        cls[0] += 1
    while depth[0] < DIRECTORY_DEPTH_MAX and expected >> depth[0] > shard_limit(cls[0]) // 64 * 63:
        depth[0] += 1


cdef inline uint64_t rows_pages(uint64_t segments) noexcept nogil:
    """For so many segments, and some that come."""
    return (segments + ROWS_A_PAGE // 8 * 9) // ROWS_A_PAGE


def index_pages(uint64_t expected, uint64_t segments) -> int:
    """Pages of a new index for so many keys in so many segments."""
    cdef unsigned cls, depth
    index_shape(expected, &cls, &depth)
    return 1 + rows_pages(segments) + directory_pages(depth) + (<uint64_t> SHARD_PAGES[cls] << depth)


cdef int take_index(Log log, uint8_t *base, uint64_t mapped, uint64_t pages, bint private, uint8_t *checked=NULL,
                    uint64_t checked_pages=0) except -1:
    """Goes over to another index, or to another mapping of the same; the old mapping goes when nobody reads it."""
    cdef Index *old
    cdef Index *new = <Index *> calloc(1, sizeof(Index))
    if new == NULL:
        free(checked)
        raise MemoryError()
    new.base = base
    new.header = <index_header *> base
    new.page = <index_page *> base
    new.mapped, new.pages, new.private = mapped, pages, private
    new.checked, new.checked_pages = checked, checked_pages
    find_rows(new)
    write_lock(&log.mutex)
    old = log.index
    atomic_store(&log.indexes, log.indexes + 1)     # first: whoever has the new index has the new number too
    atomic_store_pointer(<void **> &log.index, new)
    assign_rows(log)
    write_unlock(&log.mutex)
    if old != NULL:
        await_reads()
        log.unmap(old.base)
        free(old.checked)
        free(old)
    return 0


def create_index(Log log, fd, uint64_t expected, uint64_t epoch, uint64_t nonce, list chunks) -> None:
    """Begins an empty index for so many keys in the segments at these chunks, in an empty file of
    `index_pages(expected, len(chunks))` pages, or, if `fd` is None, in this process's memory alone."""
    cdef unsigned cls, depth
    cdef uint64_t i, mapped, pages, page, rows = rows_pages(len(chunks))
    cdef uint8_t *base
    cdef index_header *header
    cdef uint64_t *directory
    cdef Trouble t
    index_shape(expected, &cls, &depth)
    pages = 1 + rows + directory_pages(depth) + (<uint64_t> SHARD_PAGES[cls] << depth)
    if fd is None:
        mapped = pages * PAGE_BYTES
        base = log.map_memory(mapped)
    else:
        base = log.map_file(fd, max(INDEX_RESERVE, 4 * pages * PAGE_BYTES), pages * PAGE_BYTES, &mapped)
    if make_writable(log, [Stretch(base, pages * PAGE_BYTES)], 1, &t) < 0:
        log.unmap(base)
        raise_unwritable(t.status)
    take_index(log, base, mapped, pages, fd is None)
    header = log.index.header
    memcpy(header.magic, INDEX_MAGIC, 8)
    header.format = FORMAT_VERSION
    header.identity = log.identity
    header.epoch = epoch
    header.nonce = nonce
    header.pages = pages
    write_lock(&log.mutex)
    log.index.page.rows = ROWS_WORD(1, rows)
    find_rows(log.index)
    write_unlock(&log.mutex)
    for chunk in chunks:
        add_row(log, chunk)
    directory = <uint64_t *> (base + (1 + rows) * PAGE_BYTES)
    page = 1 + rows + directory_pages(depth)
    for i in range(<uint64_t> 1 << depth):
        begin_shard(base + page * PAGE_BYTES, cls, depth, i << (64 - depth) if depth else 0)
        directory[i] = ENTRY(page, cls, depth)
        page += SHARD_PAGES[cls]
    atomic_store(&header.directory, DIRECTORY_WORD(1 + rows, depth, 1))
    log.seq = log.version = log.keys = 0


def attach_index(Log log, int fd, uint64_t size, uint64_t epoch, uint64_t nonce, bint clean) -> str | None:
    """Maps an existing index of `size` bytes.  Returns why it is not to be believed, or None."""
    cdef uint64_t mapped, pages = size // PAGE_BYTES, unchecked = 0
    cdef uint8_t *checked
    if pages < 4:
        return f"{size} bytes are too few"
    checked = <uint8_t *> calloc(pages, 1)
    if checked == NULL:
        raise MemoryError()
    try:
        base = log.map_file(fd, max(INDEX_RESERVE, 4 * size), size, &mapped)
    except BaseException:
        free(checked)
        raise
    problem = why_not(log, base, pages, epoch, nonce, clean, checked, &unchecked)
    if problem is not None:
        free(checked)
        log.unmap(base)
        return problem
    if not unchecked:
        free(checked)
        checked = NULL
    take_index(log, base, mapped, pages, False, checked, pages)
    return None


cdef enum:
    LONGER = 16                 # times what the header says: more is no growth that was interrupted

cdef uint64_t NO_ENTRY = <uint64_t> -1      # of a directory


cdef bint are_apart(Extent *extents, uint64_t count) noexcept nogil:
    cdef uint64_t i
    qsort(extents, count, sizeof(Extent), compare_extents)
    for i in range(1, count):
        if extents[i].page < extents[i - 1].page + extents[i - 1].pages:
            return False
    return True


cdef str why_not(Log log, uint8_t *base, uint64_t pages, uint64_t epoch, uint64_t nonce, bint clean, uint8_t *checked,
                 uint64_t *unchecked):
    """What is wrong with an index, or None; counts the shards whose checksums are still to be compared."""
    cdef index_header *header = <index_header *> base
    cdef uint64_t word = atomic_load(&header.directory), rows = atomic_load(&(<index_page *> base).rows), i, entry, last = NO_ENTRY
    cdef unsigned depth = DIRECTORY_DEPTH(word)
    cdef uint64_t *directory
    cdef Extent *extents
    cdef uint64_t count = 3
    cdef bint apart
    if memcmp(header.magic, INDEX_MAGIC, 8):
        return "its first bytes are not an index's"
    if header.format != FORMAT_VERSION:
        return f"it has format {header.format}, expected {FORMAT_VERSION}"
    if header.identity != log.identity or header.epoch != epoch or header.nonce != nonce:
        return "it belongs to another store or another time of this one"
    if header.pages > pages or pages > LONGER * header.pages:
        return f"{header.pages} pages expected, {pages} found"
    if depth > DIRECTORY_DEPTH_MAX or DIRECTORY_PAGE(word) + directory_pages(depth) > pages:
        return "its directory is out of bounds"
    if ROWS_PAGE(rows) == 0 or ROWS_PAGES(rows) == 0 or ROWS_PAGE(rows) + ROWS_PAGES(rows) > pages:
        return "its segments' rows are out of bounds"
    if clean and (header.clean_directory != word or header.crc != index_crc(base)):
        return "its directory or its segments' rows fail the checksum"
    directory = <uint64_t *> (base + DIRECTORY_PAGE(word) * PAGE_BYTES)
    extents = <Extent *> malloc((count + (<uint64_t> 1 << depth)) * sizeof(Extent))
    if extents == NULL:
        raise MemoryError()
    extents[0].page, extents[0].pages = 0, 1
    extents[1].page, extents[1].pages = DIRECTORY_PAGE(word), directory_pages(depth)
    extents[2].page, extents[2].pages = ROWS_PAGE(rows), ROWS_PAGES(rows)
    for i in range(<uint64_t> 1 << depth):
        entry = atomic_load(directory + i)
        if entry == last:
            continue
        last = entry
        if ENTRY_CLASS(entry) >= SHARD_CLASSES or ENTRY_DEPTH(entry) > depth or \
                ENTRY_PAGE(entry) + SHARD_PAGES[ENTRY_CLASS(entry)] > pages:
            free(extents)
            return "a shard is out of bounds"
        extents[count].page, extents[count].pages = ENTRY_PAGE(entry), SHARD_PAGES[ENTRY_CLASS(entry)]
        count += 1
    apart = are_apart(extents, count)
    free(extents)
    if not apart:
        return "two parts of it share pages"
    last = NO_ENTRY
    for i in range(<uint64_t> 1 << depth):
        entry = atomic_load(directory + i)
        if entry == last:
            continue
        last = entry
        if (<shard_header *> (base + ENTRY_PAGE(entry) * PAGE_BYTES)).intact:
            unchecked[0] += 1
        elif clean:
            return "a shard was changed after its checksum was made"
        else:
            checked[ENTRY_PAGE(entry)] = 1
    return None


cdef uint32_t index_crc(uint8_t *base) noexcept nogil:
    cdef index_page page = (<index_page *> base)[0]
    cdef uint64_t word = page.header.directory
    page.header.crc = 0
    page.header.directory = 0
    cdef uint32_t crc = crc32c(0, &page, sizeof(page))
    crc = crc32c(crc, base + ROWS_PAGE(page.rows) * PAGE_BYTES, ROWS_PAGES(page.rows) * PAGE_BYTES)
    return crc32c(crc, base + DIRECTORY_PAGE(word) * PAGE_BYTES, <uint64_t> 8 << DIRECTORY_DEPTH(word))


cdef uint32_t shard_crc(uint8_t *shard, unsigned cls) noexcept nogil:
    return crc32c(0, shard + 8, <uint64_t> SHARD_PAGES[cls] * PAGE_BYTES - 8)


cdef bint check_shard(Log log, uint64_t page) except -1:
    """At a shard's first use: compares its checksum, unless a writer has changed it since.  No thread changes it
    meanwhile, but another process may."""
    cdef bint right = True
    cdef Index *ix
    log.check_open()
    write_lock(&log.mutex)
    ix = log.index
    if not atomic_load(&log.attention) and ix.checked != NULL and page < ix.checked_pages and not ix.checked[page]:
        right = shard_is_right(ix, page)
        if right:
            atomic_store_byte(&ix.checked[page], 1)
    write_unlock(&log.mutex)
    return right


cdef bint shard_is_right(Index *ix, uint64_t page) noexcept nogil:
    cdef uint8_t *shard = ix.base + page * PAGE_BYTES
    cdef shard_header *header = <shard_header *> shard
    cdef unsigned cls = header.cls      # it may be what is damaged
    if atomic_load_word(&header.intact) and (cls >= SHARD_CLASSES or page + SHARD_PAGES[cls] > ix.pages or
                                             header.crc != shard_crc(shard, cls)):
        acquire_fence()
        return not atomic_load_word(&header.intact)
    return True


def seal_index(Log log) -> None:
    """Gives every shard, the directory and the header their checksums; to be synced afterwards."""
    cdef uint64_t word, i
    cdef uint64_t *directory
    cdef uint8_t *shard
    cdef uint32_t crc
    cdef Trouble t
    log.check_writer()
    word = log.index.header.directory
    directory = <uint64_t *> (log.index.base + DIRECTORY_PAGE(word) * PAGE_BYTES)
    with nogil:
        for i in range(<uint64_t> 1 << DIRECTORY_DEPTH(word)):
            shard = log.index.base + ENTRY_PAGE(directory[i]) * PAGE_BYTES
            if not (<shard_header *> shard).intact:
                crc = shard_crc(shard, ENTRY_CLASS(directory[i]))
                if make_writable(log, [Stretch(shard, SHARD_HEADER_BYTES)], 1, &t) < 0:
                    with gil:
                        raise_unwritable(t.status)
                (<shard_header *> shard).crc = crc
                atomic_store_word(&(<shard_header *> shard).intact, 1)
    log.check_change()
    log.index.header.clean_directory = word
    log.index.header.crc = index_crc(log.index.base)


def extend_index(Log log, fd, uint64_t pages) -> None:
    """The index has so many pages now: maps them if they are beyond what is mapped."""
    cdef uint64_t mapped
    cdef uint8_t *base
    cdef uint8_t *checked = NULL
    cdef Index *ix = log.index
    log.check_open()
    if log.writable:
        log.check_change()
    if pages <= ix.pages:
        return
    if pages * PAGE_BYTES > ix.mapped:
        if ix.checked != NULL:
            checked = <uint8_t *> malloc(ix.checked_pages)
            if checked == NULL:
                raise MemoryError()
            memcpy(checked, ix.checked, ix.checked_pages)
        if ix.private:
            mapped = 2 * pages * PAGE_BYTES
            base = log.map_memory(mapped)
            memcpy(base, ix.base, ix.pages * PAGE_BYTES)
        else:
            base = log.map_file(fd, 4 * pages * PAGE_BYTES, pages * PAGE_BYTES, &mapped)
        take_index(log, base, mapped, pages, ix.private, checked, ix.checked_pages)
    write_lock(&log.mutex)
    atomic_store(&log.index.pages, pages)
    if log.writable or log.index.private:
        log.index.header.pages = pages
    write_unlock(&log.mutex)


def index_nonce(Log log) -> int:
    """The nonce in the index's own header."""
    log.check_open()
    return log.index.header.nonce


def index_bytes(Log log) -> int:
    """Bytes of the index that this process knows of."""
    log.check_open()
    return log.index.pages * PAGE_BYTES


def index_facts(Log log) -> dict:
    """Bytes of the index, its shards, slots and slots in use; and the most slots that a put has moved in this process."""
    cdef Index *ix
    cdef Trouble t
    cdef uint64_t word, entry, h = 0, after = 0, shards = 0, slots = 0, used = 0, pages = 0
    cdef unsigned depth = 0
    cdef bint private = False
    cdef int status
    while not after >> depth:
        h = after << (64 - depth) if depth else 0
        status = LOOK_CLOSER
        read_begin()
        ix = current_index(log)
        if not atomic_load(&log.attention):
            status = find_entry(ix, h, &word, &entry, &t)
            if status < 0 and status != UNCHECKED and atomic_load(&ix.header.directory) != word:
                status = CHANGED
            if status == FOUND or status == UNCHECKED:      # a number that is wrong harms nobody
                slots += SHARD_BUCKETS[ENTRY_CLASS(entry)] * BUCKET_SLOTS
                used += relaxed_load(&(<shard_header *> (ix.base + ENTRY_PAGE(entry) * PAGE_BYTES)).used)
                pages, private = atomic_load(&ix.pages), ix.private
        read_end()
        if status == FOUND or status == UNCHECKED:
            depth = ENTRY_DEPTH(entry)
            after = (h >> (64 - depth)) + 1 if depth else 1
            shards += 1
        else:
            settle(log, status, &t)
    return {"bytes": pages * PAGE_BYTES, "shards": shards, "slots": slots, "used": used, "private": bool(private),
            "most_moved": log.most_moved}

# Growth: a full shard gets more room, alone; nothing is changed until the one store that makes the new directory current.

cdef enum:
    LONGEST_SEARCH = 128        # buckets; at 15/16 the longest of a shard is some 50


cdef struct Extent:
    uint64_t page, pages


cdef int compare_extents(const void *a, const void *b) noexcept nogil:
    cdef uint64_t x = (<Extent *> a).page, y = (<Extent *> b).page
    return (x > y) - (x < y)


cdef int used_extents(Index *ix, Extent **out, uint64_t *count, unsigned spare) noexcept nogil:
    """What is in use: the header page, the rows, the directory, its shards.  All else is free."""
    cdef uint64_t word = ix.header.directory, i, entry, last = 0, n = 0
    cdef unsigned depth = DIRECTORY_DEPTH(word)
    cdef uint64_t *directory = <uint64_t *> (ix.base + DIRECTORY_PAGE(word) * PAGE_BYTES)
    cdef Extent *extents = <Extent *> malloc(((<uint64_t> 1 << depth) + 3 + spare) * sizeof(Extent))
    if extents == NULL:
        return NO_MEMORY
    extents[0].page, extents[0].pages = 0, 1
    extents[1].page, extents[1].pages = DIRECTORY_PAGE(word), directory_pages(depth)
    extents[2].page, extents[2].pages = ROWS_PAGE(ix.page.rows), ROWS_PAGES(ix.page.rows)
    n = 3
    for i in range(<uint64_t> 1 << depth):
        entry = directory[i]
        if entry != last:
            extents[n].page, extents[n].pages = ENTRY_PAGE(entry), SHARD_PAGES[ENTRY_CLASS(entry)]
            n += 1
        last = entry
    out[0] = extents
    count[0] = n
    return FOUND


cdef uint64_t claim_pages(Extent *extents, uint64_t *count, uint64_t pages) noexcept nogil:
    """The first gap of so many pages between the extents; it is added to them."""
    cdef uint64_t i, at = 0
    qsort(extents, count[0], sizeof(Extent), compare_extents)
    for i in range(count[0]):
        if extents[i].page >= at + pages:
            break
        at = extents[i].page + extents[i].pages
    extents[count[0]].page, extents[count[0]].pages = at, pages
    count[0] += 1
    return at


cdef void begin_shard(uint8_t *shard, unsigned cls, unsigned depth, uint64_t prefix) noexcept nogil:
    cdef shard_header *header = <shard_header *> shard
    relaxed_clear(<uint64_t *> shard, <uint64_t> SHARD_PAGES[cls] * PAGE_BYTES // 8)
    header.cls = cls
    header.depth = depth
    header.prefix = prefix


cdef bint place(uint8_t *shard, unsigned cls, uint64_t home, uint64_t value) noexcept nogil:
    """Puts an entry into a shard that is not current yet; False if that is too full."""
    cdef uint64_t bucket = home, n
    cdef uint64_t *slots
    cdef unsigned i
    if (<shard_header *> shard).used >= shard_limit(cls):
        return False
    for n in range(SHARD_BUCKETS[cls]):
        slots = bucket_at(shard, bucket)
        for i in range(BUCKET_SLOTS):
            if slots[i] == SLOT_EMPTY:
                relaxed_store(slots + i, value)
                if bucket != home:
                    displaced_at(shard, cls, bucket)[0] |= <uint8_t> (1 << i)
                relaxed_store(&(<shard_header *> shard).used, (<shard_header *> shard).used + 1)
                return True
        bucket = next_bucket(bucket, n, SHARD_BUCKETS[cls])
    return False


cdef inline int rehash(Log log, uint64_t value, uint64_t *h, Trouble *t) noexcept nogil:
    """A slot's whole hash, from the key in the log; the tag tells whether that key is undamaged."""
    cdef record_view r
    cdef int status = read_record(log, value & LOCATION_MASK, &r, t)
    if status == FOUND or status == DAMAGED and t.status == RECORD_BAD_CRC:
        h[0] = siphash13(log.seed, r.key, r.key_length)
        if h[0] >> TAG_SHIFT == value >> TAG_SHIFT:
            return FOUND
        status = DAMAGED
    if status == DAMAGED and footer_hash(log, value & LOCATION_MASK, h):
        return FOUND
    return status


cdef bint place_everywhere(uint8_t *shard, unsigned cls, uint64_t bucket, unsigned slot, uint64_t value, uint8_t *target,
                           unsigned to_cls) noexcept nogil:
    """An entry whose record is damaged goes wherever its key may be looked for: a get of it raises, as before."""
    cdef uint64_t buckets = SHARD_BUCKETS[cls], n, home
    if not (displaced_at(shard, cls, bucket)[0] >> slot) & 1:
        return place_from(cls, bucket, value, target, to_cls)
    for n in range(1, min(LONGEST_SEARCH, buckets)):
        home = (bucket + n * buckets - n * (n + 1) // 2) % buckets
        if sends_on(shard, cls, home, n) and not place_from(cls, home, value, target, to_cls):
            return False
    return True


cdef bint sends_on(uint8_t *shard, unsigned cls, uint64_t home, uint64_t buckets) noexcept nogil:
    """Whether a search that begins at `home` passes so many buckets."""
    cdef uint64_t n
    for n in range(buckets):
        if has_empty(bucket_at(shard, home)):
            return False
        home = next_bucket(home, n, SHARD_BUCKETS[cls])
    return True


cdef bint place_from(unsigned cls, uint64_t home, uint64_t value, uint8_t *target, unsigned to_cls) noexcept nogil:
    """Into every bucket that keys of the old shard's bucket `home` may have in the new one."""
    cdef uint64_t buckets = SHARD_BUCKETS[cls], to_buckets = SHARD_BUCKETS[to_cls]
    cdef uint64_t bucket = (home << 32) // buckets * to_buckets >> 32
    cdef uint64_t last = min(((home + 1) << 32) // buckets * to_buckets >> 32, to_buckets - 1)
    while bucket <= last:
        if not place(target, to_cls, bucket, value):
            return False
        bucket += 1
    return True


cdef int grow_shard(Log log, uint64_t h, Trouble *t) noexcept nogil:
    """Gives the shard of a hash more room: without its deleted entries, in the next class, or split in two.

    Bounded by one shard (145,176 slots).  Nothing is changed until the one store at the end, so it can be
    stopped anywhere and begun again.
    """
    cdef unsigned least = 0
    cdef int status = NO_ROOM
    while status == NO_ROOM:        # many damaged entries, each in several places, may need more than usual
        if least >= SHARD_CLASSES:
            t.status = RECORD_BAD_CRC
            return DAMAGED
        status = grow_to(log, h, &least, t)
    return status


cdef int grow_to(Log log, uint64_t h, unsigned *least, Trouble *t) noexcept nogil:
    """To a class of at least `least`; NO_ROOM if that was too small, and then `least` is the next."""
    cdef Index *ix = log.index
    cdef uint64_t word, entry, live = 0, bucket, value, i, page, count = 0, width, first, stride
    cdef uint64_t pages[2]
    cdef Stretch stretches[3]
    cdef Extent *extents = NULL
    cdef uint64_t *slots
    cdef uint64_t *old
    cdef uint64_t *new
    cdef uint8_t *shard
    cdef uint8_t *target
    cdef unsigned cls, depth, to_cls, to_depth, full_depth, parts, slot
    cdef int status = find_entry(ix, h, &word, &entry, t)
    if status < 0:
        return status
    cls, depth = ENTRY_CLASS(entry), ENTRY_DEPTH(entry)
    full_depth = DIRECTORY_DEPTH(word)
    shard = ix.base + ENTRY_PAGE(entry) * PAGE_BYTES
    for bucket in range(SHARD_BUCKETS[cls]):
        slots = bucket_at(shard, bucket)
        for slot in range(BUCKET_SLOTS):
            live += slots[slot] > SLOT_DELETED
    to_cls, to_depth, parts = cls, depth, 1
    if live > shard_limit(cls) // 4 * 3:
        if cls + 1 < SHARD_CLASSES:
            to_cls = cls + 1
        elif depth < DIRECTORY_DEPTH_MAX:
            to_depth, parts = depth + 1, 2
    to_cls = max(to_cls, least[0])
    if to_cls >= SHARD_CLASSES:
        return DAMAGED
    least[0] = to_cls + 1
    full_depth = max(full_depth, to_depth)

    status = used_extents(ix, &extents, &count, 3)
    if status < 0:
        return status
    for i in range(parts):
        pages[i] = claim_pages(extents, &count, SHARD_PAGES[to_cls])
    page = claim_pages(extents, &count, directory_pages(full_depth))
    t.place = max(max(pages[0], pages[parts - 1]) + SHARD_PAGES[to_cls], page + directory_pages(full_depth))
    free(extents)
    if t.place > ix.pages:
        return NEED_PAGES

    # A reader may still be in what was here before: who sees anything of the new sees that the old has gone.
    release_fence()
    for i in range(parts):
        stretches[i] = Stretch(ix.base + pages[i] * PAGE_BYTES, <uint64_t> SHARD_PAGES[to_cls] * PAGE_BYTES)
    stretches[parts] = Stretch(ix.base + page * PAGE_BYTES, <uint64_t> 8 << full_depth)
    if make_writable(log, stretches, parts + 1, t) < 0:
        return CANNOT_WRITE
    for i in range(parts):
        target = ix.base + pages[i] * PAGE_BYTES
        begin_shard(target, to_cls, to_depth,
                    (<shard_header *> shard).prefix | (i << (64 - to_depth) if i else 0))
    status = copy_entries(log, shard, cls, ix.base + pages[0] * PAGE_BYTES, ix.base + pages[parts - 1] * PAGE_BYTES,
                          to_cls, depth, t)
    if status < 0:
        return status
    log.most_moved = max(log.most_moved, live)

    old = <uint64_t *> (ix.base + DIRECTORY_PAGE(word) * PAGE_BYTES)
    new = <uint64_t *> (ix.base + page * PAGE_BYTES)
    stride = full_depth - DIRECTORY_DEPTH(word)
    for i in range(<uint64_t> 1 << full_depth):
        relaxed_store(new + i, old[i >> stride])
    width = <uint64_t> 1 << (full_depth - depth)            # entries that named the old shard
    first = ((h >> 1) >> (63 - full_depth)) & ~(width - 1)
    for i in range(width):
        relaxed_store(new + first + i, ENTRY(pages[i * parts // width], to_cls, to_depth))
    for i in range(parts):
        if ix.checked != NULL and pages[i] < ix.checked_pages:
            atomic_store_byte(&ix.checked[pages[i]], 1)
    atomic_store(&ix.header.directory, DIRECTORY_WORD(page, full_depth, word + 1))
    return FOUND


cdef int copy_entries(Log log, uint8_t *shard, unsigned cls, uint8_t *low, uint8_t *high, unsigned to_cls,
                      unsigned depth, Trouble *t) noexcept nogil:
    """The old shard's live entries into one new shard, or by the next bit of the tag into two.

    Where the class stays, an entry in its own bucket keeps it; any other's bucket comes from the key in the
    log, read in rounds so that the reads overlap.
    """
    cdef uint64_t bucket, value, h
    cdef uint64_t waiting[64]
    cdef uint64_t stood[64]
    cdef uint64_t *slots
    cdef uint8_t *target
    cdef unsigned slot, n = 0, i, damaged = 0
    cdef int status
    cdef uint64_t buckets = SHARD_BUCKETS[cls]
    cdef unsigned split_bit = 63 - depth
    for bucket in range(buckets + 1):
        if n > 56 or bucket == buckets:
            for i in range(n):
                status = rehash(log, waiting[i], &h, t)
                target = high if (waiting[i] >> split_bit) & 1 else low
                damaged += status == DAMAGED
                if status == FOUND:
                    if not place(target, to_cls, home_bucket(h, to_cls), waiting[i]):
                        return NO_ROOM
                elif status != DAMAGED or damaged > buckets:        # an eighth of the shard: too many copies
                    return status
                elif not place_everywhere(shard, cls, stood[i] >> 3, stood[i] & 7, waiting[i], target, to_cls):
                    return NO_ROOM
            n = 0
        if bucket == buckets:
            break
        slots = bucket_at(shard, bucket)
        for slot in range(BUCKET_SLOTS):
            value = slots[slot]
            if value <= SLOT_DELETED:
                continue
            if cls == to_cls and not (displaced_at(shard, cls, bucket)[0] >> slot) & 1:
                target = high if (value >> split_bit) & 1 else low
                if not place(target, to_cls, bucket, value):
                    return NO_ROOM
            else:
                prefetch_record(log, value & LOCATION_MASK)
                waiting[n], stood[n] = value, bucket << 3 | slot
                n += 1
    return FOUND

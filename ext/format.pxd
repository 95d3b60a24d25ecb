from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "crc32c.h" nogil:
    uint32_t crc32c(uint32_t begin, const void *data, size_t length)
    uint32_t crc32c_software(uint32_t begin, const void *data, size_t length)
    uint32_t crc32c_shift(uint32_t crc, uint64_t length)
    void crc32c_setup()

cdef extern from "format.h" nogil:
    const unsigned FORMAT_VERSION, PAGE_BYTES
    const unsigned LOCATION_UNIT_SHIFT, CHUNK_SHIFT, CHUNK_UNIT_SHIFT, CHUNK_COUNT
    const uint64_t CHUNK_BYTES, LOCATION_MASK

    const char *SEGMENT_MAGIC
    const unsigned SEGMENT_HEADER_BYTES, SEGMENT_MIN_BYTES, SEGMENT_MAX_BYTES
    ctypedef struct segment_header:
        char magic[8]
        uint16_t format, hash
        uint32_t compatible, read_compatible, incompatible
        uint64_t number, identity
        uint8_t seed[16]
        uint32_t salt, crc
    void segment_header_pack(segment_header *h, uint64_t number, uint64_t identity, const uint8_t *seed, uint32_t salt)

    const unsigned KIND_PUT, KIND_DELETE, KIND_CONTINUES, KIND_CLEAR, KIND_SYNC_MARK, KIND_FOOTER
    const unsigned RECORD_HEADER_BYTES, KEY_MAX, VALUE_CRC_ABOVE, VALUE_CRC_BYTES, FLAGS_KNOWN
    const uint64_t VALUE_MAX, VERSION_MAX
    enum:
        RECORD_OK
        RECORD_END
        RECORD_TRUNCATED
        RECORD_UNKNOWN
        RECORD_BAD_CRC
        RECORD_BAD_VALUE
    ctypedef struct record_view:
        const uint8_t *key
        const uint8_t *value
        uint64_t version, size
        uint32_t value_length, crc, found
        uint16_t key_length
        uint8_t kind
    ctypedef struct continues_value:
        uint64_t number, end, version
    ctypedef struct sync_mark_value:
        uint64_t number, end
    uint64_t record_size(uint64_t key_length, uint64_t value_length)
    const uint64_t RECORD_LONGEST
    void record_pack(uint8_t *p, uint32_t salt, uint64_t offset, uint8_t kind, uint64_t version,
                     const void *key, uint32_t key_length, const void *value, uint32_t value_length)
    int record_unpack(record_view *r, const uint8_t *p, uint64_t space, uint32_t salt, uint64_t offset, bint check_value)

    uint64_t record_reach(const uint8_t *p)
    uint64_t record_covered(const uint8_t *p)
    bint record_flags_fit(const uint8_t *p)
    uint32_t record_crc_begin(uint32_t salt, uint64_t offset)
    void record_peek(record_view *r, const uint8_t *p)

    const unsigned FOOTER_SIZE_BITS
    ctypedef struct footer_header:
        uint64_t first_version, last_version, records, entries
    ctypedef struct footer_entry:
        uint64_t hash
        uint32_t unit, size_kind

    const char *INDEX_MAGIC
    const unsigned BUCKET_SLOTS, BUCKET_BYTES, TAG_SHIFT, SLOT_EMPTY, SLOT_DELETED, SHARD_CLASSES, SHARD_HEADER_BYTES
    const unsigned DIRECTORY_DEPTH_MAX
    const uint32_t SHARD_PAGES[5]
    const uint32_t SHARD_BUCKETS[5]
    uint32_t shard_limit(unsigned cls)
    ctypedef struct index_header:
        char magic[8]
        uint32_t format, crc
        uint64_t identity, epoch, nonce, directory, pages, clean_directory
    ctypedef struct index_state:
        uint64_t seq, number, end, version, keys, live, previous, previous_live
    uint64_t live_more(uint64_t live, uint64_t size)
    uint64_t live_less(uint64_t live, uint64_t size)
    ctypedef struct segment_row:
        uint64_t chunk, live
    const unsigned ROWS_A_PAGE
    uint64_t ROWS_PAGE(uint64_t word)
    uint64_t ROWS_PAGES(uint64_t word)
    uint64_t ROWS_WORD(uint64_t page, uint64_t pages)
    ctypedef struct swing_note:
        uint64_t location, chunk, live, previous_live
    ctypedef struct index_page:
        index_header header
        uint64_t rows, seq
        index_state state[2]
        swing_note swing
    ctypedef struct shard_header:
        uint32_t crc, intact, cls, depth
        uint64_t prefix, used
    ctypedef struct bucket_view:
        unsigned match, empty, deleted
    bucket_view bucket_look(const uint64_t *slots, uint32_t tag)
    uint64_t DIRECTORY_PAGE(uint64_t word)
    unsigned DIRECTORY_DEPTH(uint64_t word)
    uint64_t DIRECTORY_WORD(uint64_t page, unsigned depth, uint64_t seq)
    uint64_t ENTRY_PAGE(uint64_t entry)
    unsigned ENTRY_CLASS(uint64_t entry)
    unsigned ENTRY_DEPTH(uint64_t entry)
    uint64_t ENTRY(uint64_t page, unsigned cls, unsigned depth)

    const char *CONTROL_MAGIC
    const unsigned CONTROL_NOTES, CONTROL_NOTES_END
    ctypedef struct control_manifest:
        uint64_t generation, inode, ctime, noted
    ctypedef struct control_page:
        char magic[8]
        uint32_t format, crc
        uint64_t identity, clean
        uint8_t boot[16]
        uint64_t device, inode, index_inode
        control_manifest manifest[2]
        uint64_t index_nonce, epoch, merges, last_version, reserved_end, durable_number, durable_end, sync_failed

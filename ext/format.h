/* The on-disk format, format 0: byte maps, summed constants, inline pack and unpack.  No Python here.
   docs/format.md explains the same bytes in prose.  All integers are little-endian. */
#ifndef LOGKV_FORMAT_H
#define LOGKV_FORMAT_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "crc32c.h"

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "LogKV stores little-endian integers and has not been ported to big-endian machines"
#endif

enum {
    FORMAT_VERSION = 0,
    HASH_SIPHASH_1_3 = 1,
    PAGE_BYTES = 4096,
};

/* ---- location: where a record is, in 40 bits ------------------------------------------------------------
   Units of 8 bytes in a space of 8 TiB.  A segment owns a run of chunks of 16 MiB there; its first chunk is
   in the MANIFEST.  Location 0 would be a segment's header, so 0 and 1 are free to mean something else. */
enum {
    LOCATION_BITS = 40,
    LOCATION_UNIT_SHIFT = 3,
    CHUNK_SHIFT = 24,                                       /* bytes of a chunk, as a power of two */
    CHUNK_UNIT_SHIFT = CHUNK_SHIFT - LOCATION_UNIT_SHIFT,
    CHUNK_COUNT = 1 << (LOCATION_BITS - CHUNK_UNIT_SHIFT),
};
#define CHUNK_BYTES ((uint64_t)1 << CHUNK_SHIFT)
#define LOCATION_MASK (((uint64_t)1 << LOCATION_BITS) - 1)

/* ---- segment: header, records, then zeros or a footer --------------------------------------------------- */
#define SEGMENT_MAGIC "LogKVseg"

typedef struct {
    char     magic[8];
    uint16_t format;
    uint16_t hash;                 /* HASH_SIPHASH_1_3 */
    uint32_t compatible;           /* feature masks: unknown bits may be passed over ... */
    uint32_t read_compatible;      /* ... may be passed over by readers only ... */
    uint32_t incompatible;         /* ... may not be passed over */
    uint64_t number;               /* the file's number, never used twice */
    uint64_t identity;             /* the store's */
    uint8_t  seed[16];             /* of the hash */
    uint32_t salt;                 /* random; goes into every record's checksum */
    uint32_t crc;                  /* of the 60 bytes before it */
} segment_header;
_Static_assert(sizeof(segment_header) == 64, "segment header");

enum {
    SEGMENT_HEADER_BYTES = 64,
    SEGMENT_MIN_BYTES = 64 << 10,
    SEGMENT_MAX_BYTES = 1 << 30,
};

static inline void segment_header_pack(segment_header *h, uint64_t number, uint64_t identity,
                                       const uint8_t *seed, uint32_t salt) {
    memset(h, 0, sizeof *h);
    memcpy(h->magic, SEGMENT_MAGIC, 8);
    h->format = FORMAT_VERSION;
    h->hash = HASH_SIPHASH_1_3;
    h->number = number;
    h->identity = identity;
    memcpy(h->seed, seed, 16);
    h->salt = salt;
    h->crc = crc32c(0, h, offsetof(segment_header, crc));
}

/* ---- record: aligned to 8 bytes ------------------------------------------------------------------------- */
typedef struct {
    uint32_t crc;                  /* of everything after it up to the end of the key, and of the value unless
                                      that has its own; begun from the salt and the record's offset */
    uint32_t value_length;
    uint64_t version;
    uint16_t key_length;
    uint8_t  kind;
    uint8_t  flags;
} record_header;                   /* 20 bytes used; the compiler's padding is where fields or key begin */

enum record_kind {
    KIND_END = 0,                  /* zeros: the log ends here */
    KIND_PUT = 1,
    KIND_DELETE = 2,
    KIND_CONTINUES = 3,            /* first record of a successor: names its predecessor and that one's end */
    KIND_CLEAR = 4,
    KIND_SYNC_MARK = 5,            /* appended after a sync returned: how far the log was then on the device */
    KIND_BATCH = 6,                /* reserved: length of a run of records that count together or not at all */
    KIND_DICTIONARY = 7,           /* reserved: for compressed values */
    KIND_FOOTER = 8,
    KINDS_KNOWN = 1 << KIND_PUT | 1 << KIND_DELETE | 1 << KIND_CONTINUES | 1 << KIND_CLEAR | 1 << KIND_SYNC_MARK
                | 1 << KIND_FOOTER,
};

enum record_flag {                 /* each announces a field, stored in this order */
    FLAG_EXPIRY = 1,               /* u64: reserved */
    FLAG_VALUE_CRC = 2,            /* u32: set exactly where the value is longer than VALUE_CRC_ABOVE */
    FLAG_CODEC = 4,                /* u32: reserved */
    FLAGS_KNOWN = FLAG_VALUE_CRC,
};

enum {
    RECORD_HEADER_BYTES = 20,
    RECORD_ALIGN = 8,
    EXPIRY_BYTES = 8,
    VALUE_CRC_BYTES = 4,
    CODEC_BYTES = 4,
    VALUE_CRC_ABOVE = 4096,
    KEY_MAX = 65535,
    CONTINUES_VALUE_BYTES = 24,
    SYNC_MARK_VALUE_BYTES = 16,
};
#define VALUE_MAX ((uint64_t)UINT32_MAX)
#define VERSION_MAX ((uint64_t)INT64_MAX)      /* so that there is always a next one */
_Static_assert(offsetof(record_header, flags) + 1 == RECORD_HEADER_BYTES, "record header");

/* What stands in a value begins at a multiple of 4 only. */
#define IN_A_VALUE __attribute__((packed, aligned(4)))
typedef struct { uint64_t number, end, version; } IN_A_VALUE continues_value;
_Static_assert(sizeof(continues_value) == CONTINUES_VALUE_BYTES, "continues");
typedef struct { uint64_t number, end; } IN_A_VALUE sync_mark_value;
_Static_assert(sizeof(sync_mark_value) == SYNC_MARK_VALUE_BYTES, "sync mark");

static inline unsigned record_fields(unsigned flags) {          /* bytes of the optional fields, reserved ones too */
    return (flags & FLAG_EXPIRY ? EXPIRY_BYTES : 0) + (flags & FLAG_VALUE_CRC ? VALUE_CRC_BYTES : 0)
         + (flags & FLAG_CODEC ? CODEC_BYTES : 0);
}

static inline unsigned value_crc_at(unsigned flags) {
    return RECORD_HEADER_BYTES + (flags & FLAG_EXPIRY ? EXPIRY_BYTES : 0);
}

static inline uint64_t record_span(uint64_t fields, uint64_t key_length, uint64_t value_length) {
    return (RECORD_HEADER_BYTES + fields + key_length + value_length + RECORD_ALIGN - 1) & ~(uint64_t)(RECORD_ALIGN - 1);
}

static inline uint64_t record_size(uint64_t key_length, uint64_t value_length) {    /* of a record as it is written now */
    return record_span(value_length > VALUE_CRC_ABOVE ? VALUE_CRC_BYTES : 0, key_length, value_length);
}

#define RECORD_LONGEST record_size(KEY_MAX, VALUE_MAX)

static inline uint32_t record_crc_begin(uint32_t salt, uint64_t offset) {
    return salt ^ (uint32_t)(offset >> LOCATION_UNIT_SHIFT);
}

/* Writes a whole record at p, the checksum last.  The padding is written too. */
static inline void record_pack(uint8_t *p, uint32_t salt, uint64_t offset, uint8_t kind, uint64_t version,
                               const void *key, uint32_t key_length, const void *value, uint32_t value_length) {
    record_header h = {0, value_length, version, (uint16_t)key_length, kind, 0};
    uint32_t begin = record_crc_begin(salt, offset);
    uint8_t *q = p + RECORD_HEADER_BYTES;
    uint8_t *end = p + record_size(key_length, value_length);
    uint32_t value_crc = 0;
    size_t head;

    if (value_length > VALUE_CRC_ABOVE) h.flags |= FLAG_VALUE_CRC;
    memset(end - RECORD_ALIGN, 0, RECORD_ALIGN);
    memcpy(p + 4, (char *)&h + 4, RECORD_HEADER_BYTES - 4);
    q += record_fields(h.flags);
    memcpy(q, key, key_length);
    memcpy(q + key_length, value, value_length);
    if (h.flags & FLAG_VALUE_CRC) {
        value_crc = crc32c(begin, q + key_length, value_length);
        memcpy(p + value_crc_at(h.flags), &value_crc, VALUE_CRC_BYTES);
        head = (size_t)(q - p) + key_length - 4;
    } else {
        head = RECORD_HEADER_BYTES - 4 + key_length + (size_t)value_length;
    }
    h.crc = crc32c(begin, p + 4, head);
    __atomic_store_n((uint32_t *)p, h.crc, __ATOMIC_RELEASE);
}

static inline uint64_t record_head(const record_header *h) {    /* bytes behind the checksum that it covers */
    return RECORD_HEADER_BYTES - 4 + record_fields(h->flags) + h->key_length
         + (h->flags & FLAG_VALUE_CRC ? 0 : h->value_length);
}

static inline int flags_fit(const record_header *h) {
    return !(h->flags & FLAG_VALUE_CRC) == (h->value_length <= VALUE_CRC_ABOVE);
}

enum record_status {
    RECORD_OK = 0,
    RECORD_END,                    /* zeros where a record would begin */
    RECORD_TRUNCATED,              /* the space ends inside it */
    RECORD_UNKNOWN,                /* a kind or flag that this version does not know */
    RECORD_BAD_CRC,                /* of header and key (and of a value of up to VALUE_CRC_ABOVE) */
    RECORD_BAD_VALUE,              /* of a longer value */
};

typedef struct {
    const uint8_t *key, *value;
    uint64_t version, size;        /* size: whole record, aligned */
    uint32_t value_length, crc, found;
    uint16_t key_length;
    uint8_t  kind;
} record_view;

/* Reads the record at p, where `space` bytes are readable; never follows a length before it is checked.
   Without `check_value` a longer value's own checksum is left to the caller. */
static inline int record_unpack(record_view *r, const uint8_t *p, uint64_t space, uint32_t salt, uint64_t offset,
                                int check_value) {
    record_header h;
    uint32_t begin = record_crc_begin(salt, offset), value_crc;
    uint64_t head, total;
    const uint8_t *q = p + RECORD_HEADER_BYTES;

    r->crc = r->found = 0;
    r->size = 0;
    if (space < RECORD_HEADER_BYTES + 4) return RECORD_TRUNCATED;
    memcpy(&h, p, RECORD_HEADER_BYTES);
    if (h.kind == KIND_END && h.version == 0 && h.crc == 0 && h.value_length == 0) return RECORD_END;
    total = record_span(record_fields(h.flags), h.key_length, h.value_length);
    r->size = total;
    if (total > space) return RECORD_TRUNCATED;
    q += record_fields(h.flags);
    head = record_head(&h);
    r->key = q;
    r->value = q + h.key_length;
    r->version = h.version;
    r->value_length = h.value_length;
    r->key_length = h.key_length;
    r->kind = h.kind;
    r->crc = h.crc;
    if (!flags_fit(&h)) return RECORD_BAD_CRC;
    r->found = crc32c(begin, p + 4, head);
    if (r->found != h.crc) return RECORD_BAD_CRC;
    if (h.kind > KIND_FOOTER || !(KINDS_KNOWN >> h.kind & 1) || (h.flags & ~FLAGS_KNOWN)) return RECORD_UNKNOWN;
    if ((h.flags & FLAG_VALUE_CRC) && check_value) {
        memcpy(&value_crc, p + value_crc_at(h.flags), VALUE_CRC_BYTES);
        r->found = crc32c(begin, r->value, h.value_length);
        r->crc = value_crc;
        if (r->found != value_crc) return RECORD_BAD_VALUE;
    }
    return RECORD_OK;
}

/* How far the record at p reaches, as its header says, which was not verified. */
static inline uint64_t record_reach(const uint8_t *p) {
    record_header h;
    memcpy(&h, p, RECORD_HEADER_BYTES);
    return record_span(record_fields(h.flags), h.key_length, h.value_length);
}

/* What its checksum would cover, likewise; and whether a record may say so. */
static inline uint64_t record_covered(const uint8_t *p) {
    record_header h;
    memcpy(&h, p, RECORD_HEADER_BYTES);
    return record_head(&h);
}

static inline int record_flags_fit(const uint8_t *p) {
    record_header h;
    memcpy(&h, p, RECORD_HEADER_BYTES);
    return flags_fit(&h);
}

/* Key and lengths of a record that was verified before. */
static inline void record_peek(record_view *r, const uint8_t *p) {
    record_header h;
    memcpy(&h, p, RECORD_HEADER_BYTES);
    r->key = p + RECORD_HEADER_BYTES + record_fields(h.flags);
    r->key_length = h.key_length;
    r->value = r->key + h.key_length;
    r->value_length = h.value_length;
    r->version = h.version;
    r->kind = h.kind;
}

/* ---- footer: the value of a record of kind footer ------------------------------------------------------- */
typedef struct {
    uint64_t first_version, last_version;
    uint64_t records;              /* of every kind, between header and footer */
    uint64_t entries;              /* that follow: one for each key, its newest record, in key order */
} IN_A_VALUE footer_header;
_Static_assert(sizeof(footer_header) == 32, "footer header");

typedef struct {
    uint64_t hash;
    uint32_t unit;                 /* the record's offset / 8 */
    uint32_t size_kind;            /* its size / 8 in the lower 30 bits; above them put or delete */
} IN_A_VALUE footer_entry;
_Static_assert(sizeof(footer_entry) == 16, "footer entry");
#define FOOTER_SIZE_BITS 30
_Static_assert((((uint64_t)1 << 32) + KEY_MAX + 64) >> 3 < (uint64_t)1 << FOOTER_SIZE_BITS, "footer entry's size");

/* ---- index: header page, then extents of whole pages: rows, directories, shards ----------------------------
   A slot is 24 tag bits (the top of the hash) and a location.  A bucket is a cache line of eight.  A shard is
   a header line, buckets, and a byte a bucket that says which of its entries belong to another bucket.
   The directory maps the top bits of a hash to a shard; it is copied, changed, and published by one store
   of its word in the header, so a kill or a reader sees the old one or the new one. */
#define INDEX_MAGIC "LogKVidx"
enum {
    BUCKET_SLOTS = 8,
    BUCKET_BYTES = 64,
    TAG_SHIFT = LOCATION_BITS,
    SLOT_EMPTY = 0,
    SLOT_DELETED = 1,              /* of a bucket that was full: the search goes on behind it */
    SHARD_CLASSES = 5,
    SHARD_HEADER_BYTES = 64,
    SHARD_FULL_PAGES = 288,
    DIRECTORY_DEPTH_MAX = 20,
};

typedef struct {
    char     magic[8];
    uint32_t format;
    uint32_t crc;                  /* of page 0 (this field and `directory` zero), rows and directory; valid in a clean index */
    uint64_t identity;
    uint64_t epoch;                /* the MANIFEST's: how often the store was cleared */
    uint64_t nonce;                /* this file's name in the control page */
    uint64_t directory;            /* directory word: page 32 bits | depth 8 bits | sequence 24 bits */
    uint64_t pages;                /* of the file, allocated */
    uint64_t clean_directory;      /* the directory word that crc covers */
} index_header;
_Static_assert(sizeof(index_header) == 64, "index header");

typedef struct {                   /* what is derived, as of one end of the log */
    uint64_t seq;                  /* block seq % 2 is current while the page's seq == seq */
    uint64_t number, end;          /* of the log: file number and offset */
    uint64_t version;              /* last given out */
    uint64_t keys;
    uint64_t live;                 /* live word of the segment `number` */
    uint64_t previous;             /* the slot that the last record replaced, 0: none */
    uint64_t previous_live;        /* live word of that one's segment */
} index_state;
_Static_assert(sizeof(index_state) == 64, "index state");

/* live word: how many of a segment's records the index points to, and an eighth of their aligned bytes */
static inline uint64_t live_more(uint64_t live, uint64_t size) { return live + ((uint64_t)1 << 32 | size >> 3); }

static inline uint64_t live_less(uint64_t live, uint64_t size) {    /* a damaged record's size may be anything */
    uint64_t records = live >> 32, units = live & UINT32_MAX;
    return (records - (records > 0)) << 32 | (units > size >> 3 ? units - (size >> 3) : 0);
}

typedef struct {                   /* what of a segment is alive */
    uint64_t chunk;                /* the segment's first chunk plus 1; 0: nobody's */
    uint64_t live;                 /* a live word */
} segment_row;
enum { ROWS_A_PAGE = PAGE_BYTES / sizeof(segment_row) };
#define ROWS_PAGE(w) ((w) >> 32)
#define ROWS_PAGES(w) ((w) & UINT32_MAX)
#define ROWS_WORD(page, pages) ((uint64_t)(page) << 32 | (pages))

typedef struct {                   /* a slot that compaction is about to change from one copy of a record to the other */
    uint64_t location;             /* of the new one; 0: none.  Written last, and zero again when all is done */
    uint64_t chunk;                /* first one of the segment that the old copy is in */
    uint64_t live, previous_live;  /* the live words of the two segments afterwards */
} swing_note;

typedef struct {                   /* page 0: the header, and on lines of its own, for a put writes it, the state */
    index_header header;           /*   0 */
    uint64_t rows;                 /*  64  where the segments' rows are: page 32 bits | pages 32 bits */
    uint8_t  zero1[184];
    uint64_t seq;                  /* 256  selects the state block */
    uint8_t  zero2[56];
    index_state state[2];          /* 320 */
    swing_note swing;              /* 448 */
    uint8_t  zero3[PAGE_BYTES - 480];
} index_page;
_Static_assert(offsetof(index_page, seq) == 256, "index page");
_Static_assert(offsetof(index_page, state) == 320, "index page");
_Static_assert(sizeof(index_page) == PAGE_BYTES, "index page");

#define DIRECTORY_PAGE(w) ((w) >> 32)
#define DIRECTORY_DEPTH(w) ((unsigned)((w) >> 24) & 0xff)
#define DIRECTORY_WORD(page, depth, seq) (((uint64_t)(page) << 32) | ((uint64_t)(depth) << 24) | ((seq) & 0xffffff))

/* directory entry: page 32 bits | shard class 8 bits | depth 8 bits | zero */
#define ENTRY_PAGE(e) ((e) >> 32)
#define ENTRY_CLASS(e) ((unsigned)((e) >> 24) & 0xff)
#define ENTRY_DEPTH(e) ((unsigned)((e) >> 16) & 0xff)
#define ENTRY(page, cls, depth) (((uint64_t)(page) << 32) | ((uint64_t)(cls) << 24) | ((uint64_t)(depth) << 16))

typedef struct {
    uint32_t crc;                  /* of the rest of the shard from `cls` on; valid while intact is 1 */
    uint32_t intact;               /* cleared before the first store into the shard after a clean close */
    uint32_t cls, depth;
    uint64_t prefix;               /* the first hash that belongs here */
    uint64_t used;                 /* slots that are not empty, or one more after a kill */
    uint8_t  zero[32];
} shard_header;
_Static_assert(sizeof(shard_header) == SHARD_HEADER_BYTES, "shard header");

static const uint32_t SHARD_PAGES[SHARD_CLASSES] = {1, 4, 16, 64, SHARD_FULL_PAGES};
/* (pages * 4096 - header) / (a bucket and its byte) */
static const uint32_t SHARD_BUCKETS[SHARD_CLASSES] = {62, 251, 1007, 4032, 18147};

static inline uint32_t shard_limit(unsigned cls) {          /* slots in use at which a shard grows: 15/16 */
    return SHARD_BUCKETS[cls] * BUCKET_SLOTS / 16 * 15;
}

/* One look at a bucket: bit i of `match` for a slot with this tag, of `empty` and `deleted` likewise.  Each slot is
   read whole, but they may be of different moments: whoever follows one loads it again. */
typedef struct { unsigned match, empty, deleted; } bucket_view;

#if defined(__SSE2__) && !defined(__SANITIZE_THREAD__)
#include <emmintrin.h>
static inline bucket_view bucket_look(const uint64_t *slots, uint32_t tag) {
    const __m128i *line = (const __m128i *)slots, zero = _mm_setzero_si128();
    bucket_view view = {0, 0, 0};
    for (int half = 0; half < 2; half++) {
        __m128 a = _mm_castsi128_ps(_mm_load_si128(line + 2 * half));
        __m128 b = _mm_castsi128_ps(_mm_load_si128(line + 2 * half + 1));
        __m128i low = _mm_castps_si128(_mm_shuffle_ps(a, b, _MM_SHUFFLE(2, 0, 2, 0)));
        __m128i high = _mm_castps_si128(_mm_shuffle_ps(a, b, _MM_SHUFFLE(3, 1, 3, 1)));
        __m128i same = _mm_cmpeq_epi32(_mm_srli_epi32(high, TAG_SHIFT - 32), _mm_set1_epi32((int)tag));
        __m128i none = _mm_cmpeq_epi32(high, zero);
        __m128i empty = _mm_and_si128(none, _mm_cmpeq_epi32(low, zero));
        __m128i deleted = _mm_and_si128(none, _mm_cmpeq_epi32(low, _mm_set1_epi32(SLOT_DELETED)));
        view.match |= (unsigned)_mm_movemask_ps(_mm_castsi128_ps(same)) << (4 * half);
        view.empty |= (unsigned)_mm_movemask_ps(_mm_castsi128_ps(empty)) << (4 * half);
        view.deleted |= (unsigned)_mm_movemask_ps(_mm_castsi128_ps(deleted)) << (4 * half);
    }
    view.match &= ~(view.empty | view.deleted);
    return view;
}
#else
static inline bucket_view bucket_look(const uint64_t *slots, uint32_t tag) {
    bucket_view view = {0, 0, 0};
    for (int i = 0; i < BUCKET_SLOTS; i++) {
        uint64_t value = __atomic_load_n(slots + i, __ATOMIC_ACQUIRE);
        view.empty |= (unsigned)(value == SLOT_EMPTY) << i;
        view.deleted |= (unsigned)(value == SLOT_DELETED) << i;
        view.match |= (unsigned)(value > SLOT_DELETED && value >> TAG_SHIFT == tag) << i;
    }
    return view;
}
#endif

/* ---- control: one page, mapped by every process, never replaced ----------------------------------------- */
#define CONTROL_MAGIC "LogKVctl"

typedef struct {                   /* a MANIFEST that `control` vouches for */
    uint64_t generation, inode, ctime;   /* ctime: ns; 0 while the rename is under way */
    uint64_t noted;                /* when this note was made: ns */
} control_manifest;

typedef struct {
    char     magic[8];             /*   0 */
    uint32_t format;
    uint32_t crc;                  /*  12  of the page but for itself and bytes 32 to 135; valid while clean is set */
    uint64_t identity;             /*  16 */
    uint64_t clean;                /*  24  closed, index and log on the device and in agreement: the MANIFEST's
                                           generation then; 0: not */
    uint8_t  boot[16];             /*  32  the boot id under which the rest is true */
    uint64_t device, inode;        /*  48  of this file */
    uint64_t index_inode;          /*  64 */
    control_manifest manifest[2];  /*  72  the one in force, the coming one */
    uint8_t  zero1[56];            /* 136 */
    uint64_t index_nonce;          /* 192  the index to use, 0: none.  Every get reads this line. */
    uint64_t epoch;                /* 200  of the MANIFEST in force, or of the coming one that clears the store */
    uint64_t merges;               /* 208  rises when segments have gone: whoever maps them lets go */
    uint8_t  zero2[40];
    uint64_t last_version;         /* 256  published */
    uint64_t reserved_end;         /* 264  bytes up to here may hold an unfinished record */
    uint64_t durable_number;       /* 272  on the device up to here */
    uint64_t durable_end;          /* 280 */
    uint64_t sync_failed;          /* 288  errno of a sync that failed */
    uint64_t batch_pending;        /* 296  reserved: location of a committed batch whose slots are not all set */
    uint64_t batch_count;          /* 304  reserved */
    uint8_t  zero3[PAGE_BYTES - 312];
} control_page;
enum { CONTROL_NOTES = 32, CONTROL_NOTES_END = 136 };   /* what a writer notes while the page is still clean */
_Static_assert(offsetof(control_page, boot) == CONTROL_NOTES, "control");
_Static_assert(offsetof(control_page, zero1) == CONTROL_NOTES_END, "control");
_Static_assert(offsetof(control_page, index_nonce) == 192, "control");
_Static_assert(offsetof(control_page, last_version) == 256, "control");
_Static_assert(sizeof(control_page) == PAGE_BYTES, "control");

#endif

/* Makes inputs for the fuzzer: bytes of a real store, changed where a parser looks, with checksums that are right again. */
#include "fuzz_input.h"

#include <stdlib.h>

#include "format.h"

enum { SEEDS_MAX = 256, RECORDS_MAX = 256 };

enum { SHORT, LONG, WITH_INDEX, SORTS, SHORT_MAX = 2048 };

static struct { uint8_t *data; size_t size; } seeds[SEEDS_MAX];
static unsigned seed_count, of_sort[SORTS][SEEDS_MAX], sort_count[SORTS];

typedef struct {                   /* an input that is being changed */
    uint8_t *segment, *index;
    fuzz_head head;
    size_t index_size;
    uint64_t dice;
    uint32_t at[RECORDS_MAX];      /* its records */
    unsigned records;
} input;

int fuzz_add_seed(const uint8_t *data, size_t size) {
    fuzz_head head;
    unsigned sort;
    if (seed_count == SEEDS_MAX || size > FUZZ_MAX || size < sizeof head) return 0;
    memcpy(&head, data, sizeof head);
    sort = size - sizeof head > head.segment ? WITH_INDEX : size > SHORT_MAX ? LONG : SHORT;
    seeds[seed_count].data = malloc(size);
    if (!seeds[seed_count].data) return 0;
    memcpy(seeds[seed_count].data, data, size);
    seeds[seed_count].size = size;
    of_sort[sort][sort_count[sort]++] = seed_count++;
    return 1;
}

static uint64_t roll(input *in) {                               /* splitmix64 */
    uint64_t z = in->dice += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static uint64_t below(input *in, uint64_t n) { return n ? roll(in) % n : 0; }

/* Lengths, offsets and numbers that are at a border, or near to one that this input has. */
static uint64_t awkward(input *in) {
    static const uint64_t borders[] = {
        0, 1, 7, 8, 20, 24, 63, 64, 4095, 4096, 4097, 65535, 65536, 1 << 20, 1 << 24, 1 << 30, INT32_MAX, UINT32_MAX,
        (uint64_t)1 << 40, (uint64_t)1 << 61, INT64_MAX, UINT64_MAX,
    };
    uint64_t near = below(in, 9) - 4;
    switch (below(in, 4)) {
        case 0: return in->head.segment + near;
        case 1: return (in->records ? in->at[below(in, in->records)] : 0) + near;
        case 2: return roll(in) >> below(in, 64);
        default: return borders[below(in, sizeof borders / sizeof *borders)] + (below(in, 3) ? 0 : near);
    }
}

static void find_records(input *in) {
    uint64_t offset = SEGMENT_HEADER_BYTES;
    in->records = 0;
    while (in->records < RECORDS_MAX && offset + RECORD_HEADER_BYTES <= in->head.segment) {
        if (in->segment[offset + offsetof(record_header, kind)] == KIND_END) break;
        in->at[in->records++] = (uint32_t)offset;
        offset += record_reach(in->segment + offset);
    }
}

static uint64_t reach_of(input *in, unsigned record) {          /* bytes of it that are there */
    uint64_t left = in->head.segment - in->at[record], reach = record_reach(in->segment + in->at[record]);
    return reach < left ? reach : left;
}

static void store(uint8_t *at, uint64_t value, size_t bytes) { memcpy(at, &value, bytes); }

/* -- the segment ------------------------------------------------------------------------------------------ */

static void change_field(input *in) {                           /* of a record's header */
    static const struct { uint8_t at, bytes; } fields[] = {
        {offsetof(record_header, value_length), 4}, {offsetof(record_header, version), 8},
        {offsetof(record_header, key_length), 2}, {offsetof(record_header, kind), 1}, {offsetof(record_header, flags), 1},
        {offsetof(record_header, crc), 4},
    };
    unsigned field = (unsigned)below(in, sizeof fields / sizeof *fields);
    uint8_t *record = in->segment + in->at[below(in, in->records)];
    uint64_t value = fields[field].bytes == 1 ? below(in, 10) : awkward(in);
    if (record + RECORD_HEADER_BYTES <= in->segment + in->head.segment)
        store(record + fields[field].at, value, fields[field].bytes);
}

static void change_body(input *in) {                            /* of a record: what footers, links and marks say */
    unsigned record = (unsigned)below(in, in->records);
    uint64_t reach = reach_of(in, record);
    if (reach >= RECORD_HEADER_BYTES + 8)
        store(in->segment + in->at[record] + RECORD_HEADER_BYTES + below(in, (reach - RECORD_HEADER_BYTES - 8) / 4 + 1) * 4,
              awkward(in), below(in, 2) ? 8 : 4);
}

static void copy_record(input *in) {                            /* over another one, or behind the last */
    unsigned from = (unsigned)below(in, in->records), to = (unsigned)below(in, in->records + 1u);
    uint64_t bytes = reach_of(in, from), room;
    uint64_t at = to < in->records ? in->at[to] : in->at[in->records - 1] + reach_of(in, in->records - 1);
    room = FUZZ_SEGMENT_MAX - at;
    if (bytes > room) bytes = room;
    memmove(in->segment + at, in->segment + in->at[from], bytes);
    if (at + bytes > in->head.segment) in->head.segment = (uint32_t)(at + bytes);
}

static void remove_record(input *in) {
    unsigned record = (unsigned)below(in, in->records);
    uint64_t bytes = reach_of(in, record), at = in->at[record];
    memmove(in->segment + at, in->segment + at + bytes, in->head.segment - at - bytes);
    in->head.segment -= (uint32_t)bytes;
}

static void splice(input *in) {                                 /* a piece of another input */
    unsigned other = (unsigned)below(in, seed_count);
    if (seed_count == 0) return;
    uint64_t size = seeds[other].size - sizeof(fuzz_head), from = below(in, size) & ~(uint64_t)7;
    uint64_t at = below(in, in->head.segment) & ~(uint64_t)7, bytes = 1 + below(in, 256);
    if (bytes > size - from) bytes = size - from;
    if (bytes > FUZZ_SEGMENT_MAX - at) bytes = FUZZ_SEGMENT_MAX - at;
    memcpy(in->segment + at, seeds[other].data + sizeof(fuzz_head) + from, bytes);
    if (at + bytes > in->head.segment) in->head.segment = (uint32_t)(at + bytes);
}

static void change_head(input *in) {
    switch (below(in, 4)) {
        case 0: in->head.version = awkward(in); break;
        case 1: in->head.end = (uint32_t)awkward(in); break;
        case 2: in->head.end = in->records ? in->at[below(in, in->records)] : 0; break;
        default: in->head.what ^= (uint64_t)1 << below(in, 7);
    }
}

static void change_segment(input *in) {
    uint64_t size = in->head.segment, at = below(in, size), bytes;
    find_records(in);
    switch (below(in, in->records ? 13 : 6)) {
        case 0: if (size) in->segment[at] ^= (uint8_t)(1 << below(in, 8)); break;
        case 1: if (size) in->segment[at] = (uint8_t)roll(in); break;
        case 2: if (size > 8) store(in->segment + (below(in, size - 7) & ~(uint64_t)3), awkward(in), below(in, 2) ? 8 : 4); break;
        case 3: splice(in); break;
        case 4: in->head.segment = (uint32_t)(below(in, 2) ? at : at & ~(uint64_t)7); break;
        case 5:
            bytes = 1 + below(in, 64);
            memset(in->segment + at, below(in, 2) ? 0 : (int)below(in, 256), bytes < size - at ? bytes : size - at);
            break;
        case 6: copy_record(in); break;
        case 7: remove_record(in); break;
        case 8: change_head(in); break;
        case 9: case 10: change_body(in); break;
        default: change_field(in);
    }
}

static void mend_segment(input *in) {                           /* all checksums are right, as far as lengths lead */
    segment_header *header = (segment_header *)in->segment;
    uint64_t offset, reach, head;
    uint32_t begin, crc;
    if (in->head.segment < SEGMENT_HEADER_BYTES) return;
    header->crc = crc32c(0, header, offsetof(segment_header, crc));
    find_records(in);
    for (unsigned i = 0; i < in->records; i++) {
        uint8_t *p = in->segment + in->at[i];
        record_header h;
        memcpy(&h, p, RECORD_HEADER_BYTES);
        offset = in->at[i];
        reach = RECORD_HEADER_BYTES + record_fields(h.flags) + h.key_length + (uint64_t)h.value_length;
        if (reach > in->head.segment - offset) return;
        begin = record_crc_begin(header->salt, offset);
        head = reach - 4;
        if (h.flags & FLAG_VALUE_CRC) {
            head -= h.value_length;
            crc = crc32c(begin, p + 4 + head, h.value_length);
            memcpy(p + value_crc_at(h.flags), &crc, sizeof crc);
        }
        crc = crc32c(begin, p + 4, head);
        memcpy(p, &crc, sizeof crc);
    }
}

/* -- the index -------------------------------------------------------------------------------------------- */

static void change_index(input *in) {
    index_page *page = (index_page *)in->index;
    uint64_t pages = in->index_size / PAGE_BYTES, value = awkward(in), *words = (uint64_t *)in->index, *slot;
    uint64_t directory = DIRECTORY_PAGE(page->header.directory), entry;
    switch (below(in, 9)) {
        case 0: in->index[below(in, in->index_size)] ^= (uint8_t)(1 << below(in, 8)); break;
        case 1: words[4 + below(in, 60)] = value; break;                            /* header, rows, state, note */
        case 2: words[32 + below(in, 28)] = value; break;                           /* state, note */
        case 3:
            page->header.directory = DIRECTORY_WORD(below(in, 3) ? below(in, pages + 1) : value, below(in, 23), value);
            break;
        case 4: page->rows = ROWS_WORD(below(in, pages + 1), below(in, pages + 2)); break;
        case 5:
            if (directory >= pages) break;
            words[directory * (PAGE_BYTES / 8) + below(in, 4)] = ENTRY(below(in, pages + 1), below(in, 6), below(in, 3));
            break;
        default:                                                                    /* a shard: its header, or a slot */
            if (directory >= pages) break;
            entry = ENTRY_PAGE(words[directory * (PAGE_BYTES / 8)]);
            if (entry >= pages) break;
            slot = words + entry * (PAGE_BYTES / 8);
            if (below(in, 3) == 0) {
                slot[below(in, 4)] = value;
                break;
            }
            slot += 8 + below(in, PAGE_BYTES / 8 - 8);
            for (int turn = 0; turn < 40 && *slot <= SLOT_DELETED; turn++)
                slot = words + entry * (PAGE_BYTES / 8) + 8 + below(in, PAGE_BYTES / 8 - 8);
            *slot = below(in, 2) ? value : (*slot & ~LOCATION_MASK) | (value & LOCATION_MASK);
    }
}

static void mend_index(input *in) {
    index_page *page = (index_page *)in->index, copy = *page;
    uint64_t pages = in->index_size / PAGE_BYTES, *words = (uint64_t *)in->index;
    uint64_t word = page->header.directory, at = DIRECTORY_PAGE(word), bytes = (uint64_t)8 << (DIRECTORY_DEPTH(word) & 31);
    if (at >= pages || DIRECTORY_DEPTH(word) > 9 || at * PAGE_BYTES + bytes > in->index_size) return;
    if (ROWS_PAGE(page->rows) + ROWS_PAGES(page->rows) > pages) return;
    for (uint64_t i = 0; i < bytes / 8; i++) {
        uint64_t entry = words[at * (PAGE_BYTES / 8) + i];
        uint8_t *shard = in->index + ENTRY_PAGE(entry) * PAGE_BYTES;
        if (ENTRY_CLASS(entry) >= SHARD_CLASSES || ENTRY_PAGE(entry) + SHARD_PAGES[ENTRY_CLASS(entry)] > pages) continue;
        ((shard_header *)shard)->crc = crc32c(0, shard + 8, SHARD_PAGES[ENTRY_CLASS(entry)] * PAGE_BYTES - 8);
        if (below(in, 4)) ((shard_header *)shard)->intact = 1;
    }
    copy = *page;
    copy.header.clean_directory = page->header.clean_directory = word;
    copy.header.crc = 0;
    copy.header.directory = 0;
    page->header.crc = crc32c(crc32c(crc32c(0, &copy, sizeof copy), in->index + ROWS_PAGE(page->rows) * PAGE_BYTES,
                                     ROWS_PAGES(page->rows) * PAGE_BYTES), in->index + at * PAGE_BYTES, bytes);
}

/* -- inputs ----------------------------------------------------------------------------------------------- */

size_t fuzz_change(uint8_t *data, size_t size, uint64_t seed) {
    static _Alignas(8) uint8_t segment[FUZZ_SEGMENT_MAX + 8], index[FUZZ_INDEX_MAX];
    input in = {.segment = segment, .index = index, .dice = seed};
    if (crc32c_table[0][1] == 0) crc32c_setup();
    if (size < sizeof in.head) return 0;
    memcpy(&in.head, data, sizeof in.head);
    size -= sizeof in.head;
    data += sizeof in.head;
    if (in.head.segment > size) in.head.segment = (uint32_t)size;
    if (in.head.segment > FUZZ_SEGMENT_MAX) in.head.segment = FUZZ_SEGMENT_MAX;
    memcpy(segment, data, in.head.segment);
    in.index_size = size - in.head.segment;
    if (in.index_size > FUZZ_INDEX_MAX) in.index_size = FUZZ_INDEX_MAX;
    in.index_size &= ~(size_t)(PAGE_BYTES - 1);
    memcpy(index, data + in.head.segment, in.index_size);

    uint64_t turns = 1 + below(&in, 3) * below(&in, 3);
    while (turns--) {
        if (in.index_size && below(&in, 3)) change_index(&in);
        else change_segment(&in);
    }
    if (below(&in, 4)) mend_segment(&in);
    if (in.index_size && below(&in, 4)) mend_index(&in);

    memcpy(data - sizeof in.head, &in.head, sizeof in.head);
    memcpy(data, segment, in.head.segment);
    memcpy(data + in.head.segment, index, in.index_size);
    return sizeof in.head + in.head.segment + in.index_size;
}

size_t fuzz_make(uint8_t *out, uint64_t seed, uint64_t number) {
    input in = {.dice = seed ^ number * 0xd1342543de82ef95u};
    uint64_t sort = below(&in, 64), also = roll(&in), *what = &((fuzz_head *)out)->what;
    sort = sort < 2 && sort_count[WITH_INDEX] ? WITH_INDEX : sort < 6 && sort_count[LONG] ? LONG : SHORT;
    if (sort_count[sort] == 0) return 0;
    unsigned from = of_sort[sort][below(&in, sort_count[sort])];
    memcpy(out, seeds[from].data, seeds[from].size);
    if (also % 8 == 0) *what |= FUZZ_READ;                      /* what takes longer, now and then */
    if (also >> 8 & 1 && also >> 9 & 1) *what |= FUZZ_BEHIND;
    if (also >> 16 & 1 && also >> 17 & 1) *what |= FUZZ_ORDER;
    return fuzz_change(out, seeds[from].size, roll(&in));
}

/* -- libFuzzer -------------------------------------------------------------------------------------------- */

#ifdef LOGKV_LIBFUZZER
int LLVMFuzzerRunDriver(int *argc, char ***argv, fuzz_callback callback);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed) {
    static uint8_t buffer[FUZZ_MAX];
    if (seed % 8 == 0 || size < sizeof(fuzz_head)) return LLVMFuzzerMutate(data, size, max_size);
    memcpy(buffer, data, size < FUZZ_MAX ? size : FUZZ_MAX);
    size = fuzz_change(buffer, size < FUZZ_MAX ? size : FUZZ_MAX, seed);
    if (size > max_size) size = max_size;
    memcpy(data, buffer, size);
    return size;
}

int fuzz_guided(int argc, char **argv, fuzz_callback callback) { return LLVMFuzzerRunDriver(&argc, &argv, callback); }
#else
int fuzz_guided(int argc, char **argv, fuzz_callback callback) {
    (void)argc; (void)argv; (void)callback;
    return -1;
}
#endif

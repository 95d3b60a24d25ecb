/* Inputs of the fuzzer's target `scan`: a head, a segment, perhaps an index; and how one is made of another. */
#ifndef LOGKV_FUZZ_INPUT_H
#define LOGKV_FUZZ_INPUT_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
    uint32_t segment;              /* bytes of the segment; what follows it is an index */
    uint32_t end;                  /* where its records are said to end; 0: not said */
    uint64_t version;              /* that the scan begins with */
    uint64_t what;                 /* bits: FUZZ_... */
} fuzz_head;
_Static_assert(sizeof(fuzz_head) == 24, "fuzz head");

enum {
    FUZZ_MERGED = 1,               /* in the order of keys */
    FUZZ_FOOTER = 2,               /* the footer is replayed, not the records */
    FUZZ_BEHIND = 4,               /* what recovery and verification look for behind damage */
    FUZZ_ORDER = 8,                /* a footer is made */
    FUZZ_READ = 16,                /* all entries are searched for and read */
    FUZZ_CLEAN = 32,               /* the index was closed cleanly: its checksums must be right */
    FUZZ_WRITE = 64,               /* and then the store is written to */
    FUZZ_SEGMENT_MAX = 16 << 10,
    FUZZ_INDEX_MAX = 32 << 10,
    FUZZ_MAX = sizeof(fuzz_head) + FUZZ_SEGMENT_MAX + FUZZ_INDEX_MAX,
};

/* Adds a valid input, which is copied, to those that others are made of; 0 if it is too long or there is no memory. */
int fuzz_add_seed(const uint8_t *data, size_t size);

/* Makes the input with this number: the same one every time.  Returns its size. */
size_t fuzz_make(uint8_t *out, uint64_t seed, uint64_t number);

/* Changes an input a little; with checksums made anew more often than not.  Returns its size, FUZZ_MAX at the most. */
size_t fuzz_change(uint8_t *data, size_t size, uint64_t seed);

#if defined(__SANITIZE_ADDRESS__)
#define FUZZ_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FUZZ_ASAN
#endif
#endif
#ifdef FUZZ_ASAN
void __asan_poison_memory_region(void const volatile *start, size_t size);
void __asan_unpoison_memory_region(void const volatile *start, size_t size);
#define fuzz_poison(start, size) __asan_poison_memory_region((start), (size))
#define fuzz_unpoison(start, size) __asan_unpoison_memory_region((start), (size))
#else
#define fuzz_poison(start, size) ((void)(start), (void)(size))
#define fuzz_unpoison(start, size) ((void)(start), (void)(size))
#endif

/* clang's libFuzzer, where it is linked: calls back until it ends the process. */
typedef int (*fuzz_callback)(const uint8_t *data, size_t size);
int fuzz_guided(int argc, char **argv, fuzz_callback callback);

#endif

from libc.stdint cimport uint8_t, uint64_t

cdef extern from "platform.h" nogil:
    uint64_t atomic_load(uint64_t *p)
    void atomic_store(uint64_t *p, uint64_t value)
    void atomic_fence()
    unsigned lowest_bit(unsigned mask)
    void prefetch(const void *p)
    uint64_t clock_ns()
    int populate(uint8_t *start, uint64_t length, bint for_writing)
    unsigned long c_filesystem_magic "filesystem_magic" (int fd)

cdef extern from "siphash.h" nogil:
    uint64_t siphash13(const uint64_t *seed, const void *data, size_t length)

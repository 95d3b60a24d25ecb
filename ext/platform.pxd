from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "platform.h" nogil:
    uint64_t atomic_load(uint64_t *p)
    void atomic_store(uint64_t *p, uint64_t value)
    uint32_t atomic_load_word "atomic_load" (uint32_t *p)
    void atomic_store_word "atomic_store" (uint32_t *p, uint32_t value)
    uint8_t atomic_load_byte "atomic_load" (uint8_t *p)
    void atomic_store_byte "atomic_store" (uint8_t *p, uint8_t value)
    void *atomic_load_pointer "atomic_load" (void **p)
    void atomic_store_pointer "atomic_store" (void **p, void *value)
    uint64_t relaxed_load(uint64_t *p)
    void relaxed_store(uint64_t *p, uint64_t value)
    void relaxed_copy(uint64_t *to, const uint64_t *source, uint64_t words)
    void relaxed_clear(uint64_t *at, uint64_t words)
    void acquire_fence()
    void release_fence()
    ctypedef bint shared_flag
    ctypedef uint64_t shared_word
    unsigned lowest_bit(unsigned mask)
    void prefetch(const void *p)
    uint64_t clock_ns()
    int populate(uint8_t *start, uint64_t length, bint for_writing)
    void c_free_blocks "free_blocks" (int fd, uint64_t offset, uint64_t length)
    uint64_t c_data_end "data_end" (int fd, uint64_t size, uint64_t most)
    uint64_t page_faults()
    uint64_t free_bytes(int fd)
    unsigned long c_filesystem_magic "filesystem_magic" (int fd)

cdef extern from "siphash.h" nogil:
    uint64_t siphash13(const uint64_t *seed, const void *data, size_t length)

cdef extern from "threads.h" nogil:
    ctypedef struct write_mutex:
        pass
    void write_mutex_init(write_mutex *m)
    void write_lock(write_mutex *m)
    void write_unlock(write_mutex *m)
    void read_begin()
    void read_end()
    void long_read_begin()
    void long_read_end()
    void await_reads()
    void threads_after_fork()

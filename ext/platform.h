/* What C and Linux offer and Cython cannot say: atomics, prefetch, clock, populated mappings. */
#ifndef LOGKV_PLATFORM_H
#define LOGKV_PLATFORM_H

#include <errno.h>
#include <stdint.h>
#include <time.h>
#include <sys/mman.h>
#ifdef __linux__
#include <sys/vfs.h>
#endif

#if defined(_WIN32)
#error "LogKV does not support Windows"
#endif

#define atomic_load(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define atomic_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define atomic_fence() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define lowest_bit(mask) ((unsigned)__builtin_ctz(mask))
#define prefetch(p) __builtin_prefetch((const void *)(p))

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#define MADV_POPULATE_WRITE 23
#endif
#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

/* Nanoseconds since 1970, as of the system's last tick (1 to 10 ms ago) where that costs less. */
static inline uint64_t clock_ns(void) {
    struct timespec t;
#ifdef CLOCK_REALTIME_COARSE
    clock_gettime(CLOCK_REALTIME_COARSE, &t);
#else
    clock_gettime(CLOCK_REALTIME, &t);
#endif
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Makes the pages present, so that touching them neither faults one by one nor raises SIGBUS: an error is an
   errno here.  `start` is rounded down to a page.  A kernel without it (before Linux 5.14): 0, pages fault in. */
static inline int populate(uint8_t *start, uint64_t length, int for_writing) {
#ifdef __linux__
    uintptr_t page = (uintptr_t)start & ~(uintptr_t)4095;
    length += (uintptr_t)start - page;
    while (madvise((void *)page, length, for_writing ? MADV_POPULATE_WRITE : MADV_POPULATE_READ)) {
        if (errno == EINTR || errno == EAGAIN) continue;
        return errno == EINVAL ? 0 : errno;
    }
#else
    (void)start; (void)length; (void)for_writing;
#endif
    return 0;
}

/* The kind of file system that a file is on, as statfs(2) numbers them; 0: not known. */
static inline unsigned long filesystem_magic(int fd) {
#ifdef __linux__
    struct statfs s;
    if (fstatfs(fd, &s) == 0) return (unsigned long)s.f_type & 0xffffffffu;
#else
    (void)fd;
#endif
    return 0;
}

#endif

/* What C and Linux offer and Cython cannot say: atomics, prefetch, clock, populated mappings. */
#ifndef LOGKV_PLATFORM_H
#define LOGKV_PLATFORM_H

#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <time.h>
#include <unistd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#ifdef __linux__
#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/vfs.h>
#endif

#if defined(_WIN32)
#error "LogKV does not support Windows"
#endif

/* In place of those of <stdatomic.h>, which are sequentially consistent, and which clang has for _Atomic types only. */
#undef atomic_load
#undef atomic_store
#define atomic_load(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define atomic_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define relaxed_load(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define relaxed_store(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define acquire_fence() __atomic_thread_fence(__ATOMIC_ACQUIRE)
#define release_fence() __atomic_thread_fence(__ATOMIC_RELEASE)
#define lowest_bit(mask) ((unsigned)__builtin_ctz(mask))
#define prefetch(p) __builtin_prefetch((const void *)(p))

/* What threads of this process read while another one changes it. */
typedef _Atomic(int) shared_flag;
typedef _Atomic(uint64_t) shared_word;

/* Of memory that others may be reading: each word is right, and which of them are of one moment is not said. */
static inline void relaxed_copy(uint64_t *to, const uint64_t *from, uint64_t words) {
    for (uint64_t i = 0; i < words; i++) relaxed_store(to + i, relaxed_load(from + i));
}
static inline void relaxed_clear(uint64_t *at, uint64_t words) {
    for (uint64_t i = 0; i < words; i++) relaxed_store(at + i, 0);
}

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
   errno here.  `start` is rounded down to a page.  A kernel without it (before Linux 5.14), or without the memory
   to read them now: 0, pages fault in. */
static inline int populate(uint8_t *start, uint64_t length, int for_writing) {
#ifdef __linux__
    uintptr_t page = (uintptr_t)start & ~(uintptr_t)4095;
    length += (uintptr_t)start - page;
    while (madvise((void *)page, length, for_writing ? MADV_POPULATE_WRITE : MADV_POPULATE_READ)) {
        if (errno == EINTR || errno == EAGAIN) continue;
        if (errno == EFAULT && for_writing) return ENOSPC;      /* the store would be a SIGBUS: there is no block for it */
        return errno == EINVAL || errno == ENOMEM && !for_writing ? 0 : errno;
    }
#else
    (void)start; (void)length; (void)for_writing;
#endif
    return 0;
}

/* Gives the blocks of a part of a file back, which reads as zeros then; where that cannot be, nothing happens. */
static inline void free_blocks(int fd, uint64_t offset, uint64_t length) {
#ifdef __linux__
    if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)length)) return;
#else
    (void)fd; (void)offset; (void)length;
#endif
}

/* How far a file has anything in it: behind the last byte that takes room on the device, up to `size`, are zeros that nobody
   wrote.  What comes after a hole longer than `most` does not count. */
static inline uint64_t data_end(int fd, uint64_t size, uint64_t most) {
#ifdef SEEK_DATA
    struct stat s;
    off_t at = 0;
    uint64_t end = 0;
    if (fstat(fd, &s) || (uint64_t)s.st_blocks * 512 >= (uint64_t)s.st_size) return size;
    while (end < size && (at = lseek(fd, at, SEEK_DATA)) >= 0 && (uint64_t)at - end <= most) {
        at = lseek(fd, at, SEEK_HOLE);
        if (at < 0) break;
        end = (uint64_t)at;
    }
    return at < 0 && errno != ENXIO || end > size ? size : end;
#else
    (void)fd; (void)most;
    return size;
#endif
}

/* Pages that this thread has had made present or writable so far. */
static inline uint64_t page_faults(void) {
#ifdef RUSAGE_THREAD
    struct rusage u;
    if (getrusage(RUSAGE_THREAD, &u) == 0) return (uint64_t)u.ru_minflt + (uint64_t)u.ru_majflt;
#endif
    return 0;
}

/* Bytes that a file's file system has left; 0 if that is not known. */
static inline uint64_t free_bytes(int fd) {
    struct statvfs s;
    return fstatvfs(fd, &s) == 0 ? (uint64_t)s.f_bavail * s.f_frsize : 0;
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

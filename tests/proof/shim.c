/* Stands between a process and its C library (LD_PRELOAD): fails the k-th system call of a kind on the files below one
   directory, or the k-th allocation, once or from there on.  What is to fail and what was counted is in `shim_words`,
   which is read and written without a call, and so without an allocation. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>
#include <unistd.h>

enum { ON, CALL, NUMBER, ERROR, EVER, PART, HITS, OWNER, MAPPED, OPEN, FIRST_COUNT = 16, WORDS = 64 };
enum {
    C_OPEN, C_READ, C_WRITE, C_SYNC, C_ALLOCATE, C_TRUNCATE, C_RENAME, C_UNLINK, C_MKDIR, C_LINK, C_STAT, C_LOCK, C_UNLOCK,
    C_DUP, C_MMAP, C_POPULATE, C_STATFS, C_LIST, C_CLOSE, C_PUNCH, C_THREAD, C_MEMORY
};
volatile int64_t shim_words[WORDS];
char shim_root[4096];           /* files below this directory, with a slash at its end */
static const char BOOT[] = "/proc/sys/kernel/random/boot_id";

enum { MANY = 4096 };
static char watched[MANY];      /* descriptors */
static void *mapped[MANY];      /* watched files, and memory that the extension module has mapped */

/* 1: this call fails, and errno says how.  2: it does a part of its work. */
static int due(int call) {
    if (!shim_words[ON] || call == C_MEMORY && shim_words[OWNER] != (int64_t)pthread_self()) return 0;
    int64_t n = __atomic_add_fetch(&shim_words[FIRST_COUNT + call], 1, __ATOMIC_RELAXED);
    if (shim_words[CALL] != call || n < shim_words[NUMBER] || n > shim_words[NUMBER] && !shim_words[EVER]) return 0;
    shim_words[HITS]++;
    if (shim_words[PART]) return 2;
    errno = (int)shim_words[ERROR];
    return 1;
}

static int is_watched(int fd) { return fd >= 0 && fd < MANY && watched[fd]; }

static int is_below(int directory, const char *path) {
    if (!path || !*shim_root) return 0;
    if (*path != '/') return directory != AT_FDCWD && is_watched(directory);
    return !strncmp(path, shim_root, strlen(shim_root)) || !strcmp(path, BOOT);
}

static int watch(int fd) {
    if (fd >= 0 && fd < MANY && !watched[fd]) {
        watched[fd] = 1;
        shim_words[OPEN]++;
    }
    return fd;
}

static void forget(int fd) {
    if (is_watched(fd)) {
        watched[fd] = 0;
        shim_words[OPEN]--;
    }
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

int open64(const char *path, int flags, ...) {
    REAL(open64);
    va_list more;
    va_start(more, flags);
    int mode = flags & O_CREAT ? va_arg(more, int) : 0;
    va_end(more);
    if (!is_below(AT_FDCWD, path)) return real(path, flags, mode);
    return due(C_OPEN) ? -1 : watch(real(path, flags, mode));
}

int openat64(int directory, const char *path, int flags, ...) {
    REAL(openat64);
    va_list more;
    va_start(more, flags);
    int mode = flags & O_CREAT ? va_arg(more, int) : 0;
    va_end(more);
    if (!is_below(directory, path)) return real(directory, path, flags, mode);
    return due(C_OPEN) ? -1 : watch(real(directory, path, flags, mode));
}

/* On Linux the descriptor is gone also when this fails. */
int close(int fd) {
    REAL(close);
    int fails = is_watched(fd) && due(C_CLOSE), error = errno, result;
    forget(fd);
    result = real(fd);
    if (!fails) return result;
    errno = error;
    return -1;
}

ssize_t read(int fd, void *to, size_t size) {
    REAL(read);
    int how = is_watched(fd) ? due(C_READ) : 0;
    return how == 1 ? -1 : real(fd, to, how ? (size + 1) / 2 : size);
}

ssize_t pread64(int fd, void *to, size_t size, off64_t offset) {
    REAL(pread64);
    int how = is_watched(fd) ? due(C_READ) : 0;
    return how == 1 ? -1 : real(fd, to, how ? (size + 1) / 2 : size, offset);
}

ssize_t pwrite64(int fd, const void *from, size_t size, off64_t offset) {
    REAL(pwrite64);
    int how = is_watched(fd) ? due(C_WRITE) : 0;
    return how == 1 ? -1 : real(fd, from, how ? (size + 1) / 2 : size, offset);
}

int fdatasync(int fd) { REAL(fdatasync); return is_watched(fd) && due(C_SYNC) ? -1 : real(fd); }
int fsync(int fd) { REAL(fsync); return is_watched(fd) && due(C_SYNC) ? -1 : real(fd); }
int ftruncate64(int fd, off64_t size) { REAL(ftruncate64); return is_watched(fd) && due(C_TRUNCATE) ? -1 : real(fd, size); }

int posix_fallocate64(int fd, off64_t offset, off64_t size) {
    REAL(posix_fallocate64);
    return is_watched(fd) && due(C_ALLOCATE) ? errno : real(fd, offset, size);
}

int fallocate64(int fd, int mode, off64_t offset, off64_t size) {
    REAL(fallocate64);
    return is_watched(fd) && due(C_PUNCH) ? -1 : real(fd, mode, offset, size);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    return is_below(AT_FDCWD, to) && due(C_RENAME) ? -1 : real(from, to);
}

int renameat(int from_directory, const char *from, int directory, const char *to) {
    REAL(renameat);
    return is_below(directory, to) && due(C_RENAME) ? -1 : real(from_directory, from, directory, to);
}

int unlink(const char *path) { REAL(unlink); return is_below(AT_FDCWD, path) && due(C_UNLINK) ? -1 : real(path); }

int unlinkat(int directory, const char *path, int flags) {
    REAL(unlinkat);
    return is_below(directory, path) && due(C_UNLINK) ? -1 : real(directory, path, flags);
}

int mkdir(const char *path, mode_t mode) { REAL(mkdir); return is_below(AT_FDCWD, path) && due(C_MKDIR) ? -1 : real(path, mode); }

int mkdirat(int directory, const char *path, mode_t mode) {
    REAL(mkdirat);
    return is_below(directory, path) && due(C_MKDIR) ? -1 : real(directory, path, mode);
}

int link(const char *from, const char *to) { REAL(link); return is_below(AT_FDCWD, to) && due(C_LINK) ? -1 : real(from, to); }

int linkat(int from_directory, const char *from, int directory, const char *to, int flags) {
    REAL(linkat);
    return is_below(directory, to) && due(C_LINK) ? -1 : real(from_directory, from, directory, to, flags);
}

int fstat64(int fd, struct stat64 *status) { REAL(fstat64); return is_watched(fd) && due(C_STAT) ? -1 : real(fd, status); }

int stat64(const char *path, struct stat64 *status) {
    REAL(stat64);
    return is_below(AT_FDCWD, path) && due(C_STAT) ? -1 : real(path, status);
}

int lstat64(const char *path, struct stat64 *status) {
    REAL(lstat64);
    return is_below(AT_FDCWD, path) && due(C_STAT) ? -1 : real(path, status);
}

int fstatat64(int directory, const char *path, struct stat64 *status, int flags) {
    REAL(fstatat64);
    return is_below(directory, path) && due(C_STAT) ? -1 : real(directory, path, status, flags);
}

int fstatfs64(int fd, struct statfs64 *status) { REAL(fstatfs64); return is_watched(fd) && due(C_STATFS) ? -1 : real(fd, status); }

int fstatvfs64(int fd, struct statvfs64 *status) {
    REAL(fstatvfs64);
    return is_watched(fd) && due(C_STATFS) ? -1 : real(fd, status);
}

int fcntl64(int fd, int command, ...) {
    REAL(fcntl64);
    va_list more;
    va_start(more, command);
    void *argument = va_arg(more, void *);
    va_end(more);
    if (!is_watched(fd)) return real(fd, command, argument);
    switch (command) {
    case F_DUPFD:
    case F_DUPFD_CLOEXEC:
        return due(C_DUP) ? -1 : watch(real(fd, command, argument));
    case F_OFD_SETLK:
    case F_OFD_SETLKW:
        if (due(((struct flock64 *)argument)->l_type == F_UNLCK ? C_UNLOCK : C_LOCK)) return -1;
        break;
    case F_OFD_GETLK:
        if (due(C_LOCK)) return -1;
    }
    return real(fd, command, argument);
}

DIR *fdopendir(int fd) { REAL(fdopendir); return is_watched(fd) && due(C_LIST) ? NULL : real(fd); }
struct dirent64 *readdir64(DIR *list) { REAL(readdir64); return is_watched(dirfd(list)) && due(C_LIST) ? NULL : real(list); }

int closedir(DIR *list) {
    REAL(closedir);
    forget(dirfd(list));
    return real(list);
}

/* Whether a place in the code is the extension module's. */
static int is_extension(void *place) {
    Dl_info info;
    return dladdr(place, &info) && strstr(info.dli_fname, "/_core.");
}

void *mmap64(void *address, size_t size, int protection, int flags, int fd, off64_t offset) {
    REAL(mmap64);
    int i = 0, is_file = !(flags & MAP_ANONYMOUS);
    /* Memory counts where the extension asks for it; the chunks of the interpreter's own stack do not. */
    int counts = is_file ? is_watched(fd) : is_extension(__builtin_return_address(0));
    if (counts && due(is_file ? C_MMAP : C_MEMORY)) return MAP_FAILED;
    address = real(address, size, protection, flags, fd, offset);
    if (address != MAP_FAILED && counts) {
        while (mapped[i]) i++;
        mapped[i] = address;
        shim_words[MAPPED]++;
    }
    return address;
}

int munmap(void *address, size_t size) {
    REAL(munmap);
    for (int i = 0; shim_words[MAPPED] && i < MANY; i++)
        if (mapped[i] == address) {
            mapped[i] = NULL;
            shim_words[MAPPED]--;
            break;
        }
    return real(address, size);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*run)(void *), void *argument) {
    REAL(pthread_create);
    return due(C_THREAD) ? errno : real(thread, how, run, argument);
}

int madvise(void *address, size_t size, int advice) {
    REAL(madvise);
    return (advice == MADV_POPULATE_READ || advice == MADV_POPULATE_WRITE) && due(C_POPULATE) ? -1 : real(address, size, advice);
}

/* -- allocations: what glibc calls its own --

   CPython 3.11 and 3.12 spin where the int with an instruction's number cannot be had for ever, while an exception goes
   through a `finally` (ceval.c, exception_unwind): so behind the first one that fails, ints of one digit are had. */
enum { INT = 32 };

static int no_memory(size_t size) {
    if (size == INT && shim_words[ON] && shim_words[CALL] == C_MEMORY && shim_words[EVER] && shim_words[HITS]) return 0;
    return due(C_MEMORY);
}

extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t), *__libc_memalign(size_t, size_t);
__attribute__((weak)) extern void *__interceptor_malloc(size_t), *__interceptor_calloc(size_t, size_t),
    *__interceptor_realloc(void *, size_t), *__interceptor_memalign(size_t, size_t);    /* a sanitizer's, where there is one */
#define BEHIND(name) (__interceptor_##name ? __interceptor_##name : __libc_##name)

void *malloc(size_t size) { return no_memory(size) ? NULL : BEHIND(malloc)(size); }
void *calloc(size_t n, size_t size) { return no_memory(n * size) ? NULL : BEHIND(calloc)(n, size); }
void *realloc(void *old, size_t size) { return no_memory(size) ? NULL : BEHIND(realloc)(old, size); }
void *memalign(size_t alignment, size_t size) { return no_memory(size) ? NULL : BEHIND(memalign)(alignment, size); }
void *aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void **to, size_t alignment, size_t size) {
    if (no_memory(size)) return ENOMEM;
    *to = BEHIND(memalign)(alignment, size);
    return *to ? 0 : ENOMEM;
}

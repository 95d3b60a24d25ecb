/* The allocator of gcc's libasan is not locked around a fork (LLVM's is, since 18): the child of a process in which another
   thread is just in malloc or free, or ends, waits for that one for ever.  Loaded before libasan, this lets nobody fork
   meanwhile. */
#include <limits.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

static pthread_rwlock_t forks = PTHREAD_RWLOCK_INITIALIZER;
static pthread_key_t ending = PTHREAD_KEYS_MAX;         /* how often a thread's destructors will still be called */

/* The last time libasan's gives back what the thread had kept to allocate from; its key is older, so it comes first. */
static void end(void *times) {
    uintptr_t left = (uintptr_t)times;
    if (left == PTHREAD_DESTRUCTOR_ITERATIONS) pthread_rwlock_rdlock(&forks);
    if (left > 1) pthread_setspecific(ending, (void *)(left - 1));
    else pthread_rwlock_unlock(&forks);
}

static void enter(void) {
    if (!pthread_getspecific(ending)) pthread_setspecific(ending, (void *)(uintptr_t)PTHREAD_DESTRUCTOR_ITERATIONS);
    pthread_rwlock_rdlock(&forks);
}

static void leave(void) { pthread_rwlock_unlock(&forks); }

static void before(void) { pthread_rwlock_wrlock(&forks); }
static void in_child(void) { forks = (pthread_rwlock_t)PTHREAD_RWLOCK_INITIALIZER; }

__attribute__((constructor)) static void guard(void) {
    pthread_key_create(&ending, end);
    pthread_atfork(before, leave, in_child);
}

#define GUARDED(type, name, parameters, arguments) \
    extern type __interceptor_##name parameters; \
    type name parameters { \
        enter(); \
        type result = __interceptor_##name arguments; \
        leave(); \
        return result; \
    }

GUARDED(void *, malloc, (size_t size), (size))
GUARDED(void *, calloc, (size_t count, size_t size), (count, size))
GUARDED(void *, realloc, (void *old, size_t size), (old, size))
GUARDED(void *, reallocarray, (void *old, size_t count, size_t size), (old, count, size))
GUARDED(void *, memalign, (size_t alignment, size_t size), (alignment, size))
GUARDED(void *, aligned_alloc, (size_t alignment, size_t size), (alignment, size))
GUARDED(int, posix_memalign, (void **to, size_t alignment, size_t size), (to, alignment, size))

extern void __interceptor_free(void *);
void free(void *memory) {
    enter();
    __interceptor_free(memory);
    leave();
}

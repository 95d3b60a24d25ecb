/* Threads without the GIL: a mapping goes only when every thread has left the read it was in, and writes take turns.
   Where there is a GIL it does both for who holds it. */
#ifndef LOGKV_THREADS_H
#define LOGKV_THREADS_H

#include <sched.h>

#ifdef Py_GIL_DISABLED
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

/* A thread in a read says which epoch it began in; 0: it is in none.  A line of its own for each thread. */
typedef struct thread_slot {
    _Alignas(64) uint64_t epoch;
    uint64_t taken;                /* by a thread that lives */
    struct thread_slot *next;
} thread_slot;

static thread_slot *thread_slots;  /* only grows: as many as there ever were threads at a time */
static uint64_t thread_epoch = 1;
static _Thread_local thread_slot *my_slot;
static pthread_key_t thread_end;
static pthread_once_t thread_once = PTHREAD_ONCE_INIT;

static void thread_slot_leave(void *slot) {
    my_slot = NULL;
    __atomic_store_n(&((thread_slot *)slot)->taken, 0, __ATOMIC_RELEASE);
}
static void threads_setup(void) { pthread_key_create(&thread_end, thread_slot_leave); }

static thread_slot *thread_slot_take(void) {
    pthread_once(&thread_once, threads_setup);
    thread_slot *slot = __atomic_load_n(&thread_slots, __ATOMIC_ACQUIRE);
    for (; slot; slot = slot->next) {
        uint64_t no = 0;
        if (__atomic_compare_exchange_n(&slot->taken, &no, 1, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) break;
    }
    if (!slot) {
        if (posix_memalign((void **)&slot, 64, sizeof(*slot))) abort();
        slot->epoch = 0;
        slot->taken = 1;
        slot->next = __atomic_load_n(&thread_slots, __ATOMIC_RELAXED);
        while (!__atomic_compare_exchange_n(&thread_slots, &slot->next, slot, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {}
    }
    pthread_setspecific(thread_end, slot);
    return my_slot = slot;
}

/* Between these two nothing is called that could wait for another thread, and no Python code runs. */
static inline void read_begin(void) {
    thread_slot *slot = my_slot ? my_slot : thread_slot_take();
    __atomic_store_n(&slot->epoch, __atomic_load_n(&thread_epoch, __ATOMIC_RELAXED), __ATOMIC_RELEASE);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
static inline void read_end(void) { __atomic_store_n(&my_slot->epoch, 0, __ATOMIC_RELEASE); }
static inline void long_read_begin(void) { read_begin(); }
static inline void long_read_end(void) { read_end(); }

/* Returns when all reads have ended that may have seen what was there before this call. */
static inline void await_reads(void) {
    uint64_t now = __atomic_add_fetch(&thread_epoch, 1, __ATOMIC_SEQ_CST), then;
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    for (thread_slot *slot = __atomic_load_n(&thread_slots, __ATOMIC_ACQUIRE); slot; slot = slot->next)
        while ((then = __atomic_load_n(&slot->epoch, __ATOMIC_ACQUIRE)) && then < now) sched_yield();
}

/* In the child of a fork only the thread that forked lives on. */
static inline void threads_after_fork(void) {
    for (thread_slot *slot = thread_slots; slot; slot = slot->next)
        if (slot != my_slot) slot->epoch = slot->taken = 0;
}

typedef pthread_mutex_t write_mutex;
static inline void write_mutex_init(write_mutex *m) { pthread_mutex_init(m, NULL); }
static inline void write_lock(write_mutex *m) { pthread_mutex_lock(m); }
static inline void write_unlock(write_mutex *m) { pthread_mutex_unlock(m); }

#else
typedef char write_mutex;
static inline void write_mutex_init(write_mutex *m) { *m = 0; }
static inline void write_lock(write_mutex *m) { (void)m; }
static inline void write_unlock(write_mutex *m) { (void)m; }
static inline void read_begin(void) {}
static inline void read_end(void) {}

/* A read that has let the GIL go is one that others must wait for. */
static unsigned long_reads;
static inline void long_read_begin(void) { __atomic_add_fetch(&long_reads, 1, __ATOMIC_SEQ_CST); }
static inline void long_read_end(void) { __atomic_sub_fetch(&long_reads, 1, __ATOMIC_RELEASE); }
static inline void await_reads(void) { while (__atomic_load_n(&long_reads, __ATOMIC_ACQUIRE)) sched_yield(); }
static inline void threads_after_fork(void) { long_reads = 0; }
#endif
#endif

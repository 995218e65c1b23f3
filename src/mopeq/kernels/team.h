/* Threads are those of the OpenMP that torch has loaded. After each of torch's own operators they keep their cores busy
   for a while, waiting for the next, so that threads of our own would have to take the cores from them. */

#pragma once

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);
static Parallel parallel; /* GOMP_parallel, or NULL: one thread */

static void after_fork(void) { parallel = 0; } /* its threads do not survive a fork, and it does not know */

void mopeq_use_threads(Parallel of) {
    if (of) pthread_atfork(0, 0, after_fork);
    parallel = of;
}

/* Does a share of a job, 0 … shares - 1; not 0 where it fails. */
typedef int (*Share)(const void *job, int64_t share, int64_t shares);

typedef struct {
    Share work;
    const void *job;
    int64_t shares;
    atomic_int next, failed;
} Shares;

static inline void take_shares(void *of) {
    Shares *s = of;
    for (int64_t share; (share = atomic_fetch_add(&s->next, 1)) < s->shares;)
        if (s->work(s->job, share, s->shares)) atomic_store(&s->failed, 1);
}

/* All of a job, on as many threads as shares where OpenMP gives them. */
static inline int in_shares(Share work, const void *job, int64_t shares) {
    Shares s = {work, job, shares, 0, 0};
    if (shares > 1 && parallel)
        parallel(take_shares, &s, (unsigned)shares, 0);
    else
        take_shares(&s);
    return s.failed;
}

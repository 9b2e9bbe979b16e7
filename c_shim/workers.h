/* SPDX-License-Identifier: MIT
 * Threads for I/O that may block; see workers.c. */
#ifndef VMS_WORKERS_H
#define VMS_WORKERS_H

#include "store.h"

/* Work that is done, oldest first; under the workers' lock. */
typedef struct inbox {
    struct work *first, *last;
} inbox;

typedef struct work {
    struct work *next;
    vms_store *store; /* holds a reference */
    inbox *to;        /* where it goes when it is done, with job.error set */
    vms_job job;
} work;

/* Queues the work; -errno: no thread can be started. */
int workers_submit(vms_workers *workers, work *item);
/* The oldest work in an inbox, NULL: there is none. */
work *workers_take(vms_workers *workers, inbox *from);
/* Revokes work that has not begun: the first for `to` for which `wanted` is true; NULL: none. */
work *workers_revoke(vms_workers *workers, const inbox *to, int (*wanted)(const work *, uint64_t), uint64_t key);
/* Gives back the store. */
void work_release(work *item);
void workers_ref(vms_workers *workers);

#endif

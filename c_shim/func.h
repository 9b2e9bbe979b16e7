/* SPDX-License-Identifier: MIT
 * One function's regions: who answers which byte, and from where; see func.c. */
#ifndef VMS_FUNC_H
#define VMS_FUNC_H

#include <pthread.h>
#include <stdatomic.h>

#include "vmshim.h"

#define MAX_WATCHES 64

typedef struct byte_policy {
    uint8_t store, w1c, w1s, rc, exits, sizes;
} byte_policy;

typedef struct area {
    uint64_t start, size;
    uint8_t *backing;    /* NULL: hook, every access exits */
    byte_policy *policy; /* NULL: RAM */
    int in_memfd;
} area;

typedef struct region {
    uint64_t size;
    uint8_t fill;
    int writable;
    int disabled;
    _Atomic unsigned tapped; /* VMS_EXIT_ON_*: such accesses exit, whatever the policy of their bytes */
    int fd; /* memfd of the mappable areas, or -1 */
    area *areas; /* ascending */
    size_t n_areas;
} region;

struct vms_func {
    region regions[VMS_REGIONS];
    int wake_fd;
    uint64_t poll_ns; /* see sleep.c */
    _Atomic unsigned refs; /* its creator's and its channels' */
    pthread_mutex_t watch_lock;
    struct {
        int fd;
        uint16_t cookie;
    } watches[MAX_WATCHES];
    unsigned n_watches;
    vms_func_stats stats; /* written by the function's thread only */
};

/* Whether [offset, offset+n) lies inside the region; n > 0. */
static inline int region_has(const region *r, uint64_t offset, uint64_t n)
{
    return n <= r->size && offset <= r->size - n;
}

void func_ref(vms_func *func);

/* VMS_REFUSED_* of an access inside the region, 0: none. */
uint32_t region_refuses(const region *r, uint64_t offset, size_t n);

/* Tries to answer without Python.  1: done; 0: Python has to.  behind: Python has earlier writes to do, which this one
 * must not overtake. */
int region_try_read(const region *r, uint64_t offset, uint8_t *buf, size_t n);
int region_try_write(const region *r, uint64_t offset, const uint8_t *buf, size_t n, int behind);

#endif

/* SPDX-License-Identifier: MIT
 * What is behind a store's handle; see store.c. */
#ifndef VMS_STORE_H
#define VMS_STORE_H

#include <pthread.h>
#include <stdatomic.h>
#include <sys/uio.h>

#include "vmshim.h"

#define STORE_RANGES 64

struct vms_store {
    _Atomic unsigned refs;
    uint64_t size;
    uint8_t *memory; /* NULL: a file */
    int fd;
    int in_memory; /* a file system that has no disk to wait for, and so does not know RWF_NOWAIT */
    _Atomic int mute[2]; /* reads, writes: the file system cannot say whether it would have to wait */
    uint64_t slow_until; /* it has waited, so leave it to others till then (ns); of the thread that calls store_try() */
    pthread_rwlock_t range[STORE_RANGES]; /* files: see store.c */
};

void store_ref(vms_store *store);
/* A file: reads or writes all of [offset, offset+length) if that takes no waiting, as far as one can know.  1: done;
 * 0: it would, or the range is being written; -EFAULT: the memory in iov is not there. */
int store_try(vms_store *store, int write, uint64_t offset, uint64_t length, const struct iovec *iov, int n);

#endif

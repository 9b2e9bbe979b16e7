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
    int in_memory; /* tmpfs: never blocks on a disk, and does not support RWF_NOWAIT */
    _Atomic int mute[2]; /* reads, writes: the file system does not support RWF_NOWAIT */
    uint64_t slow_until; /* ns: no attempt before, as a write has blocked; for the caller of store_try() only */
    pthread_rwlock_t range[STORE_RANGES]; /* files: see store.c */
};

void store_ref(vms_store *store);
/* A file: reads or writes all of [offset, offset+length) if that does not block, as far as can be known.  1: done;
 * 0: it would block, or the range is being written; -EFAULT: the memory in iov is not mapped. */
int store_try(vms_store *store, int write, uint64_t offset, uint64_t length, const struct iovec *iov, int n);

#endif

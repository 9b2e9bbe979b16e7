/* SPDX-License-Identifier: MIT
 * Pieces of client files, mapped and reference-counted; see files.c. */
#ifndef VMS_FILES_H
#define VMS_FILES_H

#include <stdatomic.h>
#include <stdint.h>
#include <sys/types.h>

#include "vmshim.h"

/* [first, first + size) of a file.  It is one of a table, and never freed: the handler of SIGBUS reads all of them. */
typedef struct mapped_file {
    _Atomic unsigned version; /* odd: free, or being changed; what follows up to `writable` is the handler's */
    _Atomic(uint8_t *) base;
    _Atomic uint64_t size;
    _Atomic uint64_t first; /* in the file, of base */
    _Atomic uint64_t good;  /* as far as the file has not shrunk: an offset in it */
    _Atomic uint64_t zeros; /* from this byte of the mapping on there are zeros of our own */
    _Atomic uint64_t page;
    _Atomic int writable;

    struct mapped_file *next; /* in a bucket of the owner, or free */
    vms_files *owner;
    dev_t dev;
    ino_t ino;
    unsigned refs; /* under owner->lock */
} mapped_file;

/* A mapping that covers [offset, offset+size) of fd, with one reference for the caller.  ENOSPC: it would be larger
 * than `room` bytes, or there are too many. */
int file_get(vms_files *files, int fd, uint64_t offset, uint64_t size, uint32_t prot, uint64_t room,
             mapped_file **out);
void files_ref(vms_files *files);
void file_put(mapped_file *file);
void file_ref(mapped_file *file);

static inline uint64_t file_size(const mapped_file *file)
{
    return atomic_load_explicit(&file->size, memory_order_relaxed);
}

/* Where a byte of the file is. */
static inline uint8_t *file_at(const mapped_file *file, uint64_t offset)
{
    return atomic_load_explicit(&file->base, memory_order_relaxed) +
           (offset - atomic_load_explicit(&file->first, memory_order_relaxed));
}

#endif

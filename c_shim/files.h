/* SPDX-License-Identifier: MIT
 * Client files, mapped once per inode and reference-counted; see files.c. */
#ifndef VMS_FILES_H
#define VMS_FILES_H

#include <stdatomic.h>
#include <stdint.h>
#include <sys/types.h>

#include "vmshim.h"

typedef struct mapped_file {
    struct mapped_file *next;
    vms_files *owner;
    uint8_t *base;
    uint64_t size;         /* of the mapping */
    _Atomic uint64_t good; /* bytes from the start that are still backed by the file */
    uint64_t page;         /* page size of the backing (huge pages) */
    dev_t dev;
    ino_t ino;
    int writable;
    int slot;
    unsigned refs; /* under owner->lock */
} mapped_file;

/* A mapping that covers [offset, offset+size) of fd, with one reference for the caller. */
int file_get(vms_files *files, int fd, uint64_t offset, uint64_t size, uint32_t prot, mapped_file **out);
void files_ref(vms_files *files);
void file_ref(mapped_file *file);
void file_put(mapped_file *file);

#endif

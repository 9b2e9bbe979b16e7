/* SPDX-License-Identifier: MIT
 * What fuzz targets share: an input taken apart, checks, guest memory that is there for all inputs. */
#ifndef FUZZ_H
#define FUZZ_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "vmshim.h"

/* As assert(), which a build may leave out. */
#define CHECK(what)                                                                                                    \
    do {                                                                                                               \
        if (!(what)) {                                                                                                 \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #what);                                       \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* An input: bytes are taken from its front, zeros follow its end. */
typedef struct input {
    const uint8_t *at;
    size_t left;
} input;

static inline size_t take_bytes(input *in, void *to, size_t n)
{
    size_t got = n < in->left ? n : in->left;

    memset(to, 0, n);
    if (got)
        memcpy(to, in->at, got);
    in->at += got;
    in->left -= got;
    return got;
}

static inline uint8_t take8(input *in)
{
    uint8_t value;
    take_bytes(in, &value, sizeof value);
    return value;
}

static inline uint16_t take16(input *in)
{
    uint16_t value;
    take_bytes(in, &value, sizeof value);
    return value;
}

static inline uint32_t take32(input *in)
{
    uint32_t value;
    take_bytes(in, &value, sizeof value);
    return value;
}

static inline uint64_t take64(input *in)
{
    uint64_t value;
    take_bytes(in, &value, sizeof value);
    return value;
}

/* An address: in eight of sixteen cases a small one, else near a border, or any. */
static inline uint64_t take_address(input *in)
{
    uint8_t kind = take8(in);

    switch (kind & 15) {
    case 8:
        return take64(in);
    case 9:
        return UINT64_MAX - take16(in);
    case 10:
        return (UINT64_C(1) << (kind >> 4 & 15) * 4) + (int16_t)take16(in);
    default:
        return (uint64_t)take8(in) << 12 | (kind & 16 ? take16(in) & 0xFFF : 0);
    }
}

/* Guest memory: `size` bytes of RAM at GPA 0, mapped here as well; `memory` has the window. */
typedef struct guest {
    vms_files *files;
    vms_memory *memory;
    vms_requester *requester;
    uint8_t *ram;
    size_t size;
    int fd;
} guest;

static inline void guest_create(guest *g, size_t size)
{
    g->size = size;
    g->fd = memfd_create("guest", 0);
    CHECK(g->fd >= 0 && ftruncate(g->fd, (off_t)size) == 0);
    g->ram = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, g->fd, 0);
    CHECK(g->ram != MAP_FAILED);
    CHECK(vms_files_create(&g->files) == 0 && vms_memory_create(g->files, 64, &g->memory) == 0);
    CHECK(vms_memory_map(g->memory, 0, size, VMS_PROT_READ | VMS_PROT_WRITE, g->fd, 0) == 0);
    CHECK(vms_requester_create(g->memory, &g->requester) == 0 && vms_requester_enable(g->requester, 1) == 0);
}

#endif

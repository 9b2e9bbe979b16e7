/* SPDX-License-Identifier: MIT
 * Uses of stale translations, see vms_requester_check_stale().  All of it is under the requester's lock. */
#ifndef VMS_STALE_H
#define VMS_STALE_H

#include "attachment.h"

#define STALE_ROOM 64

typedef struct stale_log {
    vms_stale item[STALE_ROOM];
    unsigned first, count;
    uint64_t *total;     /* counts all, noted or not */
    translation clipped; /* what stale_entry() gives out */
} stale_log;

/* The table words that a domain was chosen by. */
struct witness {
    vms_memory *memory;
    size_t n;
    vms_word word[VMS_WORDS];
};

/* Compares the words that `at` was chosen by with memory. */
void stale_route(stale_log *log, const attachment *at, uint64_t iova, uint32_t access);
/* Compares an entry with a walk of iova; returns the part of the entry that the comparison covers. */
const translation *stale_entry(stale_log *log, const attachment *at, const translation *t, uint64_t iova,
                               uint32_t access);
size_t stale_take(stale_log *log, vms_stale *out, size_t room);

struct witness *witness_create(vms_memory *memory, const vms_word *words, size_t n);
void witness_destroy(struct witness *witness);

#endif

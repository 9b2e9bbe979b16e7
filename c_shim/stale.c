/* SPDX-License-Identifier: MIT
 * Compares cached translations with the present tables in guest memory, or a domain's mappings. */
#include "stale.h"

#include <stdlib.h>
#include <string.h>

#define LAST_OF_PAGE ((uint64_t)4095)

static void note(stale_log *log, const attachment *at, vms_stale item)
{
    (*log->total)++;
    item.pasid = (uint32_t)at->pasid.start;
    /* Without room it is only counted: the first ones are worth more than the last. */
    if (log->count < STALE_ROOM)
        log->item[(log->first + log->count++) % STALE_ROOM] = item;
}

void stale_route(stale_log *log, const attachment *at, uint64_t iova, uint32_t access)
{
    const struct witness *witness = at->witness;

    for (size_t i = 0; witness && i < witness->n; i++) {
        const vms_word *word = &witness->word[i];
        uint64_t now = 0;
        int rc = memory_load64(witness->memory, word->gpa, &now);
        if (rc == 0 && now == word->value)
            continue;
        note(log, at, (vms_stale){ .iova = iova, .access = access, .word = word->gpa, .was = word->value, .now = now,
                                   .kind = VMS_STALE_ROUTE,
                                   .reason = rc < 0 ? VMS_REASON_TABLE_ACCESS : VMS_REASON_NONE });
        return;
    }
}

const translation *stale_entry(stale_log *log, const attachment *at, const translation *t, uint64_t iova,
                               uint32_t access)
{
    translation now = { 0 };
    vms_fault fault = { 0 };
    int rc = domain_translate(at->domain, iova, 0, &now, &fault);
    uint64_t was = t->gpa + (iova - t->start), leads = rc < 0 ? 0 : now.gpa + (iova - now.start);
    /* The neighbouring page may be translated differently. */
    uint64_t last = rc < 0 ? iova | LAST_OF_PAGE : now.last;

    if (rc < 0 || leads != was || (now.prot & access) != access)
        note(log, at, (vms_stale){ .iova = iova, .access = access, .was = was, .was_prot = t->prot, .now = leads,
                                   .now_prot = now.prot, .kind = VMS_STALE_ENTRY,
                                   .reason = rc < 0 ? fault.reason : VMS_REASON_NONE });
    log->clipped = *t;
    if (last < t->last)
        log->clipped.last = last;
    return &log->clipped;
}

size_t stale_take(stale_log *log, vms_stale *out, size_t room)
{
    size_t n = 0;

    for (; n < room && log->count; n++, log->count--) {
        out[n] = log->item[log->first];
        log->first = (log->first + 1) % STALE_ROOM;
    }
    return n;
}

struct witness *witness_create(vms_memory *memory, const vms_word *words, size_t n)
{
    struct witness *witness = malloc(sizeof *witness);

    if (!witness)
        return NULL;
    witness->memory = memory;
    memory_ref(memory);
    witness->n = n;
    memcpy(witness->word, words, n * sizeof *words);
    return witness;
}

void witness_destroy(struct witness *witness)
{
    if (!witness)
        return;
    vms_memory_destroy(witness->memory);
    free(witness);
}

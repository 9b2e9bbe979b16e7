/* SPDX-License-Identifier: MIT
 * A requester's IOTLB; all of it is under the requester's lock.  Inline, as each access looks it up. */
#ifndef VMS_IOTLB_H
#define VMS_IOTLB_H

#include "attachment.h"

/* 4 KiB pages are indexed by page number; larger translations are kept whole, in a few entries of their own. */
#define IOTLB_PAGES 1024
#define IOTLB_RANGES 8
#define PAGE ((uint64_t)4096)

typedef struct iotlb_entry {
    const attachment *at; /* NULL: free */
    translation t;
} iotlb_entry;

typedef struct iotlb {
    iotlb_entry range[IOTLB_RANGES];
    unsigned victim;
    iotlb_entry page[IOTLB_PAGES];
} iotlb;

static inline iotlb_entry *iotlb_slot(iotlb *tlb, const attachment *at, uint64_t iova)
{
    uint64_t page = iova / PAGE;
    return &tlb->page[(page ^ page >> 10 ^ at->pasid.start * 37) % IOTLB_PAGES];
}

static inline void iotlb_drop(iotlb_entry *entry, const attachment *at, uint64_t start, uint64_t last)
{
    if (entry->at == at && entry->t.start <= last && start <= entry->t.last)
        entry->at = NULL;
}

static inline void iotlb_invalidate(iotlb *tlb, const attachment *at, uint64_t start, uint64_t last)
{
    for (int i = 0; i < IOTLB_RANGES; i++)
        iotlb_drop(&tlb->range[i], at, start, last);
    if ((last - start) / PAGE < IOTLB_PAGES / 4) {
        for (uint64_t page = start / PAGE; page <= last / PAGE; page++)
            iotlb_drop(iotlb_slot(tlb, at, page * PAGE), at, start, last);
    } else {
        for (int i = 0; i < IOTLB_PAGES; i++)
            iotlb_drop(&tlb->page[i], at, start, last);
    }
}

/* An entry that allows the access; NULL: none. */
static inline const translation *iotlb_find(const iotlb *tlb, const attachment *at, uint64_t iova, uint32_t access)
{
    const iotlb_entry *entry = iotlb_slot((iotlb *)tlb, at, iova);

    if (entry->at == at && entry->t.start == (iova & -PAGE) && (entry->t.prot & access) == access)
        return &entry->t;
    for (int i = 0; i < IOTLB_RANGES; i++) {
        entry = &tlb->range[i];
        if (entry->at == at && entry->t.start <= iova && iova <= entry->t.last && (entry->t.prot & access) == access)
            return &entry->t;
    }
    return NULL;
}

/* Inserts the result of a walk for `access`. */
static inline const translation *iotlb_keep(iotlb *tlb, const attachment *at, uint64_t iova, uint32_t access,
                                            const translation *fresh)
{
    iotlb_entry *entry = iotlb_slot(tlb, at, iova);

    if (fresh->last - fresh->start >= PAGE) {
        /* An older entry of the same range, with less permission, must not stay. */
        for (int i = 0; i < IOTLB_RANGES; i++)
            iotlb_drop(&tlb->range[i], at, fresh->start, fresh->last);
        entry = &tlb->range[tlb->victim++ % IOTLB_RANGES];
    }
    entry->at = at;
    entry->t = *fresh;
    /* A walk without an access sets no flags: the first access has to walk again. */
    if (!access)
        entry->t.prot = 0;
    return &entry->t;
}

#endif

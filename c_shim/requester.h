/* SPDX-License-Identifier: MIT
 * What is behind a requester's handle: see requester.c (attachments, IOTLB) and dma.c (accesses). */
#ifndef VMS_REQUESTER_H
#define VMS_REQUESTER_H

#include "iotlb.h"
#include "ledger.h"
#include "stale.h"

#define CACHED 4

struct vms_requester {
    memory_listener listener; /* memory's */
    vms_memory *memory;
    pthread_mutex_t attaching; /* one change of attachments at a time; outermost */
    pthread_mutex_t lock;      /* all below */
    int enabled;
    attachment *attached; /* without a PASID; NULL: no translation, unless blocked */
    int blocked;
    span_tree pasids;
    iotlb *iotlb; /* NULL: never attached */
    unsigned victim;
    struct cached {
        uint64_t start, last; /* start > last: free */
        uint8_t *host;
        mapped_file *file; /* NULL: by message */
        uint64_t file_offset;
        uint32_t prot;
    } cache[CACHED];
    vms_dma_stats stats;
    stale_log *stale; /* NULL: stale translations are not looked for */
    int own_tlb;      /* its IOTLB is a device-TLB */
    vms_ledger *ledger; /* NULL: it is not followed */
    uint32_t who;
    int notified;
};

/* The attachment of this PASID; NULL: no such PASID.  Under requester->lock. */
static inline attachment *requester_pasid(const vms_requester *requester, uint32_t pasid)
{
    span_node *node = span_tree_from(&requester->pasids, pasid);
    return node && node->start == pasid ? (attachment *)node : NULL;
}

#endif

/* SPDX-License-Identifier: MIT
 * What requesters and their domains tell a ledger; see ledger.c.  Called under requester->lock; the ledger's own lock is
 * taken inside of it, and outside of a domain's and a memory's. */
#ifndef VMS_LEDGER_H
#define VMS_LEDGER_H

#include "domain.h"

/* The mappings of one domain, as long as something that follows the ledger is attached to it. */
typedef struct ledger_space ledger_space;

void ledger_ref(vms_ledger *ledger);
/* A requester with this memory is attached to `domain`, by which it reaches what is mapped in it already.  NULL: there is
 * nothing to record in a domain of this kind, or no memory. */
ledger_space *ledger_attached(vms_ledger *ledger, vms_domain *domain, vms_memory *memory, uint32_t who, uint32_t pasid,
                              int notified);
void ledger_detached(ledger_space *space);
/* [start, last] has been mapped, or the IOTLB invalidated. */
void ledger_changed(ledger_space *space, uint64_t start, uint64_t last, int flushed);
/* An access to n bytes by this translation. */
void ledger_accessed(ledger_space *space, uint64_t iova, uint64_t n, uint32_t access, uint64_t gpa, uint32_t who);
/* An access that was refused, or should have been: item's kind, iova, access, pasid and who.  EINVAL: no such kind. */
int ledger_incident(vms_ledger *ledger, ledger_space *space, vms_incident item);

#endif

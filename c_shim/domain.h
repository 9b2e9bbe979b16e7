/* SPDX-License-Identifier: MIT
 * What is behind a domain's handle; see domain.c (mappings), pgtable.c (guest tables) and requester.c (IOTLBs). */
#ifndef VMS_DOMAIN_H
#define VMS_DOMAIN_H

#include <pthread.h>
#include <stdatomic.h>

#include "dirty.h"
#include "guest_memory.h"
#include "mapping_tree.h"
#include "vmshim.h"

/* A requester's accesses with one PASID, or with none, go through a domain. */
typedef struct attachment {
    span_node pasid; /* first: a span_node * is an attachment *; in the requester's tree unless VMS_NO_PASID */
    vms_requester *requester;
    vms_domain *domain;
    struct witness *witness; /* under requester->lock; NULL: unknown; see stale.h */
    struct attachment *next; /* under domain->attach_lock */
} attachment;

struct vms_domain {
    uint32_t kind;
    _Atomic unsigned refs; /* its creator's, its attachments' and its nested domains' */

    /* VMS_DOMAIN_PAGING */
    pthread_rwlock_t lock; /* mappings.  Taken inside a requester's lock. */
    mapping_tree mappings;
    uint64_t page_sizes, first, last, last_gpa, max_mappings;
    dirty_log dirty;

    /* VMS_DOMAIN_TABLE */
    vms_memory *memory;
    vms_table table;
    vms_domain *parent;

    pthread_mutex_t attach_lock; /* Taken before a requester's lock, and before that of a nested domain. */
    attachment *attachments;
    vms_domain *nested, *next_nested;
};

/* What an IOTLB keeps: [start, last] leads to gpa and on. */
typedef struct translation {
    uint64_t start, last, gpa;
    uint32_t prot;  /* what may be done without another walk */
    uint32_t level; /* of the entry; 0: a mapping */
    vms_domain *log; /* whose dirty log has writes, NULL: none; at log_start for start */
    uint64_t log_start;
} translation;

void domain_ref(vms_domain *domain);
void domain_link(attachment *at);
void domain_unlink(attachment *at);
/* iova's translation.  access 0: whatever is allowed.  -EFAULT: fault's reason, gpa, level and stage are filled. */
int domain_translate(vms_domain *domain, uint64_t iova, uint32_t access, translation *out, vms_fault *fault);

/* In pgtable.c. */
int pgtable_check(const vms_table *table);
int pgtable_walk(vms_domain *domain, uint64_t iova, uint32_t access, translation *out, vms_fault *fault);

/* In requester.c: takes [start, last] out of the requester's IOTLB; returns when no access through it is under way. */
void requester_invalidate(vms_requester *requester, const attachment *at, uint64_t start, uint64_t last,
                          uint32_t flags);

#endif

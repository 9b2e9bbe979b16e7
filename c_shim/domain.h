/* SPDX-License-Identifier: MIT
 * What is behind a domain's handle; see domain.c (mappings) and pgtable.c (guest tables). */
#ifndef VMS_DOMAIN_H
#define VMS_DOMAIN_H

#include <pthread.h>
#include <stdatomic.h>

#include "dirty.h"
#include "guest_memory.h"
#include "mapping_tree.h"
#include "vmshim.h"

typedef struct translation translation;

/* Embedded in each object that caches translations of a domain. */
typedef struct domain_listener {
    struct domain_listener *next; /* under domain->attach_lock */
    /* Invalidates cached translations of [start, last]; returns when no access through them is in flight; flags
     * VMS_FLUSH_*. Called under domain->attach_lock (and its parent's). */
    void (*invalidate)(struct domain_listener *listener, uint64_t start, uint64_t last, uint32_t flags);
    /* [start, last] has been mapped; only while the domain is watched.  Under the same lock. */
    void (*mapped)(struct domain_listener *listener, uint64_t start, uint64_t last);
} domain_listener;

struct vms_domain {
    uint32_t kind;
    /* See domain_translate(). */
    int (*translate)(vms_domain *domain, uint64_t iova, uint32_t access, translation *out, vms_fault *fault);
    _Atomic unsigned refs; /* its creator's, its listeners' and its nested domains' */

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
    domain_listener *listeners;
    vms_domain *nested, *next_nested;
    _Atomic unsigned watched; /* how many listeners want to know what is mapped */
};

/* An IOTLB's entry: [start, last] is mapped to gpa and up. */
struct translation {
    uint64_t start, last, gpa;
    uint32_t prot;  /* VMS_PROT_* allowed without another walk */
    uint32_t level; /* of the entry; 0: a mapping */
    vms_domain *log; /* the domain whose dirty log records writes; NULL: none; at log_start for start */
    uint64_t log_start;
};

void domain_log(vms_domain *domain, uint64_t start, uint64_t last);

/* Notes a write to the IOVAs [start, last] if dirty tracking is on: the pages as the IOMMU's tables have them. */
static inline void domain_wrote(vms_domain *domain, uint64_t start, uint64_t last)
{
    if (atomic_load_explicit(&domain->dirty.on, memory_order_acquire))
        domain_log(domain, start, last);
}

/* A domain of this kind, whose ->translate is still to be set. */
int domain_create(uint32_t kind, vms_domain **out);
void domain_ref(vms_domain *domain);
/* Takes a reference; listener->invalidate is set. */
void domain_listen(vms_domain *domain, domain_listener *listener);
/* Drops the reference. */
void domain_unlisten(vms_domain *domain, domain_listener *listener);
/* Whether listeners are notified of what is mapped; calls add up. */
void domain_watch(vms_domain *domain, int on);
/* The first translation that ends at `at` or beyond and begins at `last` or before, which takes some of *steps.
 * ENOENT: there is none; EAGAIN: no steps are left.  Sets no flags. */
int domain_next(vms_domain *domain, uint64_t at, uint64_t last, translation *out, uint32_t *steps);
/* `parent` is the stage 2 of `domain`, as long as that lives. */
void domain_nest(vms_domain *domain, vms_domain *parent);

/* iova's translation.  access 0: whatever is allowed.  -EFAULT: fault's reason, gpa, level and stage are filled. */
static inline int domain_translate(vms_domain *domain, uint64_t iova, uint32_t access, translation *out,
                                   vms_fault *fault)
{
    return domain->translate(domain, iova, access, out, fault);
}

#endif

/* SPDX-License-Identifier: MIT
 * Domains: IOVA -> GPA.  A paging domain keeps its mappings here; others translate by rule, or by tables: pgtable.c. */
#include "domain.h"

#include <errno.h>
#include <stdlib.h>

#define PROT_ALL (VMS_PROT_READ | VMS_PROT_WRITE)
#define KEPT (PROT_ALL | VMS_MAP_NO_CACHE | VMS_MAP_SNOOP) /* with a mapping */
#define PAGE_MASK ((uint64_t)4095)

/* ---- translation --------------------------------------------------------------------------- */

static int refuse(vms_fault *fault, enum vms_reason reason)
{
    fault->reason = reason;
    fault->level = 0;
    fault->stage = 0;
    return -EFAULT;
}

static int translate_identity(vms_domain *domain, uint64_t iova, uint32_t access, translation *out, vms_fault *fault)
{
    (void)domain, (void)iova, (void)access, (void)fault;
    *out = (translation){ .last = UINT64_MAX, .prot = PROT_ALL };
    return 0;
}

static int translate_blocked(vms_domain *domain, uint64_t iova, uint32_t access, translation *out, vms_fault *fault)
{
    (void)domain, (void)iova, (void)access, (void)out;
    return refuse(fault, VMS_REASON_BLOCKED);
}

static int translate_paging(vms_domain *domain, uint64_t iova, uint32_t access, translation *out, vms_fault *fault)
{
    mapping item;

    if (iova < domain->first || iova > domain->last)
        return refuse(fault, VMS_REASON_INPUT_WIDTH);
    pthread_rwlock_rdlock(&domain->lock);
    int found = mapping_tree_find(&domain->mappings, iova, &item);
    pthread_rwlock_unlock(&domain->lock);
    if (!found)
        return refuse(fault, VMS_REASON_NOT_MAPPED);
    *out = (translation){
        .start = item.start, .last = item.last, .gpa = item.target & ~PAGE_MASK,
        .prot = (uint32_t)(item.target & PROT_ALL), .log = domain, .log_start = item.start,
    };
    if ((out->prot & access) != access)
        return refuse(fault, VMS_REASON_PERMISSION);
    return 0;
}

int vms_domain_walk(vms_domain *domain, uint64_t iova, uint32_t access, vms_mapping *out, vms_fault *fault)
{
    translation t;

    *fault = (vms_fault){ .pasid = VMS_NO_PASID, .iova = iova, .access = access };
    if (access & ~PROT_ALL)
        return -EINVAL;
    int rc = domain_translate(domain, iova, access, &t, fault);
    if (rc == 0)
        *out = (vms_mapping){ t.start, t.last, t.gpa, t.prot, t.level };
    return rc;
}

/* ---- life ------------------------------------------------------------------------------------ */

int domain_create(uint32_t kind, vms_domain **out)
{
    vms_domain *domain = calloc(1, sizeof *domain);
    if (!domain)
        return -ENOMEM;
    domain->kind = kind;
    atomic_store(&domain->refs, 1);
    pthread_rwlock_init(&domain->lock, NULL);
    pthread_mutex_init(&domain->attach_lock, NULL);
    mapping_tree_init(&domain->mappings, NULL);
    dirty_init(&domain->dirty);
    *out = domain;
    return 0;
}

int vms_domain_create(uint32_t kind, vms_domain **out)
{
    if (kind != VMS_DOMAIN_IDENTITY && kind != VMS_DOMAIN_BLOCKED)
        return -EINVAL;
    int rc = domain_create(kind, out);
    if (rc == 0)
        (*out)->translate = kind == VMS_DOMAIN_IDENTITY ? translate_identity : translate_blocked;
    return rc;
}

int vms_domain_create_paging(uint64_t page_sizes, uint64_t first, uint64_t last, uint64_t last_gpa,
                             uint64_t max_mappings, vms_budget *budget, vms_domain **out)
{
    if (!page_sizes || (page_sizes & PAGE_MASK) || first > last)
        return -EINVAL;
    int rc = domain_create(VMS_DOMAIN_PAGING, out);
    if (rc < 0)
        return rc;
    (*out)->translate = translate_paging;
    (*out)->page_sizes = page_sizes;
    (*out)->first = first;
    (*out)->last = last;
    (*out)->last_gpa = last_gpa;
    (*out)->max_mappings = max_mappings;
    budget_ref(budget);
    mapping_tree_init(&(*out)->mappings, budget);
    return 0;
}

void domain_nest(vms_domain *domain, vms_domain *parent)
{
    domain->parent = parent;
    domain_ref(parent);
    pthread_mutex_lock(&parent->attach_lock);
    domain->next_nested = parent->nested;
    parent->nested = domain;
    pthread_mutex_unlock(&parent->attach_lock);
}

void domain_ref(vms_domain *domain)
{
    atomic_fetch_add(&domain->refs, 1);
}

void vms_domain_destroy(vms_domain *domain)
{
    if (!domain)
        return;
    /* A nested domain leaves its parent's list under the lock that a flush of the parent holds: so the count may
     * only reach 0 inside it. */
    vms_domain *parent = domain->parent;
    if (parent)
        pthread_mutex_lock(&parent->attach_lock);
    int gone = atomic_fetch_sub(&domain->refs, 1) == 1;
    if (parent) {
        if (gone) {
            vms_domain **link = &parent->nested;
            while (*link != domain)
                link = &(*link)->next_nested;
            *link = domain->next_nested;
        }
        pthread_mutex_unlock(&parent->attach_lock);
    }
    if (!gone)
        return;
    mapping_tree_clear(&domain->mappings);
    vms_budget_destroy(domain->mappings.nodes.budget);
    dirty_destroy(&domain->dirty);
    pthread_rwlock_destroy(&domain->lock);
    pthread_mutex_destroy(&domain->attach_lock);
    vms_memory_destroy(domain->memory);
    free(domain);
    vms_domain_destroy(parent);
}

void domain_listen(vms_domain *domain, domain_listener *listener)
{
    domain_ref(domain);
    pthread_mutex_lock(&domain->attach_lock);
    listener->next = domain->listeners;
    domain->listeners = listener;
    pthread_mutex_unlock(&domain->attach_lock);
}

void domain_unlisten(vms_domain *domain, domain_listener *listener)
{
    pthread_mutex_lock(&domain->attach_lock);
    domain_listener **link = &domain->listeners;
    while (*link != listener)
        link = &(*link)->next;
    *link = listener->next;
    pthread_mutex_unlock(&domain->attach_lock);
    vms_domain_destroy(domain);
}

void domain_watch(vms_domain *domain, int on)
{
    if (on)
        atomic_fetch_add(&domain->watched, 1);
    else
        atomic_fetch_sub(&domain->watched, 1);
}

/* ---- mappings ------------------------------------------------------------------------------ */

/* The first mapping that allows an access.  A mapping without permission counts as none. */
static int next_mapping(vms_domain *domain, uint64_t at, uint64_t last, translation *out, uint32_t *steps)
{
    mapping item;
    int rc = -ENOENT;

    pthread_rwlock_rdlock(&domain->lock);
    while (mapping_tree_from(&domain->mappings, at, &item) && item.start <= last) {
        if (!(*steps)--) {
            *steps = 0;
            rc = -EAGAIN;
            break;
        }
        if (item.target & PROT_ALL) {
            *out = (translation){ .start = item.start, .last = item.last, .gpa = item.target & ~PAGE_MASK,
                                  .prot = (uint32_t)(item.target & PROT_ALL) };
            rc = 0;
            break;
        }
        if (item.last >= last)
            break;
        at = item.last + 1;
    }
    pthread_rwlock_unlock(&domain->lock);
    return rc;
}

/* How many bits of an address an entry of a table covers, of this level (0: unknown); at most those of a page where
 * stage 2 is what refuses. */
static unsigned hole_bits(const vms_fault *fault)
{
    return fault->stage == 2 || fault->level < 2 ? 12 : 12 + 9 * (fault->level - 1);
}

/* Walks the tables: over what is not mapped in steps as large as the entry that says so. */
static int next_entry(vms_domain *domain, uint64_t at, uint64_t last, translation *out, uint32_t *steps)
{
    for (;;) {
        vms_fault fault = { 0 };
        if (!(*steps)--) {
            *steps = 0;
            return -EAGAIN;
        }
        if (domain_translate(domain, at, 0, out, &fault) == 0)
            return 0;
        uint64_t end = at | ((UINT64_C(1) << hole_bits(&fault)) - 1);
        if (fault.reason == VMS_REASON_INPUT_WIDTH && fault.stage != 2) { /* canonical addresses go on at the top */
            uint64_t top = UINT64_MAX << (domain->table.input_bits - 1);
            end = at < top ? top - 1 : UINT64_MAX;
        }
        if (end >= last)
            return -ENOENT;
        at = end + 1;
    }
}

int domain_next(vms_domain *domain, uint64_t at, uint64_t last, translation *out, uint32_t *steps)
{
    switch (domain->kind) {
    case VMS_DOMAIN_PAGING:
        return next_mapping(domain, at, last, out, steps);
    case VMS_DOMAIN_TABLE:
        return next_entry(domain, at, last, out, steps);
    default:
        return -ENOENT;
    }
}

static uint64_t smallest_page(const vms_domain *domain)
{
    return domain->page_sizes & -domain->page_sizes;
}

static void tell_mapped(vms_domain *domain, uint64_t start, uint64_t last)
{
    pthread_mutex_lock(&domain->attach_lock);
    for (domain_listener *listener = domain->listeners; listener; listener = listener->next)
        listener->mapped(listener, start, last);
    pthread_mutex_unlock(&domain->attach_lock);
}

int vms_domain_map(vms_domain *domain, uint64_t iova, uint64_t gpa, uint64_t size, uint32_t prot)
{
    if (domain->kind != VMS_DOMAIN_PAGING || !size ||
        (prot != VMS_PROT_NONE && (!(prot & PROT_ALL) || (prot & ~KEPT))) ||
        ((iova | gpa | size) & (smallest_page(domain) - 1)))
        return -EINVAL;
    mapping item = { iova, iova + (size - 1), gpa | (prot & KEPT) };
    if (item.last < iova || iova < domain->first || item.last > domain->last || gpa + (size - 1) < gpa ||
        gpa + (size - 1) > domain->last_gpa)
        return -ERANGE;
    pthread_rwlock_wrlock(&domain->lock);
    int rc = domain->mappings.count < domain->max_mappings ? mapping_tree_insert(&domain->mappings, &item) : -ENOSPC;
    pthread_rwlock_unlock(&domain->lock);
    if (rc == 0 && atomic_load(&domain->watched))
        tell_mapped(domain, item.start, item.last);
    return rc;
}

/* The page of a mapping that an address lies in: the largest that alignment and the mapping's ends allow. */
static void page_of(const vms_domain *domain, const mapping *item, uint64_t address, uint64_t *start, uint64_t *last)
{
    uint64_t offset = item->start ^ (item->target & ~PAGE_MASK);

    for (uint64_t sizes = domain->page_sizes; sizes;) {
        uint64_t size = UINT64_C(1) << (63 - __builtin_clzll(sizes));
        sizes &= ~size;
        *start = address & -size;
        *last = *start + (size - 1);
        if (!(offset & (size - 1)) && *start >= item->start && *last <= item->last)
            return;
    }
}

/* A table's entry has one dirty bit, whatever its size. */
void domain_log(vms_domain *domain, uint64_t start, uint64_t last)
{
    uint64_t unused;
    mapping item;

    pthread_rwlock_rdlock(&domain->lock);
    for (;;) {
        uint64_t end = last;
        if (mapping_tree_find(&domain->mappings, start, &item)) { /* else it was unmapped meanwhile */
            page_of(domain, &item, last < item.last ? last : item.last, &unused, &end);
            page_of(domain, &item, start, &start, &unused);
        }
        dirty_mark(&domain->dirty, start, end);
        if (end >= last)
            break;
        start = end + 1;
    }
    pthread_rwlock_unlock(&domain->lock);
}

/* Removes the pages that begin in [at, last], up to a hole; the last one may reach further. */
static int unmap_pages(vms_domain *domain, uint64_t at, uint64_t last, uint64_t *removed)
{
    mapping_tree *tree = &domain->mappings;
    uint64_t page, page_last;
    mapping item;

    while (mapping_tree_find(tree, at, &item)) {
        uint64_t to = item.last < last ? item.last : last;
        page_of(domain, &item, at, &page, &page_last);
        if (page != at)
            return 0;
        if (to < item.last) {
            page_of(domain, &item, to, &page, &page_last);
            to = page_last;
        }
        uint64_t prot = item.target & PAGE_MASK, gpa = item.target & ~PAGE_MASK;
        mapping head = { item.start, at - 1, item.target };
        mapping tail = { to + 1, item.last, (gpa + (to + 1 - item.start)) | prot };
        if (at > item.start && to < item.last) {
            int rc = tree->count < domain->max_mappings ? mapping_tree_split(tree, &head, &tail) : -ENOSPC;
            if (rc < 0)
                return rc;
        } else if (at > item.start) {
            mapping_tree_resize(tree, item.start, &head);
        } else if (to < item.last) {
            mapping_tree_resize(tree, item.start, &tail);
        } else {
            mapping_tree_remove(tree, item.start);
        }
        *removed += to - at + 1;
        if (to >= last)
            return 0;
        at = to + 1;
    }
    return 0;
}

int64_t vms_domain_unmap(vms_domain *domain, uint64_t iova, uint64_t size, uint32_t flags)
{
    uint64_t last = iova + (size - 1), removed = 0;
    int rc = 0;

    if (domain->kind != VMS_DOMAIN_PAGING || !size || ((iova | size) & (smallest_page(domain) - 1)) || last < iova)
        return -EINVAL;
    pthread_rwlock_wrlock(&domain->lock);
    if (mapping_tree_remove_exact(&domain->mappings, iova, last)) /* the usual case */
        removed = size;
    else
        rc = unmap_pages(domain, iova, last, &removed);
    pthread_rwlock_unlock(&domain->lock);
    if (removed && !(flags & VMS_UNMAP_DEFER))
        vms_domain_flush(domain, iova, iova + (removed - 1), 0);
    return removed ? (int64_t)(removed >> 12) : rc;
}

int64_t vms_domain_clear(vms_domain *domain, uint64_t first, uint64_t last, uint32_t flags)
{
    mapping_tree *tree = &domain->mappings;
    uint64_t pages = 0, at = first;
    mapping item;
    int rc = 0;

    if (domain->kind != VMS_DOMAIN_PAGING || last < first)
        return -EINVAL;
    pthread_rwlock_wrlock(&domain->lock);
    int exact = mapping_tree_remove_exact(tree, first, last); /* the usual case */
    if (exact)
        pages = (last - first) / 4096 + 1;
    else if ((mapping_tree_find(tree, first, &item) && item.start < first) ||
             (mapping_tree_find(tree, last, &item) && item.last > last))
        rc = -ERANGE;
    while (!exact && rc == 0 && mapping_tree_from(tree, at, &item) && item.start <= last) {
        mapping_tree_remove(tree, item.start);
        pages += (item.last - item.start) / 4096 + 1;
        if (item.last == last)
            break;
        at = item.last + 1;
    }
    pthread_rwlock_unlock(&domain->lock);
    if (pages && !(flags & VMS_UNMAP_DEFER))
        vms_domain_flush(domain, first, last, 0);
    return pages ? (int64_t)pages : rc;
}

int vms_domain_flush(vms_domain *domain, uint64_t start, uint64_t last, uint32_t flags)
{
    if (start > last)
        return -EINVAL;
    pthread_mutex_lock(&domain->attach_lock);
    for (domain_listener *listener = domain->listeners; listener; listener = listener->next)
        listener->invalidate(listener, start, last, flags);
    /* Nested domains have other input addresses: all of them is flushed. */
    for (vms_domain *nested = domain->nested; nested; nested = nested->next_nested)
        vms_domain_flush(nested, 0, UINT64_MAX, flags);
    pthread_mutex_unlock(&domain->attach_lock);
    return 0;
}

size_t vms_domain_list(vms_domain *domain, uint64_t iova, vms_mapping *out, size_t room)
{
    mapping item;
    size_t n = 0;

    pthread_rwlock_rdlock(&domain->lock);
    while (n < room && mapping_tree_from(&domain->mappings, iova, &item)) {
        out[n++] = (vms_mapping){ item.start, item.last, item.target & ~PAGE_MASK, item.target & KEPT, 0 };
        if (item.last == UINT64_MAX)
            break;
        iova = item.last + 1;
    }
    pthread_rwlock_unlock(&domain->lock);
    return n;
}

size_t vms_domain_count(vms_domain *domain, uint64_t *bytes)
{
    pthread_rwlock_rdlock(&domain->lock);
    size_t count = domain->mappings.count;
    *bytes = mapping_tree_bytes(&domain->mappings);
    pthread_rwlock_unlock(&domain->lock);
    return count;
}

int vms_domain_check(vms_domain *domain)
{
    pthread_rwlock_rdlock(&domain->lock);
    int rc = mapping_tree_check(&domain->mappings);
    pthread_rwlock_unlock(&domain->lock);
    return rc;
}

/* ---- the log of writes --------------------------------------------------------------------- */

int vms_domain_dirty_start(vms_domain *domain)
{
    return domain->kind == VMS_DOMAIN_PAGING ? dirty_start(&domain->dirty, NULL, 0) : -EINVAL;
}

int vms_domain_dirty_stop(vms_domain *domain)
{
    return dirty_stop(&domain->dirty);
}

int vms_domain_dirty_report(vms_domain *domain, uint64_t iova, uint64_t size, uint64_t page_size, int keep,
                            uint64_t *bitmap, size_t words)
{
    return dirty_report(&domain->dirty, iova, size, page_size, keep, bitmap, words);
}

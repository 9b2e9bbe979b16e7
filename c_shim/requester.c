/* SPDX-License-Identifier: MIT
 * The requester: its attachments to domains, and its IOTLB. */
#include "requester.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>

#define OWNER_OF(member_at, type, member) ((type *)(void *)((char *)(member_at) - offsetof(type, member)))

static void drop_windows(vms_requester *requester, uint64_t start, uint64_t last)
{
    for (int i = 0; i < CACHED; i++) {
        struct cached *window = &requester->cache[i];
        if (window->start <= last && start <= window->last)
            *window = (struct cached){ .start = 1, .last = 0 };
    }
}

/* A memory_listener's. */
static void windows_removed(memory_listener *listener, uint64_t start, uint64_t last)
{
    vms_requester *requester = OWNER_OF(listener, vms_requester, listener);

    pthread_mutex_lock(&requester->lock);
    drop_windows(requester, start, last);
    pthread_mutex_unlock(&requester->lock);
}

int vms_requester_create(vms_memory *memory, vms_requester **out)
{
    vms_requester *requester = calloc(1, sizeof *requester);
    if (!requester)
        return -ENOMEM;
    requester->memory = memory;
    memory_ref(memory);
    pthread_mutex_init(&requester->attaching, NULL);
    pthread_mutex_init(&requester->lock, NULL);
    span_tree_init(&requester->pasids);
    drop_windows(requester, 0, UINT64_MAX);
    requester->listener.removed = windows_removed;
    memory_listen(memory, &requester->listener);
    *out = requester;
    return 0;
}

void vms_requester_destroy(vms_requester *requester)
{
    if (!requester)
        return;
    vms_requester_attach(requester, VMS_NO_PASID, NULL);
    while (requester->pasids.root)
        vms_requester_attach(requester, (uint32_t)requester->pasids.root->start, NULL);
    vms_ledger_destroy(requester->ledger);
    memory_unlisten(requester->memory, &requester->listener);
    vms_memory_destroy(requester->memory);
    pthread_mutex_destroy(&requester->attaching);
    pthread_mutex_destroy(&requester->lock);
    free(requester->iotlb);
    free(requester->stale);
    free(requester);
}

int vms_requester_enable(vms_requester *requester, int on)
{
    pthread_mutex_lock(&requester->lock);
    requester->enabled = on != 0;
    pthread_mutex_unlock(&requester->lock);
    return 0;
}

void vms_dma_stats_get(vms_requester *requester, vms_dma_stats *out)
{
    pthread_mutex_lock(&requester->lock);
    *out = requester->stats;
    pthread_mutex_unlock(&requester->lock);
}

/* ---- attachments and the IOTLB --------------------------------------------------------------- */

/* A domain_listener's. */
static void invalidate(domain_listener *listener, uint64_t start, uint64_t last, uint32_t flags)
{
    const attachment *at = OWNER_OF(listener, attachment, listener);
    vms_requester *requester = at->requester;

    pthread_mutex_lock(&requester->lock);
    if (!requester->own_tlb || !(flags & VMS_FLUSH_KEEP_OWN))
        iotlb_invalidate(requester->iotlb, at, start, last);
    if (at->space)
        ledger_changed(at->space, start, last, 1);
    pthread_mutex_unlock(&requester->lock);
}

/* A domain_listener's. */
static void mapped(domain_listener *listener, uint64_t start, uint64_t last)
{
    const attachment *at = OWNER_OF(listener, attachment, listener);

    pthread_mutex_lock(&at->requester->lock);
    if (at->space)
        ledger_changed(at->space, start, last, 0);
    pthread_mutex_unlock(&at->requester->lock);
}

int vms_requester_own_tlb(vms_requester *requester, int on)
{
    pthread_mutex_lock(&requester->lock);
    requester->own_tlb = on != 0;
    pthread_mutex_unlock(&requester->lock);
    return 0;
}

int vms_requester_flush(vms_requester *requester, uint32_t pasid, uint64_t start, uint64_t last)
{
    if (start > last)
        return -EINVAL;
    pthread_mutex_lock(&requester->lock);
    const attachment *at = pasid == VMS_NO_PASID ? requester->attached : requester_pasid(requester, pasid);
    if (at)
        iotlb_invalidate(requester->iotlb, at, start, last);
    pthread_mutex_unlock(&requester->lock);
    return 0;
}

/* Has an attachment recorded, if the requester is followed.  It listens to its domain already. */
static void follow(const vms_requester *requester, attachment *at)
{
    if (requester->ledger)
        at->space = ledger_attached(requester->ledger, at->domain, requester->memory, requester->who,
                                    (uint32_t)at->pasid.start, requester->notified);
}

/* Puts an attachment, or NULL, in the place of the one of this PASID.  Under requester->attaching. */
static void put(vms_requester *requester, uint32_t pasid, attachment *fresh, int blocked)
{
    attachment *old;
    ledger_space *space = NULL;

    pthread_mutex_lock(&requester->lock);
    if (fresh)
        follow(requester, fresh);
    if (pasid == VMS_NO_PASID) {
        old = requester->attached;
        requester->attached = fresh;
        requester->blocked = blocked;
    } else {
        old = requester_pasid(requester, pasid);
        if (old)
            span_tree_remove(&requester->pasids, &old->pasid);
        if (fresh)
            span_tree_insert(&requester->pasids, &fresh->pasid);
    }
    if (old) {
        iotlb_invalidate(requester->iotlb, old, 0, UINT64_MAX);
        space = old->space;
        old->space = NULL;
    }
    pthread_mutex_unlock(&requester->lock);
    if (space)
        ledger_detached(space);
    if (old) {
        domain_unlisten(old->domain, &old->listener);
        witness_destroy(old->witness);
        free(old);
    }
}

int vms_requester_attach(vms_requester *requester, uint32_t pasid, vms_domain *domain)
{
    attachment *fresh = NULL;
    iotlb *tlb = NULL;

    if (domain) {
        fresh = calloc(1, sizeof *fresh);
        tlb = calloc(1, sizeof *tlb);
        if (!fresh || !tlb) {
            free(fresh);
            free(tlb);
            return -ENOMEM;
        }
        fresh->pasid.start = fresh->pasid.last = pasid;
        fresh->listener.invalidate = invalidate;
        fresh->listener.mapped = mapped;
        fresh->requester = requester;
        fresh->domain = domain;
    }
    pthread_mutex_lock(&requester->attaching);
    pthread_mutex_lock(&requester->lock);
    if (!requester->iotlb) {
        requester->iotlb = tlb;
        tlb = NULL;
    }
    pthread_mutex_unlock(&requester->lock);
    if (fresh)
        domain_listen(domain, &fresh->listener);
    put(requester, pasid, fresh, 0);
    pthread_mutex_unlock(&requester->attaching);
    free(tlb);
    return 0;
}

int vms_requester_block(vms_requester *requester)
{
    pthread_mutex_lock(&requester->attaching);
    put(requester, VMS_NO_PASID, NULL, 1);
    while (requester->pasids.root)
        put(requester, (uint32_t)requester->pasids.root->start, NULL, 1);
    pthread_mutex_unlock(&requester->attaching);
    return 0;
}

/* The attachment after this one; NULL: the first.  Under requester->lock. */
static attachment *next_attachment(const vms_requester *requester, const attachment *at)
{
    if (!at && requester->attached)
        return requester->attached;
    return (attachment *)span_tree_from(&requester->pasids, at && at != requester->attached ? at->pasid.start + 1 : 0);
}

int vms_requester_follow(vms_requester *requester, vms_ledger *ledger, uint32_t who, int notified)
{
    attachment *at = NULL;

    pthread_mutex_lock(&requester->attaching);
    pthread_mutex_lock(&requester->lock);
    while ((at = next_attachment(requester, at))) {
        if (at->space)
            ledger_detached(at->space);
        at->space = NULL;
    }
    vms_ledger_destroy(requester->ledger);
    requester->ledger = ledger;
    requester->who = who;
    requester->notified = notified;
    if (ledger)
        ledger_ref(ledger);
    while (ledger && (at = next_attachment(requester, at)))
        follow(requester, at);
    pthread_mutex_unlock(&requester->lock);
    pthread_mutex_unlock(&requester->attaching);
    return 0;
}

int vms_requester_incident(vms_requester *requester, uint32_t pasid, uint32_t kind, uint64_t iova, uint32_t access)
{
    pthread_mutex_lock(&requester->lock);
    const attachment *at = pasid == VMS_NO_PASID ? requester->attached : requester_pasid(requester, pasid);
    vms_incident item = { .iova = iova, .kind = kind, .access = access, .pasid = pasid, .who = requester->who };
    int rc = requester->ledger ? ledger_incident(requester->ledger, at ? at->space : NULL, item) : -ENOENT;
    pthread_mutex_unlock(&requester->lock);
    return rc;
}

int vms_requester_chosen_by(vms_requester *requester, uint32_t pasid, vms_memory *memory, const vms_word *words,
                            size_t n)
{
    if (n > VMS_WORDS)
        return -EINVAL;
    struct witness *witness = witness_create(memory, words, n), *old = witness;
    if (!witness)
        return -ENOMEM;
    pthread_mutex_lock(&requester->lock);
    attachment *at = pasid == VMS_NO_PASID ? requester->attached : requester_pasid(requester, pasid);
    if (at) {
        old = at->witness;
        at->witness = witness;
    }
    pthread_mutex_unlock(&requester->lock);
    witness_destroy(old);
    return at ? 0 : -ENOENT;
}

int vms_requester_check_stale(vms_requester *requester, int on)
{
    stale_log *log = on ? calloc(1, sizeof *log) : NULL;

    if (on && !log)
        return -ENOMEM;
    pthread_mutex_lock(&requester->lock);
    if (!on || !requester->stale) {
        stale_log *old = requester->stale;
        if (log)
            log->total = &requester->stats.stale;
        requester->stale = log;
        log = old;
    }
    pthread_mutex_unlock(&requester->lock);
    free(log);
    return 0;
}

size_t vms_requester_stale(vms_requester *requester, vms_stale *out, size_t room)
{
    pthread_mutex_lock(&requester->lock);
    size_t n = requester->stale ? stale_take(requester->stale, out, room) : 0;
    pthread_mutex_unlock(&requester->lock);
    return n;
}

/* SPDX-License-Identifier: MIT
 * DMA: IOVA -> GPA -> bytes, in one call for a whole transfer.
 *
 * A requester's lock is held while bytes are copied.  Unmapping a window takes the lock of each requester of that
 * memory after it has removed the window, and invalidating takes the lock of each requester of that domain after the
 * mapping has gone: so a window's file outlives every copy from it, and the reply to DMA_UNMAP, or the return of an
 * unmap, means that no access is in flight. */
#define _GNU_SOURCE
#include "dma.h"

#include <errno.h>
#include <string.h>

/* The translation of iova, from the IOTLB or by the domain; NULL: *fault is filled.  Under requester->lock. */
static const translation *find(vms_requester *requester, const attachment *at, uint64_t iova, uint32_t access,
                               vms_fault *fault)
{
    const translation *cached = iotlb_find(requester->iotlb, at, iova, access);
    translation fresh;

    if (cached) {
        requester->stats.iotlb_hits++;
        return requester->stale ? stale_entry(requester->stale, at, cached, iova, access) : cached;
    }
    requester->stats.iotlb_misses++;
    if (domain_translate(at->domain, iova, access, &fresh, fault) < 0)
        return NULL;
    return iotlb_keep(requester->iotlb, at, iova, access, &fresh);
}

/* ---- one piece of an access -------------------------------------------------------------------- */

static const struct cached *lookup(vms_requester *requester, uint64_t gpa)
{
    for (int i = 0; i < CACHED; i++) {
        const struct cached *c = &requester->cache[i];
        if (c->start <= gpa && gpa <= c->last)
            return c;
    }
    vms_memory *memory = requester->memory;
    struct cached *c = NULL;
    pthread_mutex_lock(&memory->lock);
    const window *win = memory_find(memory, gpa);
    if (win) {
        c = &requester->cache[requester->victim++ % CACHED];
        c->start = win->span.start;
        c->last = win->span.last;
        c->prot = win->prot;
        c->file = win->file;
        c->file_offset = win->offset;
        c->host = win->file ? file_at(win->file, win->offset) : NULL;
    }
    pthread_mutex_unlock(&memory->lock);
    return c;
}

int dma_fail(vms_requester *requester, vms_fault *fault, enum vms_reason reason, uint64_t iova)
{
    fault->reason = reason;
    fault->iova = iova;
    if (reason != VMS_REASON_NO_FILE)
        requester->stats.faults++;
    return -EFAULT;
}

/* Selects the attachment of an access: 0 with *at, NULL for no translation.  Under requester->lock. */
int dma_route(vms_requester *requester, uint32_t pasid, uint64_t iova, attachment **at, vms_fault *fault)
{
    if (!requester->enabled)
        return dma_fail(requester, fault, VMS_REASON_BUS_MASTER_OFF, iova);
    *at = pasid == VMS_NO_PASID ? requester->attached : requester_pasid(requester, pasid);
    if (!*at && pasid != VMS_NO_PASID)
        return dma_fail(requester, fault, VMS_REASON_PASID, iova);
    if (!*at && requester->blocked)
        return dma_fail(requester, fault, VMS_REASON_BLOCKED, iova);
    if (requester->stale && *at)
        stale_route(requester->stale, *at, iova, fault->access);
    return 0;
}

/* A call's return value: 1 instead of 0 if stale translations are noted.  Under requester->lock. */
int dma_outcome(const vms_requester *requester, int rc)
{
    return rc == 0 && requester->stale && requester->stale->count ? 1 : rc;
}

/* Translates iova to a place of at most `want` bytes.  Under requester->lock. */
int dma_translate(vms_requester *requester, const attachment *at, uint64_t iova, uint64_t want, uint32_t access,
                     place *out, vms_fault *fault)
{
    uint64_t gpa = iova, left = UINT64_MAX; /* bytes after the first */

    out->log = NULL;
    out->log_at = 0;
    if (at) {
        fault->gpa = 0; /* of the piece before */
        const translation *t = find(requester, at, iova, access, fault);
        if (!t)
            return dma_fail(requester, fault, fault->reason, iova);
        gpa = t->gpa + (iova - t->start);
        left = t->last - iova;
        out->log = t->log;
        out->log_at = t->log_start + (iova - t->start);
    }
    fault->gpa = gpa;
    const struct cached *c = lookup(requester, gpa);
    if (!c)
        return dma_fail(requester, fault, VMS_REASON_NO_WINDOW, iova);
    if ((c->prot & access) != access)
        return dma_fail(requester, fault, VMS_REASON_PERMISSION, iova);
    if (c->last - gpa < left)
        left = c->last - gpa;
    out->n = left < want - 1 ? left + 1 : want;
    out->gpa = gpa;
    out->window = c;
    if (!c->file) {
        if (at && at->space)
            ledger_accessed(at->space, iova, out->n, access, gpa, requester->who);
        fault->len = out->n;
        if (access & VMS_PROT_WRITE) {
            dirty_mark(&requester->memory->dirty, gpa, gpa + (out->n - 1));
            if (out->log)
                domain_wrote(out->log, out->log_at, out->log_at + (out->n - 1));
        }
        return dma_fail(requester, fault, VMS_REASON_NO_FILE, iova);
    }
    uint64_t offset = gpa - c->start;
    if (c->file_offset + offset + out->n > atomic_load_explicit(&c->file->good, memory_order_acquire))
        return dma_fail(requester, fault, VMS_REASON_TRUNCATED, iova);
    out->ptr = c->host + offset;
    if (at && at->space)
        ledger_accessed(at->space, iova, out->n, access, gpa, requester->who);
    return 0;
}

int dma_still_there(const place *p)
{
    return p->window->file_offset + (p->gpa - p->window->start) + p->n <= atomic_load(&p->window->file->good);
}

void dma_wrote(vms_requester *requester, const place *p)
{
    dirty_mark(&requester->memory->dirty, p->gpa, p->gpa + (p->n - 1));
    if (p->log)
        domain_wrote(p->log, p->log_at, p->log_at + (p->n - 1));
}

int dma_transfer(vms_requester *requester, const attachment *at, uint64_t iova, uint8_t *buf, uint64_t len,
                    uint32_t flags, vms_fault *fault)
{
    uint32_t access = flags & VMS_DMA_WRITE ? VMS_PROT_WRITE : VMS_PROT_READ;

    if (len && iova + (len - 1) < iova)
        return dma_fail(requester, fault, VMS_REASON_WRAP, iova);
    while (len) {
        place p;
        int rc = dma_translate(requester, at, iova, len, access, &p, fault);
        if (rc < 0)
            return rc;
        if (flags & VMS_DMA_WRITE) {
            memcpy(p.ptr, buf, p.n);
            dma_wrote(requester, &p);
        } else {
            memcpy(buf, p.ptr, p.n);
        }
        if (!dma_still_there(&p))
            return dma_fail(requester, fault, VMS_REASON_TRUNCATED, iova);
        fault->done += p.n;
        iova += p.n;
        buf += p.n;
        len -= p.n;
    }
    return 0;
}

void dma_begin(vms_fault *fault, uint32_t pasid, uint32_t flags)
{
    *fault = (vms_fault){ .pasid = pasid, .access = flags & VMS_DMA_WRITE ? VMS_PROT_WRITE : VMS_PROT_READ };
}

void dma_count(vms_requester *requester, uint32_t flags, uint64_t done)
{
    if (flags & VMS_DMA_WRITE) {
        requester->stats.write_ops++;
        requester->stats.write_bytes += done;
    } else {
        requester->stats.read_ops++;
        requester->stats.read_bytes += done;
    }
}

int vms_dma_rw(vms_requester *requester, uint32_t pasid, uint64_t iova, void *buf, size_t len,
               uint32_t flags, vms_fault *fault)
{
    dma_begin(fault, pasid, flags);
    attachment *at;
    pthread_mutex_lock(&requester->lock);
    int rc = dma_route(requester, pasid, iova, &at, fault);
    if (rc == 0)
        rc = dma_transfer(requester, at, iova, buf, len, flags, fault);
    dma_count(requester, flags, fault->done);
    rc = dma_outcome(requester, rc);
    pthread_mutex_unlock(&requester->lock);
    return rc;
}

int vms_dma_sg(vms_requester *requester, uint32_t pasid, const vms_sg *sg, size_t n, void *buf, size_t len,
               uint32_t flags, vms_fault *fault)
{
    attachment *at;

    dma_begin(fault, pasid, flags);
    pthread_mutex_lock(&requester->lock);
    int rc = dma_route(requester, pasid, n ? sg[0].iova : 0, &at, fault);
    for (size_t i = 0; i < n && rc == 0; i++) {
        if (sg[i].len > len - fault->done)
            rc = -EINVAL;
        else
            rc = dma_transfer(requester, at, sg[i].iova, (uint8_t *)buf + fault->done, sg[i].len, flags, fault);
    }
    dma_count(requester, flags, fault->done);
    rc = dma_outcome(requester, rc);
    pthread_mutex_unlock(&requester->lock);
    return rc;
}

#define ATOMIC_ON(type)                                                                                       \
    do {                                                                                                      \
        type *at = (type *)p.ptr, want = (type)compare;                                                         \
        if (op == VMS_ATOMIC_FETCH_ADD)                                                                       \
            *old = __atomic_fetch_add(at, (type)operand, __ATOMIC_SEQ_CST);                                   \
        else if (op == VMS_ATOMIC_SWAP)                                                                       \
            *old = __atomic_exchange_n(at, (type)operand, __ATOMIC_SEQ_CST);                                  \
        else {                                                                                                \
            __atomic_compare_exchange_n(at, &want, (type)operand, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);     \
            *old = want;                                                                                      \
        }                                                                                                     \
    } while (0)

int vms_dma_atomic(vms_requester *requester, uint32_t pasid, uint64_t iova, uint32_t op, uint32_t size,
                   uint64_t operand, uint64_t compare, uint64_t *old, vms_fault *fault)
{
    attachment *at;
    place p;

    if ((size != 4 && size != 8) || op > VMS_ATOMIC_CAS)
        return -EINVAL;
    dma_begin(fault, pasid, VMS_DMA_WRITE);
    fault->access = VMS_PROT_READ | VMS_PROT_WRITE;
    pthread_mutex_lock(&requester->lock);
    int rc = dma_route(requester, pasid, iova, &at, fault);
    if (rc == 0 && (iova & (size - 1)))
        rc = dma_fail(requester, fault, VMS_REASON_UNALIGNED, iova);
    if (rc == 0) /* windows and mappings are page-aligned, so an aligned operand never crosses one */
        rc = dma_translate(requester, at, iova, size, fault->access, &p, fault);
    if (rc == 0) {
        if (size == 4)
            ATOMIC_ON(uint32_t);
        else
            ATOMIC_ON(uint64_t);
        dma_wrote(requester, &p);
        if (!dma_still_there(&p))
            rc = dma_fail(requester, fault, VMS_REASON_TRUNCATED, iova);
        else
            fault->done = size;
    }
    dma_count(requester, 0, fault->done);
    dma_count(requester, VMS_DMA_WRITE, fault->done);
    rc = dma_outcome(requester, rc);
    pthread_mutex_unlock(&requester->lock);
    return rc;
}

int vms_dma_translate(vms_requester *requester, uint32_t pasid, const uint64_t *iova, size_t n, uint32_t access,
                      uint64_t *gpa, vms_fault *fault)
{
    attachment *at;

    if (access & ~(VMS_PROT_READ | VMS_PROT_WRITE))
        return -EINVAL;
    dma_begin(fault, pasid, access & VMS_PROT_WRITE ? VMS_DMA_WRITE : 0);
    fault->access = access;
    pthread_mutex_lock(&requester->lock);
    int rc = dma_route(requester, pasid, n ? iova[0] : 0, &at, fault);
    for (size_t i = 0; i < n && rc == 0; i++) {
        const translation *t = at ? find(requester, at, iova[i], access, fault) : NULL;
        if (t)
            gpa[i] = t->gpa + (iova[i] - t->start);
        else if (at)
            rc = dma_fail(requester, fault, fault->reason, iova[i]);
        else
            gpa[i] = iova[i];
    }
    rc = dma_outcome(requester, rc);
    pthread_mutex_unlock(&requester->lock);
    return rc;
}

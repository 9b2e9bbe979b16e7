/* SPDX-License-Identifier: MIT
 * DMA: IOVA -> GPA -> bytes, in one call for a whole transfer.
 *
 * A requester's lock is held while bytes are copied.  Unmapping a window takes the lock of each requester of that
 * memory after it has removed the window, and invalidating takes the lock of each requester of that domain after the
 * mapping has gone: so a window's file outlives every copy from it, and the reply to DMA_UNMAP, or the return of an
 * unmap, means that no access is in flight. */
#define _GNU_SOURCE
#include "requester.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct vms_pin {
    vms_memory *memory;
    mapped_file *file;
    /* What is marked as dirty; NULL: the pin is not for writing. */
    struct touched {
        uint64_t gpa, log_at; /* of a page; log_at: in the domain's log */
    } *pages;
    size_t n_pages;
    vms_domain *log; /* NULL: none */
};

/* Where a piece of an access is. */
typedef struct place {
    uint8_t *ptr;
    uint64_t gpa, n;
    const struct cached *window;
    vms_domain *log;  /* has the write noted in its dirty log, NULL: none */
    uint64_t log_at;
} place;

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
        c->host = win->file ? win->file->base + win->offset : NULL;
    }
    pthread_mutex_unlock(&memory->lock);
    return c;
}

static int fail(vms_requester *requester, vms_fault *fault, enum vms_reason reason, uint64_t iova)
{
    fault->reason = reason;
    fault->iova = iova;
    if (reason != VMS_REASON_NO_FILE)
        requester->stats.faults++;
    return -EFAULT;
}

/* What an access goes through: 0 with *at, NULL for no translation.  Under requester->lock. */
static int route(vms_requester *requester, uint32_t pasid, uint64_t iova, attachment **at, vms_fault *fault)
{
    if (!requester->enabled)
        return fail(requester, fault, VMS_REASON_BUS_MASTER_OFF, iova);
    *at = pasid == VMS_NO_PASID ? requester->attached : requester_pasid(requester, pasid);
    if (pasid != VMS_NO_PASID && !*at)
        return fail(requester, fault, VMS_REASON_PASID, iova);
    if (requester->stale && *at)
        stale_route(requester->stale, *at, iova, fault->access);
    return 0;
}

/* What a call returns.  Under requester->lock. */
static int outcome(const vms_requester *requester, int rc)
{
    return rc == 0 && requester->stale && requester->stale->count ? 1 : rc;
}

/* Where iova is: at most `want` bytes there.  Under requester->lock. */
static int translate(vms_requester *requester, const attachment *at, uint64_t iova, uint64_t want, uint32_t access,
                     place *out, vms_fault *fault)
{
    uint64_t gpa = iova, left = UINT64_MAX; /* bytes after the first */

    out->log = NULL;
    out->log_at = 0;
    if (at) {
        fault->gpa = 0; /* of the piece before */
        const translation *t = find(requester, at, iova, access, fault);
        if (!t)
            return fail(requester, fault, fault->reason, iova);
        gpa = t->gpa + (iova - t->start);
        left = t->last - iova;
        out->log = t->log;
        out->log_at = t->log_start + (iova - t->start);
    }
    fault->gpa = gpa;
    const struct cached *c = lookup(requester, gpa);
    if (!c)
        return fail(requester, fault, VMS_REASON_NO_WINDOW, iova);
    if ((c->prot & access) != access)
        return fail(requester, fault, VMS_REASON_PERMISSION, iova);
    if (c->last - gpa < left)
        left = c->last - gpa;
    out->n = left < want - 1 ? left + 1 : want;
    out->gpa = gpa;
    out->window = c;
    if (!c->file) {
        fault->len = out->n;
        if (access & VMS_PROT_WRITE) {
            dirty_mark(&requester->memory->dirty, gpa, gpa + (out->n - 1));
            if (out->log)
                dirty_mark(&out->log->dirty, out->log_at, out->log_at + (out->n - 1));
        }
        return fail(requester, fault, VMS_REASON_NO_FILE, iova);
    }
    uint64_t offset = gpa - c->start;
    if (c->file_offset + offset + out->n > atomic_load_explicit(&c->file->good, memory_order_acquire))
        return fail(requester, fault, VMS_REASON_TRUNCATED, iova);
    out->ptr = c->host + offset;
    return 0;
}

static int still_there(const place *p)
{
    return p->window->file_offset + (p->gpa - p->window->start) + p->n <= atomic_load(&p->window->file->good);
}

static void wrote(vms_requester *requester, const place *p)
{
    dirty_mark(&requester->memory->dirty, p->gpa, p->gpa + (p->n - 1));
    if (p->log)
        dirty_mark(&p->log->dirty, p->log_at, p->log_at + (p->n - 1));
}

static int transfer(vms_requester *requester, const attachment *at, uint64_t iova, uint8_t *buf, uint64_t len,
                    uint32_t flags, vms_fault *fault)
{
    uint32_t access = flags & VMS_DMA_WRITE ? VMS_PROT_WRITE : VMS_PROT_READ;

    if (len && iova + (len - 1) < iova)
        return fail(requester, fault, VMS_REASON_WRAP, iova);
    while (len) {
        place p;
        int rc = translate(requester, at, iova, len, access, &p, fault);
        if (rc < 0)
            return rc;
        if (flags & VMS_DMA_WRITE) {
            memcpy(p.ptr, buf, p.n);
            wrote(requester, &p);
        } else {
            memcpy(buf, p.ptr, p.n);
        }
        if (!still_there(&p))
            return fail(requester, fault, VMS_REASON_TRUNCATED, iova);
        fault->done += p.n;
        iova += p.n;
        buf += p.n;
        len -= p.n;
    }
    return 0;
}

static void begin(vms_fault *fault, uint32_t pasid, uint32_t flags)
{
    *fault = (vms_fault){ .pasid = pasid, .access = flags & VMS_DMA_WRITE ? VMS_PROT_WRITE : VMS_PROT_READ };
}

static void count(vms_requester *requester, uint32_t flags, uint64_t done)
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
    begin(fault, pasid, flags);
    attachment *at;
    pthread_mutex_lock(&requester->lock);
    int rc = route(requester, pasid, iova, &at, fault);
    if (rc == 0)
        rc = transfer(requester, at, iova, buf, len, flags, fault);
    count(requester, flags, fault->done);
    rc = outcome(requester, rc);
    pthread_mutex_unlock(&requester->lock);
    return rc;
}

int vms_dma_sg(vms_requester *requester, uint32_t pasid, const vms_sg *sg, size_t n, void *buf, size_t len,
               uint32_t flags, vms_fault *fault)
{
    attachment *at;

    begin(fault, pasid, flags);
    pthread_mutex_lock(&requester->lock);
    int rc = route(requester, pasid, n ? sg[0].iova : 0, &at, fault);
    for (size_t i = 0; i < n && rc == 0; i++) {
        if (sg[i].len > len - fault->done)
            rc = -EINVAL;
        else
            rc = transfer(requester, at, sg[i].iova, (uint8_t *)buf + fault->done, sg[i].len, flags, fault);
    }
    count(requester, flags, fault->done);
    rc = outcome(requester, rc);
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
    begin(fault, pasid, VMS_DMA_WRITE);
    fault->access = VMS_PROT_READ | VMS_PROT_WRITE;
    pthread_mutex_lock(&requester->lock);
    int rc = route(requester, pasid, iova, &at, fault);
    if (rc == 0 && (iova & (size - 1)))
        rc = fail(requester, fault, VMS_REASON_UNALIGNED, iova);
    if (rc == 0) /* windows and mappings are page-aligned, so an aligned operand never crosses one */
        rc = translate(requester, at, iova, size, fault->access, &p, fault);
    if (rc == 0) {
        if (size == 4)
            ATOMIC_ON(uint32_t);
        else
            ATOMIC_ON(uint64_t);
        wrote(requester, &p);
        if (!still_there(&p))
            rc = fail(requester, fault, VMS_REASON_TRUNCATED, iova);
        else
            fault->done = size;
    }
    count(requester, 0, fault->done);
    count(requester, VMS_DMA_WRITE, fault->done);
    rc = outcome(requester, rc);
    pthread_mutex_unlock(&requester->lock);
    return rc;
}

int vms_dma_translate(vms_requester *requester, uint32_t pasid, const uint64_t *iova, size_t n, uint32_t access,
                      uint64_t *gpa, vms_fault *fault)
{
    attachment *at;

    if (access & ~(VMS_PROT_READ | VMS_PROT_WRITE))
        return -EINVAL;
    begin(fault, pasid, access & VMS_PROT_WRITE ? VMS_DMA_WRITE : 0);
    fault->access = access;
    pthread_mutex_lock(&requester->lock);
    int rc = route(requester, pasid, n ? iova[0] : 0, &at, fault);
    for (size_t i = 0; i < n && rc == 0; i++) {
        const translation *t = at ? find(requester, at, iova[i], access, fault) : NULL;
        if (t)
            gpa[i] = t->gpa + (iova[i] - t->start);
        else if (at)
            rc = fail(requester, fault, fault->reason, iova[i]);
        else
            gpa[i] = iova[i];
    }
    rc = outcome(requester, rc);
    pthread_mutex_unlock(&requester->lock);
    return rc;
}

/* ---- pins ---------------------------------------------------------------------------------------- */

static void mark_pin(const vms_pin *pin)
{
    for (size_t i = 0; i < pin->n_pages; i++) {
        const struct touched *page = &pin->pages[i];
        dirty_mark(&pin->memory->dirty, page->gpa, page->gpa + (PAGE - 1));
        if (pin->log)
            dirty_mark(&pin->log->dirty, page->log_at, page->log_at + (PAGE - 1));
    }
}

int vms_dma_pin(vms_requester *requester, uint32_t pasid, uint64_t iova, size_t len, uint32_t flags, void **ptr,
                vms_pin **out, vms_fault *fault)
{
    attachment *at;
    place p;
    uint8_t *host = NULL;
    mapped_file *file = NULL;

    begin(fault, pasid, flags);
    if (!len)
        return -EINVAL;
    vms_pin *pin = calloc(1, sizeof *pin);
    int write = (flags & VMS_DMA_WRITE) != 0;
    if (pin && write)
        pin->pages = malloc((len / PAGE + 2) * sizeof *pin->pages);
    if (!pin || (write && !pin->pages)) {
        free(pin);
        return -ENOMEM;
    }
    /* A view that may be written may be read as well. */
    uint32_t access = write ? VMS_PROT_READ | VMS_PROT_WRITE : VMS_PROT_READ;
    fault->access = access;
    pthread_mutex_lock(&requester->lock);
    int rc = route(requester, pasid, iova, &at, fault);
    if (rc == 0 && iova + (len - 1) < iova)
        rc = fail(requester, fault, VMS_REASON_WRAP, iova);
    for (uint64_t done = 0; rc == 0 && done < len; done += p.n) {
        rc = translate(requester, at, iova + done, len - done, access, &p, fault);
        if (rc == 0 && done && (p.window->file != file || p.ptr != host + done))
            rc = fail(requester, fault, VMS_REASON_NO_WINDOW, iova + done);
        if (rc < 0)
            break;
        file = p.window->file;
        if (!done)
            host = p.ptr;
        pin->log = p.log; /* one domain for all pieces */
        for (uint64_t i = 0; write && i <= (p.gpa % PAGE + p.n - 1) / PAGE; i++)
            pin->pages[pin->n_pages++] = (struct touched){ (p.gpa & -PAGE) + i * PAGE, (p.log_at & -PAGE) + i * PAGE };
    }
    if (rc == 0) {
        file_ref(file);
        memory_ref(requester->memory);
        if (pin->log)
            domain_ref(pin->log);
        pin->memory = requester->memory;
        pin->file = file;
        mark_pin(pin);
        fault->done = len;
        *ptr = host;
        *out = pin;
    }
    count(requester, flags, fault->done);
    rc = outcome(requester, rc);
    pthread_mutex_unlock(&requester->lock);
    if (rc < 0) {
        free(pin->pages);
        free(pin);
    }
    return rc;
}

void vms_dma_unpin(vms_pin *pin)
{
    if (!pin)
        return;
    /* Again: the log may have been read since the pin was made. */
    mark_pin(pin);
    file_put(pin->file);
    vms_memory_destroy(pin->memory);
    vms_domain_destroy(pin->log);
    free(pin->pages);
    free(pin);
}

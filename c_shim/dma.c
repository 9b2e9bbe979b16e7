/* SPDX-License-Identifier: MIT
 * The requester: IOVA -> GPA -> bytes, in one call for a whole transfer.
 *
 * A requester's lock is held while bytes are copied, and unmapping takes the lock of each requester of that
 * memory after it has removed a window: so a window's file outlives every copy from it, and DMA_UNMAP's
 * reply means that no access is in flight. */
#define _GNU_SOURCE
#include "guest_memory.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define CACHED 4

struct vms_requester {
    vms_requester *next; /* under memory->requesters_lock */
    vms_memory *memory;
    pthread_mutex_t lock;
    int enabled;
    unsigned victim;
    struct cached {
        uint64_t start, last; /* start > last: free */
        uint8_t *host;
        mapped_file *file; /* NULL: by message */
        uint64_t file_offset;
        uint32_t prot;
    } cache[CACHED];
    vms_dma_stats stats;
};

struct vms_pin {
    vms_memory *memory;
    mapped_file *file;
    uint64_t start, last;
    int write;
};

vms_requester **requester_link(vms_requester *requester)
{
    return &requester->next;
}

static void forget(vms_requester *requester)
{
    for (int i = 0; i < CACHED; i++)
        requester->cache[i] = (struct cached){ .start = 1, .last = 0 };
}

int vms_requester_create(vms_memory *memory, vms_requester **out)
{
    vms_requester *requester = calloc(1, sizeof *requester);
    if (!requester)
        return -ENOMEM;
    requester->memory = memory;
    memory_ref(memory);
    pthread_mutex_init(&requester->lock, NULL);
    forget(requester);
    memory_attach(memory, requester);
    *out = requester;
    return 0;
}

void vms_requester_destroy(vms_requester *requester)
{
    if (!requester)
        return;
    memory_detach(requester->memory, requester);
    vms_memory_destroy(requester->memory);
    pthread_mutex_destroy(&requester->lock);
    free(requester);
}

int vms_requester_enable(vms_requester *requester, int on)
{
    pthread_mutex_lock(&requester->lock);
    requester->enabled = on != 0;
    pthread_mutex_unlock(&requester->lock);
    return 0;
}

void requester_flush(vms_requester *requester)
{
    pthread_mutex_lock(&requester->lock);
    forget(requester);
    pthread_mutex_unlock(&requester->lock);
}

void vms_dma_stats_get(vms_requester *requester, vms_dma_stats *out)
{
    pthread_mutex_lock(&requester->lock);
    *out = requester->stats;
    pthread_mutex_unlock(&requester->lock);
}

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

/* Where iova is: *ptr and *n (at most `want`) bytes there.  Under requester->lock. */
static int translate(vms_requester *requester, uint64_t iova, uint64_t want, uint32_t access, uint8_t **ptr,
                     uint64_t *n, const struct cached **where, vms_fault *fault)
{
    if (!requester->enabled)
        return fail(requester, fault, VMS_REASON_BUS_MASTER_OFF, iova);
    const struct cached *c = lookup(requester, iova);
    if (!c)
        return fail(requester, fault, VMS_REASON_NO_WINDOW, iova);
    if ((c->prot & access) != access)
        return fail(requester, fault, VMS_REASON_PERMISSION, iova);
    uint64_t left = c->last - iova; /* bytes after the first */
    *n = left < want - 1 ? left + 1 : want;
    if (!c->file) {
        fault->gpa = iova;
        fault->len = *n;
        if (access & VMS_PROT_WRITE)
            dirty_mark(requester->memory, iova, iova + (*n - 1));
        return fail(requester, fault, VMS_REASON_NO_FILE, iova);
    }
    uint64_t offset = iova - c->start;
    if (c->file_offset + offset + *n > atomic_load_explicit(&c->file->good, memory_order_acquire))
        return fail(requester, fault, VMS_REASON_TRUNCATED, iova);
    *ptr = c->host + offset;
    *where = c;
    return 0;
}

static int still_there(const struct cached *c, uint64_t iova, uint64_t n)
{
    return c->file_offset + (iova - c->start) + n <= atomic_load(&c->file->good);
}

static int transfer(vms_requester *requester, uint64_t iova, uint8_t *buf, uint64_t len, uint32_t flags,
                    vms_fault *fault)
{
    uint32_t access = flags & VMS_DMA_WRITE ? VMS_PROT_WRITE : VMS_PROT_READ;

    if (len && iova + (len - 1) < iova)
        return fail(requester, fault, VMS_REASON_WRAP, iova);
    while (len) {
        const struct cached *c;
        uint8_t *ptr;
        uint64_t n;
        int rc = translate(requester, iova, len, access, &ptr, &n, &c, fault);
        if (rc < 0)
            return rc;
        if (flags & VMS_DMA_WRITE) {
            memcpy(ptr, buf, n);
            dirty_mark(requester->memory, iova, iova + (n - 1));
        } else {
            memcpy(buf, ptr, n);
        }
        if (!still_there(c, iova, n))
            return fail(requester, fault, VMS_REASON_TRUNCATED, iova);
        fault->done += n;
        iova += n;
        buf += n;
        len -= n;
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
    pthread_mutex_lock(&requester->lock);
    int rc = transfer(requester, iova, buf, len, flags, fault);
    count(requester, flags, fault->done);
    pthread_mutex_unlock(&requester->lock);
    return rc;
}

int vms_dma_sg(vms_requester *requester, uint32_t pasid, const vms_sg *sg, size_t n, void *buf, size_t len,
               uint32_t flags, vms_fault *fault)
{
    int rc = 0;

    begin(fault, pasid, flags);
    pthread_mutex_lock(&requester->lock);
    for (size_t i = 0; i < n && rc == 0; i++) {
        if (sg[i].len > len - fault->done)
            rc = -EINVAL;
        else
            rc = transfer(requester, sg[i].iova, (uint8_t *)buf + fault->done, sg[i].len, flags, fault);
    }
    count(requester, flags, fault->done);
    pthread_mutex_unlock(&requester->lock);
    return rc;
}

#define ATOMIC_ON(type)                                                                                       \
    do {                                                                                                      \
        type *at = (type *)ptr, want = (type)compare;                                                         \
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
    const struct cached *c;
    uint8_t *ptr;
    uint64_t n;

    if ((size != 4 && size != 8) || op > VMS_ATOMIC_CAS)
        return -EINVAL;
    begin(fault, pasid, VMS_DMA_WRITE);
    fault->access = VMS_PROT_READ | VMS_PROT_WRITE;
    pthread_mutex_lock(&requester->lock);
    int rc;
    if (iova & (size - 1))
        rc = fail(requester, fault, VMS_REASON_UNALIGNED, iova);
    else
        rc = translate(requester, iova, size, fault->access, &ptr, &n, &c, fault);
    if (rc == 0 && n < size) /* windows are page-aligned, so an aligned operand never crosses one */
        rc = fail(requester, fault, VMS_REASON_NO_WINDOW, iova + n);
    if (rc == 0) {
        if (size == 4)
            ATOMIC_ON(uint32_t);
        else
            ATOMIC_ON(uint64_t);
        dirty_mark(requester->memory, iova, iova + size - 1);
        if (!still_there(c, iova, size))
            rc = fail(requester, fault, VMS_REASON_TRUNCATED, iova);
        else
            fault->done = size;
    }
    count(requester, 0, fault->done);
    count(requester, VMS_DMA_WRITE, fault->done);
    pthread_mutex_unlock(&requester->lock);
    return rc;
}

int vms_dma_pin(vms_requester *requester, uint32_t pasid, uint64_t iova, size_t len, uint32_t flags, void **ptr,
                vms_pin **out, vms_fault *fault)
{
    const struct cached *c;
    uint8_t *host;
    uint64_t n;

    begin(fault, pasid, flags);
    if (!len)
        return -EINVAL;
    vms_pin *pin = calloc(1, sizeof *pin);
    if (!pin)
        return -ENOMEM;
    /* A view that may be written may be read as well. */
    uint32_t access = flags & VMS_DMA_WRITE ? VMS_PROT_READ | VMS_PROT_WRITE : VMS_PROT_READ;
    fault->access = access;
    pthread_mutex_lock(&requester->lock);
    int rc;
    if (iova + (len - 1) < iova)
        rc = fail(requester, fault, VMS_REASON_WRAP, iova);
    else
        rc = translate(requester, iova, len, access, &host, &n, &c, fault);
    if (rc == 0 && n < len)
        rc = fail(requester, fault, VMS_REASON_NO_WINDOW, iova + n);
    if (rc == 0) {
        file_ref(c->file);
        memory_ref(requester->memory);
        *pin = (vms_pin){ requester->memory, c->file, iova, iova + (len - 1), (flags & VMS_DMA_WRITE) != 0 };
        if (pin->write)
            dirty_mark(pin->memory, pin->start, pin->last);
        fault->done = len;
        *ptr = host;
        *out = pin;
    }
    count(requester, flags, fault->done);
    pthread_mutex_unlock(&requester->lock);
    if (rc < 0)
        free(pin);
    return rc;
}

void vms_dma_unpin(vms_pin *pin)
{
    if (!pin)
        return;
    /* Again: the log may have been read since the pin was made. */
    if (pin->write)
        dirty_mark(pin->memory, pin->start, pin->last);
    file_put(pin->file);
    vms_memory_destroy(pin->memory);
    free(pin);
}

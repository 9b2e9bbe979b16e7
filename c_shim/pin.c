/* SPDX-License-Identifier: MIT
 * Pieces of guest memory that stay mapped while Python holds a view of them. */
#define _GNU_SOURCE
#include "dma.h"

#include <errno.h>
#include <stdlib.h>

struct vms_pin {
    vms_memory *memory;
    mapped_file *file;
    /* The pages to mark as dirty; NULL: the pin is read-only. */
    struct touched {
        uint64_t gpa, log_at; /* of a page; log_at: in the domain's log */
    } *pages;
    size_t n_pages, room;
    vms_domain *log; /* NULL: none */
};

/* Notes the pages of a piece.  They take memory as they are found: a length may be of anything. */
static int note_pages(vms_pin *pin, const place *p)
{
    size_t n = (p->gpa % PAGE + p->n - 1) / PAGE + 1;

    if (n > pin->room - pin->n_pages) {
        size_t room = pin->room + (n > pin->room ? n : pin->room);
        struct touched *pages = realloc(pin->pages, room * sizeof *pages);
        if (!pages)
            return -ENOMEM;
        pin->pages = pages;
        pin->room = room;
    }
    for (size_t i = 0; i < n; i++)
        pin->pages[pin->n_pages++] = (struct touched){ (p->gpa & -PAGE) + i * PAGE, (p->log_at & -PAGE) + i * PAGE };
    return 0;
}

static void mark_pin(const vms_pin *pin)
{
    for (size_t i = 0; i < pin->n_pages; i++) {
        const struct touched *page = &pin->pages[i];
        dirty_mark(&pin->memory->dirty, page->gpa, page->gpa + (PAGE - 1));
        if (pin->log)
            domain_wrote(pin->log, page->log_at, page->log_at + (PAGE - 1));
    }
}

int vms_dma_pin(vms_requester *requester, uint32_t pasid, uint64_t iova, size_t len, uint32_t flags, void **ptr,
                vms_pin **out, vms_fault *fault)
{
    attachment *at;
    place p;
    uint8_t *host = NULL;
    mapped_file *file = NULL;

    dma_begin(fault, pasid, flags);
    if (!len)
        return -EINVAL;
    vms_pin *pin = calloc(1, sizeof *pin);
    int write = (flags & VMS_DMA_WRITE) != 0;
    if (!pin)
        return -ENOMEM;
    /* A view that may be written may be read as well. */
    uint32_t access = write ? VMS_PROT_READ | VMS_PROT_WRITE : VMS_PROT_READ;
    fault->access = access;
    pthread_mutex_lock(&requester->lock);
    int rc = dma_route(requester, pasid, iova, &at, fault);
    if (rc == 0 && iova + (len - 1) < iova)
        rc = dma_fail(requester, fault, VMS_REASON_WRAP, iova);
    for (uint64_t done = 0; rc == 0 && done < len; done += p.n) {
        rc = dma_translate(requester, at, iova + done, len - done, access, &p, fault);
        if (rc == 0 && done && (p.window->file != file || p.ptr != host + done))
            rc = dma_fail(requester, fault, VMS_REASON_NO_WINDOW, iova + done);
        if (rc == 0 && write)
            rc = note_pages(pin, &p);
        if (rc < 0)
            break;
        file = p.window->file;
        if (!done)
            host = p.ptr;
        pin->log = p.log; /* one domain for all pieces */
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
    dma_count(requester, flags, fault->done);
    rc = dma_outcome(requester, rc);
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

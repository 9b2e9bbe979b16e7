/* SPDX-License-Identifier: MIT
 * Accesses piece by piece; see dma.c.  All of it is under requester->lock. */
#ifndef VMS_DMA_H
#define VMS_DMA_H

#include "requester.h"

/* The host memory of one piece of an access. */
typedef struct place {
    uint8_t *ptr;
    uint64_t gpa, n;
    const struct cached *window;
    vms_domain *log;  /* the domain whose dirty log records the write; NULL: none */
    uint64_t log_at;
} place;

/* Begins an access: *fault is empty. */
void dma_begin(vms_fault *fault, uint32_t pasid, uint32_t flags);
/* Selects the attachment of an access: 0 with *at, NULL for no translation. */
int dma_route(vms_requester *requester, uint32_t pasid, uint64_t iova, attachment **at, vms_fault *fault);
/* Fills *fault; -EFAULT. */
int dma_fail(vms_requester *requester, vms_fault *fault, enum vms_reason reason, uint64_t iova);
/* Translates iova to a place of at most `want` bytes. */
int dma_translate(vms_requester *requester, const attachment *at, uint64_t iova, uint64_t want, uint32_t access,
                  place *out, vms_fault *fault);
/* Whether the place's file has not shrunk during the access. */
int dma_still_there(const place *p);
/* Marks the piece in the dirty logs. */
void dma_wrote(vms_requester *requester, const place *p);
/* Moves len bytes; fault->done counts them. */
int dma_transfer(vms_requester *requester, const attachment *at, uint64_t iova, uint8_t *buf, uint64_t len,
                 uint32_t flags, vms_fault *fault);
/* Counts an access of `done` bytes. */
void dma_count(vms_requester *requester, uint32_t flags, uint64_t done);
/* A call's return value: 1 instead of 0 if stale translations are noted. */
int dma_outcome(const vms_requester *requester, int rc);

#endif

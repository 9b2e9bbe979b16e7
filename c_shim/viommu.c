/* SPDX-License-Identifier: MIT
 * The hot loop of virtio-iommu: plain MAP and UNMAP requests, from the available ring to the used ring.
 *
 * A request is plain when nothing about it needs a decision: one descriptor to read and one to write, a domain with
 * mappings, flags for reading and writing only.  Any other request stops the loop before it is taken off the
 * ring, and so does a failure: Python then executes the request from its beginning and finds the right status.  That is
 * safe: the answer and the used ring's element are written first, and the driver does not read them before the ring's
 * index covers them.  Section numbers are those of VIRTIO 1.3. */
#define _GNU_SOURCE
#include "vmshim.h"

#include <endian.h>
#include <errno.h>
#include <string.h>

#define NEXT 1u /* descriptor flags (2.7.5) */
#define WRITE 2u
#define INDIRECT 4u
#define MAP 3u /* request types (5.13.6.1) */
#define UNMAP 4u
#define TAIL 4u /* bytes of an answer: the status, and three that are reserved */

typedef struct descriptor {
    uint64_t address;
    uint32_t size;
    uint16_t flags, next;
} descriptor;

/* The part of MAP and UNMAP that both have, and the rest of MAP; packed by nature (5.13.6.5, 5.13.6.6). */
typedef struct request {
    uint8_t type, reserved[3];
    uint32_t domain;
    uint64_t first, last;
    uint8_t gpa[8]; /* MAP only, like flags */
    uint32_t flags;
} request;

_Static_assert(sizeof(descriptor) == 16 && sizeof(request) == 40, "as in the specification, padded at the end");
#define MAP_SIZE 36u
#define UNMAP_SIZE 28u

static int get(vms_requester *requester, uint64_t at, void *to, size_t size)
{
    vms_fault fault;
    int rc = vms_dma_rw(requester, VMS_NO_PASID, at, to, size, 0, &fault);
    return rc < 0 ? rc : 0;
}

static int put(vms_requester *requester, uint64_t at, const void *from, size_t size)
{
    vms_fault fault;
    int rc = vms_dma_rw(requester, VMS_NO_PASID, at, (void *)(uintptr_t)from, size, VMS_DMA_WRITE, &fault);
    return rc < 0 ? rc : 0;
}

/* The two descriptors of a plain request; whether it is one. */
static int plain_chain(vms_requester *requester, const vms_virtqueue *queue, uint16_t head, descriptor d[2])
{
    uint64_t table = queue->descriptors;
    uint32_t entries = queue->size, index = head;

    if (index >= entries || get(requester, table + 16ull * index, &d[0], sizeof d[0]) < 0)
        return 0;
    if (le16toh(d[0].flags) & INDIRECT) {
        if (!queue->indirect || le16toh(d[0].flags) & NEXT || le32toh(d[0].size) != 2 * sizeof d[0])
            return 0;
        table = le64toh(d[0].address);
        entries = 2;
        if (table > -(2 * sizeof d[0]) || get(requester, table, d, 2 * sizeof d[0]) < 0)
            return 0;
        index = le16toh(d[0].next);
        if (index != 1)
            return 0;
    } else {
        index = le16toh(d[0].next);
        if (index >= entries || get(requester, table + 16ull * index, &d[1], sizeof d[1]) < 0)
            return 0;
    }
    for (int i = 0; i < 2; i++)
        if (le64toh(d[i].address) + le32toh(d[i].size) < le64toh(d[i].address)) /* Python knows that its end may be 2^64 */
            return 0;
    return queue->size >= 2 && le16toh(d[0].flags) == NEXT && le16toh(d[1].flags) == WRITE && le32toh(d[1].size) >= TAIL;
}

static const vms_viommu_domain *domain_of(const vms_viommu_domain *domains, size_t n, uint32_t id)
{
    for (size_t i = 0; i < n; i++)
        if (domains[i].id == id)
            return &domains[i];
    return NULL;
}

static int is_reserved(const vms_viommu_domain *in, uint64_t first, uint64_t last)
{
    for (uint32_t i = 0; i < in->n_reserved; i++)
        if (first <= in->reserved[i].last && in->reserved[i].start <= last)
            return 1;
    return 0;
}

/* Executes a request; returns whether it succeeded. */
static int carry_out(const vms_viommu_domain *in, const request *asked)
{
    uint64_t first = le64toh(asked->first), last = le64toh(asked->last), gpa;

    if (last < first)
        return 0;
    if (asked->type == UNMAP)
        return vms_domain_clear(in->domain, first, last, 0) >= 0;
    uint32_t flags = le32toh(asked->flags);
    if (!flags || flags & ~(VMS_PROT_READ | VMS_PROT_WRITE) || last - first == UINT64_MAX || is_reserved(in, first, last))
        return 0;
    memcpy(&gpa, asked->gpa, sizeof gpa);
    return vms_domain_map(in->domain, first, le64toh(gpa), last - first + 1, flags) == 0;
}

int vms_viommu_run(vms_requester *requester, vms_virtqueue *queue, const vms_viommu_domain *domains, size_t n)
{
    uint16_t index = htole16(queue->next_used), available;
    int done = 0;

    /* No part may reach past the last address, so that sums do not wrap.  Where the index cannot be written nothing
     * may be done.  It is what the driver has seen already. */
    if (!queue->size || queue->size > 32768 || queue->descriptors > -(16ull * queue->size) ||
        queue->driver > -(6 + 2ull * queue->size) || queue->device > -(6 + 8ull * queue->size) ||
        put(requester, queue->device + 2, &index, sizeof index) < 0 ||
        get(requester, queue->driver + 2, &available, sizeof available) < 0)
        return 0;
    available = le16toh(available);
    if ((uint16_t)(available - queue->next_avail) > queue->size)
        return 0;
    __atomic_thread_fence(__ATOMIC_ACQUIRE); /* what the index covers was written before it */
    for (; queue->next_avail != available; done++) {
        uint16_t head;
        descriptor d[2];
        request asked;
        static const uint8_t ok[TAIL];

        if (get(requester, queue->driver + 4 + 2ull * (queue->next_avail % queue->size), &head, sizeof head) < 0 ||
            !plain_chain(requester, queue, le16toh(head), d))
            break;
        uint32_t size = le32toh(d[0].size);
        memset(&asked, 0, sizeof asked);
        if (size < UNMAP_SIZE ||
            get(requester, le64toh(d[0].address), &asked, size < MAP_SIZE ? UNMAP_SIZE : MAP_SIZE) < 0 ||
            (asked.type != UNMAP && (asked.type != MAP || size < MAP_SIZE)))
            break;
        const vms_viommu_domain *in = domain_of(domains, n, le32toh(asked.domain));
        uint32_t used[2] = { htole32(le16toh(head)), htole32(TAIL) };
        if (!in || put(requester, le64toh(d[1].address), ok, sizeof ok) < 0 ||
            put(requester, queue->device + 4 + 8ull * (queue->next_used % queue->size), used, sizeof used) < 0 ||
            !carry_out(in, &asked))
            break;
        queue->next_avail++;
        index = htole16(++queue->next_used);
        __atomic_thread_fence(__ATOMIC_RELEASE);
        if (put(requester, queue->device + 2, &index, sizeof index) < 0)
            return -EFAULT; /* unmapped within these microseconds: the request cannot be completed any more */
    }
    return done;
}

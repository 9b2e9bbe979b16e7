/* SPDX-License-Identifier: MIT
 * Decodes a plain submission queue entry: its blocks, and the guest memory of its data.  PRP lists and SGLs are
 * untrusted: a command with a bad one is left to Python, which finds the status. */
#define _GNU_SOURCE
#include "nvme_command.h"

#include <endian.h>
#include <string.h>

#define SGL_DESCRIPTORS 256u

enum { WRITE = 1, READ = 2 };

static uint32_t le32(const uint8_t *at)
{
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return le32toh(value);
}

static uint64_t le64(const uint8_t *at)
{
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return le64toh(value);
}

int nvme_decode(const vms_nvme *nvme, const uint8_t *entry, plain *out)
{
    uint32_t nsid = le32(entry + 4), dword12 = le32(entry + 48);
    uint64_t slba = le64(entry + 40), blocks = (dword12 & 0xFFFF) + 1;

    if ((entry[0] != READ && entry[0] != WRITE) || entry[1] & 0x3F || entry[1] >> 6 == 3)
        return 0;
    if (!nsid || nsid > VMS_NVME_NAMESPACES || !nvme->ns[nsid].store)
        return 0;
    const namespace *ns = &nvme->ns[nsid];
    int write = entry[0] == WRITE;
    if (!(ns->flags & (write ? VMS_NVME_WRITE : VMS_NVME_READ)) || slba >= ns->blocks || blocks > ns->blocks - slba)
        return 0;
    int fua = dword12 >> 30 & 1;
    /* Protection information (29:26), a directive (23:20), a Read that must find the medium up to date. */
    if (dword12 & 0x3CF00000 || (fua && !write))
        return 0;
    out->ns = ns;
    out->write = write;
    out->sync = write && (fua || ns->flags & VMS_NVME_SYNC) && !ns->store->memory;
    out->offset = slba << ns->shift;
    out->length = blocks << ns->shift;
    out->cid = (uint16_t)(entry[2] | entry[3] << 8);
    return out->length <= nvme->max_transfer;
}

/* Adds a piece, as a part of the last one where they touch; 0: no room. */
static int add_piece(vms_nvme *nvme, plain *p, uint64_t iova, uint64_t len)
{
    if (p->n && iova && nvme->piece[p->n - 1].iova + nvme->piece[p->n - 1].len == iova) {
        nvme->piece[p->n - 1].len += len;
        return 1;
    }
    if (p->n == PIECES)
        return 0;
    nvme->piece[p->n++] = (vms_sg){ iova, len };
    return 1;
}

int nvme_fetch(vms_nvme *nvme, const attachment *at, uint64_t iova, void *buf, uint64_t len)
{
    vms_fault fault;

    dma_begin(&fault, VMS_NO_PASID, 0);
    int rc = dma_transfer(nvme->requester, at, iova, buf, len, 0, &fault);
    dma_count(nvme->requester, 0, fault.done);
    return rc;
}

/* The entries of a PRP list for `left` bytes (4.3). */
static int prp_list(vms_nvme *nvme, const attachment *at, plain *p, uint64_t list, uint64_t left)
{
    uint8_t entries[4096];
    uint64_t page = nvme->page_size;

    if (list & 7)
        return 0;
    while (left) {
        uint64_t room = (page - list % page) / 8, wanted = (left + page - 1) / page, n = room < wanted ? room : wanted;
        if (n > sizeof entries / 8)
            n = sizeof entries / 8;
        if (nvme_fetch(nvme, at, list, entries, n * 8) < 0)
            return 0;
        /* The last entry of a page points to the next list if one entry is not enough for the rest. */
        int chained = n == room && wanted > room;
        for (uint64_t i = 0; i < n; i++) {
            uint64_t entry = le64(entries + 8 * i);
            if (entry % page)
                return 0;
            if (chained && i == n - 1) {
                list = entry;
                break;
            }
            uint64_t len = left < page ? left : page;
            if (!add_piece(nvme, p, entry, len))
                return 0;
            left -= len;
        }
        if (!chained)
            list += n * 8;
    }
    return 1;
}

static int prp(vms_nvme *nvme, const attachment *at, plain *p, uint64_t first, uint64_t second)
{
    uint64_t page = nvme->page_size, len = page - first % page;

    if (first & 3)
        return 0;
    if (len >= p->length)
        return add_piece(nvme, p, first, p->length);
    add_piece(nvme, p, first, len);
    if (p->length - len > page)
        return prp_list(nvme, at, p, second, p->length - len);
    return second % page == 0 && add_piece(nvme, p, second, p->length - len);
}

/* One data block, or a segment of nothing else (4.4). */
static int sgl(vms_nvme *nvme, const attachment *at, plain *p, const uint8_t *descriptor)
{
    uint8_t segment[SGL_DESCRIPTORS * 16];
    uint64_t length = le32(descriptor + 8), left = p->length;

    if (descriptor[15] == 0)
        return length == left && add_piece(nvme, p, le64(descriptor), length);
    if (descriptor[15] != 0x30 || !length || length % 16 || length > sizeof segment)
        return 0;
    if (nvme_fetch(nvme, at, le64(descriptor), segment, length) < 0)
        return 0;
    for (const uint8_t *d = segment; d < segment + length; d += 16) {
        uint64_t len = le32(d + 8);
        if (d[15] != 0 || len > left || (len && !add_piece(nvme, p, le64(d), len)))
            return 0;
        left -= len;
    }
    return left == 0;
}

int nvme_find_pieces(vms_nvme *nvme, const attachment *at, plain *p, const uint8_t *entry)
{
    p->n = 0;
    if (entry[1] >> 6)
        return sgl(nvme, at, p, entry + 24);
    return prp(nvme, at, p, le64(entry + 24), le64(entry + 32));
}

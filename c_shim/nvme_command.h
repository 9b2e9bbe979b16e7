/* SPDX-License-Identifier: MIT
 * A controller's state, and decoded commands; see nvme_command.c, and nvme.c for the hot loop. */
#ifndef VMS_NVME_COMMAND_H
#define VMS_NVME_COMMAND_H

#include "dma.h"
#include "workers.h"

#define ENTRY 64u    /* bytes of a submission queue entry */
#define FETCH 32u    /* entries that are fetched at once, and completions that are posted at once */
#define PIECES 1024u /* most pieces of a plain command, not more than IOV_MAX */
#define KEPT 64u     /* buffers kept for reuse: a new one costs a page fault for each page */

typedef struct namespace {
    vms_store *store; /* NULL: nothing is plain */
    uint64_t blocks;
    uint32_t shift, flags;
} namespace;

/* A plain command. */
typedef struct plain {
    const namespace *ns;
    uint64_t offset, length;
    int write, sync;
    uint16_t cid;
    uint32_t n; /* pieces */
} plain;

struct vms_nvme {
    vms_requester *requester;
    vms_workers *workers; /* NULL: none */
    inbox done;
    uint32_t page_size;
    uint64_t max_transfer;
    vms_nvme_sq sq[VMS_NVME_QUEUES];
    vms_nvme_cq cq[VMS_NVME_QUEUES];
    namespace ns[VMS_NVME_NAMESPACES + 1];
    vms_sg piece[PIECES];
    struct iovec iov[PIECES];
    /* The last commands that one queue has taken, as long as their completions are not posted. */
    struct {
        uint16_t cid, sq_head;
        int write;
        uint64_t length;
    } batch[FETCH];
    uint32_t batched;
    uint64_t moved; /* bytes of commands in this call of vms_nvme_run_queue */
    uint64_t held;  /* bytes queued at workers */
    void *kept[KEPT]; /* buffers of KEPT_SIZE */
    uint32_t n_kept;
};

/* Fetches guest memory; 0, -errno.  Under requester->lock. */
int nvme_fetch(vms_nvme *nvme, const attachment *at, uint64_t iova, void *buf, uint64_t len);
/* Whether an entry is a plain command: 1 with *out filled, but for its pieces. */
int nvme_decode(const vms_nvme *nvme, const uint8_t *entry, plain *out);
/* Fills nvme->piece with the pieces of the data; 0: not plain, or its lists cannot be read.  Under requester->lock. */
int nvme_find_pieces(vms_nvme *nvme, const attachment *at, plain *p, const uint8_t *entry);

#endif

/* SPDX-License-Identifier: MIT
 * The hot loop of an NVMe controller: plain Reads and Writes, from the submission queue to the completion queue.
 *
 * A command is plain when nothing about it needs a decision: no fused operation, no protection information, blocks
 * that are there, PRPs or a short SGL, a namespace without a special state.  Any other command stops the loop before
 * it is fetched off the queue, and so does a failure: Python then executes the command from its beginning, which is
 * harmless for a Read or a Write, and finds the right status.
 *
 * File I/O that may block goes to workers, through a buffer.  Workers never access guest memory: the device's thread
 * fetches a Write's data beforehand, and stores a Read's data when it collects the job.  Section numbers are those of
 * NVMe base 1.4. */
#define _GNU_SOURCE
#include "nvme_command.h"

#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define COMPLETION 16u                   /* bytes of an entry */
#define INLINE ((uint64_t)256 * 1024)    /* a transfer from or to a file that is larger is for workers */
#define KEPT_SIZE ((uint64_t)256 * 1024) /* of a buffer that is kept */
#define LOCKED ((uint64_t)8 << 20)       /* bytes moved before the lock is released */
#define TURN ((uint64_t)64 << 20)        /* and before the device serves its client again */
#define HELD ((uint64_t)64 << 20)        /* limit of bytes queued at workers: no more commands are fetched beyond it */
#define HELD_LEAST ((uint64_t)64 * 1024) /* a command counts at least this much */

/* A plain command queued at the workers. */
typedef struct task {
    work work; /* first: a work * is a task * */
    uint32_t sq;
    uint16_t cid;
    uint8_t command[ENTRY];
    uint32_t n;
    vms_sg piece[]; /* of a Read */
} task;

int vms_nvme_create(vms_requester *requester, vms_workers *workers, vms_nvme **out)
{
    vms_nvme *nvme = calloc(1, sizeof *nvme);
    if (!nvme)
        return -ENOMEM;
    nvme->requester = requester;
    nvme->workers = workers;
    nvme->page_size = 4096;
    if (workers)
        workers_ref(workers);
    *out = nvme;
    return 0;
}

static int any(const work *item, uint64_t key)
{
    (void)item;
    (void)key;
    return 1;
}

/* A buffer for a task; NULL: no memory. */
static void *buffer_take(vms_nvme *nvme, uint64_t size)
{
    if (size > KEPT_SIZE)
        return malloc(size);
    return nvme->n_kept ? nvme->kept[--nvme->n_kept] : malloc(KEPT_SIZE);
}

static void buffer_give(vms_nvme *nvme, void *buffer, uint64_t size)
{
    if (buffer && size <= KEPT_SIZE && nvme->n_kept < KEPT)
        nvme->kept[nvme->n_kept++] = buffer;
    else
        free(buffer);
}

static uint64_t weight(uint64_t length)
{
    return length < HELD_LEAST ? HELD_LEAST : length;
}

static void task_free(vms_nvme *nvme, work *item)
{
    nvme->held -= weight(item->job.length);
    buffer_give(nvme, item->job.data, item->job.length);
    free(item);
}

/* Revokes tasks that have not begun, and waits for the rest. */
static void drop_tasks(vms_nvme *nvme)
{
    work *item;

    if (!nvme->workers)
        return;
    while ((item = workers_revoke(nvme->workers, &nvme->done, any, 0)))
        task_free(nvme, item);
    vms_workers_settle(nvme->workers);
    while ((item = workers_take(nvme->workers, &nvme->done)))
        task_free(nvme, item);
}

void vms_nvme_destroy(vms_nvme *nvme)
{
    if (!nvme)
        return;
    drop_tasks(nvme);
    vms_workers_destroy(nvme->workers);
    while (nvme->n_kept)
        free(nvme->kept[--nvme->n_kept]);
    for (uint32_t i = 0; i <= VMS_NVME_NAMESPACES; i++)
        vms_store_destroy(nvme->ns[i].store);
    free(nvme);
}

vms_nvme_sq *vms_nvme_sq_at(vms_nvme *nvme, uint32_t qid)
{
    return qid < VMS_NVME_QUEUES ? &nvme->sq[qid] : NULL;
}

vms_nvme_cq *vms_nvme_cq_at(vms_nvme *nvme, uint32_t qid)
{
    return qid < VMS_NVME_QUEUES ? &nvme->cq[qid] : NULL;
}

int vms_nvme_set(vms_nvme *nvme, uint32_t page_size, uint64_t max_transfer)
{
    if (page_size < 4096 || page_size > 1u << 27 || page_size & (page_size - 1))
        return -EINVAL;
    nvme->page_size = page_size;
    nvme->max_transfer = max_transfer;
    return 0;
}

int vms_nvme_namespace(vms_nvme *nvme, uint32_t nsid, vms_store *store, uint32_t shift, uint64_t blocks,
                       uint32_t flags)
{
    if (!nsid || nsid > VMS_NVME_NAMESPACES || shift < 9 || shift > 16)
        return -EINVAL;
    if (store && blocks > store->size >> shift)
        return -EINVAL;
    namespace *ns = &nvme->ns[nsid];
    if (store)
        store_ref(store);
    vms_store_destroy(ns->store);
    *ns = (namespace){ .store = store, .blocks = blocks, .shift = shift, .flags = flags };
    return 0;
}

/* ---- moving data --------------------------------------------------------------------------------- */

/* Copies between guest memory and `data`. */
static int move(vms_nvme *nvme, const attachment *at, const vms_sg *piece, uint32_t n, uint8_t *data, int to_guest)
{
    uint32_t flags = to_guest ? VMS_DMA_WRITE : 0;
    vms_fault fault;
    int rc = 0;

    dma_begin(&fault, VMS_NO_PASID, flags);
    for (uint32_t i = 0; i < n && rc == 0; i++)
        rc = dma_transfer(nvme->requester, at, piece[i].iova, data + fault.done, piece[i].len, flags, &fault);
    dma_count(nvme->requester, flags, fault.done);
    return rc;
}

/* Transfers between guest memory and a file without blocking.  1: done; 0: it would block; -EFAULT. */
static int move_file(vms_nvme *nvme, const attachment *at, const plain *p)
{
    uint32_t access = p->write ? VMS_PROT_READ : VMS_PROT_WRITE, n = 0;
    vms_fault fault;
    place found[PIECES];

    dma_begin(&fault, VMS_NO_PASID, p->write ? 0 : VMS_DMA_WRITE);
    for (uint32_t i = 0; i < p->n; i++) {
        uint64_t iova = nvme->piece[i].iova, left = nvme->piece[i].len;
        if (iova + (left - 1) < iova)
            return -EFAULT;
        for (; left; n++) {
            if (n == PIECES)
                return 0;
            int rc = dma_translate(nvme->requester, at, iova, left, access, &found[n], &fault);
            if (rc < 0)
                return rc;
            nvme->iov[n] = (struct iovec){ found[n].ptr, found[n].n };
            iova += found[n].n;
            left -= found[n].n;
        }
    }
    int rc = store_try(p->ns->store, p->write, p->offset, p->length, nvme->iov, (int)n);
    for (uint32_t i = 0; i < n; i++) {
        /* Even a read that has failed may have written something. */
        if (!p->write)
            dma_wrote(nvme->requester, &found[i]);
        if (rc == 1 && !dma_still_there(&found[i]))
            rc = -EFAULT; /* the file shrank and zeros were moved: see files.c */
    }
    if (rc == 1)
        dma_count(nvme->requester, p->write ? 0 : VMS_DMA_WRITE, p->length);
    return rc;
}

/* ---- completions ---------------------------------------------------------------------------------- */

static uint32_t room_in(const vms_nvme_cq *cq)
{
    uint32_t room = (cq->head + cq->entries - cq->tail - 1) % cq->entries;
    return room > cq->reserved ? room - cq->reserved : 0;
}

static void batch(vms_nvme *nvme, uint16_t cid, uint32_t sq_head, int write, uint64_t length)
{
    nvme->batch[nvme->batched].cid = cid;
    nvme->batch[nvme->batched].sq_head = (uint16_t)sq_head;
    nvme->batch[nvme->batched].write = write;
    nvme->batch[nvme->batched++].length = length;
}

/* Posts the batch, in order; -EFAULT: what could not be posted is still in it. */
static int post(vms_nvme *nvme, uint32_t qid, vms_nvme_cq *cq, vms_nvme_run *run)
{
    uint32_t done = 0;
    attachment *at;
    vms_fault fault;
    place p;

    dma_begin(&fault, VMS_NO_PASID, VMS_DMA_WRITE);
    int rc = dma_route(nvme->requester, VMS_NO_PASID, cq->iova, &at, &fault);
    while (rc == 0 && done < nvme->batched) {
        uint32_t n = nvme->batched - done;
        if (n > cq->entries - cq->tail)
            n = cq->entries - cq->tail;
        rc = dma_translate(nvme->requester, at, cq->iova + (uint64_t)cq->tail * COMPLETION, n * COMPLETION,
                           VMS_PROT_WRITE, &p, &fault);
        if (rc == 0 && (p.n < COMPLETION || (uintptr_t)p.ptr & 3))
            rc = -EFAULT; /* no driver has its queue there */
        if (rc < 0)
            break;
        n = (uint32_t)(p.n / COMPLETION);
        for (uint32_t i = 0; i < n; i++) {
            uint32_t *to = (uint32_t *)(void *)(p.ptr + i * COMPLETION);
            to[0] = to[1] = 0;
            to[2] = htole32(nvme->batch[done + i].sq_head | qid << 16);
            /* The driver may look at any time: the phase tag comes last. */
            __atomic_store_n(&to[3], htole32(nvme->batch[done + i].cid | cq->phase << 16), __ATOMIC_RELEASE);
        }
        dma_wrote(nvme->requester, &p);
        if (!dma_still_there(&p)) {
            rc = -EFAULT;
            break;
        }
        for (uint32_t i = done; i < done + n; i++) {
            *(nvme->batch[i].write ? &run->writes : &run->reads) += 1;
            *(nvme->batch[i].write ? &run->write_bytes : &run->read_bytes) += nvme->batch[i].length;
        }
        done += n;
        cq->tail += n;
        cq->posted += n;
        if (cq->tail == cq->entries) {
            cq->tail = 0;
            cq->phase ^= 1;
        }
    }
    dma_count(nvme->requester, VMS_DMA_WRITE, (uint64_t)done * COMPLETION);
    memmove(nvme->batch, nvme->batch + done, (nvme->batched - done) * sizeof nvme->batch[0]);
    nvme->batched -= done;
    return rc;
}

/* ---- workers -------------------------------------------------------------------------------------- */

/* Hands a command to the workers; 0: Python has to do it. */
static int defer(vms_nvme *nvme, const attachment *at, const plain *p, uint32_t qid, const uint8_t *entry)
{
    if (!nvme->workers)
        return 0;
    task *t = malloc(sizeof *t + (p->write ? 0 : p->n) * sizeof t->piece[0]);
    uint8_t *data = buffer_take(nvme, p->length);
    if (!t || !data)
        goto not;
    *t = (task){ .sq = qid, .cid = p->cid };
    memcpy(t->command, entry, ENTRY);
    if (p->write) {
        if (move(nvme, at, nvme->piece, p->n, data, 0) < 0)
            goto not;
    } else {
        t->n = p->n;
        memcpy(t->piece, nvme->piece, p->n * sizeof t->piece[0]);
    }
    t->work.store = p->ns->store;
    t->work.to = &nvme->done;
    t->work.job = (vms_job){
        .op = p->write ? VMS_STORE_WRITE : VMS_STORE_READ,
        .sync = (uint32_t)p->sync,
        .offset = p->offset,
        .length = p->length,
        .data = data,
    };
    store_ref(t->work.store);
    if (workers_submit(nvme->workers, &t->work) < 0) {
        work_release(&t->work);
        goto not;
    }
    nvme->held += weight(p->length);
    return 1;
not:
    buffer_give(nvme, data, p->length);
    free(t);
    return 0;
}

int vms_nvme_collect(vms_nvme *nvme, vms_nvme_run *run)
{
    vms_requester *requester = nvme->requester;
    work *item;
    vms_fault fault;
    attachment *at;

    *run = (vms_nvme_run){ .stop = VMS_NVME_EMPTY };
    pthread_mutex_lock(&requester->lock);
    while (nvme->workers && run->stop == VMS_NVME_EMPTY && (item = workers_take(nvme->workers, &nvme->done))) {
        task *t = (task *)item;
        uint32_t qid = nvme->sq[t->sq].cq;
        vms_nvme_cq *cq = &nvme->cq[qid];
        int write = item->job.op == VMS_STORE_WRITE;
        uint64_t faults = requester->stats.faults;
        cq->reserved--;
        run->taken++;
        int rc = item->job.error ? -EIO : 0;
        if (rc == 0 && !write) {
            dma_begin(&fault, VMS_NO_PASID, VMS_DMA_WRITE);
            rc = dma_route(requester, VMS_NO_PASID, t->n ? t->piece[0].iova : 0, &at, &fault);
            if (rc == 0)
                rc = move(nvme, at, t->piece, t->n, item->job.data, 1);
        }
        if (rc == 0) {
            nvme->batched = 0;
            batch(nvme, t->cid, nvme->sq[t->sq].head, write, item->job.length);
            rc = post(nvme, t->sq, cq, run);
        }
        if (rc == 0) {
            run->posted[qid / 64] |= (uint64_t)1 << qid % 64;
        } else {
            requester->stats.faults = faults; /* counted when Python repeats the command */
            run->stop = VMS_NVME_OTHER;
            run->sq = t->sq;
            memcpy(run->command, t->command, ENTRY);
        }
        task_free(nvme, item);
    }
    int rc = dma_outcome(requester, 0);
    pthread_mutex_unlock(&requester->lock);
    return rc;
}

static int is_command(const work *item, uint64_t key)
{
    const task *t = (const task *)item;
    return t->sq == key >> 16 && t->cid == (key & 0xFFFF);
}

int vms_nvme_abort(vms_nvme *nvme, uint32_t qid, uint16_t cid)
{
    work *item = NULL;

    if (nvme->workers && qid < VMS_NVME_QUEUES)
        item = workers_revoke(nvme->workers, &nvme->done, is_command, (uint64_t)qid << 16 | cid);
    if (!item)
        return -ENOENT;
    nvme->cq[nvme->sq[qid].cq].reserved--;
    task_free(nvme, item);
    return 0;
}

uint64_t vms_nvme_held(const vms_nvme *nvme)
{
    return nvme->held;
}

void vms_nvme_reset(vms_nvme *nvme)
{
    drop_tasks(nvme);
    memset(nvme->sq, 0, sizeof nvme->sq);
    memset(nvme->cq, 0, sizeof nvme->cq);
}

/* ---- the loop ------------------------------------------------------------------------------------- */

/* Takes the tail from the shadow doorbell, once the driver has written it.  0, -errno. */
static int take_shadow(vms_nvme *nvme, const attachment *at, vms_nvme_sq *sq)
{
    uint32_t value;
    int rc = nvme_fetch(nvme, at, sq->shadow, &value, sizeof value);

    if (rc < 0)
        return rc;
    value = le32toh(value);
    if (!sq->shadow_used && value == sq->shadow_first)
        return 0;
    sq->shadow_used = 1;
    if (value < sq->entries)
        sq->tail = value;
    return 0;
}

/* Reads the shadow doorbell (5.7, 7.13); if nothing is new, sets EventIdx to get a doorbell for the next command.  0,
 * -errno. */
static int look_at_shadow(vms_nvme *nvme, const attachment *at, vms_nvme_sq *sq)
{
    vms_fault fault;
    uint32_t event;
    int rc = take_shadow(nvme, at, sq);

    if (rc < 0 || sq->head != sq->tail)
        return rc;
    rc = nvme_fetch(nvme, at, sq->event, &event, sizeof event);
    if (rc < 0 || le32toh(event) == sq->tail)
        return rc;
    event = htole32(sq->tail);
    dma_begin(&fault, VMS_NO_PASID, VMS_DMA_WRITE);
    rc = dma_transfer(nvme->requester, at, sq->event, (uint8_t *)&event, sizeof event, VMS_DMA_WRITE, &fault);
    dma_count(nvme->requester, VMS_DMA_WRITE, fault.done);
    if (rc < 0)
        return rc;
    /* The driver writes its tail, then reads EventIdx; we write EventIdx, then read the tail. */
    atomic_thread_fence(memory_order_seq_cst);
    return take_shadow(nvme, at, sq);
}

/* Whether a ring wraps past 2^64. */
static int wraps(uint64_t iova, uint64_t size)
{
    return iova + (size - 1) < iova;
}

/* Executes one command.  1: it is in the batch, or queued at workers; 0: left to Python. */
static int carry_out(vms_nvme *nvme, const attachment *at, vms_nvme_cq *cq, uint32_t qid, const uint8_t *entry,
                     vms_nvme_run *run)
{
    vms_nvme_sq *sq = &nvme->sq[qid];
    uint32_t next = sq->head + 1 == sq->entries ? 0 : sq->head + 1;
    plain p;

    if (!nvme_decode(nvme, entry, &p) || !nvme_find_pieces(nvme, at, &p, entry))
        return 0;
    nvme->moved += p.length;
    if (p.ns->store->memory) {
        if (move(nvme, at, nvme->piece, p.n, p.ns->store->memory + p.offset, !p.write) < 0)
            return 0;
    } else {
        int rc = p.sync || p.length > INLINE ? 0 : move_file(nvme, at, &p);
        if (rc < 0)
            return 0;
        if (rc == 0) {
            /* A batch has no gaps, so that a failed post can undo it from its end. */
            if (post(nvme, qid, cq, run) < 0 || !defer(nvme, at, &p, qid, entry))
                return 0;
            cq->reserved++;
            run->deferred++;
            sq->head = next;
            return 1;
        }
    }
    sq->head = next;
    batch(nvme, p.cid, next, p.write, p.length);
    return 1;
}

int vms_nvme_run_queue(vms_nvme *nvme, uint32_t qid, uint32_t count, vms_nvme_run *run)
{
    uint8_t entries[FETCH * ENTRY];
    vms_requester *requester = nvme->requester;
    vms_fault fault;
    attachment *at;

    *run = (vms_nvme_run){ .stop = VMS_NVME_OTHER };
    if (qid >= VMS_NVME_QUEUES || nvme->sq[qid].cq >= VMS_NVME_QUEUES)
        return -EINVAL;
    vms_nvme_sq *sq = &nvme->sq[qid];
    vms_nvme_cq *cq = &nvme->cq[sq->cq];
    if (!sq->entries || !cq->entries || sq->head >= sq->entries || sq->tail >= sq->entries || cq->tail >= cq->entries)
        return -EINVAL;
    if (wraps(sq->iova, (uint64_t)sq->entries * ENTRY) || wraps(cq->iova, (uint64_t)cq->entries * COMPLETION))
        return -EINVAL;
    nvme->batched = 0;
    nvme->moved = 0;
    int noted = 0;
    for (int going = 1; going;) {
        /* The lock is released from time to time: a thread that unmaps memory waits for it. */
        pthread_mutex_lock(&requester->lock);
        uint64_t faults = requester->stats.faults;
        dma_begin(&fault, VMS_NO_PASID, 0);
        int rc = dma_route(requester, VMS_NO_PASID, sq->iova, &at, &fault);
        if (rc == 0 && sq->head == sq->tail && sq->shadow)
            rc = look_at_shadow(nvme, at, sq);
        uint32_t n = sq->tail >= sq->head ? sq->tail - sq->head : sq->entries - sq->head, room = room_in(cq);
        n = n > FETCH ? FETCH : n;
        n = n > count - run->taken ? count - run->taken : n;
        n = n > room ? room : n;
        int busy = nvme->held >= HELD;
        uint64_t enough = nvme->moved + LOCKED;
        if (rc == 0 && (n == 0 || busy || nvme->moved >= TURN)) {
            run->stop = sq->head == sq->tail ? VMS_NVME_EMPTY : !room ? VMS_NVME_FULL : busy ? VMS_NVME_BUSY : VMS_NVME_TURN;
            going = 0;
        } else if (rc < 0 || nvme_fetch(nvme, at, sq->iova + (uint64_t)sq->head * ENTRY, entries, n * ENTRY) < 0) {
            going = 0;
        }
        for (uint32_t i = 0; i < n && going && nvme->moved < enough && nvme->held < HELD; i++) {
            going = carry_out(nvme, at, cq, qid, entries + i * ENTRY, run);
            run->taken += (uint32_t)going;
        }
        if (post(nvme, qid, cq, run) < 0) {
            /* Undo: these commands count as not begun. */
            sq->head = (sq->head + sq->entries - nvme->batched) % sq->entries;
            run->taken -= nvme->batched;
            nvme->batched = 0;
            going = 0;
        }
        if (!going)
            requester->stats.faults = faults; /* the failure is counted when Python repeats the command */
        noted |= dma_outcome(requester, 0);
        pthread_mutex_unlock(&requester->lock);
    }
    return noted;
}

/* SPDX-License-Identifier: MIT
 * NVMe's hot loop on rings, commands, PRP lists and SGLs that are the input's, with stores in memory and in a file.
 *
 * It ends, its rings stay rings, and it says no more than it was asked for. */
#include "fuzz.h"

#define PAGES 16u
#define RAM (PAGES * 4096u)
#define STORE (8u << 20)

static guest g;
static vms_store *memory_store, *file_store;
static vms_workers *workers;
static vms_func *func;

static void create(void)
{
    guest_create(&g, RAM);
    int fd = memfd_create("store", 0);
    CHECK(fd >= 0 && ftruncate(fd, STORE) == 0);
    CHECK(vms_store_create_file(fd, STORE, &file_store) == 0);
    CHECK(vms_store_create_memory(STORE, &memory_store) == 0);
    CHECK(vms_func_create(&func) == 0 && vms_workers_create(func, 1, &workers) == 0);
    close(fd);
}

/* A pointer of the guest's: in its memory as a rule, and at borders. */
static uint64_t take_pointer(input *in)
{
    uint8_t kind = take8(in);
    uint64_t page = (uint64_t)(kind & 15) << 12;

    switch (kind >> 4) {
    case 0:
        return take64(in);
    case 1:
        return page + (take16(in) & 0xFFF);
    case 2:
        return page + 0xFF8;
    case 3:
        return UINT64_MAX - take16(in);
    case 4:
        return page + (take8(in) & 0xFC);
    default:
        return page;
    }
}

static void take_command(input *in, uint8_t *command)
{
    uint8_t kind = take8(in), blocks = take8(in);
    uint64_t first = take_pointer(in), second = take_pointer(in), slba = take8(in);
    uint32_t nsid = 1 + (kind >> 2 & 3), dword12 = blocks & 31;

    memset(command, 0, 64);
    command[0] = kind & 1 ? 1 : 2;
    if (kind & 16) { /* SGL */
        command[1] = 0x40;
        memcpy(command + 24, &first, 8);
        uint32_t length = kind & 32 ? (uint32_t)take16(in) : (uint32_t)(dword12 + 1) << (nsid & 1 ? 9 : 12);
        memcpy(command + 32, &length, 4);
        command[39] = kind & 2 ? 0x30 : 0;
        if (kind & 2) {
            length = kind & 32 ? 16u * (take16(in) & 0x3FF) : 16u * (1 + (second >> 12 & 7));
            memcpy(command + 32, &length, 4);
        }
    } else {
        memcpy(command + 24, &first, 8);
        memcpy(command + 32, &second, 8);
    }
    if (kind & 64)
        dword12 |= (uint32_t)take16(in) << 16;
    if (blocks & 128)
        dword12 = (dword12 & 0xFFFF0000) | take16(in);
    if (blocks & 64)
        slba = take64(in);
    memcpy(command + 4, &nsid, 4);
    memcpy(command + 40, &slba, 8);
    memcpy(command + 48, &dword12, 4);
    if (kind & 128)
        command[take8(in) & 63] = take8(in);
}

/* PRPs or SGL descriptors, one after the other. */
static void fill(input *in)
{
    uint8_t where = take8(in), n = take8(in);
    uint64_t at = (uint64_t)(where & 15) << 12;

    if (where & 16)
        at += 4096 - 8 * ((uint64_t)n >> 4 & 15) - 8;
    for (unsigned i = 0; i < (n & 15u) + 1 && in->left; i++, at += 8) {
        uint64_t value = take_pointer(in);
        if (where & 32 && i & 1) /* the second half of a descriptor */
            value = (uint64_t)(take8(in) & 7) << 60 | (take16(in) & 0x1FFF);
        if (at + 8 <= RAM)
            memcpy(g.ram + at, &value, 8);
    }
}

static void check_run(vms_nvme *nvme, const vms_nvme_run *run, uint32_t count)
{
    const vms_nvme_sq *sq = vms_nvme_sq_at(nvme, 1);
    const vms_nvme_cq *cq = vms_nvme_cq_at(nvme, sq->cq);

    CHECK(run->taken <= count && run->stop <= VMS_NVME_OTHER && run->deferred <= run->taken);
    CHECK(sq->head < sq->entries && sq->tail < sq->entries && cq->tail < cq->entries && cq->phase <= 1);
    CHECK(cq->posted <= run->taken && cq->posted + run->deferred == run->taken);
    CHECK(run->reads + run->writes == cq->posted);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = { data, size };
    vms_domain *domain = NULL;
    vms_nvme *nvme;
    vms_nvme_run run;

    if (!g.memory)
        create();
    memset(g.ram, 0, RAM);
    uint8_t choice = take8(&in), rings = take8(&in);
    CHECK(vms_nvme_create(g.requester, choice & 1 ? workers : NULL, &nvme) == 0);
    CHECK(vms_nvme_set(nvme, choice & 2 ? 8192 : 4096, choice & 4 ? 4096 : choice & 128 ? STORE : 65536) == 0);
    CHECK(vms_nvme_namespace(nvme, 1, memory_store, 9, STORE >> 9, VMS_NVME_READ | VMS_NVME_WRITE) == 0);
    CHECK(vms_nvme_namespace(nvme, 2, memory_store, 12, STORE >> 12, VMS_NVME_READ) == 0);
    CHECK(vms_nvme_namespace(nvme, 3, file_store, 9, (STORE >> 9) - 56, VMS_NVME_READ | VMS_NVME_WRITE) == 0);
    CHECK(vms_nvme_namespace(nvme, 4, file_store, 12, STORE >> 12, 3 | (choice & 8 ? VMS_NVME_SYNC : 0)) == 0);
    if (choice & 16) { /* a hole in the middle */
        CHECK(vms_domain_create_paging(0x1000, 0, UINT64_MAX, UINT64_MAX, 64, NULL, &domain) == 0);
        CHECK(vms_domain_map(domain, 0, 0, 0x8000, 3) == 0 && vms_domain_map(domain, 0x9000, 0x8000, 0x4000, 1) == 0);
        CHECK(vms_domain_map(domain, 0xD000, 0xD000, 0x3000, 3) == 0);
        CHECK(vms_requester_attach(g.requester, VMS_NO_PASID, domain) == 0);
    }
    vms_nvme_sq *sq = vms_nvme_sq_at(nvme, 1);
    vms_nvme_cq *cq = vms_nvme_cq_at(nvme, 1);
    *sq = (vms_nvme_sq){ .iova = 0x1000, .entries = 2 + (rings & 31), .cq = 1 };
    *cq = (vms_nvme_cq){ .iova = 0x3000, .entries = 2 + (rings >> 4), .phase = 1 };
    sq->head = take8(&in) % sq->entries;
    cq->tail = cq->head = take8(&in) % cq->entries;
    if (choice & 32) {
        sq->iova = take_pointer(&in);
        cq->iova = take_pointer(&in);
    }
    if (choice & 64) {
        sq->shadow = take_pointer(&in) | 4;
        sq->event = take_pointer(&in);
    }
    if (choice & 128)
        cq->head = take8(&in) % cq->entries;

    sq->tail = sq->head;
    for (int rounds = 0; rounds < 3; rounds++) {
        for (unsigned n = take8(&in) & 7; n && in.left; n--) {
            uint8_t command[64];
            take_command(&in, command);
            command[2] = (uint8_t)n;
            uint64_t at = sq->iova + 64ull * sq->tail;
            if (at < RAM - 64)
                memcpy(g.ram + at, command, 64);
            sq->tail = (sq->tail + 1) % sq->entries;
        }
        for (unsigned n = take8(&in) & 3; n && in.left; n--)
            fill(&in);
        uint32_t count = 1 + (take8(&in) & 15);
        cq->posted = 0;
        int rc = vms_nvme_run_queue(nvme, 1, count, &run);
        int wraps = sq->iova + (64 * sq->entries - 1) < sq->iova || cq->iova + (16 * cq->entries - 1) < cq->iova;
        CHECK(rc == (wraps ? -EINVAL : 0));
        if (wraps)
            break;
        check_run(nvme, &run, count);
        if (run.deferred) {
            if (rounds & 1)
                vms_nvme_abort(nvme, 1, 1);
            vms_workers_settle(workers);
            /* One that fails is given back, and ends a collection. */
            for (int n = 0; n <= 16; n++) {
                CHECK(vms_nvme_collect(nvme, &run) == 0 && run.stop <= VMS_NVME_OTHER);
                if (run.stop != VMS_NVME_OTHER)
                    break;
            }
            CHECK(run.stop == VMS_NVME_EMPTY && vms_nvme_held(nvme) == 0 && cq->reserved == 0);
        }
        cq->head = cq->tail;
    }
    vms_nvme_destroy(nvme);
    CHECK(vms_requester_attach(g.requester, VMS_NO_PASID, NULL) == 0);
    vms_domain_destroy(domain);
    return 0;
}

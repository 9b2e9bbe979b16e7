/* SPDX-License-Identifier: MIT
 * The shim's side of the IOMMU's figures, without Python: built with the shim by run.py.
 *
 *   iommu hit|miss|map|bytes REPEAT COUNT MAPPINGS     a line for each repetition: nanoseconds of one operation
 *   (bytes: memory of the mappings, in bytes, once)
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "vmshim.h"

#define PAGE 4096ull
#define BATCH 64

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static void must(int rc, const char *what)
{
    if (rc < 0) {
        fprintf(stderr, "%s: %s\n", what, strerror(-rc));
        exit(1);
    }
}

static uint64_t state = 88172645463325252ull;

static uint64_t next_random(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

int main(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    const char *what = argv[1];
    int repeat = atoi(argv[2]);
    uint64_t count = strtoull(argv[3], NULL, 10), mappings = strtoull(argv[4], NULL, 10);
    vms_files *files;
    vms_memory *memory;
    vms_requester *requester;
    vms_domain *domain;
    vms_fault fault;

    must(vms_files_create(&files), "files");
    must(vms_memory_create(files, 16, &memory), "memory");
    must(vms_requester_create(memory, &requester), "requester");
    must(vms_requester_enable(requester, 1), "enable");
    must(vms_domain_create_paging(PAGE, 0, UINT64_MAX, UINT64_MAX, UINT64_MAX, NULL, &domain), "domain");
    must(vms_requester_attach(requester, VMS_NO_PASID, domain), "attach");
    /* Every other page, so that no two mappings could be one; scattered GPAs. */
    for (uint64_t i = 0; i < mappings; i++)
        must(vms_domain_map(domain, 2 * i * PAGE, (i * 2654435761u % (1u << 28)) * PAGE, PAGE, 3), "map");

    if (!strcmp(what, "bytes")) {
        uint64_t bytes;
        vms_domain_count(domain, &bytes);
        printf("%llu\n", (unsigned long long)bytes);
        return 0;
    }
    uint64_t *iova = malloc(count * sizeof *iova), gpa[BATCH];
    if (!iova)
        return 1;
    uint64_t few = mappings < 64 ? mappings : 64; /* which stay in the IOTLB */
    for (uint64_t i = 0; i < count; i++)
        iova[i] = 2 * (!strcmp(what, "hit") ? i % few : next_random() % mappings) * PAGE + (next_random() & 0xFF8);
    for (int r = -1; r < repeat; r++) { /* -1: warms up */
        double start = now();
        if (!strcmp(what, "map")) {
            for (uint64_t i = 0; i < count; i++) {
                uint64_t at = (iova[i] & -PAGE) + PAGE; /* a gap */
                must(vms_domain_map(domain, at, at, PAGE, 3), "map");
                must((int)vms_domain_unmap(domain, at, PAGE, 0), "unmap");
            }
        } else {
            for (uint64_t i = 0; i + BATCH <= count; i += BATCH)
                must(vms_dma_translate(requester, VMS_NO_PASID, iova + i, BATCH, VMS_PROT_READ, gpa, &fault),
                     "translate");
        }
        if (r >= 0)
            printf("%.2f\n", (now() - start) / (double)count);
    }
    return 0;
}

/* SPDX-License-Identifier: MIT
 * Three threads do DMA on files that have shrunk, three others map and unmap: test_sanitizers.py runs it under ASan and
 * under TSan.  In C, for Python's lock would let one in at a time. */
#define _GNU_SOURCE
#include "vmshim.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096u
#define PAGES 512u
#define ROUNDS 40
#define FILES 32

static vms_files *files;

static void must(int ok, const char *what)
{
    if (!ok) {
        fprintf(stderr, "%s\n", what);
        _exit(1);
    }
}

static int file_of(unsigned pages)
{
    int fd = memfd_create("guest-ram", 0);
    must(fd >= 0 && ftruncate(fd, (off_t)pages * PAGE) == 0, "memfd");
    return fd;
}

static void *shrink(void *unused)
{
    vms_memory *memory;
    vms_requester *requester;
    vms_fault fault;
    uint64_t word, removed;

    (void)unused;
    must(vms_memory_create(files, 8, &memory) == 0 && vms_requester_create(memory, &requester) == 0, "create");
    vms_requester_enable(requester, 1);
    for (int round = 0; round < ROUNDS; round++) {
        int fd = file_of(PAGES);
        must(vms_memory_map(memory, 0, PAGES * PAGE, 3, fd, 0) == 0, "map");
        must(ftruncate(fd, 0) == 0, "ftruncate");
        for (unsigned page = PAGES; page--;) {
            int rc = page % 2 ? vms_dma_rw(requester, VMS_NO_PASID, page * PAGE, &word, 8, 0, &fault)
                              : vms_dma_atomic(requester, VMS_NO_PASID, page * PAGE, VMS_ATOMIC_SWAP, 8, 1, 0, &word,
                                               &fault);
            must(rc < 0 && fault.reason == VMS_REASON_TRUNCATED, "no fault");
        }
        vms_memory_unmap_all(memory, &removed);
        close(fd);
    }
    vms_requester_destroy(requester);
    vms_memory_destroy(memory);
    return NULL;
}

static void *come_and_go(void *stop)
{
    vms_memory *memory;
    uint64_t removed;
    int fd[FILES];

    must(vms_memory_create(files, FILES, &memory) == 0, "create");
    for (int i = 0; i < FILES; i++)
        fd[i] = file_of(1);
    while (!__atomic_load_n((int *)stop, __ATOMIC_ACQUIRE)) {
        for (unsigned i = 0; i < FILES; i++)
            must(vms_memory_map(memory, i * PAGE, PAGE, 3, fd[i], 0) == 0, "map");
        vms_memory_unmap_all(memory, &removed);
    }
    for (int i = 0; i < FILES; i++)
        close(fd[i]);
    vms_memory_destroy(memory);
    return NULL;
}

int main(void)
{
    pthread_t thread[6];
    int stop = 0;

    must(vms_files_create(&files) == 0, "create");
    for (int i = 0; i < 6; i++)
        must(pthread_create(&thread[i], NULL, i < 3 ? shrink : come_and_go, &stop) == 0, "pthread_create");
    for (int i = 0; i < 6; i++) {
        if (i == 3)
            __atomic_store_n(&stop, 1, __ATOMIC_RELEASE);
        pthread_join(thread[i], NULL);
    }
    must(vms_files_mapped(files) == 0, "a mapping is left");
    vms_files_destroy(files);
    return 0;
}

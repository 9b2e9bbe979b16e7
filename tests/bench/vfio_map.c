/* SPDX-License-Identifier: MIT
 * Runs inside the guest, for scripts/bench --iommu: what mapping and unmapping 4 KiB costs through VFIO (type 1) and the
 * guest's own IOMMU driver, one ioctl each.  Prints "NS-OF-A-MAP NS-OF-AN-UNMAP" for each repetition.  Then, with
 * TRANSFERS, edu copies each of some mapped pages to itself so often, one after the other, for the IOTLB's counters.
 *
 *   vfio_map PCI-ADDRESS REPETITIONS PAGES [TRANSFERS]
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/vfio.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096u
#define IOVA 0x123400000ull
#define BUFFER 0x40000u
#define DMA_PAGES 8

enum { DMA_SRC = 0x80, DMA_DST = 0x88, DMA_COUNT = 0x90, DMA_CMD = 0x98, RUN = 1, TO_RAM = 2 };

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void write_file(const char *text, const char *path)
{
    int fd = open(path, O_WRONLY);
    if (fd < 0 || write(fd, text, strlen(text)) < 0)
        fail(path);
    close(fd);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

static int container;

static void map(void *at, uint64_t iova)
{
    struct vfio_iommu_type1_dma_map map = {
        .argsz = sizeof map, .flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        .vaddr = (uintptr_t)at, .iova = iova, .size = PAGE,
    };
    if (ioctl(container, VFIO_IOMMU_MAP_DMA, &map) < 0)
        fail("VFIO_IOMMU_MAP_DMA");
}

static void unmap(uint64_t iova)
{
    struct vfio_iommu_type1_dma_unmap unmap = { .argsz = sizeof unmap, .iova = iova, .size = PAGE };
    if (ioctl(container, VFIO_IOMMU_UNMAP_DMA, &unmap) < 0)
        fail("VFIO_IOMMU_UNMAP_DMA");
}

static int open_device(const char *device)
{
    char path[256], target[256] = "";

    write_file("Y", "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts");
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/driver_override", device);
    write_file("vfio-pci", path);
    write_file(device, "/sys/bus/pci/drivers_probe");
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/iommu_group", device);
    if (readlink(path, target, sizeof target - 1) < 0)
        fail(path);
    snprintf(path, sizeof path, "/dev/vfio/%s", strrchr(target, '/') + 1);
    int group = open(path, O_RDWR);
    if (group < 0)
        fail(path);
    container = open("/dev/vfio/vfio", O_RDWR);
    if (container < 0 || ioctl(group, VFIO_GROUP_SET_CONTAINER, &container) < 0 ||
        ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU) < 0)
        fail("the container");
    int fd = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, device);
    if (fd < 0)
        fail("the device");
    return fd;
}

static void transfers(int device, uint8_t *memory, int count)
{
    struct vfio_region_info config = { .argsz = sizeof config, .index = VFIO_PCI_CONFIG_REGION_INDEX };
    struct vfio_region_info region = { .argsz = sizeof region, .index = VFIO_PCI_BAR0_REGION_INDEX };
    uint16_t command = 6; /* memory space, bus mastering */

    if (ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &config) < 0 || ioctl(device, VFIO_DEVICE_GET_REGION_INFO, &region) < 0)
        fail("the regions");
    if (pwrite(device, &command, 2, (off_t)config.offset + 4) != 2)
        fail("config space");
    volatile uint8_t *bar = mmap(NULL, region.size, PROT_READ | PROT_WRITE, MAP_SHARED, device, (off_t)region.offset);
    if (bar == MAP_FAILED)
        fail("BAR0");
    for (unsigned i = 0; i < DMA_PAGES; i++)
        map(memory + i * PAGE, IOVA + i * PAGE);
    for (int n = 0; n < count; n++)
        for (unsigned i = 0; i < DMA_PAGES; i++)
            for (unsigned command = RUN; command <= (RUN | TO_RAM); command += TO_RAM) {
                uint64_t iova = IOVA + i * PAGE;
                *(volatile uint64_t *)(bar + DMA_SRC) = command & TO_RAM ? BUFFER : iova;
                *(volatile uint64_t *)(bar + DMA_DST) = command & TO_RAM ? iova : BUFFER;
                *(volatile uint64_t *)(bar + DMA_COUNT) = PAGE;
                *(volatile uint64_t *)(bar + DMA_CMD) = command;
                while (*(volatile uint64_t *)(bar + DMA_CMD) & RUN)
                    usleep(1000);
            }
    for (unsigned i = 0; i < DMA_PAGES; i++)
        unmap(IOVA + i * PAGE);
}

int main(int argc, char **argv)
{
    if (argc < 4)
        return 2;
    int repetitions = atoi(argv[2]);
    unsigned pages = (unsigned)atoi(argv[3]);
    int device = open_device(argv[1]);
    uint8_t *memory =
        mmap(NULL, (size_t)pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED)
        fail("memory");
    /* Stays: else the first map and the last unmap would make and free page tables. */
    map(memory, IOVA - PAGE);
    map(memory, IOVA + pages * PAGE);
    for (int n = -1; n < repetitions; n++) { /* the first does not count */
        double start = now();
        for (unsigned i = 0; i < pages; i++)
            map(memory + i * PAGE, IOVA + i * PAGE);
        double mapped = now();
        for (unsigned i = 0; i < pages; i++)
            unmap(IOVA + i * PAGE);
        if (n >= 0)
            printf("%.0f %.0f\n", (mapped - start) / pages, (now() - mapped) / pages);
    }
    if (argc > 4)
        transfers(device, memory, atoi(argv[4]));
    return 0;
}

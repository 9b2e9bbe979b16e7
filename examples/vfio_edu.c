/* SPDX-License-Identifier: MIT
 * Runs inside the guest: drives edu from user space through VFIO and the guest's own IOMMU driver.  Needs the modules
 * vfio_iommu_type1 and vfio-pci.  A buffer is mapped at an IOVA that is not its physical address; DMA goes there and
 * back; an access beside the mapping, and one after it is gone, must not get through and must be in the kernel's log.
 *
 *   vfio_edu [PCI-ADDRESS [TEXT]]      TEXT is what the log line of a fault begins with, default "DMAR: [DMA"
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/vfio.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096u
#define IOVA 0x123400000ull
#define BUFFER 0x40000u

enum { ID = 0x00, IRQ_STATUS = 0x24, IRQ_ACK = 0x64, DMA_SRC = 0x80, DMA_DST = 0x88, DMA_COUNT = 0x90, DMA_CMD = 0x98 };
enum { RUN = 1, TO_RAM = 2, IRQ = 4, DONE = 0x100 };

static const char *device = "0000:00:03.0", *said = "DMAR: [DMA";
static volatile uint8_t *bar;

static void fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    printf("vfio_edu: ");
    vprintf(format, args);
    printf(": %s\n", strerror(errno));
    va_end(args);
    exit(1);
}

static void write_file(const char *text, const char *format, ...)
{
    char path[256];
    va_list args;
    va_start(args, format);
    vsnprintf(path, sizeof path, format, args);
    va_end(args);
    int fd = open(path, O_WRONLY);
    if (fd < 0 || write(fd, text, strlen(text)) < 0)
        fail("%s", path);
    close(fd);
}

static uint32_t get(unsigned at)
{
    return *(volatile uint32_t *)(bar + at);
}

static void put64(unsigned at, uint64_t value)
{
    *(volatile uint64_t *)(bar + at) = value;
}

/* Whether the transfer went through. */
static int transfer(uint64_t from, uint64_t to, unsigned command)
{
    *(volatile uint32_t *)(bar + IRQ_ACK) = DONE;
    put64(DMA_SRC, from);
    put64(DMA_DST, to);
    put64(DMA_COUNT, PAGE);
    put64(DMA_CMD, command | RUN | IRQ);
    for (int i = 0; i < 5000 && (*(volatile uint64_t *)(bar + DMA_CMD) & RUN); i++)
        usleep(1000);
    return !!(get(IRQ_STATUS) & DONE);
}

/* Memory to the device, and back to the page after it. */
static void round_trip(uint8_t *memory, unsigned seed)
{
    for (unsigned i = 0; i < PAGE; i++)
        memory[i] = (uint8_t)(i * 7 + seed + i / 256);
    memset(memory + PAGE, 0, PAGE);
    errno = 0;
    if (!transfer(IOVA, BUFFER, 0) || !transfer(BUFFER, IOVA + PAGE, TO_RAM))
        fail("round trip %u did not get through", seed);
    if (memcmp(memory, memory + PAGE, PAGE))
        fail("round trip %u: what came back differs", seed);
    printf("round trip %u equal\n", seed);
}

/* How often the kernel has reported a fault; the last such line goes to `line`. */
static int faults(char *line, size_t room)
{
    static char log[1 << 20];
    int n = klogctl(3, log, sizeof log - 1), count = 0;
    log[n < 0 ? 0 : n] = 0;
    for (char *at = log; (at = strstr(at, said)); at += strlen(said), count++) {
        size_t length = strcspn(at, "\n");
        snprintf(line, room, "%.*s", (int)length, at);
    }
    return count;
}

/* At most three in 5 seconds: Linux's driver reports no more. */
static void refused(const char *what, uint64_t from, uint64_t to, unsigned command)
{
    char line[256];
    int before = faults(line, sizeof line), after = before;

    errno = 0;
    if (transfer(from, to, command))
        fail("%s got through", what);
    for (int i = 0; i < 500 && after == before; i++) {
        usleep(10000);
        after = faults(line, sizeof line);
    }
    if (after == before)
        fail("%s: the kernel has not reported it", what);
    printf("%s refused: %s\n", what, line);
}

static uint64_t physical(void *page)
{
    uint64_t entry;
    int fd = open("/proc/self/pagemap", O_RDONLY);
    if (fd < 0 || pread(fd, &entry, 8, (off_t)((uintptr_t)page / PAGE * 8)) != 8)
        fail("pagemap");
    close(fd);
    return (entry & ((1ull << 55) - 1)) * PAGE;
}

static int open_group(void)
{
    char path[256], target[256] = "";

    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/iommu_group", device);
    if (readlink(path, target, sizeof target - 1) < 0)
        fail("%s has no group", device);
    printf("group %s\n", strrchr(target, '/') + 1);
    snprintf(path, sizeof path, "/dev/vfio/%s", strrchr(target, '/') + 1);
    int fd = open(path, O_RDWR);
    if (fd < 0)
        fail("%s", path);
    return fd;
}

int main(int argc, char **argv)
{
    if (argc > 1)
        device = argv[1];
    if (argc > 2)
        said = argv[2];
    setvbuf(stdout, NULL, _IOLBF, 0);
    /* Without interrupt remapping VFIO wants to be told that the guest trusts the device. */
    write_file("Y", "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts");
    write_file("vfio-pci", "/sys/bus/pci/devices/%s/driver_override", device);
    write_file(device, "/sys/bus/pci/drivers_probe");

    int container = open("/dev/vfio/vfio", O_RDWR), group = open_group();
    if (container < 0 || ioctl(group, VFIO_GROUP_SET_CONTAINER, &container) < 0)
        fail("the container");
    if (ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU) < 0)
        fail("VFIO_SET_IOMMU");
    int fd = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, device);
    if (fd < 0)
        fail("the device");

    struct vfio_region_info config = { .argsz = sizeof config, .index = VFIO_PCI_CONFIG_REGION_INDEX };
    struct vfio_region_info region = { .argsz = sizeof region, .index = VFIO_PCI_BAR0_REGION_INDEX };
    if (ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, &config) < 0 || ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, &region) < 0)
        fail("the regions");
    uint16_t command = 6; /* memory space, bus mastering */
    if (pwrite(fd, &command, 2, (off_t)config.offset + 4) != 2)
        fail("config space");
    bar = mmap(NULL, region.size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)region.offset);
    if (bar == MAP_FAILED)
        fail("BAR0");
    if (get(ID) != 0x010000ed)
        fail("id %#x", get(ID));

    uint8_t *memory = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED)
        fail("memory");
    struct vfio_iommu_type1_dma_map map = {
        .argsz = sizeof map, .flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
        .vaddr = (uintptr_t)memory, .iova = IOVA, .size = 2 * PAGE,
    };
    if (ioctl(container, VFIO_IOMMU_MAP_DMA, &map) < 0)
        fail("VFIO_IOMMU_MAP_DMA");
    printf("iova %#llx is at %#llx\n", IOVA, (unsigned long long)physical(memory));

    round_trip(memory, 1);
    refused("write beside the mapping", BUFFER, IOVA + 2 * PAGE, TO_RAM);
    refused("write to the physical address", BUFFER, physical(memory), TO_RAM);
    round_trip(memory, 2);

    struct vfio_iommu_type1_dma_unmap unmap = { .argsz = sizeof unmap, .iova = IOVA, .size = 2 * PAGE };
    if (ioctl(container, VFIO_IOMMU_UNMAP_DMA, &unmap) < 0)
        fail("VFIO_IOMMU_UNMAP_DMA");
    refused("read after unmap", IOVA, BUFFER, 0);
    if (ioctl(container, VFIO_IOMMU_MAP_DMA, &map) < 0)
        fail("VFIO_IOMMU_MAP_DMA again");
    round_trip(memory, 3);
    printf("all is well\n");
    return 0;
}

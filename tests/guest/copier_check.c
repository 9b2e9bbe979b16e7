/* SPDX-License-Identifier: MIT
 * Runs inside the guest: drives the copier of docs/writing-a-model.md by VFIO, in all that the page says of it.  Needs the modules
 * vfio_iommu_type1 and vfio-pci, and a guest that drives an IOMMU.
 *
 *   copier_check [PCI-ADDRESS [BYTES OF RAM]]
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/vfio.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096u
#define IOVA 0x123400000ull
#define NOWHERE 0x500000000ull
#define SIZE 8u
#define VECTORS 3u

enum { ID = 0x00, CONTROL = 0x04, IRQ_STATUS = 0x08, RING_SIZE = 0x0c, RING_BASE = 0x10, HEAD = 0x18, TAIL = 0x1c,
       TICK_US = 0x20 };
enum { IRQ = 1, SOURCE_IN_RAM = 2, TARGET_IN_RAM = 4 };
enum { DONE = 1, BAD = 2, FAULT = 3 };
enum { ON_DONE = 0, ON_ERROR = 1, ON_TICK = 2 };

struct descriptor {
    uint64_t source, target;
    uint32_t length, flags;
    volatile uint32_t status;
    uint32_t reserved;
};

static const char *device = "0000:00:03.0";
static volatile uint8_t *bar, *ram;
static uint8_t *memory; /* the ring, then pages for data */
static struct descriptor *ring;
static unsigned tail;
static int fd, events[VECTORS], shared, level;
static off_t config;

static void fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    printf("copier_check: ");
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
    int file = open(path, O_WRONLY);
    if (file < 0 || write(file, text, strlen(text)) < 0)
        fail("%s", path);
    close(file);
}

static uint32_t get(unsigned at)
{
    return *(volatile uint32_t *)(bar + at);
}

static void put(unsigned at, uint32_t value)
{
    *(volatile uint32_t *)(bar + at) = value;
}

/* ---- VFIO ------------------------------------------------------------------------------------------------------- */

static volatile uint8_t *map_bar(unsigned index, size_t size)
{
    struct vfio_region_info region = { .argsz = sizeof region, .index = index };
    if (ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, &region) < 0 || region.size != size)
        fail("BAR%u has %llu bytes, not %zu", index, (unsigned long long)region.size, size);
    void *there = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (off_t)region.offset);
    if (there == MAP_FAILED)
        fail("BAR%u", index);
    return there;
}

static void open_device(void)
{
    char path[256], target[256] = "";

    /* Without interrupt remapping VFIO requires this statement that the guest trusts the device. */
    write_file("Y", "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts");
    write_file("vfio-pci", "/sys/bus/pci/devices/%s/driver_override", device);
    write_file(device, "/sys/bus/pci/drivers_probe");
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/iommu_group", device);
    if (readlink(path, target, sizeof target - 1) < 0)
        fail("%s has no group", device);
    snprintf(path, sizeof path, "/dev/vfio/%s", strrchr(target, '/') + 1);
    int container = open("/dev/vfio/vfio", O_RDWR), group = open(path, O_RDWR);
    if (container < 0 || group < 0 || ioctl(group, VFIO_GROUP_SET_CONTAINER, &container) < 0 ||
        ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU) < 0)
        fail("the container");
    fd = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, device);
    if (fd < 0)
        fail("the device");
    memory = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    struct vfio_iommu_type1_dma_map asked = { .argsz = sizeof asked, .iova = IOVA, .size = 4 * PAGE,
                                              .flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
                                              .vaddr = (uintptr_t)memory };
    if (memory == MAP_FAILED || ioctl(container, VFIO_IOMMU_MAP_DMA, &asked) < 0)
        fail("memory for DMA");
    ring = (struct descriptor *)memory;
    struct vfio_region_info region = { .argsz = sizeof region, .index = VFIO_PCI_CONFIG_REGION_INDEX };
    if (ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, &region) < 0)
        fail("config space");
    config = (off_t)region.offset;
}

static void enable(void)
{
    uint16_t command = 6; /* memory space, bus mastering */
    if (pwrite(fd, &command, 2, config + 4) != 2)
        fail("the command register");
}

static void set_irqs(unsigned index, uint32_t action, uint32_t kind, unsigned count)
{
    union {
        struct vfio_irq_set set;
        uint8_t bytes[sizeof(struct vfio_irq_set) + sizeof events];
    } irq = { .set = { .argsz = sizeof irq.bytes, .flags = kind | action, .index = index, .count = count } };

    if (kind == VFIO_IRQ_SET_DATA_EVENTFD)
        memcpy(irq.bytes + sizeof irq.set, events, count * sizeof *events);
    if (ioctl(fd, VFIO_DEVICE_SET_IRQS, &irq)) /* more than 0: so many vectors could be had */
        fail("VFIO_DEVICE_SET_IRQS: index %u, %u vectors", index, count);
}

/* Waits for a cause, and that the interrupt came by the vector that it should; clears it. */
static void comes(const char *what, unsigned cause)
{
    uint64_t count;
    struct pollfd p = { .fd = events[shared ? 0 : cause], .events = POLLIN };

    errno = 0;
    if (poll(&p, 1, 10000) != 1 || read(p.fd, &count, sizeof count) != sizeof count)
        fail("%s: no interrupt in 10 s", what);
    if (get(IRQ_STATUS) != 1u << cause)
        fail("%s: interrupt status %#x", what, get(IRQ_STATUS));
    put(IRQ_STATUS, 1u << cause);
    if (get(IRQ_STATUS))
        fail("%s: %#x is left", what, get(IRQ_STATUS));
    if (level)
        set_irqs(VFIO_PCI_INTX_IRQ_INDEX, VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_NONE, 1);
}

/* ---- the copier ------------------------------------------------------------------------------------------------- */

static void start(void)
{
    put(CONTROL, 0);
    memset(ring, 0, SIZE * sizeof *ring);
    put(RING_SIZE, SIZE);
    *(volatile uint64_t *)(bar + RING_BASE) = IOVA;
    put(CONTROL, 1);
    tail = 0;
}

static struct descriptor *add(uint64_t source, uint64_t target, uint32_t length, uint32_t flags)
{
    struct descriptor *one = &ring[tail];
    *one = (struct descriptor){ source, target, length, flags, 0, 0 };
    tail = (tail + 1) % SIZE;
    return one;
}

static void doorbell(void)
{
    __sync_synchronize();
    put(TAIL, tail);
}

static void expect(const char *what, const struct descriptor *one, uint32_t status)
{
    errno = 0;
    if (one->status != status)
        fail("%s: status %u, not %u", what, one->status, status);
}

/* More turns than the ring is long: a copy, one by way of the RAM, and one that fails. */
static void copies(const char *mode)
{
    uint8_t *from = memory + PAGE, *to = memory + 2 * PAGE;
    struct descriptor *one, *other;

    start();
    for (unsigned turn = 0; turn < 10; turn++) {
        for (unsigned i = 0; i < PAGE; i++)
            from[i] = (uint8_t)(i * 7 + turn);
        memset(to, 0, PAGE);
        one = add(IOVA + PAGE, IOVA + 2 * PAGE, PAGE / 2, 0);
        add(IOVA + PAGE + PAGE / 2, 0x100, PAGE / 2, TARGET_IN_RAM);
        other = add(0x100, IOVA + 2 * PAGE + PAGE / 2, PAGE / 2, SOURCE_IN_RAM | IRQ);
        doorbell();
        comes("copies", ON_DONE);
        expect("first", one, DONE);
        expect("last", other, DONE);
        errno = 0;
        if (memcmp(from, to, PAGE))
            fail("turn %u: what was copied differs", turn);
        if (get(HEAD) != tail)
            fail("turn %u: HEAD is %u, not %u", turn, get(HEAD), tail);
    }
    one = add(NOWHERE, IOVA + PAGE, 16, IRQ);
    doorbell();
    comes("nowhere", ON_ERROR);
    expect("nowhere", one, FAULT);
    one = add(IOVA + PAGE, IOVA + PAGE, 0, IRQ);
    doorbell();
    comes("no length", ON_ERROR);
    expect("no length", one, BAD);
    put(TICK_US, 20000);
    comes("timer", ON_TICK);
    put(TICK_US, 0);
    usleep(50000);
    uint64_t late;
    if (read(events[shared ? 0 : ON_TICK], &late, sizeof late) == sizeof late && level)
        set_irqs(VFIO_PCI_INTX_IRQ_INDEX, VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_NONE, 1);
    put(IRQ_STATUS, 7);
    printf("%s: copies, faults, timer\n", mode);
}

static void interrupts(const char *mode, unsigned index, unsigned count)
{
    for (unsigned n = 0; n < VECTORS; n++)
        events[n] = eventfd(0, EFD_NONBLOCK);
    shared = count == 1;
    level = index == VFIO_PCI_INTX_IRQ_INDEX;
    set_irqs(index, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, count);
    copies(mode);
    set_irqs(index, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_NONE, 0);
    for (unsigned n = 0; n < VECTORS; n++)
        close(events[n]);
}

static void ram_bar(size_t size)
{
    ram = map_bar(2, size);
    for (size_t i = 0; i < size; i += 4)
        *(volatile uint32_t *)(ram + i) = (uint32_t)i * 3;
    for (size_t i = 0; i < size; i += 4)
        if (*(volatile uint32_t *)(ram + i) != (uint32_t)i * 3)
            fail("RAM at %#zx", i);
    printf("RAM: %zu bytes\n", size);
}

static void capability(void)
{
    uint8_t at = 0, head[4];
    uint16_t quota = 1000;

    if (pread(fd, &at, 1, config + 0x34) != 1)
        fail("the list of capabilities");
    for (int n = 0; at && n < 48; n++, at = head[1]) {
        if (pread(fd, head, 4, config + at) != 4)
            fail("the capability at %#x", at);
        if (head[0] != 0x09)
            continue;
        if (head[2] != 8 || head[3] != 1)
            fail("the vendor's capability: length %u, version %u", head[2], head[3]);
        if (pwrite(fd, &quota, 2, config + at + 4) != 2 || pread(fd, &quota, 2, config + at + 4) != 2 || quota != 64)
            fail("QUOTA is %u", quota);
        printf("capability: at %#x\n", at);
        return;
    }
    fail("no vendor-specific capability");
}

static void reset(void)
{
    *(volatile uint32_t *)(ram + 8) = 0x5a5a5a5a;
    put(TICK_US, 1000000);
    if (ioctl(fd, VFIO_DEVICE_RESET) < 0)
        fail("VFIO_DEVICE_RESET");
    enable();
    errno = 0;
    if (get(CONTROL) || get(RING_SIZE) || get(TICK_US) || get(HEAD))
        fail("registers after a reset");
    if (*(volatile uint32_t *)(ram + 8) != 0x5a5a5a5a)
        fail("RAM after a function level reset");
    printf("reset: registers as at the start, RAM kept\n");
}

int main(int argc, char **argv)
{
    if (argc > 1)
        device = argv[1];
    setvbuf(stdout, NULL, _IOLBF, 0);
    open_device();
    enable();
    bar = map_bar(0, PAGE);
    if (get(ID) != 0x0001c09e)
        fail("id %#x", get(ID));
    ram_bar(argc > 2 ? strtoul(argv[2], NULL, 0) : 65536);
    capability();
    interrupts("MSI-X", VFIO_PCI_MSIX_IRQ_INDEX, VECTORS);
    interrupts("MSI", VFIO_PCI_MSI_IRQ_INDEX, 1); /* x86 has more than one with interrupt remapping only */
    interrupts("INTx", VFIO_PCI_INTX_IRQ_INDEX, 1);
    reset();
    interrupts("MSI-X after the reset", VFIO_PCI_MSIX_IRQ_INDEX, VECTORS);
    printf("all is well\n");
    return 0;
}

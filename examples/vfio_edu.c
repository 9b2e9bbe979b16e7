/* SPDX-License-Identifier: MIT
 * Runs in the guest: drives edu from user space through VFIO and the guest's own IOMMU driver.  All modes except "raw"
 * need the modules vfio_iommu_type1 and vfio-pci.
 *
 *   vfio_edu [PCI-ADDRESS [TEXT [MODE]]]   TEXT: the start of a fault's line in the kernel's log, default "DMAR: [DMA"
 *
 *   basic  (default) Maps a buffer at an IOVA that is not its physical address; DMA to the device and back succeeds;
 *          accesses outside the mapping, and after unmap, must be refused and be in the kernel's log.
 *   more   MSI, DMA across borders of scattered pages, a read-only mapping, faults, unmap while DMA runs.
 *   die    Kills a process that does DMA all the time: no DMA must reach its memory afterwards.
 *   loop   Does DMA until it is killed; prints an x when the first data has arrived.
 *   many   Maps 10,000 windows of one page each, waits for a line on stdin, unmaps them, waits for another line.
 *   raw    Without VFIO: DMA by physical address, on a device without a driver.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/vfio.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096u
#define IOVA 0x123400000ull
#define BUFFER 0x40000u
#define READ VFIO_DMA_MAP_FLAG_READ
#define WRITE VFIO_DMA_MAP_FLAG_WRITE

enum { ID = 0x00, IRQ_STATUS = 0x24, IRQ_RAISE = 0x60, IRQ_ACK = 0x64,
       DMA_SRC = 0x80, DMA_DST = 0x88, DMA_COUNT = 0x90, DMA_CMD = 0x98 };
enum { RUN = 1, TO_RAM = 2, IRQ = 4, DONE = 0x100 };

static const char *device = "0000:00:03.0", *said = "DMAR: [DMA";
static volatile uint8_t *bar;
static size_t bar_size;
static int container, group, fd;

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
    int file = open(path, O_WRONLY);
    if (file < 0 || write(file, text, strlen(text)) < 0)
        fail("%s", path);
    close(file);
}

static uint32_t get(unsigned at)
{
    return *(volatile uint32_t *)(bar + at);
}

static void put64(unsigned at, uint64_t value)
{
    *(volatile uint64_t *)(bar + at) = value;
}

/* Starts a transfer; returns whether it succeeded. */
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

static void fill(uint8_t *page, unsigned seed)
{
    for (unsigned i = 0; i < PAGE; i++)
        page[i] = (uint8_t)(i * 7 + seed + i / 256);
}

/* Copies a page to the device, and back to the next page. */
static void round_trip(uint8_t *memory, unsigned seed)
{
    fill(memory, seed);
    memset(memory + PAGE, 0, PAGE);
    errno = 0;
    if (!transfer(IOVA, BUFFER, 0) || !transfer(BUFFER, IOVA + PAGE, TO_RAM))
        fail("round trip %u was refused", seed);
    if (memcmp(memory, memory + PAGE, PAGE))
        fail("round trip %u: the data differs", seed);
    printf("round trip %u equal\n", seed);
}

/* Returns the number of faults in the kernel's log; `line` gets the last one. */
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

/* The transfer must be refused, and reported by the kernel.  At most three calls in 5 s: Linux limits its reports. */
static void refused(const char *what, uint64_t from, uint64_t to, unsigned command)
{
    char line[256];
    int before = faults(line, sizeof line), after = before;

    errno = 0;
    if (transfer(from, to, command))
        fail("%s was not refused", what);
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
    int file = open("/proc/self/pagemap", O_RDONLY);
    if (file < 0 || pread(file, &entry, 8, (off_t)((uintptr_t)page / PAGE * 8)) != 8)
        fail("pagemap");
    close(file);
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
    int file = open(path, O_RDWR);
    if (file < 0)
        fail("%s", path);
    return file;
}

static uint8_t *anonymous(unsigned pages, int flags)
{
    uint8_t *memory = mmap(NULL, (size_t)pages * PAGE, PROT_READ | PROT_WRITE,
                           flags | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED)
        fail("memory");
    return memory;
}

static void map(void *memory, uint64_t iova, uint64_t size, unsigned flags)
{
    struct vfio_iommu_type1_dma_map asked = {
        .argsz = sizeof asked, .flags = flags, .vaddr = (uintptr_t)memory, .iova = iova, .size = size,
    };
    if (ioctl(container, VFIO_IOMMU_MAP_DMA, &asked) < 0)
        fail("VFIO_IOMMU_MAP_DMA at %#llx", (unsigned long long)iova);
}

static void unmap(uint64_t iova, uint64_t size)
{
    struct vfio_iommu_type1_dma_unmap asked = { .argsz = sizeof asked, .iova = iova, .size = size };
    if (ioctl(container, VFIO_IOMMU_UNMAP_DMA, &asked) < 0 || asked.size != size)
        fail("VFIO_IOMMU_UNMAP_DMA at %#llx", (unsigned long long)iova);
}

static void enable(int file, off_t config)
{
    uint16_t command = 6; /* memory space, bus mastering */
    if (pwrite(file, &command, 2, config + 4) != 2)
        fail("config space");
}

static void map_bar(int file, off_t offset, size_t size)
{
    bar_size = size;
    bar = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, offset);
    if (bar == MAP_FAILED)
        fail("BAR0");
    if (get(ID) != 0x010000ed)
        fail("id %#x", get(ID));
}

static void bind_driver(void)
{
    char path[256];
    /* VFIO requires this declaration of trust in the device if there is no interrupt remapping. */
    write_file("Y", "/sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts");
    write_file("vfio-pci", "/sys/bus/pci/devices/%s/driver_override", device);
    /* A device that has just been plugged is in /sys before the PCI core lets a driver have it. */
    for (int tries = 0; tries < 50; tries++) {
        write_file(device, "/sys/bus/pci/drivers_probe");
        snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/driver", device);
        if (access(path, F_OK) == 0)
            return;
        usleep(100 * 1000);
    }
    fail("vfio-pci does not take %s", device);
}

static void open_device(void)
{
    container = open("/dev/vfio/vfio", O_RDWR);
    group = open_group();
    if (container < 0 || ioctl(group, VFIO_GROUP_SET_CONTAINER, &container) < 0)
        fail("the container");
    if (ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU) < 0)
        fail("VFIO_SET_IOMMU");
    fd = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, device);
    if (fd < 0)
        fail("the device");
    struct vfio_region_info config = { .argsz = sizeof config, .index = VFIO_PCI_CONFIG_REGION_INDEX };
    struct vfio_region_info region = { .argsz = sizeof region, .index = VFIO_PCI_BAR0_REGION_INDEX };
    if (ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, &config) < 0 || ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, &region) < 0)
        fail("the regions");
    enable(fd, (off_t)config.offset);
    map_bar(fd, (off_t)region.offset, region.size);
}

static void close_device(void)
{
    munmap((void *)bar, bar_size);
    close(fd);
    close(group);
    close(container);
}

/* ---- basic ------------------------------------------------------------------------------------------------------ */

static void basic(void)
{
    uint8_t *memory = anonymous(2, MAP_PRIVATE);

    open_device();
    map(memory, IOVA, 2 * PAGE, READ | WRITE);
    printf("iova %#llx is at %#llx\n", IOVA, (unsigned long long)physical(memory));
    round_trip(memory, 1);
    refused("write beside the mapping", BUFFER, IOVA + 2 * PAGE, TO_RAM);
    refused("write to the physical address", BUFFER, physical(memory), TO_RAM);
    round_trip(memory, 2);
    unmap(IOVA, 2 * PAGE);
    refused("read after unmap", IOVA, BUFFER, 0);
    map(memory, IOVA, 2 * PAGE, READ | WRITE);
    round_trip(memory, 3);
}

/* ---- more ------------------------------------------------------------------------------------------------------- */

static void expect_msi(int event, const char *what, uint32_t status)
{
    uint64_t count;
    struct pollfd p = { .fd = event, .events = POLLIN };

    errno = 0;
    if (poll(&p, 1, 5000) != 1 || read(event, &count, sizeof count) != sizeof count)
        fail("%s: no MSI", what);
    if (count != 1 || get(IRQ_STATUS) != status)
        fail("%s: %llu interrupts, status %#x", what, (unsigned long long)count, get(IRQ_STATUS));
    *(volatile uint32_t *)(bar + IRQ_ACK) = status;
}

static void msi(void)
{
    int32_t event = eventfd(0, EFD_NONBLOCK);
    union {
        struct vfio_irq_set set;
        uint8_t bytes[sizeof(struct vfio_irq_set) + sizeof event];
    } irq = { .set = { .argsz = sizeof irq.bytes, .flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
                       .index = VFIO_PCI_MSI_IRQ_INDEX, .count = 1 } };

    memcpy(irq.bytes + sizeof irq.set, &event, sizeof event);
    if (ioctl(fd, VFIO_DEVICE_SET_IRQS, &irq) < 0)
        fail("VFIO_DEVICE_SET_IRQS");
    for (uint32_t n = 1; n <= 3; n++) {
        *(volatile uint32_t *)(bar + IRQ_RAISE) = n << 16;
        expect_msi(event, "raised", n << 16);
    }
    if (!transfer(IOVA, BUFFER, 0))
        fail("DMA with MSI");
    expect_msi(event, "DMA", DONE);
    struct vfio_irq_set off = { .argsz = sizeof off, .flags = VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER,
                                .index = VFIO_PCI_MSI_IRQ_INDEX };
    if (ioctl(fd, VFIO_DEVICE_SET_IRQS, &off) < 0)
        fail("VFIO_DEVICE_SET_IRQS, none");
    printf("MSI by eventfd: 4 of 4\n");
}

/* Pages that are contiguous for the program and the device, but not in physical memory. */
static uint8_t *scattered(unsigned pages)
{
    uint8_t *pool = anonymous(4 * pages, MAP_PRIVATE), *row = anonymous(pages, MAP_PRIVATE);

    for (unsigned i = 0, next = 4 * pages; i < pages; i++) {
        do {
            if (!next--)
                fail("nearly all pages are contiguous");
        } while (i && physical(pool + (size_t)next * PAGE) == physical(row + (size_t)(i - 1) * PAGE) + PAGE);
        if (mremap(pool + (size_t)next * PAGE, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, row + (size_t)i * PAGE) ==
            MAP_FAILED)
            fail("mremap");
    }
    return row;
}

static void over_borders(void)
{
    static const unsigned offsets[] = { 1, 0x7f8, 0xfff };
    uint8_t *memory = scattered(16), expected[PAGE];

    map(memory, 2 * IOVA, 16 * PAGE, READ | WRITE);
    for (unsigned n = 0; n < 3 * 7; n++) {
        unsigned from = n / 3 * PAGE + offsets[n % 3], to = 8 * PAGE + (6 - n / 3) * PAGE + offsets[(n + 1) % 3];

        memset(memory, 0xee, 16 * PAGE);
        fill(memory + from, n);
        fill(expected, n);
        if (!transfer(2 * IOVA + from, BUFFER, 0) || !transfer(BUFFER, 2 * IOVA + to, TO_RAM))
            fail("from %#x to %#x was refused", from, to);
        if (memcmp(memory + to, expected, PAGE))
            fail("from %#x to %#x: the data differs", from, to);
        for (unsigned i = 0; i < 16 * PAGE; i++)
            if (memory[i] != 0xee && i - from >= PAGE && i - to >= PAGE)
                fail("from %#x to %#x: byte %#x has changed", from, to, i);
    }
    unmap(2 * IOVA, 16 * PAGE);
    printf("over borders of scattered pages: equal\n");
}

static void all_are(const uint8_t *memory, uint8_t value, const char *what)
{
    for (unsigned i = 0; i < 2 * PAGE; i++)
        if (memory[i] != value)
            fail("%s: byte %#x is %#x", what, i, memory[i]);
}

static volatile int stop;
static volatile unsigned long started;

/* Starts DMAs without waiting for their end, so that many writes are queued in the socket. */
static void *run(void *nothing)
{
    put64(DMA_SRC, BUFFER);
    put64(DMA_COUNT, PAGE);
    while (!stop) {
        put64(DMA_DST, IOVA + (started & 1) * PAGE);
        put64(DMA_CMD, RUN | TO_RAM);
        if (++started % 64 == 0)
            get(ID);
    }
    return nothing;
}

static void start(uint8_t *memory, pthread_t *thread)
{
    memset(memory, 0x11, 2 * PAGE);
    if (!transfer(IOVA, BUFFER, 0))
        fail("DMA before the thread");
    stop = 0;
    if ((errno = pthread_create(thread, NULL, run, NULL)))
        fail("a thread");
}

/* Waits for DMA of the thread to both pages: otherwise the test would test nothing. */
static void both_arrive(volatile uint8_t *memory)
{
    for (int i = 0; memory[0] != 0x11 || memory[PAGE] != 0x11; i++) {
        if (i == 5000)
            fail("no DMA of the thread arrives");
        usleep(1000);
    }
}

static void unmap_while_it_runs(uint8_t *memory)
{
    pthread_t thread;

    start(memory, &thread);
    for (int n = 0; n < 50; n++) {
        memset(memory, 0, 2 * PAGE);
        both_arrive(memory);
        unmap(IOVA, 2 * PAGE);
        unsigned long before = started;
        memset(memory, 0x77, 2 * PAGE);
        /* Waits until the thread has started DMAs after the unmap. */
        for (int i = 0; started < before + 3; i++) {
            if (i == 5000)
                fail("the thread starts no DMA");
            usleep(1000);
        }
        all_are(memory, 0x77, "DMA after unmap");
        map(memory, IOVA, 2 * PAGE, READ | WRITE);
    }
    stop = 1;
    pthread_join(thread, NULL);
    printf("unmap while DMA runs: 50 times, %lu DMAs\n", started);
}

static void more(void)
{
    uint8_t *memory = anonymous(2, MAP_PRIVATE), *other = anonymous(2, MAP_PRIVATE);

    open_device();
    map(memory, IOVA, 2 * PAGE, READ | WRITE);
    msi();
    over_borders();

    map(other, 3 * IOVA, 2 * PAGE, READ);
    fill(other, 9);
    fill(other + PAGE, 9);
    if (!transfer(3 * IOVA, BUFFER, 0) || !transfer(BUFFER, IOVA, TO_RAM) || memcmp(memory, other, PAGE))
        fail("reading the read-only mapping");
    memset(memory, 0x22, 2 * PAGE);
    if (!transfer(IOVA, BUFFER, 0))
        fail("filling the buffer");
    refused("write to the read-only mapping", BUFFER, 3 * IOVA, TO_RAM);
    if (memcmp(other, other + PAGE, PAGE))
        fail("the read-only mapping has changed");
    unmap(3 * IOVA, 2 * PAGE);
    refused("read after unmap", 3 * IOVA, BUFFER, 0);
    refused("write outside", BUFFER, IOVA + 2 * PAGE, TO_RAM);
    round_trip(memory, 1);
    unmap_while_it_runs(memory);
    round_trip(memory, 2);
}

/* ---- die -------------------------------------------------------------------------------------------------------- */

static void victim(uint8_t *memory, int ready)
{
    pthread_t thread;

    open_device();
    map(memory, IOVA, 2 * PAGE, READ | WRITE);
    start(memory, &thread);
    memset(memory, 0, 2 * PAGE);
    both_arrive(memory);
    if (write(ready, "x", 1) != 1)
        fail("the pipe");
    for (;;)
        pause();
}

static void die(void)
{
    uint8_t *memory = anonymous(2, MAP_SHARED);

    for (int n = 0; n < 5; n++) {
        int ends[2], status;
        char x;

        if (pipe(ends) < 0)
            fail("a pipe");
        fflush(stdout);
        pid_t child = fork();
        if (child < 0)
            fail("fork");
        if (!child) {
            victim(memory, ends[1]);
            exit(1);
        }
        close(ends[1]);
        if (read(ends[0], &x, 1) != 1)
            fail("the victim has ended");
        close(ends[0]);
        kill(child, SIGKILL);
        if (waitpid(child, &status, 0) != child || !WIFSIGNALED(status))
            fail("the victim cannot be killed");
        memset(memory, 0x33, 2 * PAGE);
        usleep(100000);
        all_are(memory, 0x33, "DMA after the end of the process");
        open_device();
        map(memory, IOVA, 2 * PAGE, READ | WRITE);
        round_trip(memory, (unsigned)n);
        close_device();
    }
    printf("killed while DMA runs: 5 times\n");
}

static void loop(void)
{
    victim(anonymous(2, MAP_PRIVATE), 1);
}

/* ---- many ------------------------------------------------------------------------------------------------------- */

#define MANY 10000u

static uint64_t window(unsigned n)
{
    return IOVA + (uint64_t)n * 2 * PAGE;
}

static void pause_here(const char *what)
{
    char line[16];
    printf("%s\n", what);
    if (!fgets(line, sizeof line, stdin))
        fail("stdin");
}

static void many(void)
{
    uint8_t *memory = anonymous(MANY, MAP_PRIVATE);

    open_device();
    map(memory, window(0), PAGE, READ | WRITE);
    if (!transfer(window(0), BUFFER, 0))
        fail("the first DMA");
    unmap(window(0), PAGE);
    pause_here("ready");
    for (unsigned n = 0; n < MANY; n++)
        map(memory + (size_t)n * PAGE, window(n), PAGE, READ | WRITE);
    pause_here("mapped");
    for (unsigned n = 0; n + 251 < MANY; n += 251) {
        uint8_t *here = memory + (size_t)n * PAGE, *there = here + (size_t)251 * PAGE;
        fill(here, n);
        if (!transfer(window(n), BUFFER, 0) || !transfer(BUFFER, window(n + 251), TO_RAM) || memcmp(here, there, PAGE))
            fail("DMA by window %u", n);
    }
    if (transfer(window(3) + PAGE, BUFFER, 0))
        fail("DMA between two windows was not refused");
    for (unsigned n = 0; n < MANY; n++)
        unmap(window(n), PAGE);
    if (transfer(window(5), BUFFER, 0))
        fail("DMA to an unmapped window was not refused");
    pause_here("unmapped");
}

/* ---- raw -------------------------------------------------------------------------------------------------------- */

static int sysfs(const char *name)
{
    char path[256];
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/%s", device, name);
    int file = open(path, O_RDWR | O_SYNC);
    if (file < 0)
        fail("%s", path);
    return file;
}

static void raw(void)
{
    uint8_t *memory = anonymous(2, MAP_PRIVATE | MAP_LOCKED);

    enable(sysfs("config"), 0);
    map_bar(sysfs("resource0"), 0, 1 << 20);
    fill(memory, 5);
    if (!transfer(physical(memory), BUFFER, 0) || !transfer(BUFFER, physical(memory + PAGE), TO_RAM))
        fail("raw DMA was refused");
    if (memcmp(memory, memory + PAGE, PAGE))
        fail("raw DMA: the data differs");
    printf("raw DMA equal\n");
}

int main(int argc, char **argv)
{
    static const struct { const char *name; void (*run)(void); int vfio; } modes[] = {
        { "basic", basic, 1 }, { "more", more, 1 }, { "die", die, 1 },
        { "loop", loop, 1 },   { "many", many, 1 }, { "raw", raw, 0 },
    };
    const char *mode = argc > 3 ? argv[3] : "basic";

    if (argc > 1)
        device = argv[1];
    if (argc > 2)
        said = argv[2];
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (unsigned i = 0; i < sizeof modes / sizeof *modes; i++)
        if (!strcmp(mode, modes[i].name)) {
            if (modes[i].vfio)
                bind_driver();
            modes[i].run();
            printf("all is well\n");
            return 0;
        }
    fail("no mode %s", mode);
}

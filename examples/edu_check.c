/* SPDX-License-Identifier: MIT
 * Runs in the guest and tests the edu device: its id, liveness, a factorial with an interrupt, and 4 KiB by DMA to the
 * device and back.  It uses only interfaces of a stock kernel: uio_pci_generic for the interrupt, sysfs for the BAR and
 * config space, pagemap for physical addresses.
 *
 *   edu_check [PCI-ADDRESS[+OFFSET] ...]      default 0000:00:03.0; exit status 0: success
 *
 * It waits $EDU_CHECK_WAIT seconds for an interrupt: 10 by default, without end if negative.
 *
 * OFFSET: the device is behind an IOMMU whose domain maps physical memory at IOVA = address + OFFSET, and nothing else.
 * DMA uses these IOVAs, and an access to the physical address itself must be refused.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096u
#define BUFFER 0x40000u
#define DMA_LIMIT (1ull << 28) /* edu has 28 address lines by default */

enum { ID = 0x00, LIVENESS = 0x04, FACTORIAL = 0x08, STATUS = 0x20, IRQ_STATUS = 0x24, IRQ_ACK = 0x64,
       DMA_SRC = 0x80, DMA_DST = 0x88, DMA_COUNT = 0x90, DMA_CMD = 0x98 };

static char device[32];
static uint64_t offset; /* IOVA - physical address */
static volatile uint8_t *bar;
static int config, uio;

static void fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    printf("edu_check: ");
    vprintf(format, args);
    printf("\n");
    va_end(args);
    exit(1);
}

static uint32_t get(unsigned at)
{
    return *(volatile uint32_t *)(bar + at);
}

static void put(unsigned at, uint32_t value)
{
    *(volatile uint32_t *)(bar + at) = value;
}

static void put64(unsigned at, uint64_t value)
{
    *(volatile uint64_t *)(bar + at) = value;
}

static void write_file(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY);
    if (fd < 0 || (write(fd, text, strlen(text)) < 0 && errno != EEXIST))
        fail("%s: %s", path, strerror(errno));
    close(fd);
}

static int open_in(const char *name, int flags)
{
    char path[256];
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/%s", device, name);
    int fd = open(path, flags);
    if (fd < 0)
        fail("%s: %s", path, strerror(errno));
    return fd;
}

static void open_uio(void)
{
    char path[300];
    struct dirent *entry = NULL;

    write_file("/sys/bus/pci/drivers/uio_pci_generic/new_id", "1234 11e8");
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/uio", device);
    DIR *dir = opendir(path);
    while (dir && (entry = readdir(dir)) && strncmp(entry->d_name, "uio", 3))
        ;
    if (!entry)
        fail("uio_pci_generic did not bind to %s", device);
    snprintf(path, sizeof path, "/dev/%s", entry->d_name);
    uio = open(path, O_RDWR);
    if (uio < 0)
        fail("%s: %s", path, strerror(errno));
    closedir(dir);
}

/* Memory, I/O and bus mastering on, INTx not disabled. */
static void enable(void)
{
    uint16_t command;
    if (pread(config, &command, 2, 4) != 2)
        fail("config space: %s", strerror(errno));
    command = (uint16_t)((command | 6) & ~0x400);
    if (pwrite(config, &command, 2, 4) != 2)
        fail("config space: %s", strerror(errno));
}

static void wait_for_interrupt(const char *what, uint32_t expected)
{
    uint32_t count;
    const char *given = getenv("EDU_CHECK_WAIT");
    int seconds = given ? atoi(given) : 10;
    struct pollfd p = { .fd = uio, .events = POLLIN };

    if (poll(&p, 1, seconds * 1000) != 1 || read(uio, &count, sizeof count) != sizeof count)
        fail("%s: no interrupt in %d s", what, seconds);
    uint32_t seen = get(IRQ_STATUS);
    put(IRQ_ACK, seen);
    if (seen != expected)
        fail("%s: interrupt status %#x, not %#x", what, seen, expected);
    enable(); /* uio_pci_generic disables INTx for each interrupt */
}

static uint64_t physical(void *page)
{
    uint64_t entry;
    int fd = open("/proc/self/pagemap", O_RDONLY);
    if (fd < 0 || pread(fd, &entry, 8, (off_t)((uintptr_t)page / PAGE * 8)) != 8)
        fail("pagemap: %s", strerror(errno));
    close(fd);
    return (entry & ((1ull << 55) - 1)) * PAGE;
}

/* A page that the device can reach. */
static uint8_t *low_page(uint64_t *address)
{
    for (int i = 0; i < 80000; i++) {
        uint8_t *page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE | MAP_LOCKED, -1, 0);
        if (page == MAP_FAILED)
            break;
        *address = physical(page);
        if (*address && *address + PAGE <= DMA_LIMIT)
            return page;
    }
    fail("no page below %#llx", DMA_LIMIT);
    return NULL;
}

static void transfer(uint64_t from, uint64_t to, unsigned command)
{
    put64(DMA_SRC, from);
    put64(DMA_DST, to);
    put64(DMA_COUNT, PAGE);
    put64(DMA_CMD, command | 1 | 4);
    wait_for_interrupt("DMA", 0x100);
    if (get(DMA_CMD) & 1)
        fail("DMA still runs after its interrupt");
}

/* The device must not be able to write to the page at this address. */
static void refused(uint8_t *page, uint64_t address)
{
    memset(page, 0x5a, PAGE);
    put64(DMA_SRC, BUFFER);
    put64(DMA_DST, address);
    put64(DMA_COUNT, PAGE);
    put64(DMA_CMD, 1 | 2 | 4);
    for (int i = 0; get(DMA_CMD) & 1; i++) {
        if (i == 1000)
            fail("refused DMA: it does not end");
        usleep(10000);
    }
    struct pollfd p = { .fd = uio, .events = POLLIN };
    if (get(IRQ_STATUS) || poll(&p, 1, 0))
        fail("refused DMA: it has raised an interrupt");
    for (unsigned i = 0; i < PAGE; i++)
        if (page[i] != 0x5a)
            fail("refused DMA: it has written to the page");
}

static void check(const char *where)
{
    const char *plus = strchr(where, '+');
    snprintf(device, sizeof device, "%.*s", plus ? (int)(plus - where) : (int)strlen(where), where);
    offset = plus ? strtoull(plus + 1, NULL, 0) : 0;
    printf("device        %s%s\n", device, offset ? ", behind an IOMMU" : "");
    config = open_in("config", O_RDWR);
    open_uio();
    enable();
    int fd = open_in("resource0", O_RDWR | O_SYNC);
    bar = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (bar == MAP_FAILED)
        fail("BAR0: %s", strerror(errno));

    uint32_t id = get(ID);
    if ((id & 0xff) != 0xed)
        fail("id %#x is not edu's", id);
    printf("id            %#010x\n", id);

    for (uint32_t n = 0; n < 1000; n++) {
        put(LIVENESS, 0x12345678 + n);
        if (get(LIVENESS) != ~(0x12345678 + n))
            fail("liveness: %#x does not read as its inverse", 0x12345678 + n);
    }
    printf("liveness      1000 values inverted\n");

    put(STATUS, 0x80);
    put(FACTORIAL, 10);
    wait_for_interrupt("factorial", 1);
    if (get(FACTORIAL) != 3628800)
        fail("10! is 3628800, not %u", get(FACTORIAL));
    printf("factorial     10! = %u, by interrupt\n", get(FACTORIAL));

    uint64_t source, target;
    uint8_t *out = low_page(&source), *in = low_page(&target);
    for (unsigned i = 0; i < PAGE; i++)
        out[i] = (uint8_t)(i * 7 + (i >> 8));
    if (offset) {
        refused(in, target);
        printf("refused       DMA to iova %#llx, where nothing is mapped\n", (unsigned long long)target);
    }
    transfer(source + offset, BUFFER, 0);
    transfer(BUFFER, target + offset, 2);
    if (memcmp(in, out, PAGE))
        fail("DMA: the data that was read back differs from the data that was written");
    printf("DMA           4096 bytes to the device and back, equal");
    if (offset)
        printf(": iova %#llx leads to page %#llx", (unsigned long long)(target + offset), (unsigned long long)target);
    printf("\n");
    munmap((void *)bar, 1 << 20);
    close(fd);
    close(uio);
    close(config);
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int i = 1; i < argc; i++)
        check(argv[i]);
    if (argc == 1)
        check("0000:00:03.0");
    return 0;
}

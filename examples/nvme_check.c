/* SPDX-License-Identifier: MIT
 * Runs in the guest and tests an NVMe namespace, by the kernel's own driver and without its page cache: writes 32 MiB,
 * flushes, reads them back and compares; then measures 4 KiB reads and writes per second, one at a time and with 8
 * threads.  It overwrites the namespace.
 *
 *   nvme_check PCI-ADDRESS [NSID]      exit status 0: success
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <glob.h>
#include <linux/fs.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#define LARGE 65536u
#define SMALL 4096u
#define AREA (32u << 20)
#define THREADS 8
#define TRANSFERS 1000

static char name[32];
static int fd;

static void fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    printf("nvme_check: ");
    vprintf(format, args);
    printf("\n");
    va_end(args);
    exit(1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* xorshift64: reproducible, and all blocks differ. */
static uint64_t next(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void read_word(const char *path, char *word, size_t size)
{
    FILE *file = fopen(path, "r");
    if (!file || !fgets(word, (int)size, file))
        fail("cannot read %s", path);
    word[strcspn(word, "\n")] = 0;
    fclose(file);
}

/* The block device of a namespace, by address and id: names such as nvme0n1 depend on the order of probing. */
static int find(const char *address, const char *nsid)
{
    char pattern[128], word[32];
    glob_t found;
    snprintf(pattern, sizeof pattern, "/sys/bus/pci/devices/%s/nvme/nvme*/nvme*n*/nsid", address);
    if (glob(pattern, 0, NULL, &found))
        return 0;
    for (size_t n = 0; n < found.gl_pathc; n++) {
        char *path = found.gl_pathv[n];
        read_word(path, word, sizeof word);
        if (strcmp(word, nsid))
            continue;
        *strrchr(path, '/') = 0;
        snprintf(name, sizeof name, "%s", strrchr(path, '/') + 1);
    }
    globfree(&found);
    return name[0] != 0;
}

static void *buffer(size_t size)
{
    void *memory;
    if (posix_memalign(&memory, LARGE, size))
        fail("no memory");
    return memory;
}

static void transfer(int writes, void *data, size_t size, off_t at)
{
    ssize_t done = writes ? pwrite(fd, data, size, at) : pread(fd, data, size, at);
    if (done != (ssize_t)size)
        fail("%s of %zu bytes at %lld: %zd: %m", writes ? "write" : "read", size, (long long)at, done);
}

static void fill(uint64_t *data, off_t at)
{
    uint64_t state = (uint64_t)at + 1;
    for (unsigned n = 0; n < LARGE / 8; n++)
        data[n] = next(&state);
}

static void round_trip(void)
{
    uint64_t *wanted = buffer(LARGE), *got = buffer(LARGE);
    double writing = 0, reading = 0, start;
    for (off_t at = 0; at < AREA; at += LARGE) {
        fill(wanted, at);
        start = now();
        transfer(1, wanted, LARGE, at);
        writing += now() - start;
    }
    start = now();
    if (fsync(fd))
        fail("flush: %m");
    writing += now() - start;
    for (off_t at = 0; at < AREA; at += LARGE) {
        start = now();
        transfer(0, got, LARGE, at);
        reading += now() - start;
        fill(wanted, at);
        if (memcmp(wanted, got, LARGE))
            fail("the data read at %lld differs from the data written", (long long)at);
    }
    printf("round trip    32 MiB written with %.0f MB/s and flushed, read with %.0f MB/s, equal\n", AREA / writing / 1e6,
           AREA / reading / 1e6);
}

struct worker {
    pthread_t thread;
    int writes;
    uint64_t state;
};

static void *work(void *of)
{
    struct worker *worker = of;
    void *data = buffer(SMALL);
    memset(data, 0x5a, SMALL);
    for (int n = 0; n < TRANSFERS; n++)
        transfer(worker->writes, data, SMALL, (off_t)(next(&worker->state) % (AREA / SMALL)) * SMALL);
    free(data);
    return NULL;
}

static double rate(int writes, int threads)
{
    struct worker workers[THREADS];
    double start = now();
    for (int n = 0; n < threads; n++) {
        workers[n] = (struct worker){.writes = writes, .state = (uint64_t)n + 1};
        if (pthread_create(&workers[n].thread, NULL, work, &workers[n]))
            fail("no thread");
    }
    for (int n = 0; n < threads; n++)
        pthread_join(workers[n].thread, NULL);
    return threads * TRANSFERS / (now() - start);
}

int main(int argc, char **argv)
{
    const char *address = argc > 1 ? argv[1] : "0000:00:04.0", *nsid = argc > 2 ? argv[2] : "1";
    char path[128], group[64] = "none";
    uint64_t size;
    int block;

    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int tries = 0; !find(address, nsid); tries++) {
        if (tries == 100)
            fail("the nvme driver has no namespace %s of %s", nsid, address);
        usleep(100000); /* the driver scans for namespaces after it has loaded */
    }
    snprintf(path, sizeof path, "/dev/%s", name);
    fd = open(path, O_RDWR | O_DIRECT | O_EXCL);
    if (fd < 0 || ioctl(fd, BLKGETSIZE64, &size) || ioctl(fd, BLKSSZGET, &block))
        fail("%s: %m", path);
    if (size < AREA)
        fail("%s has %llu bytes, %u are needed", path, (unsigned long long)size, AREA);
    snprintf(path, sizeof path, "/sys/bus/pci/devices/%s/iommu_group/type", address);
    if (!access(path, R_OK))
        read_word(path, group, sizeof group);
    printf("namespace     %s: %llu MiB in blocks of %d bytes; IOMMU: %s\n", name, (unsigned long long)size >> 20, block,
           group);
    round_trip();
    printf("4 KiB reads   %.0f IOPS one at a time, %.0f from %d threads\n", rate(0, 1), rate(0, THREADS), THREADS);
    printf("4 KiB writes  %.0f IOPS one at a time, %.0f from %d threads\n", rate(1, 1), rate(1, THREADS), THREADS);
    return 0;
}

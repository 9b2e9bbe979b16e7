/* SPDX-License-Identifier: MIT
 * Runs inside the guest, for scripts/bench --nvme: direct reads and writes through the guest's block layer, one at a time
 * and one after the other, as dd does them.  Prints, for each repetition and kind, "NS-OF-ALL NS-MEDIAN NS-99TH" of the
 * kinds: 4 KiB reads, 4 KiB writes, 64 KiB reads, 64 KiB writes.
 *
 *   nvme_io DEVICE REPETITIONS
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MOST 2000
#define LARGE 65536u

struct kind {
    size_t size;
    int count;
    int writes;
};

static const struct kind kinds[] = {{4096, 2000, 0}, {4096, 2000, 1}, {LARGE, 200, 0}, {LARGE, 200, 1}};

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e9 * (double)t.tv_sec + (double)t.tv_nsec;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void transfer(int fd, void *buffer, const struct kind *kind, int n)
{
    off_t at = (off_t)kind->size * n;
    ssize_t done = kind->writes ? pwrite(fd, buffer, kind->size, at) : pread(fd, buffer, kind->size, at);
    if (done != (ssize_t)kind->size)
        fail(kind->writes ? "pwrite" : "pread");
}

static void measure(int fd, void *buffer, const struct kind *kind)
{
    static double spent[MOST];
    double start = now(), last = start;
    for (int n = 0; n < kind->count; n++) {
        transfer(fd, buffer, kind, n);
        double at = now();
        spent[n] = at - last;
        last = at;
    }
    qsort(spent, (size_t)kind->count, sizeof *spent, compare);
    printf("%.0f %.0f %.0f\n", last - start, spent[kind->count / 2], spent[kind->count * 99 / 100]);
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    int fd = open(argv[1], O_RDWR | O_DIRECT);
    void *buffer;
    if (fd < 0 || posix_memalign(&buffer, LARGE, LARGE))
        fail(argv[1]);
    memset(buffer, 0x5a, LARGE);
    for (int n = 0; n < 200; n++) /* no measured write makes the image larger */
        transfer(fd, buffer, &kinds[3], n);
    for (int n = atoi(argv[2]); n > 0; n--)
        for (size_t k = 0; k < sizeof kinds / sizeof *kinds; k++)
            measure(fd, buffer, &kinds[k]);
    return 0;
}

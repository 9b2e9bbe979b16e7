/* The measuring end of scripts/bench: a ping-pong between two C processes, which is the yardstick, and a
 * vfio-user client that does nothing but wait.  Prints nanoseconds per operation, one line a repetition.
 *
 *   peer pp REPEAT COUNT
 *   peer memcpy REPEAT COUNT                          256 scattered pages, 1 MiB in all
 *   peer SOCKET REPEAT COUNT read REGION OFFSET
 *   peer SOCKET REPEAT COUNT write REGION OFFSET      posted, in bursts of 128, each burst ended by a read
 *   peer SOCKET REPEAT COUNT map LIVE fd|message      DMA_MAP + DMA_UNMAP with LIVE other windows
 */
#define _GNU_SOURCE
#include <err.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

struct header {
    uint16_t id, command;
    uint32_t size, flags, error;
};
struct access {
    struct header h;
    uint64_t offset;
    uint32_t region, count;
    uint8_t data[8];
};
struct map {
    struct header h;
    uint32_t argsz, flags;
    uint64_t offset, address, size;
};
struct unmap {
    struct header h;
    uint32_t argsz, flags;
    uint64_t address, size;
};

static int sock;

static double now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec * 1e9 + (double)ts.tv_nsec;
}

static void send_message(void *message, size_t size, int fd)
{
    struct header *h = message;
    h->size = (uint32_t)size;
    struct iovec iov = { message, size };
    union {
        struct cmsghdr align;
        char space[CMSG_SPACE(sizeof fd)];
    } control;
    struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
    if (fd >= 0) {
        msg.msg_control = &control;
        msg.msg_controllen = sizeof control;
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(c), &fd, sizeof fd);
    }
    if (sendmsg(sock, &msg, MSG_NOSIGNAL) != (ssize_t)size)
        err(1, "sendmsg");
}

static void receive(void *buf, size_t size, size_t least)
{
    ssize_t n = recv(sock, buf, size, 0);
    struct header *h = buf;
    if (n < (ssize_t)least)
        errx(1, "reply of %zd bytes", n);
    if (h->flags & 0x20)
        errx(1, "command %u failed with errno %u", h->command, h->error);
}

static void negotiate(const char *path)
{
    struct sockaddr_un addr = { .sun_family = AF_UNIX };
    struct {
        struct header h;
        uint16_t major, minor;
        char json[64];
    } m = { .h = { .id = 1, .command = 1 }, .json = "{\"capabilities\":{\"max_msg_fds\":8}}" };
    char reply[4096];

    snprintf(addr.sun_path, sizeof addr.sun_path, "%s", path);
    sock = socket(AF_UNIX, SOCK_STREAM, 0);
    if (sock < 0 || connect(sock, (struct sockaddr *)&addr, sizeof addr) < 0)
        err(1, "%s", path);
    send_message(&m, 20 + strlen(m.json) + 1, -1);
    receive(reply, sizeof reply, 20);
}

static void do_read(uint32_t region, uint64_t offset)
{
    struct access m = { .h = { .id = 2, .command = 9 }, .offset = offset, .region = region, .count = 4 };
    send_message(&m, 32, -1);
    receive(&m, sizeof m, 36);
}

static void post_write(uint32_t region, uint64_t offset, uint32_t value)
{
    struct access m = { .h = { .id = 3, .command = 10, .flags = 0x10 }, .offset = offset, .region = region,
                        .count = 4 };
    memcpy(m.data, &value, 4);
    send_message(&m, 36, -1);
}

static void map(uint64_t address, int fd, uint64_t offset)
{
    struct map m = { .h = { .id = 4, .command = 2 }, .argsz = 32, .flags = 3, .offset = offset,
                     .address = address, .size = 4096 };
    send_message(&m, sizeof m, fd);
    receive(&m, sizeof m, 16);
}

static void unmap(uint64_t address)
{
    struct unmap m = { .h = { .id = 5, .command = 3 }, .argsz = 24, .address = address, .size = 4096 };
    send_message(&m, sizeof m, -1);
    receive(&m, sizeof m, 40);
}

static void ping_pong(long repeat, long count)
{
    int pair[2];
    char buf[32] = { 0 };

    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) < 0)
        err(1, "socketpair");
    pid_t child = fork();
    if (child < 0)
        err(1, "fork");
    if (child == 0) {
        close(pair[0]);
        while (read(pair[1], buf, sizeof buf) == (ssize_t)sizeof buf)
            if (write(pair[1], buf, sizeof buf) < 0)
                break;
        _exit(0);
    }
    close(pair[1]);
    for (long r = 0; r < repeat; r++) {
        double start = now();
        for (long i = 0; i < count; i++)
            if (write(pair[0], buf, sizeof buf) < 0 || read(pair[0], buf, sizeof buf) <= 0)
                err(1, "ping-pong");
        printf("%.1f\n", (now() - start) / (double)count);
    }
    close(pair[0]);
    waitpid(child, NULL, 0);
}

static void copy_pages(long repeat, long count)
{
    enum { PAGES = 256, STRIDE = 8192 };
    uint8_t *from = mmap(NULL, PAGES * STRIDE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    uint8_t *to = malloc(PAGES * 4096);
    if (from == MAP_FAILED || !to)
        err(1, "memory");
    memset(from, 1, PAGES * STRIDE);
    memset(to, 2, PAGES * 4096);
    for (long r = 0; r < repeat; r++) {
        double start = now();
        for (long i = 0; i < count; i++)
            for (int page = 0; page < PAGES; page++) {
                memcpy(to + page * 4096, from + (page * 167 % PAGES) * STRIDE, 4096);
                __asm__ volatile("" ::: "memory");
            }
        printf("%.1f\n", (now() - start) / (double)count);
    }
    free(to);
}

int main(int argc, char **argv)
{
    if (argc < 4)
        errx(2, "see the top of peer.c");
    long repeat = atol(argv[2]), count = atol(argv[3]);
    if (!strcmp(argv[1], "pp")) {
        ping_pong(repeat, count);
        return 0;
    }
    if (!strcmp(argv[1], "memcpy")) {
        copy_pages(repeat, count);
        return 0;
    }
    if (argc < 7)
        errx(2, "see the top of peer.c");
    const char *what = argv[4];
    negotiate(argv[1]);
    if (!strcmp(what, "map")) {
        long live = atol(argv[5]);
        int fd = -1;
        if (!strcmp(argv[6], "fd")) {
            fd = memfd_create("bench", MFD_CLOEXEC);
            if (fd < 0 || ftruncate(fd, (live + 1) * 4096) < 0)
                err(1, "memfd");
        }
        /* Every second page: neighbours must not look like one range. */
        for (long i = 0; i < live; i++)
            map((uint64_t)i * 8192, fd, fd < 0 ? 0 : (uint64_t)i * 4096);
        for (long r = 0; r < repeat; r++) {
            double start = now();
            for (long i = 0; i < count; i++) {
                uint64_t at = live ? (uint64_t)(i * 7919 % live) * 8192 + 4096 : 4096;
                map(at, fd, fd < 0 ? 0 : (uint64_t)live * 4096);
                unmap(at);
            }
            printf("%.1f\n", (now() - start) / (double)count);
        }
        return 0;
    }
    uint32_t region = (uint32_t)strtoul(argv[5], NULL, 0);
    uint64_t offset = strtoull(argv[6], NULL, 0);
    for (long r = 0; r < repeat; r++) {
        double start = now();
        if (!strcmp(what, "read")) {
            for (long i = 0; i < count; i++)
                do_read(region, offset);
        } else if (!strcmp(what, "write")) {
            for (long i = 0; i < count; i++) {
                post_write(region, offset, (uint32_t)i);
                if (i % 128 == 127)
                    do_read(7, 0); /* bounds the queue, and waits for what was posted */
            }
            do_read(7, 0);
        } else {
            errx(2, "what is %s?", what);
        }
        printf("%.1f\n", (now() - start) / (double)count);
    }
    return 0;
}

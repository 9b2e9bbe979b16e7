/* SPDX-License-Identifier: MIT
 * A connection whose bytes and fds are the input's, on a socketpair: framing, accesses to regions of all kinds,
 * DMA_MAP and DMA_UNMAP.
 *
 * Every reply is whole, error replies are headers only, and no fd and no mapping of a file is left. */
#include "fuzz.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#define XFER 4096u

static vms_files *files;
static int memfd = -1, small_fd = -1, event_fd = -1;

static void create(void)
{
    CHECK(vms_files_create(&files) == 0);
    memfd = memfd_create("ram", 0);
    small_fd = memfd_create("small", 0);
    event_fd = eventfd(0, EFD_NONBLOCK);
    CHECK(memfd >= 0 && small_fd >= 0 && event_fd >= 0 && ftruncate(memfd, 0x10000) == 0 &&
          ftruncate(small_fd, 0x1800) == 0);
}

static vms_func *regions(uint8_t choice)
{
    static uint8_t all[256], none[256], sizes[256], exits[256];
    uint8_t *backing;
    vms_func *func;

    memset(all, 0xFF, sizeof all);
    memset(sizes, choice & 1 ? 0x3F : VMS_SIZE_4, sizeof sizes);
    for (unsigned i = 0; i < 256; i++)
        exits[i] = (uint8_t)(i >> 6);
    CHECK(vms_func_create(&func) == 0);
    CHECK(vms_region_define(func, 0, 0x3000, 0xFF, 1) == 0);
    CHECK(vms_area_bank(func, 0, 0, 256, &backing) == 0 && vms_area_hook(func, 0, 0x100, 0x40) == 0);
    CHECK(vms_area_ram(func, 0, 0x2000, 0x1000, 0, &backing) == 0);
    vms_policy policy = { all, none, none, choice & 2 ? all : none, exits, sizes };
    CHECK(vms_bank_policy(func, 0, 0, 256, &policy) == 0);
    CHECK(vms_region_define(func, 6, 0x1000, 0, 0) == 0); /* ROM */
    CHECK(vms_region_define(func, 7, 256, 0, 1) == 0 && vms_area_bank(func, 7, 0, 256, &backing) == 0);
    vms_policy config = { none, all, all, none, none, sizes };
    CHECK(vms_bank_policy(func, 7, 0, 256, &config) == 0);
    if (choice & 4)
        CHECK(vms_region_enable(func, 0, 0) == 0);
    if (choice & 8)
        CHECK(vms_region_tap(func, 0, VMS_EXIT_ON_READ | VMS_EXIT_ON_WRITE) == 0);
    return func;
}

static size_t put(uint8_t *to, const void *bytes, size_t n)
{
    memcpy(to, bytes, n);
    return n;
}

/* Sends the input's messages. */
static void send_messages(input *in, int sock)
{
    static const uint16_t commands[8] = { 9, 10, 15, 2, 3, 1, 8, 0 };
    static const uint32_t places[8] = { 0, 0x3C, 0x40, 0xFC, 0x100, 0x2FF8, 0x3000, 0x13F };

    for (int n = 0; n < 24 && in->left; n++) {
        uint8_t message[512], shape = take8(in), how = take8(in);
        size_t len = 16;
        uint16_t id = (uint16_t)n, command = commands[shape & 7];
        uint32_t flags = how & 1 ? 0x10 : 0, error = 0;
        if (how & 2)
            flags = take32(in);
        if (shape & 8) { /* a body of anything */
            len += take_bytes(in, message + 16, take8(in));
        } else if (command == 9 || command == 10) {
            uint64_t offset = places[how >> 2 & 7] + (how & 32 ? take8(in) : 0);
            uint32_t region = how & 64 ? take8(in) % 10 : 0, count = how & 128 ? take16(in) : 1u << (take8(in) & 3);
            len += put(message + len, &offset, 8) + put(message + len + 8, &region, 4) +
                   put(message + len + 12, &count, 4);
            if (command == 10) {
                size_t data = count < 64 ? count : 64;
                take_bytes(in, message + len, data);
                len += data;
            }
        } else if (command == 15) {
            uint64_t k = how >> 2 & 7, entries = k;
            if (how & 64) /* 24 times that wraps to what fits, or nearly */
                entries += (uint64_t)take8(in) << 58;
            len += put(message + len, &entries, 8);
            for (; k; k--) {
                uint64_t offset = places[take8(in) & 7];
                uint32_t region = how & 32 ? take8(in) : 0, count = how & 128 ? take8(in) : 4;
                len += put(message + len, &offset, 8);
                len += put(message + len, &region, 4);
                len += put(message + len, &count, 4);
                len += put(message + len, &entries, 8);
            }
        } else if (command == 2 || command == 3) {
            uint32_t argsz = how & 64 ? take8(in) : command == 2 ? 32 : 24, what = how & 128 ? take8(in) : command == 2 ? 3 : 0;
            uint64_t offset = how & 32 ? take_address(in) : 0, address = take_address(in), size = take_address(in);
            len += put(message + len, &argsz, 4);
            len += put(message + len, &what, 4);
            if (command == 2)
                len += put(message + len, &offset, 8);
            len += put(message + len, &address, 8);
            len += put(message + len, &size, 8);
        }
        uint32_t size = shape & 16 ? take16(in) : (uint32_t)len;
        put(message, &id, 2);
        put(message + 2, &command, 2);
        put(message + 4, &size, 4);
        put(message + 8, &flags, 4);
        put(message + 12, &error, 4);
        if (shape & 32)
            len = len * take8(in) / 256;
        if (!len)
            continue;
        int fds[4] = { shape & 128 ? small_fd : memfd, event_fd, memfd, memfd }, n_fds = shape & 64 ? 1 + (how & 3) : 0;
        union {
            char bytes[CMSG_SPACE(sizeof fds)];
            struct cmsghdr align;
        } control;
        struct iovec iov = { message, len };
        struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1 };
        if (n_fds) {
            memset(&control, 0, sizeof control);
            msg.msg_control = control.bytes;
            msg.msg_controllen = CMSG_SPACE((size_t)n_fds * sizeof(int));
            struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
            c->cmsg_level = SOL_SOCKET;
            c->cmsg_type = SCM_RIGHTS;
            c->cmsg_len = CMSG_LEN((size_t)n_fds * sizeof(int));
            memcpy(CMSG_DATA(c), fds, (size_t)n_fds * sizeof(int));
        }
        CHECK(sendmsg(sock, &msg, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)len);
    }
}

/* Serves until the connection is over, as Python does; 0: in good order. */
static int serve(vms_chan *chan)
{
    vms_run *run = vms_chan_run(chan);

    for (int turns = 0;; turns++) {
        CHECK(turns < 4096);
        CHECK(vms_enter(chan, 0) == (int)run->reason);
        switch (run->reason) {
        case VMS_EXIT_READ:
            CHECK(run->count && run->count <= XFER);
            if (run->count > 8)
                memset(run->data, 0x5A, run->count);
            run->value = 0x5A5A5A5A;
            run->error = turns & 4 ? EIO : 0;
            break;
        case VMS_EXIT_WRITE:
            CHECK(run->count && run->len == run->count && run->data);
            break;
        case VMS_EXIT_POSTED:
            CHECK(run->n_accesses && run->n_accesses <= VMS_BATCH);
            for (size_t i = 0; i < run->n_accesses; i++)
                CHECK(run->accesses[i].count && run->accesses[i].count <= 8 && run->accesses[i].region < VMS_REGIONS);
            break;
        case VMS_EXIT_COMMAND:
            for (size_t i = 0; i < run->n_fds; i++)
                close(run->fds[i]);
            if (!run->posted) {
                int with_fd = run->command == 1 && run->len > 2;
                CHECK(vms_reply(chan, run->id, run->command, run->len & 1 ? EINVAL : 0, run->data, run->len & 1 ? 0 : run->len,
                                &event_fd, with_fd && !(run->len & 1)) == 0);
            }
            break;
        case VMS_EXIT_REPLY:
            break;
        case VMS_EXIT_CLOSED:
            return run->error;
        default:
            CHECK(run->reason == VMS_EXIT_TIMEOUT || run->reason == VMS_EXIT_WAKE);
        }
    }
}

/* Reads what was answered; every message is whole. */
static void check_replies(int sock)
{
    static uint8_t bytes[1 << 20];
    size_t have = 0;
    ssize_t n;

    for (;;) {
        union {
            char bytes[CMSG_SPACE(16 * sizeof(int))];
            struct cmsghdr align;
        } control;
        struct iovec iov = { bytes + have, sizeof bytes - have };
        struct msghdr msg = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.bytes,
                              .msg_controllen = sizeof control.bytes };
        n = recvmsg(sock, &msg, MSG_DONTWAIT);
        if (n <= 0)
            break;
        have += (size_t)n;
        for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c))
            for (size_t at = CMSG_LEN(0); at < c->cmsg_len; at += sizeof(int))
                close(*(int *)((uint8_t *)c + at));
    }
    if (n < 0 && errno == ECONNRESET) /* messages of ours were left unread: answers may be cut off, too */
        return;
    for (size_t at = 0; at < have;) {
        uint32_t size, flags;
        CHECK(have - at >= 16);
        memcpy(&size, bytes + at + 4, 4);
        memcpy(&flags, bytes + at + 8, 4);
        CHECK(size >= 16 && size <= have - at && (flags & 15) == 1);
        CHECK(!(flags & 0x20) || size == 16);
        at += size;
    }
}

static int lowest_free_fd(void)
{
    int fd = dup(event_fd);
    CHECK(fd >= 0 && close(fd) == 0);
    return fd;
}

/* None is open of those that an input may have opened: each took the lowest that was free. */
static void check_fds(int first)
{
    for (int fd = first; fd < first + 64; fd++)
        CHECK(fcntl(fd, F_GETFD) < 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input in = { data, size };
    vms_memory *memory;
    vms_chan *chan;
    int pair[2], twins[2] = { -1, -1 };

    if (!files)
        create();
    int free_fd = lowest_free_fd();
    uint8_t choice = take8(&in);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, pair) == 0);
    if (choice & 0x40)
        CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, twins) == 0);
    CHECK(vms_memory_create(files, 8, &memory) == 0);
    vms_func *func = regions(choice);
    CHECK(vms_chan_create(func, memory, pair[0], XFER, 2, 1000, &chan) == 0);
    if (!(choice & 0x80))
        CHECK(vms_chan_open(chan, XFER, twins[0]) == 0);
    else if (twins[0] >= 0)
        close(twins[0]);
    if (twins[1] >= 0) {
        size_t n = take8(&in) & 31;
        uint8_t some[32];
        take_bytes(&in, some, n);
        if (n)
            CHECK(send(twins[1], some, n, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)n || choice & 0x80);
    }
    send_messages(&in, pair[1]);
    shutdown(pair[1], SHUT_WR);
    serve(chan);
    vms_chan_destroy(chan);
    check_replies(pair[1]);
    close(pair[1]);
    if (twins[1] >= 0)
        close(twins[1]);
    vms_func_destroy(func);
    vms_memory_destroy(memory);
    CHECK(vms_files_mapped(files) == 0);
    check_fds(free_fd);
    return 0;
}

/* SPDX-License-Identifier: MIT
 * Runs in the guest: tests a PCI-IDIO-16 whose outputs are wired to its inputs (wired.py), by the kernel's GPIO API.
 * For each of some patterns it sets all outputs, waits for an edge, and compares the inputs.
 *
 *   gpio_check      exit status 65: no error was reported, but inputs are wrong; 1: an error, or no edge in 2 s */
#include <errno.h>
#include <fcntl.h>
#include <linux/gpio.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static int chip = -1;

static void fail(const char *what)
{
    printf("gpio_check: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int lines(uint32_t first, uint64_t flags)
{
    struct gpio_v2_line_request request = { .num_lines = 16, .config = { .flags = flags }, .consumer = "check" };
    for (uint32_t i = 0; i < 16; i++)
        request.offsets[i] = first + i;
    if (ioctl(chip, GPIO_V2_GET_LINE_IOCTL, &request) < 0)
        fail("GPIO_V2_GET_LINE");
    return request.fd;
}

int main(void)
{
    static const uint16_t patterns[] = { 0xA5C3, 0x5A3C, 0xFFFF, 0x0001, 0x8000, 0x1234, 0xEDCB, 0x0000 };
    struct gpio_v2_line_event event[64];
    int wrong = 0;

    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int n = 0; n < 16; n++) {
        char path[32];
        struct gpiochip_info info;
        snprintf(path, sizeof path, "/dev/gpiochip%d", n);
        int fd = open(path, O_RDWR);
        if (fd >= 0 && ioctl(fd, GPIO_GET_CHIPINFO_IOCTL, &info) == 0 && info.lines == 32)
            chip = fd;
    }
    if (chip < 0) {
        errno = ENODEV;
        fail("no chip with 32 lines");
    }
    int outputs = lines(0, GPIO_V2_LINE_FLAG_OUTPUT);
    int inputs = lines(16, GPIO_V2_LINE_FLAG_INPUT | GPIO_V2_LINE_FLAG_EDGE_RISING | GPIO_V2_LINE_FLAG_EDGE_FALLING);
    struct pollfd edge = { .fd = inputs, .events = POLLIN };

    for (unsigned n = 0; n < sizeof patterns / sizeof *patterns; n++) {
        struct gpio_v2_line_values values = { .bits = patterns[n], .mask = 0xFFFF };
        if (ioctl(outputs, GPIO_V2_LINE_SET_VALUES_IOCTL, &values) < 0)
            fail("GPIO_V2_LINE_SET_VALUES");
        errno = ETIME;
        if (poll(&edge, 1, 2000) != 1)
            fail("no edge in 2 s");
        while (poll(&edge, 1, 0) == 1)
            if (read(inputs, event, sizeof event) < (long)sizeof *event)
                fail("an event");
        values.mask = 0xFFFF;
        if (ioctl(inputs, GPIO_V2_LINE_GET_VALUES_IOCTL, &values) < 0)
            fail("GPIO_V2_LINE_GET_VALUES");
        if (values.bits != patterns[n]) {
            printf("gpio_check: outputs %04x, inputs %04llx\n", patterns[n], (unsigned long long)values.bits);
            wrong = 1;
        }
    }
    return wrong ? 65 : 0;
}

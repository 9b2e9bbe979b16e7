/* SPDX-License-Identifier: MIT
 * Runs inside the guest: drives the PCI-IDIO-16 through the kernel's GPIO interface.
 * Sets the outputs to 0xA5C3, says so, then reports the input line whose edge it sees, and all inputs. */
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
    printf("idio16_check: %s: %s\n", what, strerror(errno));
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
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int n = 0; n < 16; n++) {
        char path[32];
        struct gpiochip_info info;
        snprintf(path, sizeof path, "/dev/gpiochip%d", n);
        int fd = open(path, O_RDWR);
        if (fd >= 0 && ioctl(fd, GPIO_GET_CHIPINFO_IOCTL, &info) == 0 && info.lines == 32)
            chip = fd;
    }
    if (chip < 0)
        fail("no chip with 32 lines");

    struct gpio_v2_line_values values = { .bits = 0xA5C3, .mask = 0xFFFF };
    int outputs = lines(0, GPIO_V2_LINE_FLAG_OUTPUT);
    if (ioctl(outputs, GPIO_V2_LINE_SET_VALUES_IOCTL, &values) < 0)
        fail("GPIO_V2_LINE_SET_VALUES");
    int inputs = lines(16, GPIO_V2_LINE_FLAG_INPUT | GPIO_V2_LINE_FLAG_EDGE_RISING | GPIO_V2_LINE_FLAG_EDGE_FALLING);
    printf("outputs set\n");

    struct pollfd p = { .fd = inputs, .events = POLLIN };
    if (poll(&p, 1, 20000) != 1)
        fail("no edge in 20 s");
    struct gpio_v2_line_event event;
    if (read(inputs, &event, sizeof event) != sizeof event)
        fail("event");
    values.mask = 0xFFFF;
    if (ioctl(inputs, GPIO_V2_LINE_GET_VALUES_IOCTL, &values) < 0)
        fail("GPIO_V2_LINE_GET_VALUES");
    printf("inputs %04llx\n", (unsigned long long)values.bits);
    return 0;
}

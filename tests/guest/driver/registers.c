// SPDX-License-Identifier: GPL-2.0
#include <linux/io.h>
#include <linux/iopoll.h>

#include "registers.h"

#define FACTORIAL 0x08
#define STATUS 0x20
#define COMPUTING 0x01

u32 factorial(void __iomem *registers, u32 number)
{
	u32 status;

	writel(number, registers + FACTORIAL);
	if (readl_poll_timeout(registers + STATUS, status, !(status & COMPUTING), 1000, 1000000))
		return 0;
	return readl(registers + FACTORIAL);
}

// SPDX-License-Identifier: GPL-2.0
/* Transfers between memory and the device. */
#include <linux/io.h>
#include <linux/iopoll.h>

#include "edudma.h"

void edu_start(struct edu *edu, dma_addr_t at, size_t bytes, u32 to_ram)
{
	writeq(to_ram ? EDU_BUFFER : at, edu->regs + EDU_DMA_SRC);
	writeq(to_ram ? at : EDU_BUFFER, edu->regs + EDU_DMA_DST);
	writeq(bytes, edu->regs + EDU_DMA_COUNT);
	writel(EDU_DMA_RUN | to_ram, edu->regs + EDU_DMA_CMD);
}

int edu_wait(struct edu *edu)
{
	u32 command;

	return readl_poll_timeout(edu->regs + EDU_DMA_CMD, command, !(command & EDU_DMA_RUN), 1000, 10 * USEC_PER_SEC);
}

int edu_read(struct edu *edu, dma_addr_t at, size_t bytes)
{
	edu_start(edu, at, bytes, 0);
	return edu_wait(edu);
}

int edu_write(struct edu *edu, dma_addr_t at, size_t bytes)
{
	edu_start(edu, at, bytes, EDU_DMA_TO_RAM);
	return edu_wait(edu);
}

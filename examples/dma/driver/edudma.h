/* SPDX-License-Identifier: GPL-2.0 */
#ifndef EDUDMA_H
#define EDUDMA_H

#include <linux/bits.h>
#include <linux/dma-mapping.h>
#include <linux/sizes.h>
#include <linux/types.h>

#define EDU_ID 0x00
#define EDU_ID_VALUE 0x010000ed
#define EDU_DMA_SRC 0x80
#define EDU_DMA_DST 0x88
#define EDU_DMA_COUNT 0x90
#define EDU_DMA_CMD 0x98
#define EDU_DMA_RUN BIT(0)
#define EDU_DMA_TO_RAM BIT(1)

/* The device's own memory, which DMA moves data to and from: its address there. */
#define EDU_BUFFER 0x40000
#define EDU_BUFFER_SIZE SZ_4K
#define EDU_DMA_BITS 28

struct edu_buffer {
	void *data; /* NULL: it has been freed, or is somebody else's now */
	size_t bytes;
	enum dma_data_direction direction;
	dma_addr_t at;
	bool mapped;
};

struct edu {
	struct device *dev;
	void __iomem *regs;
	const struct edu_bug *bug;
	struct edu_buffer late; /* of in_flight */
};

struct edu_bug {
	const char *name;
	size_t bytes; /* of the buffer that `use` gets, mapped; what it leaves of it is unmapped and freed afterwards */
	enum dma_data_direction direction;
	int (*use)(struct edu *edu, struct edu_buffer *buffer);
	void (*remove)(struct edu *edu);
};

/* device.c: a transfer of up to 4 KiB.  The device does not say whether the IOMMU has refused it. */
void edu_start(struct edu *edu, dma_addr_t at, size_t bytes, u32 to_ram);
int edu_wait(struct edu *edu);
int edu_read(struct edu *edu, dma_addr_t at, size_t bytes);
int edu_write(struct edu *edu, dma_addr_t at, size_t bytes);

/* buffer.c: whole pages, with zeros.  `buffer_end` unmaps and frees what still is. */
int buffer_make(struct edu_buffer *buffer, size_t bytes, enum dma_data_direction direction);
int buffer_map(struct edu *edu, struct edu_buffer *buffer);
void buffer_unmap(struct edu *edu, struct edu_buffer *buffer);
void buffer_end(struct edu *edu, struct edu_buffer *buffer);

/* bugs.c */
const struct edu_bug *edu_find_bug(const char *name);
int edu_bug_happens(struct edu *edu);

#endif

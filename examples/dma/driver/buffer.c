// SPDX-License-Identifier: GPL-2.0
/* Buffers of whole pages. */
#include <linux/gfp.h>
#include <linux/mm.h>

#include "edudma.h"

int buffer_make(struct edu_buffer *buffer, size_t bytes, enum dma_data_direction direction)
{
	buffer->data = alloc_pages_exact(bytes, GFP_KERNEL | __GFP_ZERO);
	if (!buffer->data)
		return -ENOMEM;
	buffer->bytes = bytes;
	buffer->direction = direction;
	buffer->mapped = false;
	return 0;
}

int buffer_map(struct edu *edu, struct edu_buffer *buffer)
{
	buffer->at = dma_map_single(edu->dev, buffer->data, buffer->bytes, buffer->direction);
	if (dma_mapping_error(edu->dev, buffer->at))
		return -ENOMEM;
	buffer->mapped = true;
	return 0;
}

void buffer_unmap(struct edu *edu, struct edu_buffer *buffer)
{
	if (buffer->mapped)
		dma_unmap_single(edu->dev, buffer->at, buffer->bytes, buffer->direction);
	buffer->mapped = false;
}

void buffer_end(struct edu *edu, struct edu_buffer *buffer)
{
	if (!buffer->data)
		return;
	buffer_unmap(edu, buffer);
	free_pages_exact(buffer->data, buffer->bytes);
	buffer->data = NULL;
}

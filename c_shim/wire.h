/* SPDX-License-Identifier: MIT
 * The messages that the shim itself reads and writes; section names are those of the specification. */
#ifndef VMS_WIRE_H
#define VMS_WIRE_H

#include <stdint.h>

enum {
    CMD_VERSION = 1,
    CMD_DMA_MAP = 2,
    CMD_DMA_UNMAP = 3,
    CMD_SET_IRQS = 8,
    CMD_REGION_READ = 9,
    CMD_REGION_WRITE = 10,
    CMD_WRITE_MULTI = 15,
};

#define TYPE_MASK 0xFu
#define TYPE_COMMAND 0u
#define TYPE_REPLY 1u
#define FLAG_NO_REPLY 0x10u
#define FLAG_ERROR 0x20u
#define UNMAP_FLAG_ALL 2u /* as VFIO_DMA_UNMAP_FLAG_ALL; the vfio-user text leaves flags unused */

typedef struct header {
    uint16_t id, command;
    uint32_t size, flags, error;
} header;

typedef struct access_head {
    uint64_t offset;
    uint32_t region, count;
} access_head;

typedef struct dma_map_body {
    uint32_t argsz, flags;
    uint64_t offset, address, size;
} dma_map_body;

typedef struct dma_unmap_body {
    uint32_t argsz, flags;
    uint64_t address, size;
} dma_unmap_body;

typedef struct multi_entry {
    uint64_t offset;
    uint32_t region, count;
    uint8_t data[8];
} multi_entry;

_Static_assert(sizeof(header) == 16 && sizeof(access_head) == 16 && sizeof(dma_map_body) == 32 &&
                   sizeof(dma_unmap_body) == 24 && sizeof(multi_entry) == 24,
               "wire layout");

#endif

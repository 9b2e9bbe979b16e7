/* Registers of Memcard; written by `vmodel regs --format c`. */
#ifndef MEMCARD_REGS_H
#define MEMCARD_REGS_H

/* Registers of the card. */
#define MEMCARD_BAR 0
#define MEMCARD_SIZE 0x40u

#define MEMCARD_ID 0x0u /* which card this is, and which version */
#define MEMCARD_ID_RESET 0x4d430001u

#define MEMCARD_CONTROL 0x4u
#define MEMCARD_CONTROL_RESET 0x0u
#define MEMCARD_CONTROL_ENABLE 0x1u /* take commands */
#define MEMCARD_CONTROL_RESTART 0x2u /* end all commands, start again with the first entry of the ring; reads as 0 */

#define MEMCARD_STATUS 0x8u
#define MEMCARD_STATUS_RESET 0x0u
#define MEMCARD_STATUS_READY 0x1u /* the card takes commands */
#define MEMCARD_STATUS_BUSY 0x2u /* a command or a reset is being worked on */

#define MEMCARD_BLOCKS 0xcu /* the number of blocks, of 4 KiB each */
#define MEMCARD_BLOCKS_RESET 0x10u

#define MEMCARD_RING 0x10u /* bus address of 16 completions, of 16 bytes each; its upper half counts for nothing */
#define MEMCARD_RING_RESET 0x0ull

#define MEMCARD_DATA 0x18u /* bus address of the block's data */
#define MEMCARD_DATA_RESET 0x0ull

#define MEMCARD_BLOCK 0x20u
#define MEMCARD_BLOCK_RESET 0x0u

#define MEMCARD_TAG 0x24u /* for the completion, which has it in 8 bits */
#define MEMCARD_TAG_RESET 0x0u

#define MEMCARD_DOORBELL 0x28u /* starts a command: 1 reads a block, 2 writes it */
#define MEMCARD_DOORBELL_RESET 0x0u

#define MEMCARD_PAGE_LINES 0x2cu /* bits of DATA that the card has, above the lower 12 */
#define MEMCARD_PAGE_LINES_RESET 0x1cu

#endif

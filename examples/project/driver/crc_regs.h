/* Registers of Crc; written by `vmodel regs --format c`. */
#ifndef CRC_REGS_H
#define CRC_REGS_H

/* Registers of the card. */
#define CRC_BAR 0
#define CRC_SIZE 0x18u

#define CRC_ID 0x0u /* Which card this is, and which version. */
#define CRC_ID_RESET 0xc3c32001u

#define CRC_LENGTH 0x4u /* In bytes, up to 1 MiB; writing it starts the work. */
#define CRC_LENGTH_RESET 0x0u

#define CRC_SOURCE 0x8u /* Bus address. */
#define CRC_SOURCE_RESET 0x0ull

#define CRC_STATUS 0x10u /* The result of the last command. */
#define CRC_STATUS_RESET 0x0u
#define CRC_STATUS_DONE 0x1u /* the command has ended */
#define CRC_STATUS_ERROR 0x2u /* memory could not be read, or LENGTH was wrong */

#define CRC_RESULT 0x14u /* The CRC-32. */
#define CRC_RESULT_RESET 0x0u

#endif

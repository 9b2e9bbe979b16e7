/* SPDX-License-Identifier: GPL-2.0 */
/* The registers of the card, in BAR0: those of crc.rdl. */
#ifndef CRC_REGS_H
#define CRC_REGS_H

#define CRC_ID 0x00
#define CRC_ID_RESET 0xc3c32001
#define CRC_LENGTH 0x04
#define CRC_SOURCE 0x08
#define CRC_STATUS 0x10
#define CRC_STATUS_DONE 0x1
#define CRC_STATUS_ERROR 0x2
#define CRC_RESULT 0x14

#endif

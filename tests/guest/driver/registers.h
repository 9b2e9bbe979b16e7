/* SPDX-License-Identifier: GPL-2.0 */
#include <linux/types.h>

u32 factorial(void __iomem *registers, u32 number);

/* SPDX-License-Identifier: MIT */
/* Sections with names and alignments that no compiler chooses. */
#include <linux/linkage.h>
#include <linux/cfi_types.h>

	.section .mine.text, "ax"
	.balign 64
SYM_TYPED_FUNC_START(placed_more)
	RET
SYM_FUNC_END(placed_more)

	/* For init, as its name begins with .init, and behind .init.text. */
	.section .init.more, "ax"
	.balign 128
SYM_TYPED_FUNC_START(placed_early)
	RET
SYM_FUNC_END(placed_early)

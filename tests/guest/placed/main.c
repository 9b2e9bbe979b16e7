// SPDX-License-Identifier: MIT
/* A module with many sections of code: tests/guest/test_module_layout.py compares where the kernel puts them. */
#include <linux/module.h>
#include <asm/alternative.h>
#include <asm/cpufeatures.h>

void placed_more(void);
void placed_early(void);

static noinline __cold void placed_unlikely(void)
{
	pr_info("placed: cold\n");
}

static noinline noinstr int placed_without_tracing(int value)
{
	return value + 3;
}

static int __init placed_init(void)
{
	/* Its replacement is in .altinstr_replacement, which is executable, too. */
	asm volatile(ALTERNATIVE("nop; nop; nop", "xor %%ecx, %%ecx", X86_FEATURE_ALWAYS) : : : "ecx");
	placed_more();
	placed_early();
	if (placed_without_tracing(1) == 5)
		placed_unlikely();
	return 0;
}

static void __exit placed_exit(void)
{
	placed_unlikely();
}

module_init(placed_init);
module_exit(placed_exit);
MODULE_DESCRIPTION("A module with many sections of code");
MODULE_LICENSE("Dual MIT/GPL");

// SPDX-License-Identifier: GPL-2.0
/* Fails on purpose, as its parameter says, in functions and lines that a test looks for in the log. */
#include <linux/module.h>

static noinline int broken_read(const int *where)
{
	return READ_ONCE(*where) | 1; /* the oops */
}

static noinline int broken_check(const char *how)
{
	if (sysfs_streq(how, "warn"))
		WARN(1, "on purpose"); /* the warning */
	if (sysfs_streq(how, "oops"))
		return broken_read((void *)16) + 1; /* the call */
	return 0;
}

static int broken_set(const char *how, const struct kernel_param *param)
{
	return broken_check(how);
}

static const struct kernel_param_ops broken_ops = { .set = broken_set };
module_param_cb(how, &broken_ops, NULL, 0200);

static int __init broken_init(void)
{
	return 0;
}

static void __exit broken_exit(void)
{
}

module_init(broken_init);
module_exit(broken_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("test of places in the source");

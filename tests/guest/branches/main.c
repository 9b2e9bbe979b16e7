// SPDX-License-Identifier: GPL-2.0
/* A module whose branches are known one by one: /dev/branches takes one of them by each ioctl. */
#include <linux/init.h>
#include <linux/miscdevice.h>
#include <linux/module.h>

asmlinkage int branches_path(int which);
asmlinkage int branches_loop(int times);
asmlinkage int branches_patched(void);
asmlinkage int branches_never(void);

/* What is cold has a section of its own. */
static noinline __cold int branches_error(int code)
{
	pr_info("an error %d\n", code);
	return -code;
}

static noinline int branches_cold(int code)
{
	if (unlikely(code > 2)) {
		pr_info("code %d is unlikely\n", code);
		return branches_error(code);
	}
	return code + 1;
}

static long branches_ioctl(struct file *file, unsigned int which, unsigned long value)
{
	switch (which) {
	case 0x701:
		return branches_path(value);
	case 0x702:
		return branches_loop(value);
	case 0x703:
		return branches_patched();
	case 0x704:
		return branches_cold(value);
	case 0x705:
		return branches_never();
	default:
		return -ENOTTY;
	}
}

static const struct file_operations branches_operations = {
	.owner = THIS_MODULE,
	.unlocked_ioctl = branches_ioctl,
};

static struct miscdevice branches_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "branches",
	.fops = &branches_operations,
};

/* Runs before the module's init function if the parameter is given when it is loaded. */
static noinline int branches_set(const char *text, const struct kernel_param *parameter)
{
	return branches_loop(1) == 1 ? 0 : -EINVAL;
}

static const struct kernel_param_ops branches_parameter = { .set = branches_set };
module_param_cb(early, &branches_parameter, NULL, 0200);

static int __init branches_init(void)
{
	return misc_register(&branches_device);
}
module_init(branches_init);

static void __exit branches_exit(void)
{
	misc_deregister(&branches_device);
}
module_exit(branches_exit);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Branches that are known one by one");

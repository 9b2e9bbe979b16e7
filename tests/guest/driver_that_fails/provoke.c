// SPDX-License-Identifier: GPL-2.0
/* Makes the kernel fail in the way that the parameter `how` names, when it is loaded. */
#include <linux/completion.h>
#include <linux/delay.h>
#include <linux/irqflags.h>
#include <linux/kthread.h>
#include <linux/module.h>
#include <linux/notifier.h>
#include <linux/reboot.h>
#include <linux/sched.h>
#include <linux/smp.h>
#include <linux/string.h>

static char *how = "";
module_param(how, charp, 0444);

static DECLARE_COMPLETION(never);

static int panic_at_off(struct notifier_block *block, unsigned long event, void *data)
{
	panic("provoked at power-off");
	return NOTIFY_OK;
}

static struct notifier_block at_off = { .notifier_call = panic_at_off };

static int provoke_oops(void *data)
{
	*(volatile int *)NULL = 1;
	return 0;
}

/* Interrupts of this CPU are off for good: it answers nobody. */
static int provoke_spin(void *data)
{
	msleep(500); /* until modprobe is done: it must not wait for a CPU that spins, on one that does not spin yet */
	local_irq_disable();
	for (;;)
		cpu_relax();
	return 0;
}

/* All CPUs spin.  All threads are there before the first runs, and this CPU's comes last. */
static int spin(void)
{
	static struct task_struct *threads[NR_CPUS];
	unsigned int cpu, here = raw_smp_processor_id();

	for_each_online_cpu(cpu) {
		threads[cpu] = kthread_create_on_cpu(provoke_spin, NULL, cpu, "provoke-spin/%u");
		if (IS_ERR(threads[cpu]))
			return PTR_ERR(threads[cpu]);
	}
	for_each_online_cpu(cpu)
		if (cpu != here)
			wake_up_process(threads[cpu]);
	wake_up_process(threads[here]);
	return 0;
}

static int provoke_block(void *data)
{
	wait_for_completion(&never);
	return 0;
}

static int __init provoke_init(void)
{
	if (!strcmp(how, "warn"))
		WARN(1, "provoked\n");
	else if (!strcmp(how, "oops-in-init"))
		provoke_oops(NULL);
	else if (!strcmp(how, "oops"))
		kthread_run(provoke_oops, NULL, "provoke-oops");
	else if (!strcmp(how, "panic-at-off"))
		register_reboot_notifier(&at_off);
	else if (!strcmp(how, "spin"))
		return spin();
	else if (!strcmp(how, "block"))
		kthread_run(provoke_block, NULL, "provoke-block");
	else
		return -EINVAL;
	return 0;
}

module_init(provoke_init);
MODULE_DESCRIPTION("makes the kernel fail");
MODULE_LICENSE("GPL");

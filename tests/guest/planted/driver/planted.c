// SPDX-License-Identifier: GPL-2.0
/* A module with one bug of each kind that a stock kernel finds with the arguments of vmodel's `sanitize`: the name that
 * is written to /sys/kernel/planted/bug says which one happens.  Each has a cache of its own, so that none finds what
 * another has damaged. */
#include <linux/delay.h>
#include <linux/kfence.h>
#include <linux/kobject.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/preempt.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/sysfs.h>

#define SIZE 200

struct chained {
	struct chained *next;
	u32 value;
};

static struct kmem_cache *cache;
static struct chained here = { NULL, 5 };

/* An object that KFENCE does not guard, as it would report what SLUB is to report; those that it guards are kept. */
static void *plain(void)
{
	void *object;

	do
		object = kmem_cache_alloc(cache, GFP_KERNEL);
	while (is_kfence_address(object));
	return object;
}

static noinline void write_after_free(void)
{
	u8 *object = plain();

	kmem_cache_free(cache, object);
	WRITE_ONCE(object[SIZE / 2 + 1], 1);
	object = plain(); /* the same one */
	kmem_cache_free(cache, object);
}

static noinline void one_too_many(void)
{
	u8 *object = plain();

	WRITE_ONCE(object[SIZE], 1);
	kmem_cache_free(cache, object);
}

static noinline void double_free(void)
{
	void *one = plain(), *other = plain();

	kmem_cache_free(cache, one);
	kmem_cache_free(cache, other); /* between the two, else 6.12 finds it without arguments */
	kmem_cache_free(cache, one);
}

static noinline void read_after_free(void)
{
	struct chained *object = plain();

	/* In the middle, as the kernel has a pointer of its own in a free object's. */
	object += 4;
	object->next = &here;
	kmem_cache_free(cache, object - 4);
	pr_info("planted: %u\n", READ_ONCE(READ_ONCE(object->next)->value));
}

static noinline void read_free_page(void)
{
	struct chained *object = (void *)__get_free_page(GFP_KERNEL);

	object->next = &here;
	preempt_disable(); /* nobody else gets the page */
	free_page((unsigned long)object);
	object = READ_ONCE(object->next);
	preempt_enable();
	pr_info("planted: %u\n", READ_ONCE(object->value));
}

static noinline void write_free_page(void)
{
	unsigned long page = __get_free_page(GFP_KERNEL), next;

	preempt_disable();
	free_page(page);
	WRITE_ONCE(((u8 *)page)[SIZE], 1);
	next = __get_free_page(GFP_ATOMIC); /* the same one */
	preempt_enable();
	free_page(next);
}

/* An object that KFENCE guards; without KFENCE, or if it takes none of 8,000 within two seconds, any. */
static u8 *fenced(void)
{
	u8 *object = kmem_cache_alloc(cache, GFP_KERNEL);
	int n;

	for (n = 0; n < 8000 && !is_kfence_address(object); n++) {
		kmem_cache_free(cache, object);
		if (n % 8 == 0)
			usleep_range(1000, 2000);
		object = kmem_cache_alloc(cache, GFP_KERNEL);
	}
	return object;
}

static noinline void read_beside(void)
{
	u8 *object = fenced();

	/* A page before or behind it, as objects lie at either end of their page. */
	pr_info("planted: %u\n", READ_ONCE(object[-PAGE_SIZE]));
	kmem_cache_free(cache, object);
}

static noinline void read_just_freed(void)
{
	u8 *object = fenced();

	kmem_cache_free(cache, object);
	pr_info("planted: %u\n", READ_ONCE(object[SIZE / 2]));
}

static const struct {
	const char *name;
	void (*call)(void);
} bugs[] = {
	{ "write_after_free", write_after_free },
	{ "one_too_many", one_too_many },
	{ "double_free", double_free },
	{ "read_after_free", read_after_free },
	{ "read_free_page", read_free_page },
	{ "write_free_page", write_free_page },
	{ "read_beside", read_beside },
	{ "read_just_freed", read_just_freed },
};

static ssize_t bug_store(struct kobject *object, struct kobj_attribute *attribute, const char *text, size_t length)
{
	int n;

	for (n = 0; n < ARRAY_SIZE(bugs); n++) {
		if (!sysfs_streq(text, bugs[n].name))
			continue;
		cache = kmem_cache_create(bugs[n].name, SIZE, 8, SLAB_NO_MERGE, NULL);
		if (!cache)
			return -ENOMEM;
		bugs[n].call();
		return length;
	}
	return -EINVAL;
}

static struct kobj_attribute bug = __ATTR_WO(bug);

static int __init planted_init(void)
{
	struct kobject *folder = kobject_create_and_add("planted", kernel_kobj);

	return folder ? sysfs_create_file(folder, &bug.attr) : -ENOMEM;
}
module_init(planted_init);

MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("one bug of each kind");

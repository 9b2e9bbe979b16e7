"""What kernels print when something is wrong, in the formats of 6.12 (NEW: of 7.2), with made-up addresses."""

OOPS = """\
[   12.000001] BUG: kernel NULL pointer dereference, address: 0000000000000010
[   12.000002] #PF: supervisor read access in kernel mode
[   12.000003] #PF: error_code(0x0000) - not-present page
[   12.000004] PGD 0 P4D 0
[   12.000005] Oops: Oops: 0000 [#1] PREEMPT SMP NOPTI
[   12.000006] CPU: 0 UID: 0 PID: 118 Comm: dd Not tainted 6.12.107+deb13-amd64 #1  Debian 6.12.107-1
[   12.000007] Hardware name: QEMU Standard PC (Q35 + ICH9, 2009), BIOS 1.17.0-debian-1.17.0-1 04/01/2014
[   12.000008] RIP: 0010:nvme_complete_rq+0x1b/0x1f0 [nvme_core]
[   12.000009] Code: 90 90 90 90 90 90 90 90 f3 0f 1e fa 0f 1f 44 00 00 41 54 55 53 48 89 fb <48> 8b 47 10
[   12.000010] RSP: 0018:ffffb0a0c0003e90 EFLAGS: 00010246
[   12.000011] RAX: 0000000000000000 RBX: ffff8c4402c60000 RCX: 0000000000000000
[   12.000012] FS:  0000000000000000(0000) GS:ffff8c441f200000(0000) knlGS:0000000000000000
[   12.000013] CR2: 0000000000000010 CR3: 0000000002c0a000 CR4: 0000000000750ef0
[   12.000014] PKRU: 55555554
[   12.000015] Call Trace:
[   12.000016]  <IRQ>
[   12.000017]  ? __die_body.cold+0x19/0x27
[   12.000018]  ? page_fault_oops+0x15c/0x2e0
[   12.000019]  ? exc_page_fault+0x7e/0x180
[   12.000020]  ? asm_exc_page_fault+0x26/0x30
[   12.000021]  ? nvme_complete_rq+0x1b/0x1f0 [nvme_core]
[   12.000022]  nvme_pci_complete_rq+0x68/0xf0 [nvme]
[   12.000023]  nvme_irq+0x43/0xa0 [nvme]
[   12.000024]  __handle_irq_event_percpu+0x4a/0x190
[   12.000025]  </IRQ>
[   12.000026] Modules linked in: nvme nvme_core
[   12.000027] CR2: 0000000000000010
[   12.000028] ---[ end trace 0000000000000000 ]---
[   12.000029] RIP: 0010:nvme_complete_rq+0x1b/0x1f0 [nvme_core]
[   12.000030] Kernel panic - not syncing: Fatal exception in interrupt
[   12.000031] Kernel Offset: 0x2a000000 from 0xffffffff81000000 (relocation range: 0xffffffff80000000-0xffffffffbfffffff)
"""

PROTECTION = """\
[    9.100001] Oops: general protection fault, probably for non-canonical address 0xdead000000000108: 0000 [#1] PREEMPT SMP
[    9.100002] CPU: 0 UID: 0 PID: 77 Comm: rmmod Not tainted 6.12.107+deb13-amd64 #1  Debian 6.12.107-1
[    9.100003] RIP: 0010:idio_16_get+0x2d/0x80
[    9.100004] Call Trace:
[    9.100005]  <TASK>
[    9.100006]  gpiod_get_raw_value_commit+0x3e/0x90
[    9.100007]  </TASK>
[    9.100008] ---[ end trace 0000000000000000 ]---
"""

BUG_AT = """\
[    3.200001] list_del corruption. prev->next should be ffff8c4402c60000, but was 0000000000000000. (prev=ffff8c4402c61000)
[    3.200002] ------------[ cut here ]------------
[    3.200003] kernel BUG at lib/list_debug.c:62!
[    3.200004] Oops: invalid opcode: 0000 [#1] PREEMPT SMP NOPTI
[    3.200005] RIP: 0010:__list_del_entry_valid_or_report.cold+0xf/0x6f
[    3.200006] Call Trace:
[    3.200007]  <TASK>
[    3.200008]  virtqueue_detach_unused_buf+0x2f/0xd0
[    3.200009]  </TASK>
[    3.200010] ---[ end trace 0000000000000000 ]---
"""

KASAN = """\
[   20.500001] ==================================================================
[   20.500002] BUG: KASAN: slab-out-of-bounds in edu_read+0x7f/0x120 [edu]
[   20.500003] Read of size 8 at addr ffff888103b1f040 by task cat/233
[   20.500004] 
[   20.500005] CPU: 1 UID: 0 PID: 233 Comm: cat Not tainted 6.12.107 #1
[   20.500006] Call Trace:
[   20.500007]  <TASK>
[   20.500008]  dump_stack_lvl+0x5d/0x80
[   20.500009]  print_report+0x174/0x502
[   20.500010]  kasan_report+0xdd/0x120
[   20.500011]  edu_read+0x7f/0x120 [edu]
[   20.500012]  vfs_read+0x17e/0xb00
[   20.500013]  </TASK>
[   20.500014] Allocated by task 233:
[   20.500015]  kasan_save_stack+0x30/0x50
[   20.500016] The buggy address belongs to the object at ffff888103b1f000
[   20.500017]  which belongs to the cache kmalloc-64 of size 64
[   20.500018] ==================================================================
"""

WARN = """\
[    5.300001] ------------[ cut here ]------------
[    5.300002] nvme nvme0: frozen twice
[    5.300003] WARNING: CPU: 0 PID: 43 at drivers/iommu/dma-iommu.c:851 __iommu_dma_unmap+0x161/0x170
[    5.300004] Modules linked in: nvme nvme_core
[    5.300005] CPU: 0 UID: 0 PID: 43 Comm: kworker/0:2 Not tainted 6.12.107+deb13-amd64 #1  Debian 6.12.107-1
[    5.300006] Workqueue: nvme-reset-wq nvme_reset_work [nvme]
[    5.300007] RIP: 0010:__iommu_dma_unmap+0x161/0x170
[    5.300008] Call Trace:
[    5.300009]  <TASK>
[    5.300010]  ? __warn.cold+0x93/0xf6
[    5.300011]  iommu_dma_unmap_page+0x46/0x90
[    5.300012]  nvme_unmap_data+0xb3/0x120 [nvme]
[    5.300013]  </TASK>
[    5.300014] ---[ end trace 0000000000000000 ]---
"""

WARN_NEW = """\
[    5.300001] ------------[ cut here ]------------
[    5.300003] WARNING: drivers/iommu/dma-iommu.c:905 at __iommu_dma_unmap+0x151/0x160, CPU#0: kworker/0:2/43
[    5.300004] Modules linked in: nvme nvme_core
[    5.300007] RIP: 0010:__iommu_dma_unmap+0x151/0x160
[    5.300008] Call Trace:
[    5.300009]  <TASK>
[    5.300011]  iommu_dma_unmap_page+0x46/0x90
[    5.300012]  nvme_unmap_data+0xc3/0x130 [nvme]
[    5.300013]  </TASK>
[    5.300014] ---[ end trace 0000000000000000 ]---
"""

HUNG_TASK = """\
[  241.700001] INFO: task dd:118 blocked for more than 20 seconds.
[  241.700002]       Not tainted 6.12.107+deb13-amd64 #1 Debian 6.12.107-1
[  241.700003] "echo 0 > /proc/sys/kernel/hung_task_timeout_secs" disables this message.
[  241.700004] task:dd              state:D stack:0     pid:118   tgid:118   ppid:117    flags:0x00004002
[  241.700005] Call Trace:
[  241.700006]  <TASK>
[  241.700007]  __schedule+0x505/0xbf0
[  241.700008]  schedule+0x27/0xf0
[  241.700009]  io_schedule+0x46/0x70
[  241.700010]  folio_wait_bit_common+0x13f/0x340
[  241.700011]  ? __pfx_wake_page_function+0x10/0x10
[  241.700012]  filemap_read+0x1e1/0x380
[  241.700013]  </TASK>
[  241.700014] INFO: task sync:119 blocked in I/O wait for more than 20 seconds.
[  241.700015]       Not tainted 7.2.12+deb13-amd64 #1 Debian 7.2.12-1
[  241.700016] task:sync            state:D stack:0     pid:119   tgid:119   ppid:117    task_flags:0x400000 flags:0x00080002
[  241.700017] Call Trace:
[  241.700018]  <TASK>
[  241.700019]  __schedule+0x505/0xbf0
[  241.700020]  wb_wait_for_completion+0x56/0x90
[  241.700021]  </TASK>
"""

BLOCKED = """\
[   66.000001] sysrq: Show Blocked State
[   66.000002] task:kworker/0:1     state:D stack:0     pid:9     tgid:9     ppid:2      flags:0x00004000
[   66.000003] Call Trace:
[   66.000004]  <TASK>
[   66.000005]  schedule+0x27/0xf0
[   66.000006]  nvme_wait_freeze+0x44/0x80 [nvme_core]
[   66.000007]  </TASK>
[   66.000008] task:dd              state:D stack:0     pid:118   tgid:118   ppid:117    flags:0x00004002
[   66.000009]  folio_wait_bit_common+0x13f/0x340
"""

LOCKUPS = """\
[   50.000001] watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [modprobe:133]
[   50.000002] Modules linked in: idio_16
[   50.000003] CPU: 0 UID: 0 PID: 133 Comm: modprobe Not tainted 6.12.107+deb13-amd64 #1  Debian 6.12.107-1
[   50.000004] RIP: 0010:idio_16_probe+0x88/0x110 [gpio_pci_idio_16]
[   50.000005] Call Trace:
[   50.000006]  <TASK>
[   50.000007]  local_pci_probe+0x42/0xa0
[   50.000008]  </TASK>
[   51.000001] rcu: INFO: rcu_preempt self-detected stall on CPU
[   51.000002] rcu: 	0-....: (5249 ticks this GP) idle=2f6c/1/0x4000000000000000 softirq=1024/1024 fqs=2624
[   51.000003] rcu: 	(t=5250 jiffies g=1177 q=89 ncpus=1)
[   52.000001] watchdog: CPU0: Watchdog detected hard LOCKUP on cpu 0
"""

AER = """\
[    7.000001] pcieport 0000:00:04.0: AER: Multiple Uncorrectable (Fatal) error message received from 0000:01:00.0
[    7.000002] nvme 0000:01:00.0: PCIe Bus Error: severity=Uncorrectable (Fatal), type=Transaction Layer, (Requester ID)
[    7.000003] nvme nvme0: frozen state error detected, reset controller
[    7.000004] pcieport 0000:00:04.0: AER: Root Port link has been reset (0)
[    7.000005] pcieport 0000:00:04.0: AER: device recovery successful
[    7.000006] pcieport 0000:00:04.0: AER: enabled with IRQ 24
"""

IOMMU = """\
[    8.000001] DMAR: DRHD: handling fault status reg 2
[    8.000002] DMAR: [DMA Write NO_PASID] Request device [00:03.0] fault addr 0x40100000 [fault reason 0x05] PTE Write access
[    8.000003] DMAR: [DMA Write NO_PASID] Request device [0000:00:03.0] fault addr 0x40100040 [fault reason 0x05] PTE Write access
[    8.000004] virtio_iommu virtio0: page fault from EP 24 at 0x40100000 [W]
[    8.000005] virtio_iommu virtio0: domain fault from EP 24
[    8.000006] AMD-Vi: Event logged [IO_PAGE_FAULT device=0000:00:03.0 domain=0x0001 address=0x40100000 flags=0x0020]
[    8.000007] arm-smmu-v3 arm-smmu-v3.0.auto: event 0x10 received:
[    8.000008] DMAR: VT-d detected Invalidation Time-out Error: SID 0
"""

NVME = """\
[   30.000001] nvme nvme0: I/O tag 129 (2081) opcode 0x2 (I/O Cmd) QID 1 timeout, aborting req_op:READ(0) size:4096
[   31.000001] nvme nvme0: Abort status: 0x0
[   60.000001] nvme nvme0: I/O tag 129 (2081) opcode 0x2 (I/O Cmd) QID 1 timeout, reset controller
[   60.000002] nvme nvme0: controller is down; will reset: CSTS=0x3, PCI_STATUS=0x10
[   60.000003] nvme0n1: I/O Cmd(0x2) @ LBA 0, 8 blocks, I/O Error (sct 0x3 / sc 0x71)
[   60.000004] I/O error, dev nvme0n1, sector 0 op 0x0:(READ) flags 0x80700 phys_seg 1 prio class 0
[   60.000005] Buffer I/O error on dev nvme0n1, logical block 0, async page read
[   60.000006] nvme nvme0: invalid id 65535 completed on queue 1
[   60.000007] nvme nvme0: Device not ready; aborting reset, CSTS=0x1
[   60.000008] nvme nvme0: Disabling device after reset failure: -19
[   60.000009] nvme nvme0: 2/0/0 default/read/poll queues
"""

OTHERS = """\
[   11.000001] irq 11: nobody cared (try booting with the "irqpoll" option)
[   11.000002] CPU: 0 UID: 0 PID: 0 Comm: swapper/0 Not tainted 6.12.107+deb13-amd64 #1  Debian 6.12.107-1
[   11.000003] handlers:
[   11.000004] [<000000009c1a2b3c>] idio_16_irq_handler
[   11.000005] Disabling IRQ #11
[   11.000006] gpio-pci-idio-16 0000:00:03.0: probe with driver gpio-pci-idio-16 failed with error -22
[   11.000007] edu 0000:00:03.0: probe of 0000:00:03.0 failed with error -5
[   11.000008] pci 0000:01:00.0: not ready 1023ms after FLR; waiting
[   11.000009] virtio_rng virtio0: input:id 9 out of range
[   11.000010] virtio_rng virtio0: input:id 3 is not a head!
[   11.000011] EXT4-fs error (device nvme0n1): ext4_find_entry:1639: inode #2: comm ls: reading directory lblock 0
[   11.000012] nvme 0000:00:04.0: Unable to change power state from D3cold to D0, device inaccessible
"""

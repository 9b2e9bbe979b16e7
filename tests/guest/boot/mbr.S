/* A master boot record: loads the first sector of the active partition to 0x8000 and jumps there.  DL is the drive.

   It is read to 0x10000 and then moved, as GRUB's does.  Without KVM that matters: QEMU does not see what a device of
   another process writes to memory, and would go on with what it has translated of the code that was there before. */
    .code16
    .globl _start
_start:
    cli
    xorw    %ax, %ax
    movw    %ax, %ds
    movw    %ax, %es
    movw    %ax, %ss
    movw    $0x7c00, %sp
    sti
    cld
    movw    $0x7c00 + 446, %bp      /* the partition table */
    movb    $4, %cl
find:
    cmpb    $0x80, (%bp)
    je      found
    addw    $16, %bp
    decb    %cl
    jnz     find
fail:
    movb    $'M', %al               /* no active partition, or the read failed */
    movw    $0x3f8, %dx
    outb    %al, %dx
stop:
    hlt
    jmp     stop
found:
    movl    8(%bp), %ebx            /* where it starts; the program there wants to know it, too */
    movl    %ebx, lba
    movw    $packet, %si
    movb    $0x42, %ah
    int     $0x13
    jc      fail
    movw    $0x1000, %ax
    movw    %ax, %ds
    xorw    %si, %si
    movw    $0x8000, %di
    movw    $256, %cx
    rep movsw
    movw    %cx, %ds
    ljmp    $0, $0x8000

packet:
    .byte   16, 0
    .word   1
    .word   0, 0x1000
lba:
    .quad   0

/* A master boot record: loads the first sector of the active partition to 0x7c00, as any does, and jumps there.
   The firmware has loaded it to 0x7c00; it moves to 0x600, for which it is linked. DL is the drive. */
    .code16
    .globl _start
_start:
    cli
    xorw    %ax, %ax
    movw    %ax, %ds
    movw    %ax, %es
    movw    %ax, %ss
    movw    $0x7c00, %sp
    movw    $0x7c00, %si
    movw    $0x600, %di
    movw    $256, %cx
    cld
    rep movsw
    ljmp    $0, $moved
moved:
    sti
    movw    $0x600 + 446, %bp       /* the partition table */
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
    hlt
    jmp     fail
found:
    movl    8(%bp), %eax            /* where it starts */
    movl    %eax, lba
    movw    $packet, %si
    movb    $0x42, %ah
    int     $0x13
    jc      fail
    movl    lba, %ebx               /* for the partition's sector */
    ljmp    $0, $0x7c00

packet:
    .byte   16, 0
    .word   1
    .word   0x7c00, 0
lba:
    .quad   0

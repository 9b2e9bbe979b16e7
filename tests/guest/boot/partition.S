/* The first sector of a partition, moved to 0x8000: DL is the drive, EBX the partition's first LBA.

   It reads 127 sectors that follow it, in one request, and compares their sum with the one in `sum`; counts its boots in
   the partition's sector 200, which it writes; resets the machine at the first boot, and ends QEMU at the second one.
   The first serial port tells all this: "read." or "read!", and "boot 1", "boot 2". The test puts `sum` in. */
    .code16
    .globl _start
_start:
    movb    %dl, drive
    movl    %ebx, first

    incl    %ebx                    /* 127 sectors to 0x10000 */
    movl    %ebx, lba
    movb    $127, count
    movw    $0x1000, segment
    movb    $0x42, %ah
    call    disk
    movw    $0x1000, %ax
    movw    %ax, %es
    xorw    %di, %di
    xorl    %eax, %eax
    movw    $127 * 128, %cx
add:
    addl    %es:(%di), %eax
    addw    $4, %di
    loop    add
    movw    $bad, %si
    cmpl    sum, %eax
    jne     said
    movw    $good, %si
said:
    call    print

    movl    first, %ebx             /* the counter, to 0x20000 */
    addl    $200, %ebx
    movl    %ebx, lba
    movb    $1, count
    movw    $0x2000, segment
    movb    $0x42, %ah
    call    disk
    movw    $0x2000, %ax
    movw    %ax, %es
    incb    %es:0
    movb    $0x43, %ah
    call    disk
    movb    $0, %es:0               /* what is on the disk counts */
    movb    $0x42, %ah
    call    disk
    movb    %es:0, %al
    addb    $'0', %al
    movb    %al, number
    movw    $boot, %si
    call    print
    cmpb    $1, %es:0
    jne     end
    movw    $0xcf9, %dx             /* reset */
    movb    $6, %al
    outb    %al, %dx
end:
    movw    $0x501, %dx             /* isa-debug-exit: QEMU's status is 2 * 3 + 1 */
    movb    $3, %al
    outb    %al, %dx
stop:
    hlt
    jmp     stop

disk:                               /* AH: 0x42 reads, 0x43 writes */
    movb    $0, %al
    movb    drive, %dl
    movw    $packet, %si
    int     $0x13
    jc      failed
    ret
failed:
    movw    $error, %si
    call    print
    jmp     end

print:                              /* the text at SI */
    movw    $0x3fd, %dx             /* until there is room */
    inb     %dx, %al
    testb   $0x20, %al
    jz      print
    lodsb
    testb   %al, %al
    jz      printed
    movw    $0x3f8, %dx
    outb    %al, %dx
    jmp     print
printed:
    ret

packet:
    .byte   16, 0
count:
    .word   0
    .word   0
segment:
    .word   0
lba:
    .quad   0
first:
    .long   0
drive:
    .byte   0
good:
    .asciz  "read.\n"
bad:
    .asciz  "read!\n"
error:
    .asciz  "disk error\n"
boot:
    .ascii  "boot "
number:
    .asciz  "0\n"

    .org    506
sum:
    .long   0
    .word   0xaa55

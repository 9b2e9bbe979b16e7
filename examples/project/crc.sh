#!/bin/sh
# Drives the card in a guest that has only busybox.  The kernel does not use memory from 256 MiB on (mem=256M), so the
# card's input is there.
# Exit status 1: the card reported an error.  2: it did not answer.  65: no error was reported, but the result is wrong.
card=/sys/bus/pci/devices/0000:00:03.0
input=0x10000000
echo 1 > $card/enable
printf '\006\000' | dd of=$card/config bs=1 seek=4 conv=notrunc 2>/dev/null # memory space, bus mastering
read bar rest < $card/resource

printf 'all is well here' > text
at=$((input))
for word in $(hexdump -v -e '1/4 "0x%08x "' text); do
    devmem $at 32 $word
    at=$((at + 4))
done
[ $(devmem $((bar))) = 0xC3C32001 ] || { echo "no card"; exit 2; }
devmem $((bar + 0x10)) 32 3
devmem $((bar + 0x08)) 64 $input
devmem $((bar + 0x04)) 32 16

for i in 1 2 3 4 5 6 7 8 9 10; do
    status=$(($(devmem $((bar + 0x10)))))
    [ $((status & 1)) = 1 ] && break
    usleep 100000
done
[ $((status & 1)) = 1 ] || { echo "the card does not answer"; exit 2; }
[ $((status & 2)) = 0 ] || { echo "the card reports an error"; exit 1; }
found=$(($(devmem $((bar + 0x14)))))
wanted=$((0x$(crc32 text | cut -c1-8)))
printf 'crc %08x\n' $found
[ $found = $wanted ] || exit 65

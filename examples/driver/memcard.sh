#!/bin/sh
# Loads the driver, writes blocks and reads them, and removes the card while it is read, in a guest that has only busybox.
# Exit status 1: the driver reported an error.  65: it did not, but the data is wrong.
cd /root || exit 1

end() {
	rmmod memcard 2>/dev/null
	exit "$1"
}

put() { # FILE BLOCK
	dd if="$1" of=/dev/memcard bs=4096 seek="$2" conv=notrunc 2>/dev/null || end 1
}

get() { # FILE BLOCK
	dd if=/dev/memcard of="$1" bs=4096 skip="$2" count=1 2>/dev/null || end 1
}

modprobe memcard || end 1
[ -c /dev/memcard ] || end 1
for block in 0 5 1; do
	yes "MEMCARD 64 KiB, block $block, written at $(cat /proc/uptime)" | head -c 4096 >data
	put data "$block"
	get back "$block"
	cmp -s data back || end 65
done
get back 5
get back 0

# The card is removed while it is read.
while dd if=/dev/memcard of=/dev/null bs=4096 2>/dev/null; do :; done &
reader=$!
usleep 20000
echo 0000:00:03.0 >/sys/bus/pci/drivers/memcard/unbind
wait $reader
end 0

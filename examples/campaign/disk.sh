# Writes what nobody has written before to a disk, past the page cache, and reads it back.
#
#   sh disk.sh [BLOCKS]        of 16 KiB; exit status 65: no error was reported, and data is wrong
disk=/dev/nvme0n1
count=${1:-8}
[ -b $disk ] || { echo "there is no $disk"; exit 3; }
dd if=/dev/urandom of=written bs=16k count=$count 2>/dev/null || exit 4
dd if=written of=$disk bs=16k count=$count oflag=direct conv=fsync 2>said || { cat said; exit 1; }
dd if=$disk of=found bs=16k count=$count iflag=direct 2>said || { cat said; exit 2; }
[ "$(wc -c <found)" = $((count * 16384)) ] || { echo "the disk is too short"; exit 2; }
cmp written found && exit 0
# Which of both was wrong: what is on the disk, or what was read?
dd if=$disk of=again bs=16k count=$count iflag=direct 2>/dev/null && cmp -s written again && echo "read wrongly, once"
exit 65

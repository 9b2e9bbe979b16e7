# Writes random data to a disk, without the page cache, reads it back and compares.
#
#   sh disk.sh [BLOCKS]        blocks of 16 KiB; exit status 65: no error was reported, but data is wrong
disk=/dev/nvme0n1
count=${1:-8}

copy() {
    dd bs=16k count=$count "$@" 2>said && return
    status=$?
    cat said
    # dd itself was damaged, by a write to memory that no longer belongs to the disk.
    [ $status -ge 128 ] && { echo "dd was killed by signal $((status - 128))"; exit 65; }
    exit 1
}

[ -b $disk ] || { echo "there is no $disk"; exit 3; }
copy if=/dev/urandom of=written
copy if=written of=$disk oflag=direct conv=fsync
copy if=$disk of=found iflag=direct
[ "$(wc -c <found)" = $((count * 16384)) ] || { echo "the disk is too short"; exit 2; }
cmp written found || exit 65

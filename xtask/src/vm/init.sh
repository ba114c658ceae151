#!/bin/busybox sh
# The first process of the machine: runs the test programs in /tests one after the other and writes what they say to
# the second serial port.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root RUST_BACKTRACE=1
if [ "$1" != again ]; then
    /bin/busybox --install -s /bin
    # Containers change their root, which no process can in a machine's first file system: it goes on top of itself.
    mount -o bind / /mnt
    cd /mnt || exit 1
    mount -o move . /
    exec chroot . /init again
fi
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir /dev/pts
mount -t devpts pts /dev/pts
mount -t tmpfs -o mode=1777 tmp /tmp
mount -t tmpfs run /run
mount -t bpf bpf /sys/fs/bpf
mount -t securityfs security /sys/kernel/security
mount -t cgroup2 cgroup /sys/fs/cgroup
# What tests look for before the kernel would load it: not each kernel has all of them as modules.
modprobe -aq overlay squashfs loop ext4 btrfs
stty -F /dev/ttyS1 raw -echo 115200
exec >/dev/ttyS1 2>&1 </dev/null
ip link set lo up
. /tests/settings
echo "flynn-vm: booted $(uname -r)"
while read -r name only; do
    run="$name${only:+ $only}"
    echo "flynn-vm: begin $run"
    # shellcheck disable=SC2086
    timeout -k 5 "$LIMIT" "/tests/$name" --color=never ${only:+--exact} ${only:-$ARGUMENTS} </dev/null
    status=$?
    echo
    echo "flynn-vm: end $run $status"
done </tests/plan
echo "flynn-vm: done"
sync
poweroff -f

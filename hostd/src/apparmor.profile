# What the jobs of apps may do, whatever else fails to keep them from the rest. Beside it stand namespaces, dropped
# capabilities and the filter of system calls, which refuse most of this already.
profile flynn-job flags=(attach_disconnected,mediate_deleted) {
  capability,
  file,
  network,
  unix,

  # Mounting is not among these: it is refused.

  # From anybody: the daemon may be confined by a profile of its own.
  signal (receive),
  signal (send) peer=flynn-job,
  ptrace (read, readby, trace, tracedby) peer=flynn-job,
  ptrace (readby, tracedby) peer=unconfined,

  # Of /proc a process may change what belongs to a process.
  deny /proc/[^1-9]** wkl,
  deny /proc/kcore r,
  deny /proc/sysrq-trigger r,
  deny /sys/** wkl,
  deny /sys/firmware/** r,
  deny /sys/kernel/security/** r,
  deny /sys/devices/virtual/powercap/** r,
}

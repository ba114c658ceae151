//! Which system calls a container may make.
//!
//! An allow-list: what is not on it fails with EPERM. Left out are the calls that reach into the kernel's own set-up
//! (modules, mounts, clocks, keys, swap), into other processes' memory, and those whose history makes them a poor risk
//! (io_uring, userfaultfd, bpf). A capability that exists for such a call brings the call back. Of sockets there are the
//! kinds that programs use: for a rare one the kernel would load a module for whoever asks.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::caps::Set;

macro_rules! calls {
    ($($name:ident)*) => { [$(libc::$name),*] };
}

#[rustfmt::skip]
const ALLOWED: &[c_long] = &calls![
    // Files.
    SYS_read SYS_write SYS_open SYS_close SYS_stat SYS_fstat SYS_lstat SYS_lseek SYS_pread64 SYS_pwrite64 SYS_readv
    SYS_writev SYS_access SYS_dup SYS_dup2 SYS_dup3 SYS_fcntl SYS_flock SYS_fsync SYS_fdatasync SYS_truncate
    SYS_ftruncate SYS_getdents SYS_getdents64 SYS_getcwd SYS_chdir SYS_fchdir SYS_rename SYS_mkdir SYS_rmdir SYS_creat
    SYS_link SYS_unlink SYS_symlink SYS_readlink SYS_chmod SYS_fchmod SYS_chown SYS_fchown SYS_lchown SYS_umask
    SYS_utime SYS_utimes SYS_futimesat SYS_utimensat SYS_mknod SYS_mknodat SYS_statfs SYS_fstatfs SYS_statx SYS_sync
    SYS_syncfs SYS_sync_file_range SYS_fallocate SYS_fadvise64 SYS_readahead SYS_setxattr SYS_lsetxattr SYS_fsetxattr
    SYS_getxattr SYS_lgetxattr SYS_fgetxattr SYS_listxattr SYS_llistxattr SYS_flistxattr SYS_removexattr
    SYS_lremovexattr SYS_fremovexattr SYS_openat SYS_openat2 SYS_mkdirat SYS_fchownat SYS_newfstatat SYS_unlinkat
    SYS_renameat SYS_renameat2 SYS_linkat SYS_symlinkat SYS_readlinkat SYS_fchmodat SYS_fchmodat2 SYS_faccessat
    SYS_faccessat2 SYS_preadv SYS_pwritev SYS_preadv2 SYS_pwritev2 SYS_copy_file_range SYS_sendfile SYS_splice SYS_tee
    SYS_vmsplice SYS_name_to_handle_at SYS_close_range SYS_chroot SYS_memfd_create SYS_memfd_secret
    SYS_inotify_init SYS_inotify_init1 SYS_inotify_add_watch SYS_inotify_rm_watch SYS_fanotify_mark
    SYS_landlock_create_ruleset SYS_landlock_add_rule SYS_landlock_restrict_self
    // Waiting.
    SYS_poll SYS_ppoll SYS_select SYS_pselect6 SYS_epoll_create SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_wait
    SYS_epoll_pwait SYS_epoll_pwait2 SYS_epoll_ctl_old SYS_epoll_wait_old SYS_eventfd SYS_eventfd2 SYS_signalfd
    SYS_signalfd4 SYS_timerfd_create SYS_timerfd_settime SYS_timerfd_gettime SYS_pipe SYS_pipe2 SYS_pause
    SYS_nanosleep SYS_clock_nanosleep SYS_io_setup SYS_io_destroy SYS_io_getevents SYS_io_submit SYS_io_cancel
    // Memory.
    SYS_mmap SYS_mprotect SYS_munmap SYS_brk SYS_mremap SYS_msync SYS_mincore SYS_madvise SYS_process_madvise SYS_mlock
    SYS_mlock2 SYS_munlock SYS_mlockall SYS_munlockall SYS_remap_file_pages SYS_pkey_mprotect SYS_pkey_alloc
    SYS_pkey_free SYS_membarrier SYS_mseal SYS_modify_ldt SYS_get_mempolicy
    // Sockets; `socket` and `socketpair` have rules.
    SYS_connect SYS_accept SYS_accept4 SYS_sendto SYS_recvfrom SYS_sendmsg SYS_recvmsg SYS_sendmmsg SYS_recvmmsg
    SYS_shutdown SYS_bind SYS_listen SYS_getsockname SYS_getpeername SYS_setsockopt SYS_getsockopt
    // Processes; `clone` and `personality` have rules.
    SYS_clone3 SYS_fork SYS_vfork SYS_execve SYS_execveat SYS_exit SYS_exit_group SYS_wait4 SYS_waitid SYS_kill
    SYS_tkill SYS_tgkill SYS_getpid SYS_getppid SYS_gettid SYS_getpgrp SYS_getpgid SYS_setpgid SYS_getsid SYS_setsid
    SYS_getuid SYS_getgid SYS_geteuid SYS_getegid SYS_setuid SYS_setgid SYS_setreuid SYS_setregid SYS_getgroups
    SYS_setgroups SYS_setresuid SYS_getresuid SYS_setresgid SYS_getresgid SYS_setfsuid SYS_setfsgid SYS_capget
    SYS_capset SYS_prctl SYS_arch_prctl SYS_seccomp SYS_set_tid_address SYS_set_robust_list SYS_get_robust_list
    SYS_futex SYS_futex_waitv SYS_rseq SYS_restart_syscall SYS_pidfd_open SYS_pidfd_send_signal SYS_ptrace
    SYS_set_thread_area SYS_get_thread_area SYS_sched_yield SYS_sched_setparam SYS_sched_getparam
    SYS_sched_setscheduler SYS_sched_getscheduler SYS_sched_get_priority_max SYS_sched_get_priority_min
    SYS_sched_rr_get_interval SYS_sched_setaffinity SYS_sched_getaffinity SYS_sched_setattr SYS_sched_getattr
    SYS_getpriority SYS_setpriority SYS_ioprio_set SYS_ioprio_get SYS_getrlimit SYS_setrlimit SYS_prlimit64
    SYS_getrusage SYS_times SYS_process_mrelease
    // Signals.
    SYS_rt_sigaction SYS_rt_sigprocmask SYS_rt_sigreturn SYS_rt_sigpending SYS_rt_sigtimedwait SYS_rt_sigqueueinfo
    SYS_rt_sigsuspend SYS_rt_tgsigqueueinfo SYS_sigaltstack SYS_alarm SYS_getitimer SYS_setitimer
    // Time and the machine.
    SYS_gettimeofday SYS_time SYS_clock_gettime SYS_clock_getres SYS_timer_create SYS_timer_settime SYS_timer_gettime
    SYS_timer_getoverrun SYS_timer_delete SYS_adjtimex SYS_uname SYS_sysinfo SYS_getrandom SYS_getcpu
    // System V and POSIX IPC, in the container's own namespace.
    SYS_shmget SYS_shmat SYS_shmctl SYS_shmdt SYS_semget SYS_semop SYS_semctl SYS_semtimedop SYS_msgget SYS_msgsnd
    SYS_msgrcv SYS_msgctl SYS_mq_open SYS_mq_unlink SYS_mq_timedsend SYS_mq_timedreceive SYS_mq_notify
    SYS_mq_getsetattr
    // Newer than libc's names: cachestat, map_shadow_stack, futex_wake, futex_wait, futex_requeue, statmount, listmount,
    // setxattrat, getxattrat, listxattrat, removexattrat.
];

/// See the end of [`ALLOWED`].
const ALLOWED_BY_NUMBER: &[c_long] = &[451, 453, 454, 455, 456, 457, 458, 463, 464, 465, 466];

/// Calls that come with a capability.
#[rustfmt::skip]
const WITH_CAPABILITY: &[(&str, &[c_long])] = &[
    ("SYS_ADMIN", &calls![
        SYS_mount SYS_umount2 SYS_pivot_root SYS_setns SYS_unshare SYS_sethostname SYS_setdomainname SYS_open_tree
        SYS_move_mount SYS_fsopen SYS_fsconfig SYS_fsmount SYS_fspick SYS_mount_setattr SYS_quotactl SYS_quotactl_fd
        SYS_fanotify_init SYS_lookup_dcookie SYS_bpf SYS_perf_event_open SYS_syslog
    ]),
    ("BPF", &calls![SYS_bpf]),
    ("PERFMON", &calls![SYS_perf_event_open]),
    ("SYSLOG", &calls![SYS_syslog]),
    ("SYS_PTRACE", &calls![SYS_process_vm_readv SYS_process_vm_writev SYS_kcmp SYS_pidfd_getfd]),
    ("SYS_TIME", &calls![SYS_settimeofday SYS_clock_settime SYS_clock_adjtime]),
    ("SYS_NICE", &calls![SYS_mbind SYS_set_mempolicy SYS_set_mempolicy_home_node SYS_migrate_pages SYS_move_pages]),
    ("SYS_RAWIO", &calls![SYS_iopl SYS_ioperm]),
    ("SYS_BOOT", &calls![SYS_reboot]),
    ("SYS_PACCT", &calls![SYS_acct]),
    ("SYS_TTY_CONFIG", &calls![SYS_vhangup]),
    ("DAC_READ_SEARCH", &calls![SYS_open_by_handle_at]),
];

/// Two filters: of several answers the kernel takes the strictest, and of two errors the later filter's.
pub(super) struct Filters {
    allowed: BpfProgram,
    /// `clone3` passes its flags in memory, where no filter can look: programs are told that it does not exist, and
    /// take `clone`.
    clone3: BpfProgram,
}

impl Filters {
    /// The filters for a container with these capabilities.
    pub(super) fn new(capabilities: Set) -> Result<Self, seccompiler::BackendError> {
        let admin = capabilities.has("SYS_ADMIN");
        let mut rules: BTreeMap<c_long, Vec<SeccompRule>> = ALLOWED
            .iter()
            .chain(ALLOWED_BY_NUMBER)
            .map(|call| (*call, Vec::new()))
            .collect();
        let granted = WITH_CAPABILITY.iter().filter(|(name, _)| capabilities.has(name));
        rules.extend(granted.flat_map(|(_, calls)| calls.iter().map(|call| (*call, Vec::new()))));
        rules.insert(
            libc::SYS_clone,
            if admin {
                Vec::new()
            } else {
                vec![no_new_namespaces()?]
            },
        );
        rules.insert(libc::SYS_socket, sockets()?);
        rules.insert(libc::SYS_socketpair, sockets()?);
        rules.insert(libc::SYS_ioctl, vec![ioctls(admin)?]);
        rules.insert(libc::SYS_personality, personalities()?);
        let error = |errno: i32| SeccompAction::Errno(errno.cast_unsigned());
        let arch = TargetArch::x86_64;
        let allowed = SeccompFilter::new(rules, error(libc::EPERM), SeccompAction::Allow, arch)?;
        let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
        let clone3 = SeccompFilter::new(clone3, SeccompAction::Allow, error(libc::ENOSYS), arch)?;
        Ok(Self {
            allowed: allowed.try_into()?,
            clone3: clone3.try_into()?,
        })
    }

    /// Applies them to this process, for good.
    pub(super) fn apply(&self) -> Result<(), seccompiler::Error> {
        seccompiler::apply_filter(&self.allowed)?;
        seccompiler::apply_filter(&self.clone3)
    }
}

type Rule = Result<SeccompRule, seccompiler::BackendError>;

fn condition(arg: u8, op: SeccompCmpOp, value: u64) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(arg, SeccompCmpArgLen::Qword, op, value)
}

fn no_new_namespaces() -> Rule {
    let namespaces = libc::CLONE_NEWNS
        | libc::CLONE_NEWCGROUP
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET;
    let mask = u64::from(namespaces.cast_unsigned());
    SeccompRule::new(vec![condition(0, SeccompCmpOp::MaskedEq(mask), 0)?])
}

/// Rules by each of which the call is allowed with this first argument, of which the kernel looks at the lower half.
fn one_of(values: &[u64]) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let rule = |value: &u64| {
        let equal = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *value)?;
        SeccompRule::new(vec![equal])
    };
    values.iter().map(rule).collect()
}

fn sockets() -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let families = [
        libc::AF_UNIX,
        libc::AF_INET,
        libc::AF_INET6,
        libc::AF_NETLINK,
        libc::AF_PACKET,
    ];
    one_of(&families.map(|family| u64::from(family.cast_unsigned())))
}

/// Every ioctl but those that put input into a terminal, as if somebody had typed it, and those that make a subvolume of
/// btrfs, which the limit of the volume that it is in does not count. The kernel looks at the lower half of a request, and
/// so does this.
fn ioctls(admin: bool) -> Rule {
    const TYPING: [u64; 2] = [libc::TIOCSTI, libc::TIOCLINUX];
    // BTRFS_IOC_SNAP_CREATE, _SUBVOL_CREATE, and their second versions.
    const SUBVOLUMES: [u64; 4] = [0x5000_9401, 0x5000_940e, 0x5000_9417, 0x5000_9418];
    let refused = TYPING
        .into_iter()
        .chain(SUBVOLUMES.into_iter().filter(|_| !admin));
    let not = |request| SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, request);
    SeccompRule::new(refused.map(not).collect::<Result<_, _>>()?)
}

/// Linux, its 32-bit kind, without randomised addresses, and the question which it is.
fn personalities() -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    one_of(&[0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_fit_into_the_kernels_limit() {
        for capabilities in [Set::default_container(), Set(u64::MAX)] {
            let filters = Filters::new(capabilities).unwrap();
            assert!(
                filters.allowed.len() < 4096,
                "{} instructions",
                filters.allowed.len()
            );
        }
    }
}

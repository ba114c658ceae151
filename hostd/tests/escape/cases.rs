//! Every trick by its name.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::{SocketAddr, UnixStream};

use libc::c_long;
use rustix::fs::FileType;

use crate::tricks::{
    AT_FDCWD, DEVICES, HOST, NO_FD, PTRACE_SEIZE, READ_IMPLIES_EXEC, SCRATCH, SESSION_KEYRING, before,
    c_path, call, calls_of_32_bits, cgroup_file, cgroup_paths, chroot_and_out, clone_user, clone3_user,
    core_dump, device_nodes, entries, inject, misc_minor, mknod, open_by_handle, own_of_the_kernel, place,
    pointer, reach, read, request, socket, terminal, text, unshare, variable, write,
};

/// A trick: it has worked, or this refused it.
pub(crate) type Trick = fn() -> io::Result<()>;

/// A trick with what is to be known of it.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) trick: Trick,
    /// What it takes to work at all.
    pub(crate) needs: Need,
    /// Outside, it is tried in the network of the test.
    pub(crate) same_network: bool,
    /// The container has these capabilities as well.
    pub(crate) capabilities: &'static [&'static str],
}

/// What not every machine has.
#[derive(Clone, Copy)]
pub(crate) enum Need {
    Nothing,
    /// A file of the kernel's.
    File(&'static str),
    /// A system call, which does nothing when all its arguments are the highest number.
    Call(c_long),
    /// Calls by the numbers that 32-bit programs know.
    Calls32,
    /// Programs at groups of v2.
    CgroupV2,
}

const fn case(name: &'static str, trick: Trick) -> Case {
    Case {
        name,
        trick,
        needs: Need::Nothing,
        same_network: false,
        capabilities: &[],
    }
}

const fn case_with(name: &'static str, needs: &'static str, trick: Trick) -> Case {
    Case {
        needs: Need::File(needs),
        ..case(name, trick)
    }
}

/// All of them.
pub(crate) const CASES: &[Case] = &[
    // Mounts.
    case("mount", || {
        let target = c_path(&variable(SCRATCH))?;
        call(
            libc::SYS_mount,
            [text(c"t"), target.as_ptr() as usize, text(c"tmpfs"), 0, 0],
        )
        .map(drop)
    }),
    case("mount_proc_again", || {
        let target = c_path(&variable(SCRATCH))?;
        call(
            libc::SYS_mount,
            [text(c"p"), target.as_ptr() as usize, text(c"proc"), 0, 0],
        )
        .map(drop)
    }),
    case("mount_cgroups", || {
        let target = c_path(&variable(SCRATCH))?;
        call(
            libc::SYS_mount,
            [text(c"c"), target.as_ptr() as usize, text(c"cgroup2"), 0, 0],
        )
        .map(drop)
    }),
    case("remount_writable", || {
        let flags = usize::try_from(libc::MS_REMOUNT | libc::MS_BIND).unwrap_or_default();
        call(libc::SYS_mount, [0, text(c"/proc"), 0, flags, 0]).map(drop)
    }),
    case("umount", || {
        call(libc::SYS_umount2, [text(c"/proc"), libc::MNT_DETACH as usize]).map(drop)
    }),
    case("pivot_root", || {
        reach(libc::SYS_pivot_root, [text(c"."), text(c".")])
    }),
    case("open_tree", || {
        call(libc::SYS_open_tree, [AT_FDCWD, text(c"/"), 1]).map(drop)
    }),
    case("move_mount", || {
        reach(libc::SYS_move_mount, [NO_FD, text(c""), NO_FD, text(c""), 0])
    }),
    case("fsopen", || call(libc::SYS_fsopen, [text(c"tmpfs"), 0]).map(drop)),
    case("fsconfig", || reach(libc::SYS_fsconfig, [NO_FD, 0, 0, 0, 0])),
    case("fsmount", || reach(libc::SYS_fsmount, [NO_FD, 0, 0])),
    case("fspick", || {
        call(libc::SYS_fspick, [AT_FDCWD, text(c"/"), 0]).map(drop)
    }),
    case("mount_setattr", || {
        let attributes = [0_u64; 4];
        call(
            libc::SYS_mount_setattr,
            [AT_FDCWD, text(c"/"), 0, pointer(&attributes), 32],
        )
        .map(drop)
    }),
    case_with("swapon", "/proc/swaps", || {
        reach(libc::SYS_swapon, [text(c"/none"), 0])
    }),
    case_with("quotactl", "/proc/sys/fs/quota", || {
        reach(libc::SYS_quotactl, [0xffff_ffff, text(c"/none"), 0, 0])
    }),
    // Namespaces.
    case("unshare_user", || unshare(libc::CLONE_NEWUSER)),
    case("unshare_mounts", || unshare(libc::CLONE_NEWNS)),
    case("unshare_cgroup", || unshare(libc::CLONE_NEWCGROUP)),
    case("setns", || reach(libc::SYS_setns, [NO_FD, 0])),
    case("clone_into_user_namespace", clone_user),
    case("clone3_into_user_namespace", clone3_user),
    case("chroot_and_out", chroot_and_out),
    // Other processes.
    case("ptrace_init", || {
        call(libc::SYS_ptrace, [PTRACE_SEIZE, 1, 0, 0]).map(drop)
    }),
    case("process_vm_readv", || {
        reach(libc::SYS_process_vm_readv, [1, 0, 0, 0, 0, 0])
    }),
    case("process_vm_writev", || {
        reach(libc::SYS_process_vm_writev, [1, 0, 0, 0, 0, 0])
    }),
    case("kcmp", || call(libc::SYS_kcmp, [1, 1, 1, 0, 0]).map(drop)),
    case("pidfd_getfd", || {
        let pidfd = before(call(libc::SYS_pidfd_open, [1, 0]))?;
        call(libc::SYS_pidfd_getfd, [pidfd, 0, 0]).map(drop)
    }),
    case("init_memory", || File::open("/proc/1/mem").map(drop)),
    case("init_program", || File::open("/proc/1/exe").map(drop)),
    case("init_environment", || read("/proc/1/environ")),
    case("init_root", || fs::read_dir("/proc/1/root/proc").map(drop)),
    case("init_descriptors", || fs::read_link("/proc/1/fd/0").map(drop)),
    case("init_namespaces", || File::open("/proc/1/ns/mnt").map(drop)),
    // Keys.
    case_with("add_key", "/proc/key-users", || {
        let key = [text(c"user"), text(c"escape"), text(c"x"), 1, SESSION_KEYRING];
        call(libc::SYS_add_key, key).map(drop)
    }),
    case_with("keyctl_session", "/proc/key-users", || {
        call(libc::SYS_keyctl, [0, SESSION_KEYRING, 1]).map(drop)
    }),
    case_with("request_key", "/proc/key-users", || {
        reach(libc::SYS_request_key, [text(c"user"), text(c"none"), 0, 0])
    }),
    // The kernel itself.
    case("bpf", || {
        let mut attributes = [0_u32; 32];
        attributes[..4].copy_from_slice(&[2, 4, 4, 1]);
        call(libc::SYS_bpf, [0, pointer(&attributes), 128]).map(drop)
    }),
    case_with("perf_event_open", "/proc/sys/kernel/perf_event_paranoid", || {
        let mut attributes = [0_u32; 32];
        attributes[..2].copy_from_slice(&[1, 128]);
        reach(
            libc::SYS_perf_event_open,
            [pointer(&attributes), 0, NO_FD, NO_FD, 0],
        )
    }),
    case_with("userfaultfd", "/proc/sys/vm/unprivileged_userfaultfd", || {
        call(libc::SYS_userfaultfd, [0]).map(drop)
    }),
    case("io_uring", || {
        let mut parameters = [0_u64; 15];
        reach(libc::SYS_io_uring_setup, [1, place(&mut parameters)])
    }),
    case_with("init_module", "/proc/modules", || {
        reach(libc::SYS_init_module, [text(c""), 0, text(c"")])
    }),
    case_with("finit_module", "/proc/modules", || {
        reach(libc::SYS_finit_module, [NO_FD, text(c""), 0])
    }),
    case_with("delete_module", "/proc/modules", || {
        reach(
            libc::SYS_delete_module,
            [text(c"escape_none"), libc::O_NONBLOCK as usize],
        )
    }),
    // With a flag that does not exist, or a magic number that is wrong: it must not come to pass outside.
    case_with("kexec_load", "/sys/kernel/kexec_loaded", || {
        reach(libc::SYS_kexec_load, [0, 0, 0, 0xf0])
    }),
    case_with("kexec_file_load", "/sys/kernel/kexec_loaded", || {
        reach(libc::SYS_kexec_file_load, [NO_FD, NO_FD, 0, 0, 0xf000])
    }),
    case("reboot", || reach(libc::SYS_reboot, [1, 2, 3, 0])),
    Case {
        needs: Need::Call(libc::SYS_iopl),
        ..case("iopl", || call(libc::SYS_iopl, [3]).map(drop))
    },
    Case {
        needs: Need::Call(libc::SYS_ioperm),
        ..case("ioperm", || call(libc::SYS_ioperm, [0x80, 1, 1]).map(drop))
    },
    case("settimeofday", || call(libc::SYS_settimeofday, [0, 0]).map(drop)),
    case("clock_settime", || reach(libc::SYS_clock_settime, [0xffff, 0])),
    case_with("acct", "/proc/sys/kernel/acct", || {
        reach(libc::SYS_acct, [text(c"/none")])
    }),
    case("kernel_log", || {
        let mut buffer = [0_u64; 8];
        call(libc::SYS_syslog, [3, place(&mut buffer), 64]).map(drop)
    }),
    case("fanotify_init", || reach(libc::SYS_fanotify_init, [0, 0])),
    case("sethostname", || {
        call(libc::SYS_sethostname, [text(c"x"), 1]).map(drop)
    }),
    case("personality", || {
        call(libc::SYS_personality, [READ_IMPLIES_EXEC]).map(drop)
    }),
    case("open_by_handle_at", open_by_handle),
    // A call by another door: filters know the numbers of one.
    Case {
        needs: Need::Calls32,
        ..case("calls_of_32_bits", calls_of_32_bits)
    },
    // What the kernel shows.
    case_with("sysrq", "/proc/sysrq-trigger", || write("/proc/sysrq-trigger")),
    case("core_pattern", || write("/proc/sys/kernel/core_pattern")),
    case("hostname_file", || write("/proc/sys/kernel/hostname")),
    case_with("modprobe_path", "/proc/sys/kernel/modprobe", || {
        write("/proc/sys/kernel/modprobe")
    }),
    case("ip_forward", || write("/proc/sys/net/ipv4/ip_forward")),
    case_with("irq_affinity", "/proc/irq/default_smp_affinity", || {
        write("/proc/irq/default_smp_affinity")
    }),
    case_with("uevent_helper", "/sys/kernel/uevent_helper", || {
        write("/sys/kernel/uevent_helper")
    }),
    case_with("hugepages", "/sys/kernel/mm/transparent_hugepage/enabled", || {
        write("/sys/kernel/mm/transparent_hugepage/enabled")
    }),
    case("device_mtu", || write("/sys/class/net/lo/mtu")),
    case_with("kcore", "/proc/kcore", || read("/proc/kcore")),
    case_with("keys", "/proc/keys", || own_of_the_kernel("/proc/keys")),
    case_with("timer_list", "/proc/timer_list", || read("/proc/timer_list")),
    case_with("interrupts", "/proc/interrupts", || read("/proc/interrupts")),
    case_with("acpi", "/proc/acpi/wakeup", || entries("/proc/acpi")),
    case_with("asound", "/proc/asound", || entries("/proc/asound")),
    case_with("firmware", "/sys/firmware", || entries("/sys/firmware")),
    case_with("powercap", "/sys/devices/virtual/powercap", || {
        entries("/sys/devices/virtual/powercap")
    }),
    case("kmsg", || {
        File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/proc/kmsg")
            .map(drop)
    }),
    case("core_dump", core_dump),
    // Control groups.
    case("cgroup_files", || cgroup_file("cgroup", "cgroup.procs")),
    case_with("release_agent", "/sys/fs/cgroup/devices/release_agent", || {
        cgroup_file("cgroup ", "release_agent")
    }),
    case_with(
        "notify_on_release",
        "/sys/fs/cgroup/devices/release_agent",
        || cgroup_file("cgroup ", "notify_on_release"),
    ),
    case("cgroup_paths", cgroup_paths),
    // Devices.
    case("device_nodes", device_nodes),
    case("mknod_block", || mknod(SCRATCH, FileType::BlockDevice, (7, 0))),
    case("mknod_memory", || {
        mknod(SCRATCH, FileType::CharacterDevice, (1, 1))
    }),
    Case {
        capabilities: &["MKNOD"],
        needs: Need::CgroupV2,
        ..case("device_off_the_list", || {
            mknod(
                DEVICES,
                FileType::CharacterDevice,
                (10, misc_minor("cpu_dma_latency")?),
            )?;
            File::options()
                .read(true)
                .open(variable(DEVICES).join("escape"))
                .map(drop)
        })
    },
    // Sockets.
    case("raw_socket", || {
        socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)
    }),
    case("raw_socket_v6", || {
        socket(libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_ICMPV6)
    }),
    case("packet_socket", || socket(libc::AF_PACKET, libc::SOCK_RAW, 0)),
    // Whose modules the kernel would load for whoever asks.
    case("rare_sockets", || {
        let families = [
            libc::AF_ALG,
            libc::AF_VSOCK,
            libc::AF_TIPC,
            libc::AF_RDS,
            libc::AF_CAN,
            libc::AF_BLUETOOTH,
        ];
        let numbers = families
            .into_iter()
            .map(i32::cast_unsigned)
            .map(|family| family as usize);
        let asked = numbers.map(|family| reach(libc::SYS_socket, [family, 2, 0]));
        asked.reduce(io::Result::or).unwrap_or(Ok(()))
    }),
    case("interface_down", || {
        let descriptor = before(call(libc::SYS_socket, [2, 2, 0]))?;
        let mut interface = [0_u8; 40];
        interface[..2].copy_from_slice(b"lo");
        call(
            libc::SYS_ioctl,
            [descriptor, request(libc::SIOCSIFFLAGS), pointer(&interface)],
        )
        .map(drop)
    }),
    Case {
        same_network: true,
        ..case("abstract_socket_of_the_host", || {
            let name = variable(HOST);
            let address = SocketAddr::from_abstract_name(name.as_os_str().as_encoded_bytes())?;
            UnixStream::connect_addr(&address).map(drop)
        })
    },
    case("socket_of_the_host", || {
        UnixStream::connect(variable(HOST).join("socket")).map(drop)
    }),
    case("file_of_the_host", || {
        read(&variable(HOST).join("secret").to_string_lossy())
    }),
    case("subvolume_beside_the_limit", || {
        let here = File::open("/")?;
        let create: [u32; 2] = [0x5000_940e, 0x5000_9417];
        for request in create {
            reach(libc::SYS_ioctl, [here.as_raw_fd() as usize, request as usize, 0])?;
        }
        Ok(())
    }),
    // Terminals.
    case("terminal_injection", || inject(request(libc::TIOCSTI))),
    // The kernel looks at the lower half of the request alone.
    case("terminal_injection_by_a_long_request", || {
        inject(1 << 32 | request(libc::TIOCSTI))
    }),
    case("terminal_selection", || {
        let (_master, slave) = terminal()?;
        reach(
            libc::SYS_ioctl,
            [
                slave.as_raw_fd() as usize,
                request(libc::TIOCLINUX),
                pointer(&2_u8),
            ],
        )
    }),
];

//! System calls that change a disk, held by the kernel until a supervisor has looked at them (seccomp's user
//! notifications): [`install`] in the process under test, [`Listener`] at the other end.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};

/// Where the process under test leaves its listener.
const LISTENER: RawFd = 700;

/// Calls that a supervisor sees always.
const CALLS: [libc::c_long; 32] = [
    libc::SYS_write,
    libc::SYS_pwrite64,
    libc::SYS_writev,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_msync,
    libc::SYS_truncate,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_open,
    libc::SYS_openat2,
    libc::SYS_creat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_rmdir,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_link,
    libc::SYS_linkat,
    libc::SYS_symlink,
    libc::SYS_symlinkat,
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_copy_file_range,
    libc::SYS_io_uring_setup,
    libc::SYS_io_submit,
];

/// Calls that it sees when this argument has one of these bits: files that are made or emptied, shared mappings.
const CALLS_WITH: [(libc::c_long, u32, u32); 2] = [
    (libc::SYS_openat, 2, (libc::O_CREAT | libc::O_TRUNC) as u32),
    (libc::SYS_mmap, 3, libc::MAP_SHARED as u32),
];

/// `AUDIT_ARCH_X86_64`.
const ARCH: u32 = 0xC000_003E;

fn filter() -> Vec<libc::sock_filter> {
    let load = |k| op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, k, 0, 0);
    let equal = |k, yes, no| op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, k, yes, no);
    let bits = |k, yes, no| op(libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K, k, yes, no);
    let end = |k| op(libc::BPF_RET | libc::BPF_K, k, 0, 0);
    let notify = end(libc::SECCOMP_RET_USER_NOTIF);
    let mut program = vec![
        load(4),
        equal(ARCH, 1, 0),
        end(libc::SECCOMP_RET_KILL_PROCESS),
        load(0),
    ];
    for call in CALLS {
        program.extend([equal(number(call), 0, 1), notify]);
    }
    for (call, argument, wanted) in CALLS_WITH {
        program.extend([
            equal(number(call), 0, 3),
            load(16 + 8 * argument),
            bits(wanted, 0, 1),
            notify,
            load(0),
        ]);
    }
    program.push(end(libc::SECCOMP_RET_ALLOW));
    program
}

fn number(call: libc::c_long) -> u32 {
    u32::try_from(call).unwrap()
}

fn op(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    let code = u16::try_from(code).unwrap();
    libc::sock_filter { code, jt, jf, k }
}

/// Has the calls of this process held from now on. To be called before it has other threads.
pub(crate) fn install() -> io::Result<()> {
    rustix::thread::set_no_new_privs(true)?;
    let mut program = filter();
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).unwrap(),
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the kernel reads the program, which lives until the call returns.
    let listener = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const program,
        )
    };
    let listener = RawFd::try_from(listener).map_err(io::Error::other)?;
    if listener < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: plain numbers; nothing else is at `LISTENER` in a process that has just begun.
    match unsafe { libc::dup2(listener, LISTENER) } {
        LISTENER => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A call that is held.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call {
    id: u64,
    /// The thread.
    pub(crate) thread: u32,
    /// `SYS_…`.
    pub(crate) number: libc::c_long,
    /// Its arguments.
    pub(crate) args: [u64; 6],
}

/// Where the calls of a process arrive.
#[derive(Debug)]
pub(crate) struct Listener(OwnedFd);

impl Listener {
    /// That of the process `pid`, once it has called [`install`].
    pub(crate) fn of(pid: u32) -> io::Result<Self> {
        let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
        let process = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        let began = Instant::now();
        loop {
            match rustix::process::pidfd_getfd(&process, LISTENER, PidfdGetfdFlags::empty()) {
                Ok(listener) => return Ok(Self(listener)),
                Err(rustix::io::Errno::BADF) if began.elapsed() < Duration::from_secs(10) => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The next call; `None` when the process is gone.
    pub(crate) fn next(&self) -> Option<Call> {
        loop {
            let mut poll = [PollFd::new(&self.0, PollFlags::IN)];
            match rustix::event::poll(&mut poll, None) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => panic!("the listener fails: {error}"),
            }
            if !poll[0].revents().contains(PollFlags::IN) {
                return None;
            }
            // SAFETY: all of it may be zero, which is what the kernel asks for.
            let mut notice: libc::seccomp_notif = unsafe { std::mem::zeroed() };
            // SAFETY: the kernel writes one notice.
            let got = unsafe {
                libc::ioctl(
                    self.0.as_raw_fd(),
                    libc::SECCOMP_IOCTL_NOTIF_RECV,
                    &raw mut notice,
                )
            };
            // The thread was killed meanwhile, or a signal came.
            if got == 0 {
                return Some(Call {
                    id: notice.id,
                    thread: notice.pid,
                    number: notice.data.nr.into(),
                    args: notice.data.args,
                });
            }
        }
    }

    /// Lets the call be made.
    pub(crate) fn go_on(&self, call: &Call) {
        self.answer(
            call,
            0,
            u32::try_from(libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE).unwrap(),
        );
    }

    /// Has the call fail without being made.
    pub(crate) fn fail(&self, call: &Call, errno: i32) {
        self.answer(call, -errno, 0);
    }

    fn answer(&self, call: &Call, error: i32, flags: u32) {
        let answer = libc::seccomp_notif_resp {
            id: call.id,
            val: 0,
            error,
            flags,
        };
        // SAFETY: the kernel reads one answer. It fails if the thread is gone, which is no harm.
        unsafe {
            libc::ioctl(
                self.0.as_raw_fd(),
                libc::SECCOMP_IOCTL_NOTIF_SEND,
                &raw const answer,
            )
        };
    }
}

/// Set for the process by which [`impossible`] finds out.
pub(crate) const PROBE: &str = "DISCOVERD_TEST_PROBE";

/// What that process does.
pub(crate) fn probed() -> ExitCode {
    let installed = install().is_ok();
    // Its parent lets this fail.
    let refused = std::fs::create_dir("/").is_err_and(|error| error.raw_os_error() == Some(libc::EXDEV));
    ExitCode::from(u8::from(!installed || !refused))
}

/// Why processes cannot be watched here.
pub(crate) fn impossible() -> Option<String> {
    let probe = || {
        let this = std::env::current_exe()?;
        let mut child = Command::new(this).env(PROBE, "1").spawn()?;
        let listener = Listener::of(child.id()).inspect_err(|_| {
            let _ = child.kill();
        });
        if let Ok(listener) = &listener {
            while let Some(call) = listener.next() {
                if call.number == libc::SYS_mkdir {
                    listener.fail(&call, libc::EXDEV);
                } else {
                    listener.go_on(&call);
                }
            }
        }
        let status = child.wait()?;
        listener?;
        if status.success() {
            Ok(())
        } else {
            Err(io::Error::other("calls are not held"))
        }
    };
    probe()
        .err()
        .map(|error| format!("system calls cannot be watched: {error}"))
}

//! What the programs that run in the kernel have in common: the maps, reading packets, and how a decision becomes a
//! verdict. The programs themselves are in `bin/`, one object for each part of the data plane:
//!
//! | object | programs |
//! | --- | --- |
//! | `overlay` | classifiers at containers' veths, at `flynn0` and at the uplink |
//! | `service` | what jobs' sockets are told of services' virtual addresses |
//! | `steer` | a program at the host's network namespace: the router's ports |
//!
//! A decision is an `Ok` with the kernel's action or an `Err` with the reason to drop, and [`verdict`] is the one place
//! where the second becomes the first and is counted. Nothing else is counted or logged per packet.
#![no_std]

pub mod maps;
pub mod packet;
pub mod rate;
pub mod room;
pub mod services;
pub mod translate;

use aya_ebpf::bindings::TC_ACT_SHOT;
use flynn_abi::DropReason;

/// What a classifier decides.
pub type Decision = Result<i32, DropReason>;

/// The kernel's action for a classifier's decision.
#[inline(always)]
pub fn verdict(decision: Decision) -> i32 {
    match decision {
        Ok(action) => action,
        Err(reason) => {
            maps::count_drop(reason);
            TC_ACT_SHOT
        }
    }
}

/// What every object needs beside its programs.
#[macro_export]
macro_rules! object {
    () => {
        /// Some helpers are only for programs under a licence that is compatible with the kernel's.
        #[unsafe(link_section = "license")]
        #[unsafe(no_mangle)]
        static LICENSE: [u8; 13] = *b"Dual BSD/GPL\0";

        #[panic_handler]
        fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
            loop {}
        }
    };
}

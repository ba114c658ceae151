//! A packet that came from outside.

use aya_ebpf::{bindings::TC_ACT_OK, programs::TcContext};

use crate::Decision;

#[inline(always)]
pub(crate) fn decide(_ctx: &TcContext) -> Decision {
    Ok(TC_ACT_OK)
}

//! What XDP's packets and classifiers' packets have in common.

use aya_ebpf::programs::{TcContext, XdpContext};

/// A packet, whichever hook it is seen at.
pub(crate) trait Context {
    /// The bytes at an offset as a `T`, which must be made of bytes; `None` where the packet ends before. The verifier
    /// lets nobody use it once the packet has been changed.
    fn at<T>(&self, offset: usize) -> Option<&T>;

    /// The frame's length. The network stack may still have to cut it into several.
    fn length(&self) -> u32;
}

impl Context for XdpContext {
    #[inline(always)]
    fn at<T>(&self, offset: usize) -> Option<&T> {
        within(self.data(), self.data_end(), offset)
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        (self.data_end() - self.data()) as u32
    }
}

impl Context for TcContext {
    #[inline(always)]
    fn at<T>(&self, offset: usize) -> Option<&T> {
        within(self.data(), self.data_end(), offset)
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        self.len()
    }
}

/// As far as any program looks into a packet: a tunnel's headers, an ICMPv6 error, and what that is about.
const DEPTH: u32 = 160;

/// Has the kernel put all headers where [`Context::at`] finds them, which may be in the packet's pages. Nothing that was
/// found before may be used afterwards.
#[inline(always)]
pub(crate) fn gather(ctx: &TcContext) {
    let wanted = ctx.len().min(DEPTH);
    if ctx.data() + wanted as usize > ctx.data_end() {
        // What is still missing then is missing to whoever looks for it.
        let _ = ctx.pull_data(wanted);
    }
}

#[inline(always)]
fn within<'a, T>(start: usize, end: usize, offset: usize) -> Option<&'a T> {
    const { assert!(align_of::<T>() == 1, "packets are not aligned") };
    if start + offset + size_of::<T>() > end {
        return None;
    }
    // SAFETY: the kernel lends the bytes from `start` to `end`, which were just seen to be enough; `T` is made of bytes
    // alone, so that it needs no alignment and any bytes are a value of it.
    Some(unsafe { &*((start + offset) as *const T) })
}

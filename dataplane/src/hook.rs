//! Where classifiers are attached.

use aya::programs::{SchedClassifier, TcAttachType};

/// The kernel's two ways of running a classifier at a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// A link, from kernel 6.6 on: pinned, replaced in one step, beside others' programs.
    Tcx,
    /// A filter in a `clsact` queueing discipline.
    Clsact,
}

impl Hook {
    /// The best that the kernel has. Asked of the loopback device, which is in every namespace; kernels without tcx do
    /// not know the question.
    pub fn detect() -> Self {
        match SchedClassifier::query_tcx("lo", TcAttachType::Ingress) {
            Ok(_) => Self::Tcx,
            Err(_) => Self::Clsact,
        }
    }
}

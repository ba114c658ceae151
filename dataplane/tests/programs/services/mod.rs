//! Services' virtual addresses in packets, which have come past the sockets.

pub(crate) mod flows;
pub(crate) mod paths;
mod world;

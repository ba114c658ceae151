//! Deployments: what to do next is decided by [`planner`], and done by [`worker`].

pub(crate) mod planner;
pub(crate) mod worker;

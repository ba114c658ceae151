//! What is allowed. Pure: each function looks at its input alone, and says with the field's name what is wrong.

pub(crate) mod app;
pub(crate) mod artifact;
pub(crate) mod certificate;
pub(crate) mod formation;
pub(crate) mod job;
pub(crate) mod name;
pub(crate) mod process;
pub(crate) mod release;
pub(crate) mod route;

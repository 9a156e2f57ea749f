//! balena's API: what is asked, how, and what each answer means.

pub mod client;
pub mod device;
pub mod failure;
pub mod key;
pub mod query;

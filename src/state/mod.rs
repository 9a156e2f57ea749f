//! What the API says of the devices beside the list: what balenaCloud sees, what their supervisors report, and what runs on them.

pub mod devices;
pub mod installs;
mod lists;
pub mod reported;
pub mod watching;

//! What the API says of the devices beside the list: what balenaCloud sees, what their supervisors report, and what runs on them.

pub mod listed_devices;
pub mod polling;
mod record_lists;
pub mod reported;
pub mod services;

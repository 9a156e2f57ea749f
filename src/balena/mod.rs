//! balena's API: what is asked, with which key, and what each answer means.
//!
//! The facts about the API were recorded from an open-balena-api 49.0.12 (`tests/recordings`).

pub mod client;
pub mod device;
pub mod failure;
pub mod pages;
pub mod query;
pub mod release;
mod request;
pub mod selection;

pub use client::Client;
pub use failure::{Failure, Reason};
pub use request::{Answer, Api, Requests};

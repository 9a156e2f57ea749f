//! balena's API: what is asked, with which key, and what each answer means.
//!
//! The facts about the API were recorded from an open-balena-api 49.0.12 (`tests/recordings`).

pub mod client;
pub mod device;
pub mod failure;
mod http;
pub mod pages;
pub mod query;
pub mod release;
pub mod selection;
mod source;

pub use client::{Client, NO_ANSWER};
pub use failure::{Failure, Reason};
pub use query::{Listing, Request};
pub use source::{Actor, Api, Fetched, Source};

//! balena's API: what is asked, with which key, and what each answer means.
//!
//! The facts about the API were recorded from an open-balena-api 49.0.12 (`tests/recordings`).

mod client;
pub mod device;
mod failure;
mod http;
mod pages;
pub mod query;
pub mod release;
mod selection;
mod source;

pub use client::{Client, NO_ANSWER};
pub use device::{Device, Text, display_name};
pub use failure::{Failure, Reason};
pub use pages::{List, PAGE_SIZE, Pages, Place, WithId};
pub use query::{Listing, Query, Request};
pub use release::{ImageOfService, ReleaseServices, Service};
pub use selection::{FleetRef, Selection, TagFilter};
pub use source::{Actor, Api, BALENA_CLOUD, Fetched, Source};

//! The list that the endpoint shows: pages that discovery keeps, shared.

use std::sync::Arc;

use crate::discovery::entry::{Entry, Page};

/// A list as it was published.
#[derive(Default)]
pub struct List {
    /// The version of the inventory.
    pub version: u64,
    /// By ascending id.
    pub pages: Vec<Arc<Page>>,
}

impl List {
    /// All devices.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.pages.iter().flat_map(|page| &page.entries).map(|entry| &**entry)
    }
}

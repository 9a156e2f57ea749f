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
    /// The device at `at`, which is a page and a device in it. Moves `at` to the next one.
    pub fn next(&self, at: &mut (usize, usize)) -> Option<&Entry> {
        loop {
            let page = self.pages.get(at.0)?;
            let Some(entry) = page.entries.get(at.1) else {
                *at = (at.0 + 1, 0);
                continue;
            };
            at.1 += 1;
            return Some(entry);
        }
    }

    /// All devices.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.pages.iter().flat_map(|page| &page.entries).map(|entry| &**entry)
    }
}

//! Where the list goes, and what becomes of it there.

use std::io::{self, Write};

use super::earlier_list::StoredDevice;
use super::inventory::Inventory;
use super::target_groups;
use crate::balena::{Failure, Reason};

pub trait Sink {
    fn name(&self) -> String;
    /// The devices of the list that is there; none if it cannot be read.
    fn published(&self) -> Option<Vec<StoredDevice>>;
    /// What becomes of the list that is there when a refresh fails, as the end of a sentence.
    fn stays(&self) -> String;
    /// Puts the list there, unless it is there already.
    fn publish(&mut self, list: &Inventory) -> Result<Published, Failure>;
}

/// Why a list was not published, and what to do if it should be.
pub const HELD_BACK: &str = "the API returned no scrapable device; keeping the previous list; if it should be empty, set \
    --write-empty (WRITE_EMPTY=true)";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    Written,
    Unchanged,
    /// It has no targets, and the list that is there has some: `TargetFile::publish` decides.
    HeldBack,
}

pub struct StandardOutput;

impl Sink for StandardOutput {
    fn name(&self) -> String {
        "standard output".into()
    }

    fn stays(&self) -> String {
        String::new()
    }

    fn published(&self) -> Option<Vec<StoredDevice>> {
        None
    }

    fn publish(&mut self, list: &Inventory) -> Result<Published, Failure> {
        let mut out = io::stdout().lock();
        let written = target_groups::write(list.entries(), &mut out).and_then(|()| out.flush());
        written.map_err(|error| {
            Failure::new(Reason::Write, format!("cannot write the list to standard output: {error}"))
        })?;
        Ok(Published::Written)
    }
}

//! The devices that the log has announced, and whether a device is still as it was then.

use std::borrow::Cow;
use std::sync::Arc;

use super::entry::{Entry, fingerprint};
use super::stored::{Key, StoredDevice};
use super::target_groups;

/// The devices of a list that was announced, in order.
pub enum Announced {
    /// By an earlier run.
    Stored(Vec<StoredDevice>),
    /// By this one.
    Listed(Vec<Arc<Entry>>),
}

/// A device of a list that was announced.
#[derive(Clone, Copy)]
pub enum Before<'a> {
    /// By an earlier run.
    Stored(&'a StoredDevice),
    /// By this one.
    Listed(&'a Arc<Entry>),
}

impl Announced {
    /// Its devices.
    pub fn iter(&self) -> Box<dyn Iterator<Item = Before<'_>> + '_> {
        match self {
            Announced::Stored(devices) => Box::new(devices.iter().map(Before::Stored)),
            Announced::Listed(entries) => Box::new(entries.iter().map(Before::Listed)),
        }
    }
}

impl<'a> Before<'a> {
    /// Its place among other devices.
    pub fn key(self) -> Key<'a> {
        match self {
            Before::Stored(device) => device.key(),
            Before::Listed(entry) => key(entry),
        }
    }

    /// How it is shown to people.
    pub fn name(self) -> Cow<'a, str> {
        match self {
            Before::Stored(device) => (&*device.name).into(),
            Before::Listed(entry) => entry.shown(),
        }
    }

    /// Whether it had a target.
    pub fn was_listed(self) -> bool {
        match self {
            Before::Stored(_) => true,
            Before::Listed(entry) => !entry.targets().is_empty(),
        }
    }

    /// Whether the target groups of the device are the same, or the reason why it has none.
    pub fn equals(self, entry: &Arc<Entry>) -> bool {
        match self {
            Before::Stored(device) => {
                !entry.targets().is_empty() && device.groups == fingerprint(&target_groups::of(entry))
            }
            Before::Listed(old) => {
                let are_alike = || old.left_out == entry.left_out && target_groups::of(old) == target_groups::of(entry);
                Arc::ptr_eq(old, entry) || are_alike()
            }
        }
    }
}

/// By ascending id. Devices without an id come first, by name.
pub fn key(entry: &Entry) -> Key<'_> {
    let id = entry.id();
    (id, if id.is_none() { entry.shown() } else { "".into() })
}

//! The devices that the log has announced, and whether a device is still as it was then.

use std::borrow::Cow;
use std::sync::Arc;

use super::entry::{Entry, fingerprint};
use super::stored::{Key, StoredDevice};
use super::target_groups;

/// A device of a list that was announced.
pub enum Announced {
    /// By an earlier run.
    Stored(Box<StoredDevice>),
    /// By this one.
    Listed(Arc<Entry>),
}

impl Announced {
    /// Its place among other devices.
    pub fn key(&self) -> Key<'_> {
        match self {
            Announced::Stored(device) => device.key(),
            Announced::Listed(entry) => key(entry),
        }
    }

    /// How it is shown to people.
    pub fn name(&self) -> Cow<'_, str> {
        match self {
            Announced::Stored(device) => (&*device.name).into(),
            Announced::Listed(entry) => entry.shown(),
        }
    }

    /// Whether it had a target.
    pub fn was_listed(&self) -> bool {
        match self {
            Announced::Stored(_) => true,
            Announced::Listed(entry) => !entry.targets().is_empty(),
        }
    }

    /// Whether the target groups of the device are the same, or the reason why it has none.
    pub fn equals(&self, entry: &Arc<Entry>) -> bool {
        match self {
            Announced::Stored(device) => {
                !entry.targets().is_empty() && device.groups == fingerprint(&target_groups::of(entry))
            }
            Announced::Listed(old) => {
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

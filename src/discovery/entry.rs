//! What is kept of a device and of a page of devices.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, LazyLock};

use twox_hash::XxHash3_64;

use super::left_out::{LeftOut, LeftOutReason};
use super::services::Declared;
use super::steering::Origin;
use crate::balena::device::Device;

/// A device: its target groups, or why it has none.
#[derive(Debug, Default)]
pub struct Entry {
    /// Its id, or 0 if it has none.
    pub id: u64,
    /// How it is shown to people.
    pub name: Box<str>,
    /// How many target groups it has.
    pub targets: usize,
    /// Its target groups, one a line, with `,\n` between them.
    pub text: Box<[u8]>,
    /// Why it has none.
    pub left_out: Option<Box<LeftOut>>,
    /// Fingerprint of the API's record that all of this was made from; 0 if it must be made again. For a device of the target
    /// file, whose text is not kept, the fingerprint of its text.
    pub record: u64,
    /// Its fleet.
    pub fleet: Option<Arc<Fleet>>,
    /// The labels of its `balena_device_info` that it has for itself, `uuid="…"` first; empty unless they are kept and the device
    /// has an id and a uuid.
    pub info: Box<str>,
    /// The others, which many devices have in common.
    pub common_info: Option<Arc<str>>,
    /// Whether balenaCloud sees it online, if that is asked for.
    pub online: Option<bool>,
    /// Where its exporters come from.
    pub origin: Origin,
    /// Id of the release that it runs, or 0.
    pub release: u64,
    /// What the release that it runs declares; none without a release, or where labels of services are not read.
    pub declared: Option<Arc<Declared>>,
}

impl Entry {
    /// Its uuid, if its information is kept.
    pub fn uuid(&self) -> Option<&str> {
        self.uuid_label()?.strip_prefix("uuid=\"")?.strip_suffix('"')
    }

    /// `uuid="…"`, the label that joins its series.
    pub fn uuid_label(&self) -> Option<&str> {
        self.info.split(',').next().filter(|label| !label.is_empty())
    }
}

/// A fleet with devices.
#[derive(Debug, PartialEq, Eq)]
pub struct Fleet {
    /// Database id.
    pub id: Option<u64>,
    /// Its name.
    pub name: String,
    /// `organization/name`.
    pub slug: String,
}

/// The devices of a page of the API.
#[derive(Debug, Default)]
pub struct Page {
    /// By ascending id. A device without an id keeps its place in the API's answer.
    pub entries: Vec<Arc<Entry>>,
    /// How many targets they have.
    pub targets: usize,
    /// How many devices are left out, by reason.
    pub left_out: BTreeMap<LeftOutReason, usize>,
    /// Problems with devices that are listed all the same.
    pub warnings: Vec<String>,
}

impl Page {
    /// The device's fleet, shared with its neighbours of the same fleet.
    pub fn fleet(&self, device: &Device) -> Option<Arc<Fleet>> {
        let fleet = device.fleet.as_ref()?;
        let id = fleet.id;
        let name = fleet.app_name.as_deref().unwrap_or_default();
        let slug = fleet.slug.as_deref().unwrap_or_default();
        let mut known = self.entries.iter().rev().filter_map(|entry| entry.fleet.as_ref());
        let same = known.find(|known| known.id == id && known.name == name && known.slug == slug);
        Some(same.cloned().unwrap_or_else(|| Fleet { id, name: name.into(), slug: slug.into() }.into()))
    }

    /// These labels, shared with its neighbours that have the same.
    pub fn common_info(&self, info: &str) -> Arc<str> {
        let mut known = self.entries.iter().rev().filter_map(|entry| entry.common_info.as_ref());
        known.find(|known| ***known == *info).cloned().unwrap_or_else(|| info.into())
    }
}

/// Equal texts have equal fingerprints within one run of the program. The seed is random, so that a device cannot choose the fingerprint
/// of its record.
pub fn fingerprint(text: &[u8]) -> u64 {
    static SEED: LazyLock<u64> = LazyLock::new(|| RandomState::new().hash_one(()));
    XxHash3_64::oneshot_with_seed(*SEED, text)
}

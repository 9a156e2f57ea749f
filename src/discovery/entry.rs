//! What is kept of a device and of a page of devices: data, of which renderers make text where it is needed.

use std::borrow::Cow;
use std::collections::HashSet;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::num::NonZeroU64;
use std::sync::{Arc, LazyLock};

use twox_hash::XxHash3_64;

use super::device_exporters::Origin;
use super::exporter::Exporter;
use super::left_out::LeftOut;
use super::muting::QuietTimes;
use super::service_labels::Declared;
use super::tags::{QUIET, Tags};
use crate::balena::device::up_to;
use crate::balena::{Device, display_name};

/// The most characters of a name that are kept. A name of more than 512 bytes becomes no label, and 255 characters of it are
/// shown.
const MAX_NAME_LENGTH: usize = 513;

/// A device as it was mapped: its targets, or why it has none.
#[derive(Clone, Debug)]
pub struct Entry {
    id: Option<NonZeroU64>,
    /// The uuid and then the name. Without a uuid, how the device is shown to people.
    text: Box<str>,
    uuid_size: u8,
    /// The LAN addresses that it reports, where devices are reached by these: first that of its targets, if it has some.
    pub addresses: Box<[IpAddr]>,
    pub left_out: Option<Box<LeftOut>>,
    /// Labels that come from its own tags, as members of a JSON object with a comma before each.
    pub tag_labels: Box<str>,
    pub common: Arc<Common>,
    /// Whether balenaCloud sees it online, if that is asked for.
    pub online: Option<bool>,
    /// Fingerprint of the API's record that all of this was made from; none if it must be made again.
    pub record: Option<NonZeroU64>,
}

impl Entry {
    /// A device that is reached by its uuid, if it is reached.
    pub fn new(device: &Device, common: Arc<Common>) -> Self {
        let id = device.id.and_then(NonZeroU64::new);
        let (text, uuid_size) = match device.uuid().filter(|_| id.is_some()) {
            Some(uuid) => {
                let name = device.device_name.as_deref().unwrap_or_default();
                (format!("{uuid}{}", up_to(MAX_NAME_LENGTH, name)), uuid.len())
            }
            None => (device.display_name(), 0),
        };
        Entry {
            id,
            text: text.into(),
            uuid_size: u8::try_from(uuid_size).unwrap_or_default(), // a uuid has at most 62 digits
            addresses: Box::default(),
            left_out: None,
            tag_labels: "".into(),
            common,
            online: device.is_connected_to_vpn,
            record: None,
        }
    }

    /// Its id in balena's database.
    pub fn id(&self) -> Option<u64> {
        self.id.map(NonZeroU64::get)
    }

    /// Its uuid. A device has one here if it has an id as well: by both it is told apart.
    pub fn uuid(&self) -> Option<&str> {
        Some(&self.text[..usize::from(self.uuid_size)]).filter(|uuid| !uuid.is_empty())
    }

    /// Its name in balenaCloud; may be empty. A device without a uuid has none here.
    pub fn device_name(&self) -> &str {
        if self.uuid_size == 0 { "" } else { &self.text[usize::from(self.uuid_size)..] }
    }

    /// How it is shown to people: `gw-0001 (cea099a)`.
    pub fn shown(&self) -> Cow<'_, str> {
        match self.uuid() {
            Some(uuid) => display_name(Some(self.device_name()), Some(uuid), self.id()).into(),
            None => (&*self.text).into(),
        }
    }

    /// Its targets; none if it is left out.
    pub fn targets(&self) -> &[DeviceTarget] {
        if self.left_out.is_some() { &[] } else { &self.common.targets }
    }

    pub fn host(&self) -> Cow<'_, str> {
        match self.addresses.first() {
            Some(IpAddr::V6(address)) => format!("[{address}]").into(),
            Some(IpAddr::V4(address)) => address.to_string().into(),
            None => format!("{}{}", self.uuid().unwrap_or_default(), self.common.host_suffix).into(),
        }
    }
}

/// A target of a device, but for its host.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct DeviceTarget {
    /// With the port and the scheme by which it is reached.
    pub exporter: Exporter,
    /// The labels that only this target of the device has, as members of a JSON object with a comma before each.
    pub labels: Box<str>,
}

/// What many devices have in common: it is kept once.
#[derive(Debug, Default, PartialEq, Eq, Hash)]
pub struct Common {
    /// The fleet; a device may have none.
    pub fleet: Option<ListedFleet>,
    pub release: Option<u64>,
    /// What that release declares; none without a release, or where labels of services are not read.
    pub declared: Option<Arc<Declared>>,
    pub origin: Origin,
    pub targets: Vec<DeviceTarget>,
    /// What makes a host of a uuid: `.balena`.
    pub host_suffix: Box<str>,
    /// Whether the name of the device stays on every series.
    pub has_name_label: bool,
    /// Labels of the targets as members of a JSON object, with a comma before each: those before the id of the device, those
    /// after it, and those that come from tags of the fleet.
    pub labels: [Box<str>; 3],
    /// Labels of `balena_device_info` in the text format 0.0.4, with a comma before each.
    pub info: Box<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ListedFleet {
    pub id: Option<u64>,
    pub name: String,
    pub slug: String,
    pub quiet: QuietTimes,
}

impl ListedFleet {
    /// The fleet of a device. Warns of a tag that cannot be read.
    pub fn of(tags: &mut Tags) -> Option<Self> {
        let fleet = tags.device.fleet.as_ref()?;
        let name = fleet.app_name.as_deref().unwrap_or_default().to_owned();
        let slug = fleet.slug.as_deref().unwrap_or_default().to_owned();
        let quiet = tags.of(false, QUIET, &QuietTimes::parse).unwrap_or_default();
        Some(ListedFleet { id: fleet.id, name, slug, quiet })
    }
}

/// The values that devices have in common, of all pages, each once.
#[derive(Default)]
pub struct Commons(HashSet<Arc<Common>>);

impl Commons {
    /// The kept value that equals this one.
    pub fn share(&mut self, common: Common) -> Arc<Common> {
        if let Some(known) = self.0.get(&common) {
            return known.clone();
        }
        let common = Arc::new(common);
        self.0.insert(common.clone());
        common
    }

    /// Forgets the values that no device has any more.
    pub fn tidy(&mut self) {
        self.0.retain(|common| Arc::strong_count(common) > 1);
    }
}

/// The devices of a page of the API.
#[derive(Debug, Default)]
pub struct DevicePage {
    /// By ascending id. A device without an id keeps its place in the API's answer.
    pub entries: Vec<Arc<Entry>>,
    /// Problems with devices that are listed all the same.
    pub warnings: Vec<String>,
}

/// Equal texts have equal fingerprints within one run of the program. The seed is random, so that a device cannot choose the
/// fingerprint of its record.
pub fn fingerprint(text: &[u8]) -> u64 {
    static SEED: LazyLock<u64> = LazyLock::new(|| RandomState::new().hash_one(()));
    XxHash3_64::oneshot_with_seed(*SEED, text)
}

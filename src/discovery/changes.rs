//! What the log announces: the list, each device whose state changed, and each problem, once.

use std::collections::BTreeSet;
use std::fmt::{self, Display, Formatter};
use std::iter;
use std::sync::Arc;
use std::time::{Duration, Instant};

use log::Level;

use super::device_exporters::Origin;
use super::earlier_list::{Key, StoredDevice};
use super::entry::{Entry, fingerprint};
use super::inventory::Inventory;
use super::left_out::{LeftOut, LeftOutReason};
use super::sink::Published;
use super::target_groups;
use crate::balena::FleetRef;
use crate::text::count;

/// Lines of each kind that a refresh adds to the log; the rest is at debug.
const MAX_LINES: usize = 20;

const NO_EXPORTER: &str = "devices without an exporter are left out: declare it with the label prometheus.io.port of a service \
    in the fleet's docker-compose.yml, or set --exporter, such as EXPORTERS=node:80 for devices that run \
    the example of version 0.1";
/// How often the warning is repeated that a list without targets is held back.
const REPEAT_INTERVAL: Duration = Duration::from_secs(3600);

/// What was announced already.
pub struct Changes {
    fleets: Vec<FleetRef>,
    /// The devices of the list that is published, as they were announced, in order.
    devices: Option<Vec<Announced>>,
    /// The version of the list that was announced last.
    version: Option<u64>,
    warnings: BTreeSet<String>,
    /// While a list is held back: when the warning was written last.
    held_back: Option<Instant>,
}

impl Changes {
    /// Nothing was announced yet.
    pub fn new(fleets: Vec<FleetRef>) -> Self {
        Changes { fleets, devices: None, version: None, warnings: BTreeSet::new(), held_back: None }
    }

    /// The first time, takes the devices of the published list as announced.
    pub fn begin(&mut self, published: impl FnOnce() -> Vec<StoredDevice>) {
        if self.devices.is_none() {
            let mut published = published();
            published.sort_by(|one, other| one.key().cmp(&other.key()));
            self.devices = Some(published.into_iter().map(|device| Announced::Stored(device.into())).collect());
        }
    }

    /// Whether the list of an earlier run has targets that labels of services declare.
    pub fn is_from_services(&self) -> bool {
        let is_one = |device: &Announced| matches!(device, Announced::Stored(stored) if stored.has_service);
        self.devices.iter().flatten().any(is_one)
    }

    /// Announces what is new in a list that was published, or that a list is held back.
    pub fn announce(&mut self, list: &Inventory, published: Published, name: &str, now: Instant) {
        if published == Published::HeldBack {
            self.hold_back(list, name, now);
            return;
        }
        let was_held_back = self.held_back.take().is_some();
        if self.version == Some(list.version()) && published == Published::Unchanged && !was_held_back {
            log::debug!("{name} is unchanged");
            return;
        }
        let before = self.devices.take().unwrap_or_default();
        let mut listed: Vec<_> = list.entries().cloned().collect();
        listed.sort_by(|one, other| key(one).cmp(&key(other)));
        let changes = changes(&before, &listed);
        let added = changes.iter().filter(|change| matches!(change, Change::Added(_))).count();
        let altered = changes.iter().filter(|change| matches!(change, Change::Changed(_))).count();
        let removed = changes.iter().filter(|change| change.removes_targets()).count();
        let left_out = listed.iter().filter(|entry| entry.targets().is_empty()).count();
        let summary = format!(
            "{} on {} (devices: +{added} -{removed} ~{altered}), {} left out",
            count(listed.iter().map(|entry| entry.targets().len()).sum(), "target"),
            count(listed.len() - left_out, "device"),
            count(left_out, "device")
        );
        match published {
            Published::Written => log::info!("updated {name}: {summary}"),
            _ if self.version.is_none() || was_held_back || !changes.is_empty() => {
                log::info!("{name} is up to date: {summary}");
            }
            _ => log::debug!("{name} is up to date: {summary}"),
        }
        write_lines(Level::Info, &changes);
        self.devices = Some(listed.into_iter().map(Announced::Listed).collect());
        self.warn(list);
    }

    /// Warns that the published list stays. Devices that are gone or left out are not announced before it changes.
    fn hold_back(&mut self, list: &Inventory, name: &str, now: Instant) {
        if self.held_back.is_none_or(|last| now.saturating_duration_since(last) >= REPEAT_INTERVAL) {
            log::warn!(
                "{name} keeps its targets, since there would be none left: {}; if that is right, set --write-empty \
                 (WRITE_EMPTY=true)",
                why_empty(list, &self.fleets)
            );
            self.held_back = Some(now);
        }
        if self.version != Some(list.version()) {
            self.warn(list);
        }
    }

    /// Writes the warnings that were not there before.
    fn warn(&mut self, list: &Inventory) {
        let warnings = warnings(list, &self.fleets);
        let new: Vec<_> = warnings.difference(&self.warnings).collect();
        write_lines(Level::Warn, &new);
        self.warnings = warnings;
        self.version = Some(list.version());
    }
}

fn why_empty(list: &Inventory, fleets: &[FleetRef]) -> String {
    let reasons = list.left_out();
    if reasons.is_empty() {
        let renamed = if fleets.is_empty() { "" } else { " (was a fleet renamed? Its id survives that)" };
        return format!("the API lists no device{renamed}");
    }
    let shown: Vec<_> = reasons.iter().map(|(reason, number)| format!("{reason}: {number}")).collect();
    format!("{} left out ({})", count(reasons.values().sum(), "device"), shown.join(", "))
}

/// A device of a list that was announced.
enum Announced {
    /// By an earlier run.
    Stored(Box<StoredDevice>),
    /// By this one.
    Listed(Arc<Entry>),
}

impl Announced {
    fn key(&self) -> Key<'_> {
        match self {
            Announced::Stored(device) => device.key(),
            Announced::Listed(entry) => key(entry),
        }
    }

    fn was_listed(&self) -> bool {
        match self {
            Announced::Stored(_) => true,
            Announced::Listed(entry) => !entry.targets().is_empty(),
        }
    }

    /// Whether the target groups of the device are the same, or the reason why it has none.
    fn equals(&self, entry: &Arc<Entry>) -> bool {
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

/// The place of a device among others: by ascending id. Devices without an id come first, by name.
fn key(entry: &Entry) -> Key<'_> {
    let id = entry.id();
    (id, if id.is_none() { entry.shown() } else { "".into() })
}

/// What became of a device.
enum Change<'a> {
    Added(&'a Entry),
    Changed(&'a Entry),
    LeftOut { entry: &'a Entry, left_out: &'a LeftOut, was_listed: bool },
    Removed(&'a Announced),
}

impl Change<'_> {
    fn removes_targets(&self) -> bool {
        match self {
            Change::Added(_) | Change::Changed(_) => false,
            Change::LeftOut { was_listed, .. } => *was_listed,
            Change::Removed(device) => device.was_listed(),
        }
    }
}

impl Display for Change<'_> {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        match self {
            Change::Added(entry) => {
                write!(f, "added {}: {}", entry.shown(), count(entry.targets().len(), "target"))?;
                let origin = entry.common.origin;
                // The option is the same for every device.
                if origin == Origin::Option { Ok(()) } else { write!(f, ", {}", origin.as_str()) }
            }
            Change::Changed(entry) => write!(f, "changed {}", entry.shown()),
            Change::LeftOut { entry, left_out, .. } => write!(f, "left out {}: {left_out}", entry.shown()),
            Change::Removed(device) => {
                let name = match device {
                    Announced::Stored(device) => (&*device.name).into(),
                    Announced::Listed(entry) => entry.shown(),
                };
                write!(f, "removed {name}: the API does not list it any more")
            }
        }
    }
}

fn changes<'a>(before: &'a [Announced], now: &'a [Arc<Entry>]) -> Vec<Change<'a>> {
    let (mut changes, mut gone) = (Vec::new(), Vec::new());
    let mut before = before.iter().peekable();
    for entry in now {
        let key = key(entry);
        gone.extend(iter::from_fn(|| before.next_if(|old| old.key() < key)));
        let old = before.next_if(|old| old.key() == key);
        if old.is_some_and(|old| old.equals(entry)) {
            continue;
        }
        let was_listed = old.is_some_and(Announced::was_listed);
        changes.push(match &entry.left_out {
            Some(left_out) => Change::LeftOut { entry, left_out, was_listed },
            None if was_listed => Change::Changed(entry),
            None => Change::Added(entry),
        });
    }
    changes.extend(gone.into_iter().chain(before).map(Change::Removed));
    changes
}

/// Problems with listed devices, and with the fleets that were asked for.
pub fn warnings(list: &Inventory, fleets: &[FleetRef]) -> BTreeSet<String> {
    // A list without any device has a warning of its own, with what the key sees.
    let is_empty = list.entries().next().is_none();
    let fleets = fleets.iter().filter_map(|fleet| {
        let named: Vec<_> = list.fleets_named(fleet).into_iter().collect();
        match (fleet, &*named) {
            (_, []) if !is_empty => Some(format!(
                "fleet {fleet} was asked for, but the key sees no device in it: is the fleet spelled right, was it \
                 renamed (an id survives that), and may the key see it?"
            )),
            (FleetRef::Name(_), [_, _, ..]) => Some(format!(
                "fleet name {fleet} matches several fleets, and all of them are taken: {}",
                named.join(", ")
            )),
            _ => None,
        }
    });
    let no_exporter = list.left_out().contains_key(&LeftOutReason::NoExporter).then(|| NO_EXPORTER.to_owned());
    list.warnings().map(str::to_owned).chain(fleets).chain(no_exporter).collect()
}

/// Writes the first lines at this level and the rest at debug.
fn write_lines(level: Level, lines: &[impl Display]) {
    for (index, line) in lines.iter().enumerate() {
        log::log!(if index < MAX_LINES { level } else { Level::Debug }, "{line}");
    }
    if lines.len() > MAX_LINES {
        log::info!("and {} more such lines at log level debug", lines.len() - MAX_LINES);
    }
}

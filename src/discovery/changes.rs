//! What the log announces: the list, each device whose state changed, and each problem, once.

use std::collections::BTreeSet;
use std::fmt::{self, Display, Formatter};
use std::iter;
use std::sync::Arc;

use log::Level;

use super::Published;
use super::entry::{Entry, fingerprint};
use super::inventory::Inventory;
use super::steering::Origin;
use super::target::LeftOutReason;
use crate::balena::Client;
use crate::balena::client::Actor;
use crate::balena::selection::FleetRef;
use crate::logging::count;

/// Lines of each kind that a refresh adds to the log; the rest is at debug.
const MAX_LINES: usize = 20;

const NO_EXPORTER: &str = "devices without an exporter are left out: declare it with the label prometheus.io.port of a service \
    in the fleet's docker-compose.yml, or set --exporter (EXPORTERS=node:80 for the example of version 0.1)";

/// What was announced already.
pub struct Changes {
    /// The fleets that were asked for.
    fleets: Vec<FleetRef>,
    /// The devices as they were announced, in order.
    devices: Option<Vec<Arc<Entry>>>,
    /// The version of the list that was announced last.
    version: Option<u64>,
    warnings: BTreeSet<String>,
    refused: bool,
}

impl Changes {
    /// Nothing was announced yet.
    pub fn new(fleets: Vec<FleetRef>) -> Self {
        Changes { fleets, devices: None, version: None, warnings: BTreeSet::new(), refused: false }
    }

    /// The first time, takes the devices that were listed before as announced.
    pub fn begin(&mut self, published: impl FnOnce() -> Vec<Arc<Entry>>) {
        self.devices.get_or_insert_with(|| in_order(published()));
    }

    /// Announces what is new in a list that was published.
    pub fn announce(&mut self, list: &Inventory, published: Published, name: &str) {
        let before = self.devices.take().unwrap_or_default();
        if self.version == Some(list.version()) && published != Published::Written {
            log::debug!("{name} is unchanged");
            self.devices = Some(before);
            return;
        }
        let now = in_order(list.entries().cloned().collect());
        // The first refresh has a line for each device. Lines that nobody sees are not kept.
        let most = if log::log_enabled!(Level::Debug) { usize::MAX } else { MAX_LINES };
        let (mut lines, mut number) = (Vec::new(), 0);
        let [added, removed, changed] = changes(&before, &now, |change| {
            number += 1;
            if lines.len() < most {
                lines.push(change);
            }
        });
        let left_out = now.iter().filter(|entry| entry.targets == 0).count();
        let summary = format!(
            "{} of {} (+{added} -{removed} ~{changed}), {} left out",
            count(now.iter().map(|entry| entry.targets).sum(), "target"),
            count(now.len() - left_out, "device"),
            count(left_out, "device")
        );
        match published {
            Published::Written => log::info!("updated {name}: {summary}"),
            Published::Unchanged if self.version.is_none() || !lines.is_empty() => {
                log::info!("{name} is up to date: {summary}");
            }
            Published::Unchanged => log::debug!("{name} is up to date: {summary}"),
            Published::Refused if self.refused => {}
            Published::Refused => log::warn!(
                "{name} keeps its targets, since there would be none left: {} left out, the rest gone; if that is \
                 right, set --write-empty (WRITE_EMPTY=true)",
                count(left_out, "device")
            ),
        }
        write_lines(Level::Info, &lines, number);
        let warnings = warnings(list, &self.fleets);
        let new: Vec<_> = warnings.difference(&self.warnings).collect();
        write_lines(Level::Warn, &new, new.len());
        (self.devices, self.warnings) = (Some(now), warnings);
        (self.version, self.refused) = (Some(list.version()), published == Published::Refused);
    }
}

/// By ascending id. Devices without an id are ordered by name.
fn key(entry: &Entry) -> (u64, Option<&str>) {
    (entry.id, (entry.id == 0).then_some(&entry.name))
}

fn in_order(mut entries: Vec<Arc<Entry>>) -> Vec<Arc<Entry>> {
    entries.sort_by(|one, other| key(one).cmp(&key(other)));
    entries
}

/// What became of a device.
enum Change<'a> {
    Added(&'a Entry),
    Changed(&'a Entry),
    LeftOut(&'a Entry),
    Removed(&'a Entry),
}

impl Display for Change<'_> {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        match self {
            Change::Added(entry) => {
                write!(f, "added {}: {}", entry.name, count(entry.targets, "target"))?;
                // The option is the same for every device.
                if entry.origin == Origin::Option { Ok(()) } else { write!(f, ", {}", entry.origin.as_str()) }
            }
            Change::Changed(entry) => write!(f, "changed {}", entry.name),
            Change::LeftOut(entry) => {
                let Some(why) = &entry.left_out else { return write!(f, "left out {}", entry.name) };
                write!(f, "left out {}: {why}", entry.name)
            }
            Change::Removed(entry) => write!(f, "removed {}: the API does not list it any more", entry.name),
        }
    }
}

/// How many devices were added, removed and changed. `note` gets each change.
fn changes<'a>(before: &'a [Arc<Entry>], now: &'a [Arc<Entry>], mut note: impl FnMut(Change<'a>)) -> [usize; 3] {
    let ([mut added, mut removed, mut changed], mut gone) = ([0; 3], Vec::new());
    let mut before = before.iter().peekable();
    for entry in now {
        gone.extend(iter::from_fn(|| before.next_if(|old| key(old) < key(entry))));
        let old = before.next_if(|old| key(old) == key(entry));
        let is_same = |old: &Arc<Entry>| {
            let has_text = || old.text == entry.text || old.record == fingerprint(&entry.text);
            let is_alike = || (old.targets, &old.left_out) == (entry.targets, &entry.left_out);
            Arc::ptr_eq(old, entry) || is_alike() && has_text()
        };
        if old.is_some_and(is_same) {
            continue;
        }
        let was_listed = old.is_some_and(|old| old.targets > 0);
        note(if entry.left_out.is_some() {
            removed += usize::from(was_listed);
            Change::LeftOut(entry)
        } else if was_listed {
            changed += 1;
            Change::Changed(entry)
        } else {
            added += 1;
            Change::Added(entry)
        });
    }
    for gone in gone.into_iter().chain(before) {
        removed += usize::from(gone.targets > 0);
        note(Change::Removed(gone));
    }
    [added, removed, changed]
}

/// Problems with devices that are listed all the same, and with the fleets that were asked for.
pub fn warnings(list: &Inventory, fleets: &[FleetRef]) -> BTreeSet<String> {
    let fleets = fleets.iter().filter_map(|fleet| {
        let named: Vec<_> = list.fleets_named(fleet).into_iter().collect();
        match (fleet, &*named) {
            (_, []) => Some(format!(
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
    let has_none =
        |entry: &Arc<Entry>| entry.left_out.as_ref().is_some_and(|why| why.reason == LeftOutReason::NoExporter);
    let no_exporter = list.entries().any(has_none).then(|| NO_EXPORTER.to_owned());
    list.warnings().map(str::to_owned).chain(fleets).chain(no_exporter).collect()
}

/// Writes the first of so many lines at this level, the rest at debug.
fn write_lines(level: Level, lines: &[impl Display], number: usize) {
    for (index, line) in lines.iter().enumerate() {
        log::log!(if index < MAX_LINES { level } else { Level::Debug }, "{line}");
    }
    if number > MAX_LINES {
        log::info!("and {} more such lines at log level debug", number - MAX_LINES);
    }
}

/// Warns about a key that shows one device or none. The API itself answers it without an error.
pub fn warn_about_key(client: &Client) {
    const INSTEAD: &str =
        "create a named API key (balenaCloud's dashboard, Preferences, Access tokens) and set API_KEY to it";
    match client.whoami() {
        Ok(Actor::Device) => {
            log::warn!("the API key is a device's own and shows that one device only, or none: {INSTEAD}");
        }
        Ok(Actor::Application) => {
            log::warn!("the API key is a provisioning key, which cannot read devices: {INSTEAD}");
        }
        Ok(Actor::User | Actor::Unknown) => {}
        Err(failure) => log::debug!("cannot find out whose key this is: {failure}"),
    }
}

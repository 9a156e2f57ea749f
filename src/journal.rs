//! What the log announces, once: what became of the list, of each device whose state changed, and what is amiss.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use log::Level;

use crate::inventory::{Entry, Inventory};
use crate::outcome::Published;
use crate::query::FleetRef;

/// Lines of each kind that a refresh may add to the log; the rest is at debug.
const MOST_LINES: usize = 20;

/// What was told already.
pub struct Journal {
    /// The fleets that were asked for.
    fleets: Vec<FleetRef>,
    /// The devices as they were told of.
    devices: Option<Devices>,
    /// The version of the list that was told of last.
    told: Option<u64>,
    warnings: BTreeSet<String>,
    refused: bool,
}

/// Devices by rising id; those without one of their own by name, and those of one name by number.
type Devices = BTreeMap<(u64, Option<Arc<str>>, usize), Entry>;

impl Journal {
    /// Nothing was told yet.
    pub fn new(fleets: Vec<FleetRef>) -> Self {
        Journal { fleets, devices: None, told: None, warnings: BTreeSet::new(), refused: false }
    }

    /// Takes note, the first time, of the devices that were listed before.
    pub fn begin(&mut self, held: impl FnOnce() -> Vec<Entry>) {
        self.devices.get_or_insert_with(|| keyed(held()));
    }

    /// Tells what is new of a list that was published.
    pub fn tell(&mut self, list: &Inventory, published: Published, name: &str) {
        let before = self.devices.take().unwrap_or_default();
        if self.told == Some(list.version) && published != Published::Written {
            log::debug!("{name} is unchanged");
            self.devices = Some(before);
            return;
        }
        let now = keyed(list.entries().cloned());
        let ([added, removed, changed], lines) = changes(&before, &now);
        let left_out = now.values().filter(|entry| entry.targets == 0).count();
        let summary = format!(
            "{} of {} (+{added} -{removed} ~{changed}), {} left out",
            count(now.values().map(|entry| entry.targets).sum(), "target"),
            count(now.len() - left_out, "device"),
            count(left_out, "device")
        );
        match published {
            Published::Written => log::info!("updated {name}: {summary}"),
            Published::Unchanged if self.told.is_none() || !lines.is_empty() => {
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
        tell(Level::Info, &lines);
        let warnings = warnings(list, &self.fleets);
        tell(Level::Warn, &warnings.difference(&self.warnings).collect::<Vec<_>>());
        (self.devices, self.warnings) = (Some(now), warnings);
        (self.told, self.refused) = (Some(list.version), published == Published::Refused);
    }
}

fn keyed(entries: impl IntoIterator<Item = Entry>) -> Devices {
    let mut devices = Devices::new();
    for entry in entries {
        let (id, name) = (entry.id, (entry.id == 0).then(|| entry.name.clone()));
        let last = devices.range(..=(id, name.clone(), usize::MAX)).next_back();
        let same = last.filter(|((other, named, _), _)| (other, named) == (&id, &name));
        let number = same.map_or(0, |((.., number), _)| number + 1);
        devices.insert((id, name, number), entry);
    }
    devices
}

/// How many devices were added, removed and changed, and a line for each whose state did.
fn changes(before: &Devices, now: &Devices) -> ([usize; 3], Vec<String>) {
    let ([mut added, mut removed, mut changed], mut lines) = ([0; 3], Vec::new());
    for (key, entry) in now {
        let old = before.get(key);
        let state = |entry: &Entry| (entry.targets, entry.print, entry.left_out.clone());
        if old.is_some_and(|old| state(old) == state(entry)) {
            continue;
        }
        let was_listed = old.is_some_and(|old| old.targets > 0);
        lines.push(if let Some(left_out) = &entry.left_out {
            removed += usize::from(was_listed);
            format!("left out {}: {}", entry.name, left_out.why)
        } else if was_listed {
            changed += 1;
            format!("changed {}", entry.name)
        } else {
            added += 1;
            format!("added {}: {}", entry.name, count(entry.targets, "target"))
        });
    }
    for (_, gone) in before.iter().filter(|(key, _)| !now.contains_key(key)) {
        removed += usize::from(gone.targets > 0);
        lines.push(format!("removed {}: the API does not list it any more", gone.name));
    }
    ([added, removed, changed], lines)
}

/// What is amiss with devices that are listed all the same, and with the fleets that were asked for.
pub fn warnings(list: &Inventory, fleets: &[FleetRef]) -> BTreeSet<String> {
    let fleets = fleets.iter().filter_map(|fleet| {
        let named: Vec<_> = list.fleets_named(fleet).into_iter().collect();
        match (fleet, &*named) {
            (_, []) => Some(format!(
                "fleet {fleet} was asked for, but the key sees no such device in it: is the fleet spelled right (slugs \
                 are case-sensitive), and may the key see it?"
            )),
            (FleetRef::Name(_), [_, _, ..]) => Some(format!(
                "fleet name {fleet} is that of several fleets, all of which are taken: {}",
                named.join(", ")
            )),
            _ => None,
        }
    });
    list.warnings().map(str::to_owned).chain(fleets).collect()
}

/// The first lines at this level, the rest at debug.
fn tell(level: Level, lines: &[impl std::fmt::Display]) {
    for (index, line) in lines.iter().enumerate() {
        log::log!(if index < MOST_LINES { level } else { Level::Debug }, "{line}");
    }
    if lines.len() > MOST_LINES {
        log::info!("and {} more such lines at log level debug", lines.len() - MOST_LINES);
    }
}

/// `1 device`, `2 devices`.
pub fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}
